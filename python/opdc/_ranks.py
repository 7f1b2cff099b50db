"""Losses of a vocabulary that is split over the processes of a group: what the ranks agree on
before they wait for each other, and the derivatives.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _C, _ops, _projected
from ._groups import CPU, exchangeable
from ._phases import TENSORS, Phases, Shard, all_gather, at_once, projected
from ._projected import Call, Work
from .projection import Projection


class Meeting:
    """What the ranks of a group tell each other before they wait for numbers.

    A rank that refuses its call says so: an error on one is an error on all, and nobody waits for
    numbers that never come. To know what the others say the host has to wait, for a GPU too.
    """

    _NUMBERS = 64  # of a header, and room for more
    _TEXT = 256  # bytes of an error

    def __init__(self, group: dist.ProcessGroup) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup, got "
                f"{type(group).__name__}; torch.distributed.group.WORLD is the one of all processes"
            )
        if _ops.transforms_active():
            raise RuntimeError("process_group does not work under torch.func: use loss.backward()")
        self.group = group
        self.devices = [CPU]  # where the header may be
        self.is_over = False
        self.has_default_k = False

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not self.is_over:
            self._exchange((), f"{type(error).__name__}: {error}")

    def open(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        """Both models with at least one id."""
        given = student.hidden if isinstance(student, Projection) else student
        if isinstance(given, Tensor):
            self.devices.append(given.device)
            if exchangeable(self.group, given.device) != given.device:
                raise TypeError(
                    f"student is on {given.device}, whose tensors process_group does not exchange "
                    f"(its backends are {dist.get_backend_config(self.group)}): give a group that "
                    "does, or move the tensors"
                )
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
        teacher = tensors.get("teacher")
        if inplace and isinstance(student, Tensor) and isinstance(teacher, Tensor):
            _ops.require_apart(student, teacher)
        if isinstance(student, Tensor) and student.dtype is torch.float16:
            student = student.float()  # whose gradient does not underflow before a loss scale
        self.has_default_k = integers.get("k", 0) < 0
        integers = {**integers, "k": abs(integers.get("k", 0))}
        # Beyond the last id the heads of the models may end at different places.
        rows = min(self.widths) if isinstance(student, Projection) else 0
        call, needed = _projected.flat(student, method, tensors, settings, integers, rows)
        # Of losses by position the head's gradient has to wait for what comes from upstream; and
        # one that is rounded must not be multiplied afterwards.
        rounded = isinstance(student, Projection) or student.dtype is torch.bfloat16
        late = integers["reduction"] == _ops._PER_POSITION and rounded and not inplace
        bits = _projected.bits_of(needed)
        value, *_, metrics = _ops._apply(
            _Loss,
            *(self, valid_vocab, bits, inplace, with_metrics),
            *(*call, 0 if late else bits),
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
        bits = _projected.bits_of(needed)
        whole = Call(call[0], (*call[1:], 0))
        self.check(whole, with_metrics)
        shard = self.place(whole, valid_vocab, bits, False, with_metrics)
        student = summed(student, self.group)
        return _gathered.loss(student, *rest, valid_vocab, with_metrics=with_metrics, shard=shard)

    def place(
        self,
        call: Call,
        valid_vocab: int,
        needed: int,
        inplace: bool,
        with_metrics: bool,
        work: Work | None = None,
    ) -> Shard:
        """The slice of this rank, when all ranks make the same call, which is checked."""
        same = {
            **_same(call),
            "valid_vocab": valid_vocab,
            "which gradients are wanted (bits)": needed,
            "inplace": inplace,
            "return_metrics": with_metrics,
        }
        own = (*self.widths, *_ids(call), 0 if work is None else work.rows_of_chunk)
        ranks = self._agree(same, own)
        shard = _shard(self.group, ranks, call.teacher is not None, valid_vocab)
        if self.has_default_k:
            call.integers["k"] = min(call.integers["k"], shard.vocabulary)
        if work is not None:
            work.rows_of_chunk = min(rank.rows_of_chunk for rank in ranks)
        self.check(call, with_metrics, shard.first, shard.vocabulary)
        return shard

    def check(
        self, call: Call, with_metrics: bool, first: int = 2**62, vocabulary: int = 2**62
    ) -> None:
        """What the phases check. Without a place beyond the last id: where that of all ranks is,
        is not known yet."""
        slice_ = (first, vocabulary, 1, with_metrics, *(None for _ in TENSORS))
        _C.check_slice(*call.without_logits(), *slice_, torch.get_num_threads())

    def _exchange(self, numbers: tuple[int, ...], text: str = "") -> list[list[int]]:
        """The numbers of all ranks, none if this one refuses; raises what another one says."""
        self.is_over = True
        header = torch.zeros(1 + self._NUMBERS, dtype=torch.int64)
        header[: 1 + len(numbers)] = torch.tensor([not numbers, *numbers])
        encoded = text.encode()[: self._TEXT].ljust(self._TEXT, b"\0")
        message = torch.cat([header, torch.frombuffer(bytearray(encoded), dtype=torch.int64)])
        message = message.to(exchangeable(self.group, *self.devices))
        every = message.new_empty(self.group.size() * len(message))
        all_gather(every, message, self.group)
        rows = every.view(self.group.size(), -1).cpu()
        refusals = rows[:, 0].nonzero().flatten().tolist()
        if refusals and numbers:
            said = bytes(rows[refusals[0], len(header) :].contiguous().view(torch.uint8).tolist())
            raise ValueError(
                f"process_group: rank {refusals[0]} refused its call, so no rank computes anything;"
                f" it said: {said.rstrip(bytes(1)).decode(errors='ignore')}"
            )
        return [row[1 : 1 + len(numbers)].tolist() for row in rows]

    def _agree(self, same: Mapping[str, int], own: tuple[int, ...]) -> list[_Rank]:
        """Of each rank what it has to itself; raises where the ranks differ."""
        rows = self._exchange((*same.values(), *own))
        for i, name in enumerate(same):
            values = [row[i] for row in rows]
            if len(set(values)) > 1:
                raise ValueError(
                    f"process_group: the ranks differ in {name}: {values}, by rank; all of them "
                    "must make the same call, each with its own slice of the vocabulary"
                )
        return [_Rank(*row[len(same) :]) for row in rows]


class _Rank(NamedTuple):
    """What a rank has to itself."""

    student_width: int
    teacher_width: int
    lowest_token: int
    highest_id: int
    rows_of_chunk: int


def _same(call: Call) -> dict[str, int]:
    """What of a call has to be the same on all ranks, by what it is called in an error."""
    tensors = {name: None if x is None else x.cpu() for name, x in call.tensors.items()}
    mask = tensors["mask"]
    shape = call.student.shape[:-1]
    heads = (*call.student_head, *call.teacher_head)
    models = (call.student, call.teacher, *heads)
    kinds = str([None if model is None else model.dtype for model in models])
    return {
        "the number of positions": shape.numel(),
        "the shape of the positions (checksum)": zlib.crc32(str(shape).encode()),
        "the number of active positions": shape.numel() if mask is None else int(mask.sum()),
        "mask (checksum)": _checksum(mask),
        "the method (number)": _C.methods().index(call.method),
        "whether the arithmetic is float64": call.arithmetic is torch.float64,
        "the models that are given, and their dtypes (checksum)": zlib.crc32(kinds.encode()),
        "scale and softcap (checksum)": _checksum(call.numbers),
        "the settings (checksum)": _checksum(call.settings),
        **{f"{name} (number)": number for name, number in call.integers.items()},
        **{
            f"{name} (checksum)": _checksum(tensor, mask)
            for name, tensor in tensors.items()
            if name not in ("mask", "uniforms")  # those of the first rank decide
        },
    }


class _OneId(torch.autograd.Function):
    """In the place of an empty slice: one id, whose gradient ends here."""

    @staticmethod
    def forward(ctx: Any, empty: Tensor, axis: int) -> Tensor:
        ctx.shape, ctx.dtype, ctx.device = empty.shape, empty.dtype, empty.device
        shape = list(empty.shape)
        shape[axis] = 1
        return empty.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device), None


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


def _total_of(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Summed(torch.autograd.Function):
    """A tensor that all ranks have the same of: each contributes to its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _total_of(gradients[0], ctx.group), None


