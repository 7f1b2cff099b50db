"""The loop that writes the responses: token by token, or block by block of drafts."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

import opdc
from opdc._arguments import uniforms

from .decoding import Decoding, Stopping
from .rollout import Rollout, RolloutStatistics
from .transcript import Reader, Transcript

# What is recorded of each token, in this order, beside the token.
_NUMBERS = ("logprobs", "student_logprobs", "teacher_logprobs", "beta", "kl")


@dataclass(frozen=True)
class Behaviour:
    """What does not depend on the models: the same for the student's rollout and the teacher's."""

    decoding: Decoding
    stopping: Stopping
    padding_id: int
    eos_map: tuple[int, int] | None
    valid_vocab: int | None
    generator: torch.Generator | None
    sharded: bool

    @property
    def common(self) -> dict[str, Any]:
        """The arguments of a blend."""
        return {
            "temperature": self.decoding.temperature,
            "valid_vocab": self.valid_vocab,
            "eos_map": self.eos_map,
        }

    def uniforms(self, device: torch.device, *shape: int) -> Tensor:
        """Drawn on the CPU, the same for every device, unless the generator is one of a GPU."""
        if self.decoding.greedy:
            return torch.zeros(shape, dtype=torch.float64, device=device)
        generator = torch.default_generator if self.generator is None else self.generator
        return uniforms(shape, torch.float64, device, generator)

    def aligned(self, tokens: Tensor) -> Tensor:
        """The one id that both models end with."""
        if self.eos_map is None:
            return tokens
        return tokens.masked_fill(tokens == self.eos_map[1], self.eos_map[0])


class Generation:
    """One call to `generate`: its prompts, both models, and the responses so far.

    Every row has its own length, which drafts make ragged. What stands in `tokens` and `numbers`
    beyond it does not count. A step waits for the device once, to know which rows go on.
    """

    def __init__(
        self,
        behaviour: Behaviour,
        student: Reader,
        teacher: Reader | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        epsilon: float = 0.0,
        forced: Tensor | None = None,
        draft_length: int = 0,
    ) -> None:
        self.behaviour = behaviour
        self.decoding = behaviour.decoding
        self.student, self.teacher = student, teacher
        self.epsilon = epsilon
        self.forced = forced
        self.draft_length = draft_length
        rows, self.prompt = input_ids.shape
        self.room = behaviour.stopping.room(self.prompt)
        if draft_length:
            student.require_holes()
            if teacher is not None:
                teacher.require_holes()
        self.transcript = Transcript(input_ids, attention_mask, self.room + draft_length)
        # A draft may lie beyond a row's room, and beyond the positions that a model has learned.
        self.last_position = self.transcript.last_position + self.room - 1
        # One more than there is room for: the place of what does not stand.
        self.sequences = torch.nn.functional.pad(
            input_ids, (0, self.room + 1), value=behaviour.padding_id
        )
        self.tokens = self.sequences[:, self.prompt :]  # (B, room + 1)
        self.numbers: Tensor | None = None  # (one for each of _NUMBERS, B, room + 1)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
        self.active = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        self.steps = 0  # tokens that all active rows have, as long as none is ahead
        self.remaining = self.room  # tokens that some active row may still take
        self.drafted = self.accepted = 0

    def run(self, prefix: Rollout | None = None) -> Rollout:
        """Write until all rows have ended. `prefix`: what was spent before."""
        start = time.perf_counter()
        while True:
            remaining, forced = self._agreed(self.remaining, self._is_forcing())
            if not remaining:
                break
            block = 0 if forced else min(self.draft_length, remaining)
            if not self.remaining:
                self._idle(max(1, block))
            elif block:
                self._write_block(block)
            else:
                self._write_token()
        return self._rollout(time.perf_counter() - start, prefix)

    # ------------------------------------------------------------- one token of each row

    def _write_token(self) -> None:
        """The next token of every row; all active ones are equally long."""
        step = self.steps
        transcript = self.transcript
        student = self._constrained(self.student.logits(transcript, 1)[:, 0])
        teacher = self.teacher.logits(transcript, 1)[:, 0] if self.teacher else None
        drawn = self._draw(student, teacher, self._forced_at(step))
        tokens = drawn[0]
        self._recorded(drawn[1])[..., step] = torch.stack(drawn[1:])
        self.tokens[:, step] = tokens.where(self.active, self.behaviour.padding_id)

        failed = self.active & (tokens < 0)
        stopped = self.behaviour.stopping.is_stop(tokens)
        self.lengths += self.active
        self.steps += 1
        if self.behaviour.stopping.criteria:
            stopped |= self.behaviour.stopping.criteria(self._written(self.steps), None)
        self.active = self.active & ~stopped
        state = int(self.active.long().masked_fill(failed, 2).max())  # the one wait for the device
        if state == 2:
            self._refuse(failed)
        self.remaining = self.room - self.steps if state else 0
        if self.remaining:
            transcript.append(tokens.where(self.active, 0), transcript.last_position + 1)

    def _draw(
        self, student: Tensor, teacher: Tensor | None, forced: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Tokens and their numbers, in the order of `_NUMBERS`."""
        decoding, common = self.decoding, self.behaviour.common
        uniforms = self.behaviour.uniforms(student.device, student.shape[0])
        truncation: dict[str, Any] = {
            "top_k": decoding.top_k,
            "top_p": decoding.top_p,
            "uniforms": uniforms,
        }
        if decoding.warpers or forced is not None:
            return self._draw_from_rows(student, teacher, forced, truncation)
        if teacher is not None:
            blended = opdc.blend_sample(student, teacher, self.epsilon, **truncation, **common)
            return tuple(blended[:6])
        if self.behaviour.eos_map is not None:  # a blend with itself, for its aligned rows
            blended = opdc.blend_sample(student, student, 0.0, **truncation, **common)
            tokens, logprobs, own = blended[:3]
        else:
            del common["eos_map"]
            tokens, logprobs, own = opdc.sample(student, **truncation, **common)
        nothing = torch.zeros_like(logprobs)
        return tokens, logprobs, own, torch.full_like(logprobs, torch.nan), nothing, nothing

    def _draw_from_rows(
        self,
        student: Tensor,
        teacher: Tensor | None,
        forced: Tensor | None,
        truncation: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """The same where the rows of `log μ` themselves are needed."""
        common = self.behaviour.common
        mu = opdc.blend(student, student if teacher is None else teacher, self.epsilon, **common)
        scores = self.decoding.warpers(self._written(self.steps), mu.logprobs)
        tokens, logprobs, _ = opdc.sample(scores, **truncation)
        if forced is not None:
            # A row without a law stays one, or what follows would be written by nobody.
            is_forced = (forced >= 0) & (tokens >= 0)
            tokens = tokens.where(~is_forced, forced)
            logprobs = logprobs.where(~is_forced, _at(mu.logprobs, tokens))
        own, others = (
            torch.full_like(logprobs, torch.nan)
            if logits is None
            else _at(opdc.blend(logits, logits, 0.0, **common).logprobs, tokens)
            for logits in (student, teacher)
        )
        return tokens, logprobs, own, others, mu.beta, mu.student_kl

    def _is_forcing(self) -> bool:
        return self.remaining > 0 and self._forced_at(self.steps) is not None

    def _forced_at(self, step: int) -> Tensor | None:
        if self.forced is None or not 0 <= step < self.forced.shape[1]:
            return None
        return self.forced[:, step]

    # ------------------------------------------------------------- a block of drafts

    def _write_block(self, count: int) -> None:
        """The student drafts `count` tokens, one call of the teacher judges them, and each row goes
        on from its first rejection.

        The last token of a row, drawn but not yet read by the models, is read first; the last
        draft is not read. So both caches hold the same slots after each block, and the drafts from
        a row's first rejection on are slots that nothing sees.
        """
        assert self.teacher is not None
        transcript, behaviour, decoding = self.transcript, self.behaviour, self.decoding
        rows = self.lengths.shape[0]
        uniforms = behaviour.uniforms(self.lengths.device, rows, count, 3)
        start = transcript.last_position
        drafts = self.lengths.new_empty(rows, count)
        rows_of_scores = []
        for index in range(count):
            scores = self._constrained(self.student.logits(transcript, 1)[:, 0], index)
            rows_of_scores.append(scores)
            drawn = opdc.sample(
                scores,
                temperature=decoding.temperature,
                top_k=1 if decoding.greedy else None,
                valid_vocab=behaviour.valid_vocab,
                uniforms=uniforms[:, index, 0],
            )
            # A row without a law draws −1, which only its verification may report.
            drafts[:, index] = behaviour.aligned(drawn.tokens.clamp(min=0))
            if decoding.processors:
                # Only where there is room: a finished row's last token is no place for a draft.
                has_room = self.active & (self.lengths + index < self.room)
                at = (self.lengths + index).where(has_room, self.room)
                self.tokens.scatter_(1, at[:, None], drafts[:, index, None])
            if index + 1 < count:
                position = torch.minimum(start + index + 1, self.last_position)
                transcript.append(drafts[:, index], position)
        judged = opdc.blend_verify(
            drafts,
            torch.stack(rows_of_scores, dim=1),
            self.teacher.logits(transcript, count),
            self.epsilon,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            uniforms=uniforms[..., 1:],
            **behaviour.common,
        )
        self._settle_block(judged, start)

    def _settle_block(self, judged: Any, start: Tensor) -> None:
        """Take of a judged block what stands, and hide the rest from the models."""
        tokens, transcript = judged.tokens, self.transcript
        count = tokens.shape[1]
        ahead = torch.arange(count, device=tokens.device)
        before = self.lengths
        counts = judged.valid & self.active[:, None] & (before[:, None] + ahead < self.room)
        is_stop = self.behaviour.stopping.is_stop(tokens)
        counts &= (is_stop.cumsum(-1) - is_stop.long()) == 0  # nothing after the first stop
        taken = counts.sum(-1)
        failed = counts & (tokens < 0)

        at = (before[:, None] + ahead).where(counts, self.room)
        self.tokens.scatter_(1, at, tokens)
        numbers = torch.stack(judged[1:6])
        self._recorded(judged[1]).scatter_(2, at.expand_as(numbers), numbers)
        stopped = (is_stop & counts).any(-1)
        if self.behaviour.stopping.criteria:
            taken, stopped = self._stopped_within(taken, stopped)
            counts &= ahead < taken[:, None]

        self.lengths = before + taken
        self.active = self.active & ~stopped & (self.lengths < self.room)
        missing = self.room - self.lengths
        none = torch.zeros_like(taken)
        drafted, accepted, self.remaining, longest, shortest, fails = torch.stack(
            [
                counts.sum(),
                (counts & judged.accepted).sum(),
                missing.where(self.active, none).max(),
                taken.where(self.active, none).max(),
                taken.where(self.active, none + count).min(),
                failed.any().long(),
            ]
        ).tolist()  # the one wait for the device
        if fails:
            self._refuse(failed.any(-1))
        self.drafted += drafted
        self.accepted += accepted
        self.steps = -1  # no longer the same for all
        if not self.remaining:
            return
        # Slots that are of no use to any row go; they are few, or there is but one row.
        if longest < count:
            transcript.drop(count - longest)
            for model in (self.student, self.teacher):
                assert model is not None
                model.forget(count - longest)
        if shortest < longest:
            rejected = (ahead[1:longest] >= taken[:, None]) & self.active[:, None]
            transcript.hide(rejected)
        last = tokens.gather(1, (taken - 1).clamp(min=0)[:, None])[:, 0]
        transcript.append(last.where(self.active, 0), start + taken)

    def _stopped_within(self, taken: Tensor, stopped: Tensor) -> tuple[Tensor, Tensor]:
        """What the caller's criteria leave of a block. They look at whole batches of one length, so
        each length that some row passes through is shown to them, the first to stop a row counts.
        """
        before = self.lengths
        first = int(before.where(self.active, self.room).min()) + 1
        last = int((before + taken).max())
        for length in range(first, last + 1):
            passed = (before < length) & (length <= before + taken)
            found = self.behaviour.stopping.criteria(self._written(length), None) & passed
            taken = taken.where(~found, length - before)
            stopped = stopped | found
        return taken, stopped

    # ------------------------------------------------------------- what both share

    def _constrained(self, scores: Tensor, ahead: int = 0) -> Tensor:
        """The student's scores after the processors, `ahead` of the rows' lengths.

        Processors look at a batch of one length. Where rows differ, the batch is cut to each
        length that occurs, and the rows of that length are taken.
        """
        if not self.decoding.processors:
            return scores
        exact = torch.promote_types(scores.dtype, torch.float32)
        if self.steps >= 0 and not ahead:
            written = self._written(self.steps)
            constrained: Tensor = self.decoding.processors(written, scores.to(exact, copy=True))
            return constrained
        lengths = (self.lengths + ahead).clamp(max=self.room)
        result = scores.to(exact, copy=True)
        for length in lengths[self.active].unique().tolist():
            constrained = self.decoding.processors(
                self._written(length), scores.to(exact, copy=True)
            )
            result = constrained.where((lengths == length)[:, None], result)
        return result

    def _written(self, length: int) -> Tensor:
        """Prompts and the first `length` tokens of the responses."""
        return self.sequences[:, : self.prompt + length]

    def _recorded(self, like: Tensor) -> Tensor:
        """The numbers so far, in the dtype of those that come."""
        if self.numbers is None:
            self.numbers = like.new_zeros(len(_NUMBERS), *self.tokens.shape)
        return self.numbers

    def _refuse(self, failed: Tensor) -> None:
        rows = failed.nonzero()[:, 0].tolist()
        raise ValueError(
            f"no token can be drawn for the rows {rows}: the scores of the student or of the "
            "teacher hold a NaN or +inf, or processors have left no token possible"
        )

    def _agreed(self, remaining: int, forced: bool) -> tuple[int, bool]:
        """What the processes do next: all take the same steps while one of them needs it, because
        each holds a part of the models."""
        if not self.behaviour.sharded:
            return remaining, forced
        message = torch.tensor([remaining, int(forced)], device=self.lengths.device)
        dist.all_reduce(message, dist.ReduceOp.MAX)
        return int(message[0]), bool(message[1])

    def _idle(self, count: int) -> None:
        for _ in range(count):
            self.student.idle(self.transcript)
        if self.teacher is not None:
            self.teacher.idle(self.transcript)

    def _rollout(self, seconds: float, prefix: Rollout | None) -> Rollout:
        length = int(self.lengths.max())
        steps = torch.arange(length, device=self.lengths.device)
        mask = steps < self.lengths[:, None]
        tokens = self.tokens[:, :length].where(mask, self.behaviour.padding_id)
        self.tokens[:, :length] = tokens
        prefix_mask = torch.zeros_like(mask)
        if self.forced is not None:
            forced = self.forced[:, :length]
            prefix_mask[:, : forced.shape[1]] = forced >= 0
        assert self.numbers is not None
        numbers = self.numbers[:, :, :length].masked_fill(~mask, 0.0)
        readers = [self.student] if self.teacher is None else [self.student, self.teacher]
        statistics = RolloutStatistics(
            student_forwards=self.student.forwards,
            teacher_forwards=0 if self.teacher is None else self.teacher.forwards,
            drafted=self.drafted,
            accepted=self.accepted,
            student_seconds=self.student.seconds,
            teacher_seconds=0.0 if self.teacher is None else self.teacher.seconds,
            sampling_seconds=seconds - sum(reader.seconds for reader in readers),
        )
        return Rollout(
            sequences=self._written(length).contiguous(),
            tokens=tokens,
            mask=mask,
            **dict(zip(_NUMBERS, numbers.unbind(), strict=True)),
            prefix_mask=prefix_mask & mask,
            statistics=statistics if prefix is None else _with_prefix(statistics, prefix),
        )


def is_sharded(*models: Any) -> bool:
    """Whether processes hold parts of a model, so that none can call it alone. `generate` knows,
    but does not tell a callable."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    return is_deepspeed_zero3_enabled() or any(
        is_fsdp_managed_module(model)
        or any(isinstance(parameter, DTensor) for parameter in model.parameters())
        for model in models
        if model is not None
    )


def _at(rows: Tensor, tokens: Tensor) -> Tensor:
    """The entry of each row at its token; of a row that has no token, any."""
    return rows.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _with_prefix(statistics: RolloutStatistics, prefix: Rollout) -> RolloutStatistics:
    """The teacher wrote the prefixes in a rollout of its own, where it has the student's part."""
    spent = prefix.statistics
    return dataclasses.replace(
        statistics,
        teacher_forwards=statistics.teacher_forwards + spent.student_forwards,
        teacher_seconds=statistics.teacher_seconds + spent.student_seconds,
        sampling_seconds=statistics.sampling_seconds + spent.sampling_seconds,
    )
