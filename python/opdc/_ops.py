"""The operators `torch.ops.opdc.*` and their derivatives: the only Python that touches the C core.

Two operators compute a loss, one of them over the student's memory; two give a gradient. Around
them stand autograd functions, because operators alone cannot keep a gradient from the forward call
and would answer a second derivative with a silent zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _C

__version__ = _C.__version__
METRICS = _C.metric_names()
REDUCTIONS = ("none", "sum", "mean", "seq_mean")  # in the order of opdc_reduction
ADVANTAGES = ("old", "current")  # in the order of opdc_advantage
METRICS_OF = {
    (method, teacher_logits): _C.metrics_of(method, teacher_logits)
    for method in _C.methods()
    for teacher_logits in (False, True)
}

_PER_POSITION = REDUCTIONS.index("none")

# ----------------------------------------------------------------- operators

_TENSORS = (
    "Tensor? teacher, Tensor? tokens, Tensor? mask, Tensor? weights, Tensor? teacher_logprobs, "
    "Tensor? old_logprobs, Tensor? reference_logprobs, Tensor settings"
)
_OPTIONS = "str method, int reduction, int advantage, SymInt valid_vocab"

_library = torch.library.Library("opdc", "DEF")
for _schema in (
    f"loss(Tensor student, {_TENSORS}, {_OPTIONS}, bool with_gradient, bool with_metrics)"
    " -> (Tensor value, Tensor gradient, Tensor rows, Tensor metrics)",
    f"loss_(Tensor(a!) student, {_TENSORS}, {_OPTIONS}, bool with_metrics)"
    " -> (Tensor value, Tensor rows, Tensor metrics)",
    f"gradient(Tensor student, {_TENSORS}, {_OPTIONS}, Tensor rows, Tensor upstream) -> Tensor",
    "scale(Tensor gradient, Tensor upstream) -> Tensor",
    "scale_(Tensor(a!) gradient, Tensor upstream) -> ()",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

# Loosely typed: their arguments are passed on as they come.
_core_loss: Callable[..., None] = _C.loss
_core_gradient: Callable[..., None] = _C.gradient
_loss_operator: Callable[..., tuple[Tensor, ...]] = torch.ops.opdc.loss.default
_loss_inplace_operator: Callable[..., tuple[Tensor, ...]] = torch.ops.opdc.loss_.default
_gradient_operator: Callable[..., Tensor] = torch.ops.opdc.gradient.default
_scale_operator: Callable[..., Tensor] = torch.ops.opdc.scale.default
_scale_inplace_operator: Callable[..., None] = torch.ops.opdc.scale_.default


def _outputs(
    student: Tensor, teacher: Tensor | None, reduction: int, with_metrics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty value, rows and metrics of a call."""
    double = student.dtype is torch.float64 or (
        teacher is not None and teacher.dtype is torch.float64
    )
    positions = student.shape[:-1]
    value = student.new_empty(
        positions if reduction == _PER_POSITION else (),
        dtype=torch.float64 if double else torch.float32,
    )
    rows = student.new_empty((math.prod(positions), _C.ROW), dtype=torch.float64)
    metrics = student.new_empty(len(METRICS) if with_metrics else 0, dtype=torch.float64)
    return value, rows, metrics


def _loss_cpu(student: Tensor, teacher: Tensor | None, *call: Any) -> tuple[Tensor, ...]:
    *tensors, method, reduction, advantage, valid_vocab, with_gradient, with_metrics = call
    value, rows, metrics = _outputs(student, teacher, reduction, with_metrics)
    # Not empty_like: that would copy the strides of transposed logits.
    gradient = student.new_empty(student.shape if with_gradient else 0)
    checked = (method, student, teacher, *tensors, reduction, advantage, valid_vocab)
    outputs = (value, gradient if with_gradient else None, rows, metrics if with_metrics else None)
    _core_loss(*checked, *outputs, torch.get_num_threads())
    return value, gradient, rows, metrics


def _loss_inplace_cpu(student: Tensor, teacher: Tensor | None, *call: Any) -> tuple[Tensor, ...]:
    *tensors, method, reduction, advantage, valid_vocab, with_metrics = call
    if teacher is not None and _share_memory(student, teacher):
        raise ValueError(
            "inplace=True would overwrite the teacher, whose memory overlaps with the student's: "
            "give teacher.clone(), or inplace=False"
        )
    value, rows, metrics = _outputs(student, teacher, reduction, with_metrics)
    checked = (method, student, teacher, *tensors, reduction, advantage, valid_vocab)
    outputs = (value, student, rows, metrics if with_metrics else None)
    _core_loss(*checked, *outputs, torch.get_num_threads())
    _overwritten(student)
    return value, rows, metrics