def summed(projection: Projection, group: dist.ProcessGroup) -> Projection:
    """With hidden states, and the inputs of an adapter, whose gradients add up over the ranks: in
    the dtype of the arithmetic, to be rounded once."""
    if not torch.is_grad_enabled():
        return projection
    adapter = projection.adapter
    return projection._replace(
        hidden=_sum(projection.hidden, group),
        adapter=None if adapter is None else (_sum(adapter[0], group), adapter[1]),
    )


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    if not tensor.requires_grad:
        return tensor
    wide = tensor if tensor.dtype is torch.float64 else tensor.float()
    found: Tensor = _ops._apply(_Summed, wide, group)
    return found


def _checksum(tensor: Tensor | None, mask: Tensor | None = None) -> int:
    """Of the numbers of active positions, on the CPU; of a tensor that is not there −1."""
    if tensor is None:
        return -1
    numbers = (tensor if mask is None else tensor[mask]).contiguous()
    return zlib.crc32(numbers.view(-1).view(torch.uint8).numpy().data)


def _ids(call: Call) -> tuple[int, int]:
    """The lowest of the tokens, and the highest of the ids, that an active position names; 0 and −1
    without any."""
    mask = call.tensors["mask"]
    lowest, highest = 0, -1
    for name in ("tokens", "slot_ids"):
        ids = call.tensors[name]
        if ids is not None:
            ids = ids if mask is None else ids[mask]
        if ids is not None and ids.numel():
            highest = max(highest, int(ids.max()))
            if name == "tokens":
                lowest = int(ids.min())
    return lowest, highest


