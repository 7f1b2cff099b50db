"""Losses whose logits exist for one chunk of positions at a time: the operators
`torch.ops.opdc.projected_*`, which take hidden states and heads, and their derivatives.

Both models pass through the C core as logits in the buffers of a chunk, where the student's turn
into their gradient. For a scalar reduction it goes on to the hidden states and the head at once, so
that no logits are ever computed twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, _ops
from ._head import Head, Logits, Positions, head_dtype
from .metrics import _MAXIMA, _MINIMA
from .projection import Projection

DEFAULT_BYTES = 256 << 20
DEFAULT_BYTES_ON_GPU = 1 << 30
_DISCOUNT = tuple(_ops.NUMBERS).index("discount")

# What a Projection is to the operators: its hidden states stand in the place of logits, its other
# tensors come after the call.
_PARTS = ("weight", "bias", "adapter_inputs", "adapter_weight")
_HEADS = tuple(f"{model}_{part}" for model in ("student", "teacher") for part in _PARTS)
_GRADIENTS = ("student", *_HEADS[: len(_PARTS)])  # `wanted` has bit i if the i-th is wanted

_PARTS_SCHEMA = ", ".join(f"Tensor? {part}" for part in _PARTS)
_HEADS_SCHEMA = ", ".join(f"Tensor? {name}" for name in _HEADS)
_GRADIENTS_SCHEMA = ", ".join(f"Tensor d_{name}" for name in _GRADIENTS)
# `numbers` holds the scale and the softcap of the student and of the teacher; 0: no softcap. With
# `max_bytes` 0 the default.
_PROJECTED = (
    f"Tensor student, {_ops._CALL}, {_HEADS_SCHEMA}, Tensor numbers, SymInt max_bytes, int wanted"
)
_ARGUMENTS = _ops._ARGUMENTS + len(_HEADS) + 3  # those of _PROJECTED after the student

for _schema in (
    f"projected_loss({_PROJECTED}, bool with_metrics)"
    f" -> (Tensor value, {_GRADIENTS_SCHEMA}, Tensor rows, Tensor metrics)",
    f"projected_gradient({_PROJECTED}, Tensor rows, Tensor upstream) -> ({_GRADIENTS_SCHEMA})",
    f"projected_topk(Tensor hidden, {_PARTS_SCHEMA}, Tensor numbers, SymInt max_bytes, SymInt k, "
    "Tensor temperature, SymInt valid_vocab) -> (Tensor ids, Tensor logprobs)",
):
    _ops._library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_loss_operator: Callable[..., tuple[Tensor, ...]] = torch.ops.opdc.projected_loss.default
_gradient_operator: Callable[..., tuple[Tensor, ...]] = torch.ops.opdc.projected_gradient.default
_topk_operator: Callable[..., tuple[Tensor, Tensor]] = torch.ops.opdc.projected_topk.default

# ----------------------------------------------------------------- a call by chunks


class Call:
    """The arguments of the operators by name, and what follows from their types."""

    def __init__(self, student: Tensor, arguments: Sequence[Any]) -> None:
        tensors = dict(zip(_ops.TENSORS, arguments, strict=False))
        at = len(_ops.TENSORS)
        self.student = student
        self.teacher: Tensor | None = tensors.pop("teacher")
        self.tensors: dict[str, Tensor | None] = tensors
        self.settings: Tensor = arguments[at]
        self.method: str = arguments[at + 1]
        self.integers: dict[str, int] = dict(
            zip(_ops.INTEGERS, arguments[at + 2 : _ops._ARGUMENTS - 1], strict=True)
        )
        self.valid_vocab: int = arguments[_ops._ARGUMENTS - 1]
        heads = arguments[_ops._ARGUMENTS : _ops._ARGUMENTS + len(_HEADS)]
        self.student_head: Sequence[Tensor | None] = heads[: len(_PARTS)]
        self.teacher_head: Sequence[Tensor | None] = heads[len(_PARTS) :]
        self.numbers, self.max_bytes, self.wanted = arguments[_ops._ARGUMENTS + len(_HEADS) :][:3]

    @property
    def num_items(self) -> float:
        """NaN where it is not given."""
        items: float = self.settings.tolist()[-1]
        return items

    def with_items(self, num_items: float) -> Tensor:
        """The settings with another denominator."""
        settings = self.settings.clone()
        settings[-1] = num_items
        return settings

    @property
    def has_heads(self) -> bool:
        return self.student_head[0] is not None or self.teacher_head[0] is not None

    @property
    def limited(self) -> str:
        """What `max_bytes` came as; with two of them it is the smaller one."""
        if self.method in ("token_logprobs", "entropy"):
            return "logits.max_bytes"
        heads = {"student.max_bytes": self.student_head, "teacher.max_bytes": self.teacher_head}
        return " or ".join(name for name, head in heads.items() if head[0] is not None)

    @property
    def arithmetic(self) -> torch.dtype:
        dtypes = [head_dtype(self.student, self.student_head[0])]
        if self.teacher is not None:
            dtypes.append(head_dtype(self.teacher, self.teacher_head[0]))
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def outputs(self, with_metrics: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Empty value, rows and metrics. `rows` begins with those of the active positions."""
        reduction = self.integers["reduction"]
        return _ops._outputs(self.student, self.arithmetic, reduction, with_metrics)

    def gradients(self) -> tuple[Tensor, ...]:
        """Empty gradients in the dtype that they are added up in; without elements if unwanted."""
        dtype = head_dtype(self.student, self.student_head[0])
        return tuple(
            self.student.new_empty(
                part.shape if part is not None and self.wanted >> i & 1 else 0, dtype=dtype
            )
            for i, part in enumerate((self.student, *self.student_head))
        )

    def in_order(
        self,
        student: Tensor,
        teacher: Tensor | None,
        tensors: Mapping[str, Tensor | None],
        settings: Tensor,
        reduction: int,
        valid_vocab: int,
    ) -> tuple[Any, ...]:
        """What the C core takes, with some of it replaced."""
        return (
            *(self.method, student, teacher),
            *(tensors.get(name) for name in _ops.TENSORS[1:]),
            *(settings, *({**self.integers, "reduction": reduction}).values(), valid_vocab),
        )

    def check(self, value: Tensor, rows: Tensor, metrics: Tensor | None) -> None:
        """All that the C core checks, before any matrix product: a call that evaluates nothing.

        Its outputs are those of a call without an active position.
        """
        wrong = self.num_items < 0 or self.num_items > 1e300  # and refused
        arguments = self.without_logits(self.settings if wrong else self.with_items(0))
        _ops._core_loss(*arguments, value, None, rows, metrics, torch.get_num_threads())

    def without_logits(self, settings: Tensor | None = None) -> tuple[Any, ...]:
        """What the C core takes where it reads no logits."""
        teacher = self.teacher
        return self.in_order(
            _stand_in(self.student, self.student_head[0]),
            None if teacher is None else _stand_in(teacher, self.teacher_head[0]),
            self.tensors,
            self.settings if settings is None else settings,
            self.integers["reduction"],
            self.valid_vocab,
        )