def _share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether the stretches of memory from first to last element overlap."""

    def last_byte(tensor: Tensor) -> int:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        offset = sum((size - 1) * stride for size, stride in steps)
        return tensor.data_ptr() + (offset + 1) * tensor.element_size() - 1

    if not first.numel() or not second.numel():
        return False
    return first.data_ptr() <= last_byte(second) and second.data_ptr() <= last_byte(first)


def _gradient_cpu(student: Tensor, *call: Any) -> Tensor:
    *tensors, method, reduction, advantage, valid_vocab, rows, upstream = call
    gradient = student.new_empty(student.shape)
    checked = (method, student, *tensors, reduction, advantage, valid_vocab)
    _core_gradient(*checked, rows, upstream, gradient, torch.get_num_threads())
    return gradient


def _scale_cpu(gradient: Tensor, upstream: Tensor) -> Tensor:
    output = gradient.new_empty(gradient.shape)
    _C.scale(gradient, upstream, output, torch.get_num_threads())
    return output


def _scale_inplace_cpu(gradient: Tensor, upstream: Tensor) -> None:
    _C.scale(gradient, upstream, gradient, torch.get_num_threads())
    _overwritten(gradient)


def _overwritten(tensor: Tensor) -> None:
    """Tell autograd: whoever saved the old contents raises instead of computing with the new."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


_NAMES = (
    *("teacher", "tokens", "mask", "weights"),
    *("teacher_logprobs", "old_logprobs", "reference_logprobs"),
)