def _shard(
    group: dist.ProcessGroup, ranks: list[_Rank], has_teacher: bool, valid_vocab: int
) -> Shard:
    """The slice of this rank among those of all."""
    widths = [rank.student_width for rank in ranks]
    total = sum(widths)
    if valid_vocab > total or total == 0:
        raise ValueError(
            f"process_group: the slices of the ranks have {widths} ids, together {total}, fewer "
            f"than valid_vocab={valid_vocab or 1}: give each rank its own slice of one vocabulary"
        )
    vocabulary = valid_vocab or total
    for i, rank in enumerate(ranks):
        left = vocabulary - sum(widths[:i])
        student, teacher = rank.student_width, rank.teacher_width
        beyond = valid_vocab and min(student, teacher) >= left
        if has_teacher and student != teacher and not beyond:
            raise ValueError(
                f"process_group: rank {i} has {teacher} ids of the teacher and {student} of the "
                "student: cut both vocabularies at the same ids"
            )
        if rank.highest_id >= vocabulary or rank.lowest_token < 0:
            id = rank.highest_id if rank.highest_id >= vocabulary else rank.lowest_token
            raise ValueError(
                f"process_group: rank {i} names id {id} in its tokens or the "
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


def _evaluate(
    shard: Shard, call: Call, work: Work | None, gradients: tuple[Tensor, ...], with_metrics: bool
) -> tuple[Tensor, Tensor]:
    """Value and metrics."""
    value, rows, metrics = call.outputs(with_metrics)
    outputs = (value, rows, metrics if with_metrics else None)
    if work is None:
        gradient = gradients[0] if call.wanted else None
        at_once(shard, call.without_logits(), value, gradient, *outputs[1:])
        return value, metrics
    # What a call without an active position gives.
    without = call.without_logits(call.with_items(0))
    nothing = Phases(shard, without, len(rows), with_metrics)
    nothing.rows.zero_()
    nothing.settle(value, outputs[2])
    if _projected.looks_at_all(call):
        projected(work, *outputs, shard)
    else:
        _projected.by_chunks(work, *outputs, partial(at_once, shard))
    return value, metrics


class _Loss(torch.autograd.Function):
    """Saves the gradients if forward computed them, otherwise the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        meeting: Meeting,
        valid_vocab: int,
        needed: int,
        inplace: bool,
        with_metrics: bool,
        *inputs: Any,
    ) -> tuple[Tensor, ...]:
        call = Call(inputs[0], inputs[1:])
        gradients = call.gradients()
        if inplace and call.wanted:
            gradients = (call.student, *gradients[1:])
        with torch.autocast(call.student.device.type, enabled=False):
            meeting.check(call, with_metrics)  # before the positions are packed
            work = Work(call, gradients) if call.has_heads else None
            shard = meeting.place(call, valid_vocab, needed, inplace, with_metrics, work)
            ctx.k = call.integers["k"]
            ctx.uniforms = _share_uniforms(shard, call, work)
            value, metrics = _evaluate(shard, call, work, gradients, with_metrics)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(metrics)
        ctx.group = meeting.group if call.student_head[0] is not None else None
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
            # The tensors make a second derivative arrive at _FirstDerivative.
            tensors = [x for x in ctx.saved_tensors if x.requires_grad]
            gradients = _ops._apply(_Gradient, ctx, needed, upstream, *tensors)
        if ctx.group is not None:
            gradients = tuple(
                _total(gradient, ctx.group) if needs and name in _SHARED else gradient
                for gradient, needs, name in zip(
                    gradients, needed, _projected._GRADIENTS, strict=True
                )
            )
        for i, gradient, dtype, needs in zip(
            _projected._DIFFERENTIABLE, gradients, ctx.dtypes, needed, strict=True
        ):
            if needs:
                found[first + i] = gradient.to(dtype)
        return tuple(found)


class _Total(_ops._FirstDerivative):
    @staticmethod
    def forward(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _total_of(gradient, group)


# What all ranks have the same of, among the student's tensors: each contributes to its gradient.
_SHARED = ("student", "student_adapter_inputs")


def _total(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Over the ranks, before it is rounded to the dtype of its tensor."""
    if not gradient.numel():
        return gradient
    total: Tensor = _ops._apply(_Total, gradient, group)
    return total


class _Gradient(_ops._FirstDerivative):
    """Of the losses of positions, pulled back: that of their sum, with the upstream gradient among
    the weights."""

    @staticmethod
    def forward(saved: Any, needed: list[bool], upstream: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        tensors = iter(saved.saved_tensors)
        student, *arguments = (next(tensors) if x is None else x[0] for x in saved.others)
        arguments[-1] = _projected.bits_of(needed)
        call = Call(student, arguments)
        call.integers["k"], call.tensors["uniforms"] = saved.k, saved.uniforms
        weights = call.tensors["weights"]
        call.tensors["weights"] = upstream if weights is None else weights.double() * upstream
        call.integers["reduction"] = _ops.REDUCTIONS.index("sum")
        gradients = call.gradients()
        with torch.autocast(call.student.device.type, enabled=False):
            work = Work(call, gradients) if call.has_heads else None
            if work is not None:
                work.rows_of_chunk = saved.rows_of_chunk
            _evaluate(saved.shard, call, work, gradients, False)
        return gradients
