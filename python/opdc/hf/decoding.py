"""How `generate` was asked to draw and to stop, in the words of a sampler."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

# These remember what they were shown last, but drafts are shown again and again.
_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)

_TRUNCATING = (
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)


@dataclass
class Decoding:
    """What the processors of a call to `generate` are to a blend.

    The temperature is that of both models; what truncates acts on `μ`; the rest are constraints on
    the student's scores, so that what they forbid has no mass in `μ` either.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    # Lists of processors; their annotations ask for LongTensor and FloatTensor.
    processors: Any = field(default_factory=LogitsProcessorList)
    warpers: Any = field(default_factory=LogitsProcessorList)
    greedy: bool = False

    @property
    def unfit_for_drafts(self) -> str:
        """The names of those that cannot serve a block of drafts."""
        stateful = [one for one in self.processors if isinstance(one, _STATEFUL)]
        return ", ".join(type(one).__name__ for one in [*self.warpers, *stateful])

    @classmethod
    def of(cls, processors: LogitsProcessorList, do_sample: bool) -> Decoding:
        decoding = cls(greedy=not do_sample, top_k=None if do_sample else 1)
        for processor in processors:
            if isinstance(processor, TemperatureLogitsWarper):
                decoding.temperature *= processor.temperature
            elif isinstance(processor, _TRUNCATING):
                decoding.warpers.append(processor)
            else:
                decoding.processors.append(processor)
        if do_sample and _is_top_k_then_top_p(decoding.warpers):  # what the kernels do themselves
            for warper in decoding.warpers:
                if isinstance(warper, TopKLogitsWarper):
                    decoding.top_k = warper.top_k
                else:
                    # 0, which transformers allow, keeps one id: as any part of its mass does.
                    decoding.top_p = max(warper.top_p, sys.float_info.min)
            decoding.warpers = LogitsProcessorList()
        return decoding


def _is_top_k_then_top_p(warpers: list[Any]) -> bool:
    return [type(warper) for warper in warpers] in (
        [],
        [TopKLogitsWarper],
        [TopPLogitsWarper],
        [TopKLogitsWarper, TopPLogitsWarper],
    ) and all(
        warper.filter_value == -torch.inf and warper.min_tokens_to_keep == 1 for warper in warpers
    )


@dataclass
class Stopping:
    """When a response ends: its own tokens, its length, and whatever else the caller looks at."""

    stop_ids: Tensor | None
    max_length: int  # of prompt and response
    criteria: Any  # a list of them, annotated likewise

    @classmethod
    def of(cls, criteria: StoppingCriteriaList, max_length: int, device: torch.device) -> Stopping:
        stop_ids = []
        others = StoppingCriteriaList()
        given = [one.max_length for one in criteria if isinstance(one, MaxLengthCriteria)]
        for one in criteria:
            if isinstance(one, EosTokenCriteria):
                stop_ids.append(one.eos_token_id.to(device).reshape(-1))
            elif not isinstance(one, MaxLengthCriteria):
                others.append(one)
        return cls(torch.cat(stop_ids) if stop_ids else None, min(given or [max_length]), others)

    def room(self, prompt: int) -> int:
        """The tokens of a response. One even where a caller's criterion allows none: criteria are
        asked after a token."""
        return max(1, self.max_length - prompt)

    def is_stop(self, tokens: Tensor) -> Tensor:
        if self.stop_ids is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return (tokens.unsqueeze(-1) == self.stop_ids).any(-1)
