"""Losses in phases: where what is measured of all positions, or by all processes, comes together
before the first loss is known.

    logits → parts  ⇒  rows → value, metrics            ⇒: numbers per position, from every process
    logits, rows → gradient  (⇒ its largest element, where one id has most of the mass)

Two kinds of calls take this way: those whose positions look at each other and whose logits, from a
`Projection`, are not all there at one time; and those whose vocabulary is split over the processes
of a group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _C, _ops
from ._projected import Work

# The newer name; the older one warns where both are there.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
TENSORS = ("parts", "rows", "entries", "value", "metrics", "upstream", "gradient", "sums")


@dataclass(frozen=True)
class Shard:
    """The ids `first …` of a vocabulary that the ranks of a group hold in their order."""

    group: dist.ProcessGroup | None  # None: one process has it all
    first: int
    vocabulary: int

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def left(self) -> int:
        """The ids from the first one on."""
        return self.vocabulary - self.first

    def gather(self, parts: Tensor) -> Tensor:
        """Those of all ranks, one after another."""
        if self.group is None:
            return parts
        every = parts.new_empty((self.ranks * len(parts), *parts.shape[1:]))
        if parts.numel():
            all_gather(every, parts, self.group)
        return every

    def share(self, numbers: Tensor) -> Tensor:
        """Those of the first rank."""
        numbers = numbers.contiguous().clone()
        if self.group is not None and numbers.numel():
            dist.broadcast(numbers, group=self.group, group_src=0)
        return numbers

    def add(self, sums: Tensor) -> None:
        if self.group is not None and sums.numel():
            dist.all_reduce(sums, group=self.group)


class Phases:
    """The phases of one call of the core, on the logits of some positions."""

    def __init__(
        self,
        shard: Shard,
        call: tuple[Any, ...],
        positions: int,
        with_metrics: bool,
        rows: Tensor | None = None,  # of an earlier phase
    ) -> None:
        self.shard, self.call, self.with_metrics = shard, call, with_metrics
        self.threads = torch.get_num_threads()
        k = call[-2]
        self.columns, self.looks_again, self.is_finished = _C.slice_needs(*call, with_metrics)
        student: Tensor = call[1]
        self.numbers = functools.partial(student.new_empty, dtype=torch.float64)
        self.rows = self.numbers((positions, _C.ROW)) if rows is None else rows
        self.entries = self.numbers((positions, 4 * (k + 1)))

    def run(
        self,
        phase: Callable[..., None],
        call: tuple[Any, ...] | None = None,
        **tensors: Tensor | None,
    ) -> None:
        given = {"rows": self.rows, "entries": self.entries, **tensors}
        phase(
            *(self.call if call is None else call),
            *(self.shard.first, self.shard.vocabulary, self.shard.ranks, self.with_metrics),
            *(given.get(name) for name in TENSORS),
            self.threads,
        )

    def measure(self) -> None:
        parts = self._parts(self.columns)
        self.run(_C.measure, parts=parts)
        self.combine(parts)

    def combine(self, parts: Tensor) -> None:
        self.run(_C.combine, parts=self.shard.gather(parts))
        if self.looks_again:
            parts = self._parts(_C.PART)
            self.run(_C.measure_again, parts=parts)
            self.run(_C.combine_again, parts=self.shard.gather(parts))

    def settle(self, value: Tensor, metrics: Tensor | None) -> None:
        self.run(_C.settle, value=value, metrics=metrics)

    def differentiate(self, upstream: Tensor, gradient: Tensor) -> None:
        """May overwrite the logits."""
        sums = self._parts(1)
        self.run(_C.slice_gradient, upstream=upstream, gradient=gradient, sums=sums)
        if self.is_finished:
            self.shard.add(sums)
            self.run(_C.finish_gradient, gradient=gradient, sums=sums)

    def _parts(self, columns: int) -> Tensor:
        return self.numbers((len(self.rows), columns))


def at_once(
    shard: Shard,
    call: tuple[Any, ...],
    value: Tensor,
    gradient: Tensor | None,
    rows: Tensor,
    metrics: Tensor | None,
) -> None:
    """All phases, as `_C.loss` does them at once."""
    phases = Phases(shard, call, len(rows), metrics is not None)
    phases.measure()
    phases.settle(value, metrics)
    if gradient is not None:
        phases.differentiate(torch.ones_like(value), gradient)


# ----------------------------------------------------------------- hidden states


def projected(
    work: Work, value: Tensor, rows: Tensor, metrics: Tensor | None, shard: Shard | None = None
) -> None:
    """A loss whose positions look at each other: the logits are made once for what is measured and
    once more for the gradient."""
    shard = Shard(None, 0, work.vocabulary) if shard is None else shard
    count, with_metrics = work.positions.count, metrics is not None
    packed = Phases(shard, work.without_logits(), count, with_metrics)
    parts = packed.numbers((count, packed.columns))
    for start, stop in work.chunks():
        packed.run(_C.measure, work.call(start, stop), parts=parts[start:stop])
    packed.combine(parts)
    whole = Phases(shard, work.of.without_logits(), work.positions.total, with_metrics)
    in_sequences = whole.rows.zero_().view(*work.positions.shape, _C.ROW)
    work.positions.put(in_sequences, 0, packed.rows)
    whole.settle(value, metrics)
    settled = work.positions.rows(in_sequences, 0, count)
    rows[:count] = settled
    per_position = work.of.integers["reduction"] == _ops._PER_POSITION
    for start, stop in work.chunks() if work.with_gradient else ():
        of_chunk = (work.call(start, stop), stop - start, with_metrics, settled[start:stop])
        chunk = Phases(shard, *of_chunk)
        target = work.student.target(start, stop)
        chunk.differentiate(value.new_ones(stop - start if per_position else ()), target)
        work.student.accumulate(start, stop, target)
    work.finish()