def _check_devices(student: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Beside a meta tensor, fake kernels run for real: they would return uninitialised memory."""
    for name, tensor in zip(_NAMES, tensors, strict=False):
        if tensor is not None and tensor.device != student.device:
            raise TypeError(
                f"{name} is on {tensor.device} but student is on {student.device}: "
                "move them to the same device"
            )


def _loss_fake(student: Tensor, *call: Any) -> tuple[Tensor, ...]:
    reduction, with_gradient, with_metrics = call[9], call[12], call[13]
    _check_devices(student, call)
    value, rows, metrics = _outputs(student, call[0], reduction, with_metrics)
    return value, student.new_empty(student.shape if with_gradient else 0), rows, metrics


def _loss_inplace_fake(student: Tensor, *call: Any) -> tuple[Tensor, ...]:
    _check_devices(student, call)
    return _outputs(student, call[0], call[9], call[12])


def _gradient_fake(student: Tensor, *call: Any) -> Tensor:
    _check_devices(student, call)
    return student.new_empty(student.shape)


def _scale_fake(gradient: Tensor, upstream: Tensor) -> Tensor:
    if gradient.device != upstream.device:
        raise TypeError(f"upstream is on {upstream.device} but gradient is on {gradient.device}")
    return gradient.new_empty(gradient.shape)


def _scale_inplace_fake(gradient: Tensor, upstream: Tensor) -> None:
    _scale_fake(gradient, upstream)


def _refuse_cuda(*_: Any) -> NoReturn:
    raise TypeError("CUDA tensors are not supported yet: move them to the CPU with .cpu()")


for _name, _cpu, _fake in (
    ("loss", _loss_cpu, _loss_fake),
    ("loss_", _loss_inplace_cpu, _loss_inplace_fake),
    ("gradient", _gradient_cpu, _gradient_fake),
    ("scale", _scale_cpu, _scale_fake),
    ("scale_", _scale_inplace_cpu, _scale_inplace_fake),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _refuse_cuda, "CUDA")
    torch.library.register_fake(f"opdc::{_name}", _fake, lib=_library)


def _refuse_bare_operator(*_: Any) -> NoReturn:
    raise RuntimeError(
        "torch.ops.opdc.loss has no derivative of its own: call the functions of opdc; and under "
        "torch.compile use loss.backward() in place of torch.func.grad, which steps over them"
    )


# Without this, torch.compile(torch.func.grad(f)) would return a gradient of zeros: it steps over
# every autograd.Function and finds an operator without a formula. Now torch raises an error there.
torch.library.register_autograd("opdc::loss", _refuse_bare_operator, lib=_library)

# ----------------------------------------------------------------- derivatives


def transforms_active() -> bool:
    """Whether we run under torch.func (grad, vmap, ...), where `requires_grad` may read False."""
    return torch._C._are_functorch_transforms_active()


def _vmap_by_loop(
    function: type[torch.autograd.Function], info: Any, in_dims: Any, inputs: Any
) -> tuple[Any, Any]:
    """One call per element of the batch, stacked. (Leading axes of the logits are faster.)"""
    results = []
    for index in range(info.batch_size):
        one = (
            value if dim is None else value.select(dim, index)
            for value, dim in zip(inputs, in_dims, strict=True)
        )
        results.append(_apply(function, *one))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    if torch.compiler.is_compiling() or transforms_active():
        return function.apply(*inputs)
    # The C function under it. `Function.apply` binds the inputs to the signature first, which takes
    # as long as the whole loss of a small vocabulary.
    return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


def _without_derivative(
    operator: Callable[..., tuple[Tensor, ...]], *inputs: Any
) -> tuple[Tensor, ...]:
    """Calls an operator past the formula that refuses, which costs as much as the loss itself."""
    if torch.compiler.is_compiling() or transforms_active():
        return operator(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


class _FirstDerivative(torch.autograd.Function):
    """A gradient that cannot be differentiated again, and says so instead of giving zeros."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(*_: Any) -> NoReturn:
        raise RuntimeError(
            "opdc has no second derivatives: its losses cannot be used under a gradient penalty, "
            "a Hessian or torch.autograd.grad(torch.autograd.grad(...)); write the loss in plain "
            "PyTorch for that"
        )


class _Gradient(_FirstDerivative):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _gradient_operator(*inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        return _vmap_by_loop(_Gradient, info, in_dims, inputs)


class _Scale(_FirstDerivative):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _scale_operator(*inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        return _vmap_by_loop(_Scale, info, in_dims, inputs)


def _differentiable_again() -> bool:
    """Whether the result of a running backward could be differentiated, so that it needs a node.

    With create_graph=True and under torch.func; torch.compile refuses second derivatives itself.
    """
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transforms_active())


# Private to torch: without it every backward is taken for one whose graph is kept.
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """upstream * gradient, in the memory of a saved gradient that nobody will ask for again."""
    if _differentiable_again():
        return _apply(_Scale, gradient, upstream)  # type: ignore[no-any-return]
    gradient = gradient.detach()
    if (
        torch.compiler.is_compiling()
        or _graph_is_kept()
        or torch._C._functorch.is_legacy_batchedtensor(upstream)  # is_grads_batched=True
    ):
        return _scale_operator(gradient, upstream)
    _scale_inplace_operator(gradient, upstream)
    return gradient


class _Loss(torch.autograd.Function):
    """Saves the gradient if forward computed it, and nothing else; otherwise the inputs."""

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
        settings: Tensor,
        method: str,
        reduction: int,
        advantage: int,
        valid_vocab: int,
        with_gradient: bool,
        with_metrics: bool,
    ) -> tuple[Tensor, ...]:
        tensors = (teacher, tokens, mask, weights, teacher_logprobs, old_logprobs)
        options = (method, reduction, advantage, valid_vocab, with_gradient, with_metrics)
        return _without_derivative(
            _loss_operator, student, *tensors, reference_logprobs, settings, *options
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, gradient, rows, metrics = output
        *call, ctx.with_gradient, _ = inputs
        # The gradient stays a differentiable output: it is what makes a second backward arrive at
        # _FirstDerivative. Unused outputs must not become zeros of V numbers a row.
        ctx.mark_non_differentiable(rows, metrics)
        ctx.set_materialize_grads(False)
        if ctx.with_gradient:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(*call[:9], rows)
            ctx.options = call[9:]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 14
        if upstream is None:
            return None, *nothing
        if ctx.with_gradient:
            (gradient,) = ctx.saved_tensors
            return _scaled(gradient, upstream), *nothing
        *tensors, rows = ctx.saved_tensors
        call = (*tensors, *ctx.options, rows, upstream)
        if _differentiable_again():
            return _apply(_Gradient, *call), *nothing
        return _gradient_operator(*call), *nothing

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        return _vmap_by_loop(_Loss, info, in_dims, inputs)


class _LossInplace(torch.autograd.Function):
    """Saves the student, which forward turned into the gradient.

    Not marked as dirty: the logits are spent, not a result, and mark_dirty fails on views.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _loss_inplace_operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, rows, metrics = output
        ctx.mark_non_differentiable(rows, metrics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 13
        if upstream is None:
            return None, *nothing
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, upstream), *nothing


# ----------------------------------------------------------------- what functional.py calls


def settings(
    temperature: float,
    mixture: float,
    clip_low: float,
    clip_high: float,
    discount: float,
    reward_scale: float,
    num_items: float | Tensor | None,
) -> Tensor:
    """The numbers of a call as the tensor that `opdc_settings` describes."""
    numbers = (temperature, mixture, clip_low, clip_high, discount, reward_scale)
    items = math.nan if num_items is None else num_items
    if torch.compiler.is_compiling():
        # torch.tensor(numbers) would compile again for every value of a schedule.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        last = _as_setting(items) if isinstance(items, Tensor) else one * items
        return torch.stack([*(one * number for number in numbers), last])
    if isinstance(items, Tensor):
        first = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return torch.cat([first, _as_setting(items).reshape(1)])
    return torch.tensor((*numbers, items), dtype=torch.float64, device="cpu")


def _as_setting(number: Tensor) -> Tensor:
    return number.detach().to("cpu", torch.float64)


def loss(
    student: Tensor,
    tensors: Sequence[Tensor | None],
    method: str,
    reduction: int,
    advantage: int,
    valid_vocab: int,
    *,
    inplace: bool = False,
    with_metrics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Value and metrics. `tensors`: teacher, ..., settings in the order of the operators."""
    call = (student, *tensors, method, reduction, advantage, valid_vocab)
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    if not needs_gradient and not transforms_active():
        value, _, _, metrics = _without_derivative(_loss_operator, *call, False, with_metrics)
    elif inplace:
        value, _, metrics = _apply(_LossInplace, *call, with_metrics)
    else:
        # A float16 gradient under a mean underflows before a loss scale reaches it: backward
        # computes it with the scale in it.
        early = reduction != _PER_POSITION and student.dtype is not torch.float16
        with_gradient = needs_gradient and early
        value, _, _, metrics = _apply(_Loss, *call, with_gradient, with_metrics)
    return value, metrics
