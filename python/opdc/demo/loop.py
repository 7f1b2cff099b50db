"""On-policy distillation with Hugging Face models: the loop to copy into your own code.

B prompts of P tokens (padded on the left) give B responses of C tokens; V is the vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import opdc


@dataclass(frozen=True)
class Rollout:
    """Prompts and the responses that a model gave to them."""

    sequences: Tensor  # (B, P + C), prompt and response
    attention_mask: Tensor  # (B, P + C), 0 on padding at either side
    tokens: Tensor  # (B, C), the response
    mask: Tensor  # (B, C), true up to and including the end token
    finished: Tensor  # (B,), whether the response came to its end token
    # Of a sampler other than the model itself:
    logprobs: Tensor | None = None  # (B, C), of the tokens under the policy that drew them
    prefix_mask: Tensor | None = None  # (B, C), true where the teacher wrote the token

    def mask_of(self, loss_function: torch.nn.Module) -> Tensor:
        """The positions that a loss learns from.

        What the teacher wrote is no sample of the student's. TrOPD has a term for it; under other
        losses, of which those of the sampled token would be biased there, it is only context.
        """
        if self.prefix_mask is None or isinstance(loss_function, opdc.nn.TrOPDLoss):
            return self.mask
        return self.mask & ~self.prefix_mask


@dataclass(frozen=True)
class Update:
    """What one update leaves behind for whoever watches."""

    loss: float
    rollout: Rollout
    student_logits: Tensor  # (B, C, V), detached
    teacher_logits: Tensor  # (B, C, V)
    reference_logprobs: Tensor | None  # (B, C), of the tokens under the reference, if there is one


class Clock:
    """Adds up the seconds spent under each name: `with clock("rollout"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent


def distill(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    loss_function: torch.nn.Module,
    batches: Iterable[list[str]],
    *,
    learning_rate: float,
    temperature: float,
    max_new_tokens: int,
    clock: Clock,
    sampler: Any = None,
    reference: Any = None,
) -> Iterator[Update]:
    """Make one update of the student for each batch of prompts, and yield after each.

    `sampler`, an `opdc.hf.BlendSampler`, writes the rollouts in the place of the student;
    `reference` is a third model, for a loss that takes its log-probs.
    """
    optimizer = torch.optim.AdamW(
        student.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))

    for step, prompts in enumerate(batches):
        if sampler is not None:
            sampler.step = step  # its budget, or its prefixes, shrink with the steps
        with clock("rollout"):
            rollout = roll_out(student, tokenizer, prompts, temperature, max_new_tokens, sampler)
        with clock("teacher forward"), torch.no_grad():
            teacher_logits = response_logits(teacher, rollout)
            reference_logprobs = reference and opdc.token_logprobs(
                response_logits(reference, rollout), rollout.tokens, temperature=temperature
            )
        with clock("student forward"):
            student_logits = response_logits(student, rollout)
        with clock("loss"):
            loss = loss_function(
                student_logits,
                teacher_logits,
                tokens=rollout.tokens,
                mask=rollout.mask_of(loss_function),
                old_logprobs=rollout.logprobs,
                reference_logprobs=reference_logprobs,
                prefix_mask=rollout.prefix_mask,
                temperature=temperature,
            )
        with clock("backward"):
            loss.backward()
        with clock("optimizer"):
            torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm=1.0)
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
        yield Update(
            loss.item(), rollout, student_logits.detach(), teacher_logits, reference_logprobs
        )


@torch.no_grad()
def roll_out(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    temperature: float,
    max_new_tokens: int,
    sampler: Any = None,
) -> Rollout:
    """Sample a response to each prompt from the model's full distribution; temperature 0: greedy.

    The default of `generate` is top_k=50, which would silently sample from another policy than
    the one that the loss differentiates.
    """
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    input_ids, prompt_mask = inputs["input_ids"], inputs["attention_mask"]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    sequences = model.generate(
        input_ids=input_ids,
        attention_mask=prompt_mask,
        max_new_tokens=max_new_tokens,
        custom_generate=sampler,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    tokens = sequences[:, input_ids.shape[1] :]
    is_end = torch.isin(tokens, torch.tensor(end_tokens(model), dtype=torch.long))
    mask = is_end.cumsum(-1) - is_end.long() == 0  # no end token before this one
    attention_mask = torch.cat([prompt_mask, mask.long()], dim=1)
    finished = is_end.any(-1)
    if sampler is None:
        return Rollout(sequences, attention_mask, tokens, mask, finished)
    drawn = sampler.last
    return Rollout(
        sequences, attention_mask, tokens, mask, finished, drawn.logprobs, drawn.prefix_mask
    )


def response_logits(model: Any, rollout: Rollout) -> Tensor:
    """The logits (B, C, V) that predict the tokens of the response: logits[t] predicts tokens[t].

    Only those of the response are computed, with the last token of the prompt, which predicts
    the first. The positions are counted from each prompt's own first token.
    """
    output = model(
        input_ids=rollout.sequences,
        attention_mask=rollout.attention_mask,
        position_ids=(rollout.attention_mask.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=rollout.tokens.shape[1] + 1,
        use_cache=False,
    )
    logits: Tensor = output.logits
    return logits[:, :-1]  # the last one predicts a token after the response


def end_tokens(model: Any) -> list[int]:
    """The ids that end a response: none, one or several."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else ids if isinstance(ids, list) else [ids]
