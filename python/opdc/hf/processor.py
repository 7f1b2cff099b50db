"""Blending for code that takes nothing but a logits processor."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

import opdc

from .transcript import Reader, Transcript, evaluating, vocabulary_size


class BlendLogitsProcessor(LogitsProcessor):
    """Turns the student's scores into `log μ`, the trust-region behaviour policy of `opdc.blend`.

    The fallback where `custom_generate` cannot be given; `BlendSampler` also records what a loss
    needs. One object for one call of `generate`: it holds the teacher's cache. Sample with
    `temperature=1.0, top_k=0, top_p=1.0`: the temperature belongs here, and what truncates would
    cut `μ`. A processor of one's own runs after the built-in constraints and before temperature,
    top-k and top-p. Not with assisted generation, `generate_batch` or a sharded teacher.

    Args:
        teacher_model: a causal language model that decodes with a `DynamicCache`.
        attention_mask: `(B, P)`, of the prompts, padded on the left; None: no padding. With
            `num_return_sequences` that of the prompts is enough.
        epsilon: the budget in nats, at least 0.
        temperature: of both models.
        eos_map, valid_vocab: as in `opdc.blend`.

    Raises:
        ValueError: where `opdc.blend` does, and for sequences that do not continue those of the
            call before.

    >>> import opdc.hf, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> student, teacher = (LlamaForCausalLM(config).eval() for _ in range(2))
    >>> blend = opdc.hf.BlendLogitsProcessor(teacher, attention_mask=None, epsilon=0.02)
    >>> sequences = student.generate(
    ...     torch.tensor([[1, 5, 9]]), do_sample=True, top_k=0, max_new_tokens=4,
    ...     eos_token_id=None, logits_processor=[blend])
    >>> sequences.shape
    torch.Size([1, 7])
    """

    def __init__(
        self,
        teacher_model: Any,
        attention_mask: Tensor | None,
        epsilon: float,
        *,
        temperature: float = 1.0,
        eos_map: tuple[int, int] | None = None,
        valid_vocab: int | None = None,
    ) -> None:
        if not epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, got {epsilon}")
        self.epsilon = epsilon
        self._common: dict[str, Any] = {
            "temperature": temperature,
            "valid_vocab": valid_vocab,
            "eos_map": eos_map,
        }
        self._teacher = Reader(teacher_model, "teacher", needs_cache=True)
        self._attention_mask = attention_mask
        self._read: Tensor | None = None
        self._transcript: Transcript | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        transcript = self._continued(input_ids)
        model = self._teacher.model
        with evaluating(model) if model.training else contextlib.nullcontext():
            teacher = self._teacher.logits(transcript, 1)[:, 0]
        return opdc.blend(scores, teacher, self.epsilon, **self._common).logprobs

    def _continued(self, input_ids: Tensor) -> Transcript:
        """The transcript with what is new; finished rows go on with padding, which nobody reads."""
        if self._transcript is None or self._read is None:
            mask = self._attention_mask
            if mask is not None:
                rows, prompts = input_ids.shape[0], mask.shape[0]
                if prompts == 0 or rows % prompts or mask.shape[1] != input_ids.shape[1]:
                    raise ValueError(
                        f"attention_mask has the shape {tuple(mask.shape)}, the prompts "
                        f"{tuple(input_ids.shape)}"
                    )
                mask = mask.repeat_interleave(rows // prompts, dim=0)
            self._transcript = Transcript(input_ids, mask, room=64)
        else:
            known = self._read.shape[1]
            if input_ids.shape[1] <= known or not torch.equal(input_ids[:, :known], self._read):
                raise ValueError(
                    "the sequences do not continue those of the call before: one "
                    "BlendLogitsProcessor serves one call of generate, without beams or drafts"
                )
            # The padding of a finished row may be an id that the teacher lacks.
            size = vocabulary_size(self._teacher.model)
            new = input_ids if size is None else input_ids.clamp(max=size - 1)
            for ids in new[:, known:].unbind(1):
                self._transcript.append(ids, self._transcript.last_position + 1)
        self._read = input_ids
        return self._transcript