def bits_of(needed: Sequence[bool]) -> int:
    return sum(needs << i for i, needs in enumerate(needed))


def _stand_in(
    given: Tensor, weight: Tensor | None, positions: Sequence[int] | None = None
) -> Tensor:
    """A tensor with the shape and dtype of the logits, in the memory of one row."""
    if weight is None and positions is None:
        return given
    row = given.new_empty(_whole(given, weight), dtype=head_dtype(given, weight))
    return row.expand(*(given.shape[:-1] if positions is None else positions), -1)


class Work:
    """A checked call with what computing it takes: its active positions, packed, and the logits of
    a chunk of them.

    A loop over `chunks()` may take the `logits` of each to the core with `call`, have the gradient
    written to `student.target` and pass it on with `student.accumulate`; `finish` comes last.
    """

    def __init__(self, call: Call, gradients: Sequence[Tensor]) -> None:
        at = call
        self.of = call
        shape = at.student.shape[:-1]
        self.mask = at.tensors["mask"]
        if at.num_items == 0:  # nothing is evaluated
            self.mask = at.student.new_zeros(shape, dtype=torch.bool)
        self.positions = Positions(shape, self.mask)
        self.vocabulary = at.valid_vocab or _whole(at.student, at.student_head[0])
        self.threads = torch.get_num_threads()
        self.with_gradient = any(at.wanted >> i & 1 for i in range(len(_GRADIENTS)))
        numbers = at.numbers.tolist()
        wanted = [g if at.wanted >> i & 1 else None for i, g in enumerate(gradients)]
        unwanted = [None] * len(_GRADIENTS)
        self.student = self._model(at.student, at.student_head, numbers[:2], wanted)
        self.teacher = (
            None
            if at.teacher is None
            else self._model(at.teacher, at.teacher_head, numbers[2:], unwanted)
        )
        self.models = [model for model in (self.student, self.teacher) if model is not None]
        for model in self.models:
            model.reserve(self.positions)
        self.rows_of_chunk = _rows_of_chunk(
            self.positions.count,
            at.limited,
            at.max_bytes,
            self.models,
            # What the C core keeps of a row between its loss and its gradient, in each thread.
            self.vocabulary * at.arithmetic.itemsize * 33 // 32,
            on_gpu=_ops.is_on_gpu(at.student),
        )
        for model in self.models:
            model.allocate(self.rows_of_chunk)
        self.tensors = {
            name: self.positions.rows(tensor, 0, self.positions.count)
            for name, tensor in {**at.tensors, "mask": self.mask}.items()
            if tensor is not None and (name != "mask" or self.positions.idle is not None)
        }

    def _model(
        self,
        given: Tensor,
        head: Sequence[Tensor | None],
        numbers: Sequence[float],
        gradients: Sequence[Tensor | None],
    ) -> Logits | Head:
        weight, *others = head
        if weight is None:
            return Logits(given, gradients[0])
        return Head(given, weight, others, numbers, self.vocabulary, gradients)

    def chunks(self) -> Iterator[tuple[int, int]]:
        return _chunks(self.positions.count, self.rows_of_chunk)

    def logits(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Of student and teacher, in buffers that the next chunk overwrites."""
        teacher = None if self.teacher is None else self.teacher.logits(start, stop)
        return self.student.logits(start, stop), teacher

    def call(
        self,
        start: int,
        stop: int,
        *,
        settings: Tensor | None = None,
        reduction: int | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The arguments of the C core for the logits of a chunk. `weights`: of all positions."""
        tensors = {name: tensor[start:stop] for name, tensor in self.tensors.items()}
        if weights is not None:
            tensors["weights"] = weights[start:stop]
        return self.of.in_order(
            *self.logits(start, stop),
            tensors,
            self.of.settings if settings is None else settings,
            self.of.integers["reduction"] if reduction is None else reduction,
            self.vocabulary,
        )

    def without_logits(self) -> tuple[Any, ...]:
        """The call for all active positions where the C core reads no logits."""
        of, positions = self.of, (self.positions.count,)
        teacher = of.teacher
        return of.in_order(
            _stand_in(of.student, of.student_head[0], positions),
            None if teacher is None else _stand_in(teacher, of.teacher_head[0], positions),
            self.tensors,
            of.settings,
            of.integers["reduction"],
            of.valid_vocab,
        )

    def finish(self) -> None:
        for model in self.models:
            model.finish()


def _whole(given: Tensor, weight: Tensor | None) -> int:
    return given.shape[-1] if weight is None else weight.shape[0]


def _rows_of_chunk(
    count: int,
    limited: str,
    max_bytes: int,
    models: Sequence[Logits | Head],
    of_thread: int = 0,
    *,
    on_gpu: bool,
) -> int:
    """As many positions as the memory is enough for, evenly spread over the chunks."""
    threads = torch.get_num_threads()
    if on_gpu:
        threads, of_thread = 1, 0  # whose memory does not grow with the vocabulary
    fixed = sum(model.fixed_bytes for model in models)
    position = sum(model.position_bytes for model in models)
    free = (max_bytes or (DEFAULT_BYTES_ON_GPU if on_gpu else DEFAULT_BYTES)) - fixed
    rows = (free - threads * of_thread) // max(position, 1)
    if rows < threads:  # of which there are never more than positions
        rows = min(threads, free // max(position + of_thread, 1))
    if rows < 1:
        if max_bytes:
            raise ValueError(
                f"{limited} is {max_bytes}, but the logits of one position and what is needed to "
                f"compute with them take {fixed + position + of_thread} bytes: give at least as "
                "many, or None"
            )
        rows = 1
    if rows >= count:
        return count
    even = math.ceil(count / math.ceil(count / rows))
    return min(rows - rows % 16, even + -even % 16) if rows > 16 else even


def _chunks(count: int, rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, max(rows, 1)):
        yield start, min(start + rows, count)


def looks_at_all(call: Call) -> bool:
    """Whether the loss of a position depends on what is measured of others."""
    return bool(call.settings.tolist()[_DISCOUNT] != 0) or call.method.startswith("reopold")


def at_once(
    call: tuple[Any, ...],
    value: Tensor,
    gradient: Tensor | None,
    rows: Tensor,
    metrics: Tensor | None,
) -> None:
    _ops._core_loss(*call, value, gradient, rows, metrics, torch.get_num_threads())


def by_chunks(
    work: Work,
    value: Tensor,
    rows: Tensor,
    metrics: Tensor | None,
    evaluate: Callable[..., None] = at_once,
) -> None:
    """A loss that compares each position by itself."""
    settings, reduction, weights = _shares(work)
    positions = work.positions
    per_position = reduction == _ops._PER_POSITION
    values = value.new_empty(positions.count if per_position else ())
    of_chunk = None if metrics is None else torch.empty_like(metrics)
    total = value.new_zeros((), dtype=torch.float64)
    for start, stop in work.chunks():
        call = work.call(start, stop, settings=settings, reduction=reduction, weights=weights)
        value_of_chunk = values[start:stop] if per_position else values
        gradient = work.student.target(start, stop) if work.with_gradient else None
        evaluate(call, value_of_chunk, gradient, rows[start:stop], of_chunk)
        if gradient is not None:
            work.student.accumulate(start, stop, gradient)
        if metrics is not None and of_chunk is not None:
            add_metrics(metrics, of_chunk)
        if not per_position:
            total += values
    if per_position:
        positions.put(value, 0, values)
    else:
        value.copy_(total)
    work.finish()


_EXTREMES = {
    **{_ops.METRICS.index(name): torch.minimum for name in _MINIMA},
    **{_ops.METRICS.index(name): torch.maximum for name in _MAXIMA},
}


def add_metrics(metrics: Tensor, of_chunk: Tensor) -> None:
    extremes = {i: choose(metrics[i], of_chunk[i]) for i, choose in _EXTREMES.items()}
    metrics += of_chunk
    for i, extreme in extremes.items():
        metrics[i] = extreme


def _shares(work: Work) -> tuple[Tensor, int, Tensor | None]:
    """Settings, reduction and weights with which the losses of chunks add up to the whole one."""
    at, positions = work.of, work.positions
    reduction, weights = at.integers["reduction"], work.tensors.get("weights")
    kind, is_counted = _ops.REDUCTIONS[reduction], math.isnan(at.num_items)
    if kind == "mean" and is_counted and positions.idle is None:
        return at.with_items(positions.count), reduction, weights
    if kind != "seq_mean" and not (kind == "mean" and is_counted):
        return at.settings, reduction, weights
    active = work.mask
    if active is None:
        active = at.student.new_ones(positions.shape, dtype=torch.bool)
    if kind == "mean":
        share = 1 / active.sum().double()  # without any, nobody reads it
    else:
        of_sequence = active.sum(-1, keepdim=True) if active.dim() else active.long()
        sequences = (of_sequence > 0).sum() if is_counted else at.num_items
        share = 1 / of_sequence.double() / sequences
    share = positions.rows(share.expand(positions.shape).contiguous(), 0, positions.count)
    weights = share if weights is None else weights.double() * share
    return at.settings, _ops.REDUCTIONS.index("sum"), weights


# ----------------------------------------------------------------- operators


def _as_they_are(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would round the matrix products, autograd would record them."""

    @functools.wraps(kernel)
    def undisturbed(first: Tensor, *arguments: Any) -> Any:
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return kernel(first, *arguments)

    return undisturbed


@_as_they_are
def _loss_kernel(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, with_metrics = arguments
    call = Call(student, inputs)
    value, rows, metrics = call.outputs(with_metrics)
    outputs = (value, rows, metrics if with_metrics else None)
    call.check(*outputs)
    gradients = call.gradients()
    evaluate: Callable[..., None] = by_chunks
    if looks_at_all(call):
        from . import _phases

        evaluate = _phases.projected
    evaluate(Work(call, gradients), *outputs)
    return value, *gradients, rows, metrics


@_as_they_are
def _gradient_kernel(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, rows, upstream = arguments
    call = Call(student, inputs)
    gradients = call.gradients()
    work = Work(call, gradients)
    per_position = call.integers["reduction"] == _ops._PER_POSITION
    if per_position:
        upstream = work.positions.rows(upstream, 0, work.positions.count)
    for start, stop in work.chunks():
        arguments = work.call(start, stop)
        target = work.student.target(start, stop)
        of_chunk = upstream[start:stop] if per_position else upstream
        _ops._core_gradient(*arguments, rows[start:stop], of_chunk, target, work.threads)
        work.student.accumulate(start, stop, target)
    work.finish()
    return gradients


def _loss_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, with_metrics = arguments
    call = Call(student, inputs)
    _check_devices(call)
    value, rows, metrics = call.outputs(with_metrics)
    return value, *call.gradients(), rows, metrics


def _gradient_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = Call(student, arguments)
    _check_devices(call)
    return call.gradients()


def _check_devices(call: Call) -> None:
    named = {
        "teacher": call.teacher,
        **call.tensors,
        **{
            f"student.{part}": tensor
            for part, tensor in zip(_PARTS, call.student_head, strict=True)
        },
        **{
            f"teacher.{part}": tensor
            for part, tensor in zip(_PARTS, call.teacher_head, strict=True)
        },
    }
    _ops.check_devices(call.student, tuple(named.values()), tuple(named))


def _topk_fake(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, k, _, _ = arguments
    shape = (*hidden.shape[:-1], k)
    logprobs = hidden.new_empty(shape, dtype=head_dtype(hidden, weight))
    return hidden.new_empty(shape, dtype=torch.int64), logprobs


@_as_they_are
def _topk_kernel(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *others, numbers, max_bytes, k, temperature, valid_vocab = arguments
    ids, logprobs = _topk_fake(hidden, weight, *arguments)
    threads = torch.get_num_threads()
    number = temperature.item()
    positions = Positions(hidden.shape[:-1], None)
    vocabulary = valid_vocab or weight.shape[0]
    head = Head(hidden, weight, others, numbers.tolist(), vocabulary, [None] * len(_GRADIENTS))
    flat_ids, flat_logprobs = ids.view(positions.total, k), logprobs.view(positions.total, k)
    nothing = hidden.new_empty(0, hidden.shape[-1])  # a check, with valid_vocab as it came
    outputs = flat_ids[:0], flat_logprobs[:0]
    _C.topk(_stand_in(nothing, weight), number, valid_vocab, *outputs, threads)
    head.reserve(positions)
    rows = _rows_of_chunk(
        positions.count, "logits.max_bytes", max_bytes, [head], on_gpu=_ops.is_on_gpu(hidden)
    )
    head.allocate(rows)
    for start, stop in _chunks(positions.count, rows):
        outputs = flat_ids[start:stop], flat_logprobs[start:stop]
        _C.topk(head.logits(start, stop), number, vocabulary, *outputs, threads)
    return ids, logprobs


for _name, _kernel, _fake in (
    ("projected_loss", _loss_kernel, _loss_fake),
    ("projected_gradient", _gradient_kernel, _gradient_fake),
    ("projected_topk", _topk_kernel, _topk_fake),
):
    _ops.implement(_name, _kernel, _fake)

torch.library.register_autograd(
    "opdc::projected_loss", _ops._refuse_bare_operator, lib=_ops._library
)

# ----------------------------------------------------------------- derivatives


class _Gradient(_ops._FirstDerivative):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _gradient_operator(*inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        return _ops._vmap_by_loop(_Gradient, info, in_dims, inputs)


class _Loss(torch.autograd.Function):
    """Saves the gradients if forward computed them, and nothing else; otherwise the inputs."""

    @staticmethod
    def forward(  # written out: torch.compile sees by the number of parameters that there is no ctx
        student: Tensor,
        teacher: Tensor | None,
        tokens: Tensor | None,
        mask: Tensor | None,
        weights: Tensor | None,
        teacher_logprobs: Tensor | None,
        old_logprobs: Tensor | None,
        reference_logprobs: Tensor | None,
        slot_ids: Tensor | None,
        slot_logprobs: Tensor | None,
        teacher_entropy: Tensor | None,
        tail_logprobs: Tensor | None,
        prefix_mask: Tensor | None,
        uniforms: Tensor | None,
        settings: Tensor,
        method: str,
        reduction: int,
        advantage: int,
        support: int,
        normalize: int,
        region: int,
        outlier: int,
        k: int,
        valid_vocab: int,
        student_weight: Tensor | None,
        student_bias: Tensor | None,
        student_adapter_inputs: Tensor | None,
        student_adapter_weight: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        teacher_adapter_inputs: Tensor | None,
        teacher_adapter_weight: Tensor | None,
        numbers: Tensor,
        max_bytes: int,
        wanted: int,
        with_metrics: bool,
    ) -> tuple[Tensor, ...]:
        tensors = (
            *(teacher, tokens, mask, weights, teacher_logprobs, old_logprobs, reference_logprobs),
            *(slot_ids, slot_logprobs, teacher_entropy, tail_logprobs, prefix_mask, uniforms),
            settings,
        )
        integers = (reduction, advantage, support, normalize, region, outlier, k, valid_vocab)
        heads = (
            *(student_weight, student_bias, student_adapter_inputs, student_adapter_weight),
            *(teacher_weight, teacher_bias, teacher_adapter_inputs, teacher_adapter_weight),
        )
        call = (*tensors, method, *integers, *heads, numbers, max_bytes, wanted, with_metrics)
        return _ops._without_derivative(_loss_operator, student, *call)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *gradients, rows, metrics = output
        *call, _ = inputs
        # The gradients stay differentiable outputs, see _ops._Loss.
        ctx.mark_non_differentiable(rows, metrics)
        ctx.set_materialize_grads(False)
        ctx.wanted = call[-1]
        ctx.dtypes = [getattr(call[i], "dtype", None) for i in _DIFFERENTIABLE]
        if ctx.wanted:
            ctx.save_for_backward(*gradients)
        else:
            tensors = len(_ops.TENSORS) + 2  # with the student and the settings
            options = tensors + 1 + len(_ops.INTEGERS) + 1
            ctx.save_for_backward(*call[:tensors], *call[options:-2], rows)
            ctx.options = call[tensors:options]
            ctx.max_bytes = call[-2]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * (_ARGUMENTS + 2)
        if upstream is None:
            return tuple(found)
        needed = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        if ctx.wanted:
            gradients = tuple(
                _ops._scaled(gradient, upstream) if needs else gradient
                for gradient, needs in zip(ctx.saved_tensors, needed, strict=True)
            )
        else:
            tensors = len(_ops.TENSORS) + 2
            *saved, rows = ctx.saved_tensors
            wanted = bits_of(needed)
            call = (
                *(*saved[:tensors], *ctx.options, *saved[tensors:]),
                *(ctx.max_bytes, wanted, rows, upstream),
            )
            if _ops._differentiable_again():
                gradients = _ops._apply(_Gradient, *call)
            else:
                gradients = _gradient_operator(*call)
        for i, gradient, dtype, needs in zip(
            _DIFFERENTIABLE, gradients, ctx.dtypes, needed, strict=True
        ):
            if needs:
                found[i] = gradient.to(dtype)
        return tuple(found)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        return _ops._vmap_by_loop(_Loss, info, in_dims, inputs)


# Where the tensors that receive a gradient stand among the inputs.
_DIFFERENTIABLE = (0, *(1 + _ops._ARGUMENTS + i for i in range(len(_PARTS))))

# ----------------------------------------------------------------- what the functions call


def _given(model: Tensor | Projection | None) -> Tensor | None:
    return model.hidden if isinstance(model, Projection) else model


def _parts(model: Tensor | Projection | None) -> tuple[Tensor | None, ...]:
    if not isinstance(model, Projection):
        return (None,) * len(_PARTS)
    return model.weight, model.bias, *(model.adapter or (None, None))


def _numbers(*models: Tensor | Projection | None) -> Tensor:
    return _ops.scheduled(
        *(
            number
            for model in models
            for number in (
                (model.scale, model.softcap or 0.0) if isinstance(model, Projection) else (1.0, 0.0)
            )
        )
    )


def _max_bytes(*models: Tensor | Projection | None) -> int:
    given = [model.max_bytes for model in models if isinstance(model, Projection)]
    limits = [limit for limit in given if limit is not None]
    return min(limits) if limits else 0  # torch.compile knows no default


def flat(
    student: Tensor | Projection,
    method: str,
    tensors: Mapping[str, Any],
    settings: Tensor,
    integers: Mapping[str, int],
    valid_vocab: int,
) -> tuple[tuple[Any, ...], list[bool]]:
    """The call as the operators take it, but for `wanted`, and which of its tensors need gradients.

    `tensors["teacher"]` may be a Projection.
    """
    teacher = tensors.get("teacher")
    parts = _parts(student)
    call = (
        *(_given(student), _given(teacher)),
        *(tensors.get(name) for name in _ops.TENSORS[1:]),
        *(settings, method),
        *(integers.get(name, 0) for name in _ops.INTEGERS),
        *(valid_vocab, *parts, *_parts(teacher)),
        *(_numbers(student, teacher), _max_bytes(student, teacher)),
    )
    differentiable = (_given(student), *parts)
    needed = [
        torch.is_grad_enabled() and part is not None and part.requires_grad
        for part in differentiable
    ]
    return call, needed


def loss(
    student: Tensor | Projection,
    method: str,
    tensors: Mapping[str, Any],
    settings: Tensor,
    integers: Mapping[str, int],
    valid_vocab: int,
    *,
    with_metrics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Value and metrics, as `_ops.loss`; any of the models may be a Projection."""
    call, needed = flat(student, method, tensors, settings, integers, valid_vocab)
    if not any(needed) and not _ops.transforms_active():
        value, *_, metrics = _ops._without_derivative(_loss_operator, *call, 0, with_metrics)
    else:
        # Gradients of logits in float16 would underflow, see _ops.loss; those of a Projection stay
        # in the type of the arithmetic until backward.
        early = integers["reduction"] != _ops._PER_POSITION and (
            isinstance(student, Projection) or student.dtype is not torch.float16
        )
        wanted = bits_of(needed) if early else 0
        value, *_, metrics = _ops._apply(_Loss, *call, wanted, with_metrics)
    return value, metrics


def topk(
    projection: Projection, k: int, temperature: Tensor, valid_vocab: int
) -> tuple[Tensor, Tensor]:
    """Ids and log-probs."""
    return _topk_operator(
        *(projection.hidden, *_parts(projection), _numbers(projection), _max_bytes(projection)),
        *(k, temperature, valid_vocab),
    )
