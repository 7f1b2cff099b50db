"""Losses in phases: where what is measured of all positions, or by all processes, comes together
before the first loss is known.

    logits → parts  ⇒  rows → value, metrics            ⇒: numbers per position, from every process
    logits, rows → gradient  (⇒ its largest element, where one id has most of the mass)

Two kinds of calls take this way: those whose positions look at each other and whose logits, from a
`Projection`, are not all there at one time; and those whose vocabulary is split over the processes
of a group.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _C, _ops, _projected
from ._projected import Call, Work
from .projection import Projection

# The newer name; the older one warns where both are there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_TENSORS = ("parts", "rows", "entries", "value", "metrics", "upstream", "gradient", "sums")


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
        if self.group is None or not parts.numel():
            return parts.repeat(self.ranks, 1)
        every = parts.new_empty((self.ranks * len(parts), *parts.shape[1:]))
        _all_gather(every, parts, self.group)
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

    def __init__(self, shard: Shard, call: tuple[Any, ...], positions: int, with_metrics: bool):
        self.shard, self.call, self.with_metrics = shard, call, with_metrics
        self.threads = torch.get_num_threads()
        k = call[-2]
        self.columns, self.looks_again, self.is_finished = _C.slice_needs(*call, with_metrics)
        self.rows = torch.empty((positions, _C.ROW), dtype=torch.float64)
        self.entries = torch.empty((positions, 4 * (k + 1)), dtype=torch.float64)

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
            *(given.get(name) for name in _TENSORS),
            self.threads,
        )

    def measure(self) -> None:
        self.combine(self.measured())

    def measured(self, out: Tensor | None = None) -> Tensor:
        parts = self._parts(self.columns) if out is None else out
        self.run(_C.measure, parts=parts)
        return parts

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
        return torch.empty((len(self.rows), columns), dtype=torch.float64)


# ----------------------------------------------------------------- hidden states


def projected(
    work: Work, value: Tensor, rows: Tensor, metrics: Tensor | None, shard: Shard | None = None
) -> None:
    """A loss whose positions look at each other: the logits are made once for what is measured and
    once more for the gradient."""
    shard = Shard(None, 0, work.vocabulary) if shard is None else shard
    count, with_metrics = work.positions.count, metrics is not None
    packed = Phases(shard, work.without_logits(), count, with_metrics)
    parts = torch.empty((count, packed.columns), dtype=torch.float64)
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
        chunk = Phases(shard, work.call(start, stop), stop - start, with_metrics)
        chunk.rows = settled[start:stop]
        target = work.student.target(start, stop)
        chunk.differentiate(torch.ones(stop - start if per_position else ()), target)
        work.student.accumulate(start, stop, target)
    work.finish()


# ----------------------------------------------------------------- a vocabulary over processes


# The tensors that are the same on all ranks.
_REPLICATED = tuple(name for name in _ops.TENSORS if name not in ("teacher", "mask", "uniforms"))


class Meeting:
    """What the ranks of a group tell each other before they wait for numbers.

    A rank that refuses its call says so: an error on one is an error on all, and nobody waits for
    numbers that never come.
    """

    _TEXT = 256  # bytes of an error
    # What has to be the same on all ranks, by what it is called in an error.
    _SAME = (
        *("the number of positions", "the number of active positions", "the method (number)"),
        *("the reduction (number)", "whether the arithmetic is float64", "the size of the support"),
        *("whether metrics are wanted", "valid_vocab", "the settings (checksum)"),
        *("whether gradients are wanted", "the shape of the positions (checksum)"),
        *(f"{name} (checksum)" for name in _REPLICATED),
    )
    _OWN = ("student_width", "teacher_width", "highest_id", "rows_of_chunk")

    def __init__(self, group: dist.ProcessGroup) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup, got "
                f"{type(group).__name__}; torch.distributed.group.WORLD is the one of all processes"
            )
        if _ops.transforms_active():
            raise RuntimeError("process_group does not work under torch.func: use loss.backward()")
        self.group = group
        self.is_over = False

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and not self.is_over:
            self._exchange(None, f"{type(error).__name__}: {error}")

    def open(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        """Both models with at least one id."""
        self.widths = (_width(student), _width(teacher))
        return _with_an_id(student), _with_an_id(teacher)

    def loss(
        self,
        student: Tensor | Projection,
        method: str,
        tensors: Mapping[str, Any],
        settings: Tensor,
        integers: Mapping[str, int],
        valid_vocab: int,
        *,
        inplace: bool = False,
        with_metrics: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Value and metrics, as `_ops.loss`, of a vocabulary that is split over the ranks."""
        if isinstance(student, Projection):
            student = summed(student, self.group)
        elif student.dtype is torch.float16:
            student = student.float()  # whose gradient does not underflow before a loss scale
        call, needed = _projected.flat(student, method, tensors, settings, integers, 0)
        # Of losses by position the head's gradient has to wait for what comes from upstream; and
        # one that is rounded must not be multiplied afterwards.
        rounded = isinstance(student, Projection) or student.dtype is torch.bfloat16
        late = integers["reduction"] == _ops._PER_POSITION and rounded and not inplace
        wanted = 0 if late else sum(needs << i for i, needs in enumerate(needed))
        value, *_, metrics = _ops._apply(
            _Loss, *(self, valid_vocab, any(needed), inplace, with_metrics), *call, wanted
        )
        return value, metrics

    def gathered(
        self,
        student: Projection,
        method: str,
        tensors: Mapping[str, Any],
        settings: Tensor,
        integers: Mapping[str, int],
        valid_vocab: int,
        *,
        with_metrics: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The same of a loss that reads only the rows of the head that a sparse teacher names."""
        from . import _gathered

        rest = (method, tensors, settings, integers)
        call, needed = _projected.flat(student, *rest, 0)
        shard = self.place(Call(call[0], (*call[1:], 0)), valid_vocab, any(needed), with_metrics)
        student = summed(student, self.group)
        return _gathered.loss(student, *rest, valid_vocab, with_metrics=with_metrics, shard=shard)

    def place(
        self,
        call: Call,
        valid_vocab: int,
        needed: bool,
        with_metrics: bool,
        work: Work | None = None,
    ) -> Shard:
        """The slice of this rank, when all ranks make the same call."""
        # Beyond the last id of a vocabulary: that of the others is not known yet.
        beyond = (2**62, 2**62, 1, with_metrics, *(None for _ in _TENSORS))
        _C.check_slice(*call.without_logits(), *beyond, torch.get_num_threads())
        mask = call.tensors["mask"]
        positions = call.student.shape[:-1].numel()
        same = (
            *(positions, positions if mask is None else int(mask.sum())),
            *(_C.methods().index(call.method), call.integers["reduction"]),
            *(call.arithmetic is torch.float64, call.integers["k"], with_metrics, valid_vocab),
            *(_checksum(call.settings), needed, zlib.crc32(str(call.student.shape[:-1]).encode())),
            *(_checksum(call.tensors[name], mask) for name in _REPLICATED),
        )
        own = (*self.widths, _highest_id(call), 0 if work is None else work.rows_of_chunk)
        ranks = self._agree((*same, *own))
        if work is not None:
            work.rows_of_chunk = min(rank["rows_of_chunk"] for rank in ranks)
        return _shard(self.group, ranks, call.teacher is not None, valid_vocab)

    def _exchange(self, numbers: tuple[int, ...] | None, text: str = "") -> list[list[int]]:
        """The numbers of all ranks; raises the first error of another one."""
        self.is_over = True
        length = len(self._SAME) + len(self._OWN)
        encoded = text.encode()[: self._TEXT].ljust(self._TEXT, b"\0")
        header = torch.tensor([numbers is None, *(numbers or (0,) * length)], dtype=torch.int64)
        message = torch.cat([header, torch.frombuffer(bytearray(encoded), dtype=torch.int64)])
        every = message.new_empty(self.group.size() * len(message))
        _all_gather(every, message, self.group)
        rows = every.view(self.group.size(), -1)
        refusals = [i for i, refused in enumerate(rows[:, 0].tolist()) if refused]
        if numbers is None:
            return []
        if refusals:
            said = bytes(rows[refusals[0], 1 + length :].contiguous().view(torch.uint8).tolist())
            raise ValueError(
                f"process_group: rank {refusals[0]} refused its call, so no rank computes anything;"
                f" it said: {said.rstrip(bytes(1)).decode(errors='ignore')}"
            )
        return [row[1 : 1 + length].tolist() for row in rows]

    def _agree(self, numbers: tuple[int, ...]) -> list[dict[str, int]]:
        """Of each rank what it has to itself; raises where the ranks differ."""
        rows = self._exchange(numbers)
        for i, name in enumerate(self._SAME):
            values = [row[i] for row in rows]
            if len(set(values)) > 1:
                raise ValueError(
                    f"process_group: the ranks differ in {name}: {values}, by rank; all of them "
                    "must make the same call, each with its own slice of the vocabulary"
                )
        return [dict(zip(self._OWN, row[len(self._SAME) :], strict=True)) for row in rows]


class _OneId(torch.autograd.Function):
    """In the place of an empty slice: one id, whose gradient ends here."""

    @staticmethod
    def forward(ctx: Any, empty: Tensor, axis: int) -> Tensor:
        ctx.shape, ctx.dtype = empty.shape, empty.dtype
        shape = list(empty.shape)
        shape[axis] = 1
        return empty.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return torch.zeros(ctx.shape, dtype=ctx.dtype), None


def _with_an_id(model: Any) -> Any:
    """A model whose slice is empty, with one id that is beyond the vocabulary."""
    if isinstance(model, Projection):
        if model.weight.dim() != 2 or model.weight.shape[0]:
            return model
        adapter = model.adapter
        return model._replace(
            weight=_ops._apply(_OneId, model.weight, 0),
            bias=None if model.bias is None else _ops._apply(_OneId, model.bias, 0),
            adapter=None if adapter is None else (adapter[0], _ops._apply(_OneId, adapter[1], 0)),
        )
    if isinstance(model, Tensor) and model.dim() and not model.shape[-1]:
        return _ops._apply(_OneId, model, -1)
    return model


def _width(model: Any) -> int:
    given = model.weight if isinstance(model, Projection) else model
    if not isinstance(given, Tensor) or not given.dim():
        return 0
    return given.shape[0 if isinstance(model, Projection) else -1]


class _Summed(torch.autograd.Function):
    """A tensor that all ranks have the same of: each contributes to its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def summed(projection: Projection, group: dist.ProcessGroup) -> Projection:
    """With hidden states, and the inputs of an adapter, whose gradients add up over the ranks."""
    if not torch.is_grad_enabled():
        return projection
    adapter = projection.adapter
    return projection._replace(
        hidden=_sum(projection.hidden, group),
        adapter=None if adapter is None else (_sum(adapter[0], group), adapter[1]),
    )


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _ops._apply(_Summed, tensor, group) if tensor.requires_grad else tensor


def _checksum(tensor: Tensor | None, mask: Tensor | None = None) -> int:
    """Of the numbers of active positions; of a tensor that is not there −1."""
    if tensor is None:
        return -1
    numbers = (tensor if mask is None else tensor[mask]).contiguous()
    return zlib.crc32(numbers.view(-1).view(torch.uint8).numpy().data)


def _highest_id(call: Call) -> int:
    """Of the ids that an active position names; −1 without any."""
    mask = call.tensors["mask"]
    highest = -1
    for name in ("tokens", "slot_ids"):
        ids = call.tensors[name]
        if ids is not None:
            ids = ids if mask is None else ids[mask]
            highest = max(highest, int(ids.max()) if ids.numel() else -1)
    return highest


def _shard(
    group: dist.ProcessGroup, ranks: list[dict[str, int]], has_teacher: bool, valid_vocab: int
) -> Shard:
    """The slice of this rank among those of all."""
    widths = [rank["student_width"] for rank in ranks]
    total = sum(widths)
    if valid_vocab > total or total == 0:
        raise ValueError(
            f"process_group: the slices of the ranks have {widths} ids, together {total}, fewer "
            f"than valid_vocab={valid_vocab or 1}: give each rank its own slice of one vocabulary"
        )
    vocabulary = valid_vocab or total
    for i, rank in enumerate(ranks):
        left = vocabulary - sum(widths[:i])
        student, teacher = rank["student_width"], rank["teacher_width"]
        beyond = valid_vocab and min(student, teacher) >= left
        if has_teacher and student != teacher and not beyond:
            raise ValueError(
                f"process_group: rank {i} has {teacher} ids of the teacher and {student} of the "
                "student: cut both vocabularies at the same ids"
            )
        if rank["highest_id"] >= vocabulary:
            raise ValueError(
                f"process_group: rank {i} names id {rank['highest_id']} in its tokens or the "
                f"teacher's ids, want ids from 0 to {vocabulary - 1}; mask the positions that have "
                "no token"
            )
    mine = group.rank()
    return Shard(group, sum(widths[:mine]) if widths[mine] else vocabulary, vocabulary)


def _share_uniforms(shard: Shard, call: Call, work: Work | None) -> Tensor | None:
    """The numbers that decide for a position decide on all ranks, also if each drew its own."""
    uniforms = call.tensors["uniforms"]
    if uniforms is not None:
        uniforms = call.tensors["uniforms"] = shard.share(uniforms)
        if work is not None:
            work.tensors["uniforms"] = work.positions.rows(uniforms, 0, work.positions.count)
    return uniforms


def _of_chunk(
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


def _evaluate(
    shard: Shard, call: Call, work: Work | None, gradients: tuple[Tensor, ...], with_metrics: bool
) -> tuple[Tensor, Tensor]:
    """Value and metrics."""
    value, rows, metrics = call.outputs(with_metrics)
    outputs = (value, rows, metrics if with_metrics else None)
    if work is None:
        gradient = gradients[0] if call.wanted else None
        _of_chunk(shard, call.without_logits(), value, gradient, *outputs[1:])
        return value, metrics
    # What a call without an active position gives.
    settings = call.settings.clone()
    settings[-1] = 0
    nothing = Phases(shard, call.without_logits(settings), len(rows), with_metrics)
    nothing.rows.zero_()
    nothing.settle(value, outputs[2])
    if _projected.looks_at_all(call):
        projected(work, *outputs, shard)
    else:
        _projected.by_chunks(work, *outputs, partial(_of_chunk, shard))
    return value, metrics


class _Loss(torch.autograd.Function):
    """Saves the gradients if forward computed them, otherwise the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        meeting: Meeting,
        valid_vocab: int,
        needed: bool,
        inplace: bool,
        with_metrics: bool,
        *inputs: Any,
    ) -> tuple[Tensor, ...]:
        call = Call(inputs[0], inputs[1:])
        gradients = call.gradients()
        if inplace and call.wanted:
            gradients = (call.student, *gradients[1:])
        k = call.integers["k"]
        call.integers["k"] = abs(k)
        with torch.autocast("cpu", enabled=False):
            work = Work(call, gradients) if call.has_heads else None
            shard = meeting.place(call, valid_vocab, needed, with_metrics, work)
            ctx.k = call.integers["k"] = k if k >= 0 else min(-k, shard.vocabulary)
            ctx.uniforms = _share_uniforms(shard, call, work)
            value, metrics = _evaluate(shard, call, work, gradients, with_metrics)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(metrics)
        ctx.dtypes = [getattr(inputs[i], "dtype", None) for i in _projected._DIFFERENTIABLE]
        ctx.is_early = bool(call.wanted)
        if ctx.is_early:
            if inplace:
                _ops._overwritten(call.student)
            ctx.save_for_backward(*gradients)
        elif needed:
            ctx.shard, ctx.rows_of_chunk = shard, 0 if work is None else work.rows_of_chunk
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
            ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]
        # The gradients stay differentiable outputs, see _ops._Loss.
        return value, *(() if inplace else gradients), metrics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        first = len(found) - 1 - _projected._ARGUMENTS  # of the student
        if upstream is None:
            return tuple(found)
        needed = [ctx.needs_input_grad[first + i] for i in _projected._DIFFERENTIABLE]
        if ctx.is_early:
            gradients = tuple(
                _ops._scaled(gradient, upstream) if needs else gradient
                for gradient, needs in zip(ctx.saved_tensors, needed, strict=True)
            )
        else:
            gradients = _ops._apply(_Gradient, ctx, needed, upstream)
        for i, gradient, dtype, needs in zip(
            _projected._DIFFERENTIABLE, gradients, ctx.dtypes, needed, strict=True
        ):
            if needs:
                found[first + i] = gradient.to(dtype)
        return tuple(found)


class _Gradient(_ops._FirstDerivative):
    """Of the losses of positions, pulled back: that of their sum, with the upstream gradient among
    the weights."""

    @staticmethod
    def forward(saved: Any, needed: list[bool], upstream: Tensor) -> tuple[Tensor, ...]:
        tensors = iter(saved.saved_tensors)
        student, *arguments = (next(tensors) if x is None else x[0] for x in saved.others)
        arguments[-1] = sum(needs << i for i, needs in enumerate(needed))
        call = Call(student, arguments)
        call.integers["k"], call.tensors["uniforms"] = saved.k, saved.uniforms
        weights = call.tensors["weights"]
        call.tensors["weights"] = upstream if weights is None else weights.double() * upstream
        call.integers["reduction"] = _ops.REDUCTIONS.index("sum")
        gradients = call.gradients()
        with torch.autocast("cpu", enabled=False):
            work = Work(call, gradients) if call.has_heads else None
            if work is not None:
                work.rows_of_chunk = saved.rows_of_chunk
            _evaluate(saved.shard, call, work, gradients, False)
        return gradients
