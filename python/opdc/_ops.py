"""The operators `torch.ops.opdc.*` and their derivatives: the only Python that touches the C core.

Two operators compute a loss, one of them over the student's memory; two give a gradient. Around
them stand autograd functions, because operators alone cannot keep a gradient from the forward call
and would answer a second derivative with a silent zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _C

__version__ = _C.__version__
METRICS = _C.metric_names()
REDUCTIONS = ("none", "sum", "mean", "seq_mean")  # in the order of opdc_reduction
ADVANTAGES = ("old", "current")  # in the order of opdc_advantage, and so on
SUPPORTS = ("full", "teacher", "student", "teacher+token")
NORMALIZATIONS = ("none", "teacher", "both", "tail", "generalized")
REGIONS = ("sampled", "expected", "threshold")
OUTLIERS = ("forward_kl", "mask", "clip")
METRICS_OF = {
    (method, teacher_logits, support): _C.metrics_of(method, teacher_logits, support)
    for method in _C.methods()
    for teacher_logits in (False, True)
    for support in range(len(SUPPORTS))
}

_PER_POSITION = REDUCTIONS.index("none")

# ----------------------------------------------------------------- operators

# What a loss is called with, in the order of the C core. All that C takes is here and in `Call`.
TENSORS = (
    *("teacher", "tokens", "mask", "weights", "teacher_logprobs", "old_logprobs"),
    *("reference_logprobs", "slot_ids", "slot_logprobs", "teacher_entropy", "tail_logprobs"),
    *("prefix_mask", "uniforms"),
)
INTEGERS = ("reduction", "advantage", "support", "normalize", "region", "outlier", "k")
NUMBERS = {  # opdc_settings, and what it holds where a loss has no use for it
    "temperature": 1.0,
    "mixture": 0.0,
    "clip_low": math.inf,
    "clip_high": math.inf,
    "discount": 0.0,
    "reward_scale": 1.0,
    "threshold": math.nan,
    "entropy_threshold": math.nan,
    "forward_weight": 1.0,
    "prefix_weight": 0.0,
    "keep": 1.0,
}

_CALL = ", ".join(
    [
        *(f"Tensor? {name}" for name in TENSORS),
        "Tensor settings, str method",
        *(f"int {name}" for name in INTEGERS[:-1]),
        "SymInt k, SymInt valid_vocab",
    ]
)
_REDUCTION = len(TENSORS) + 2  # its place among the arguments after the student
_ARGUMENTS = len(TENSORS) + 2 + len(INTEGERS) + 1  # those of _CALL

SAMPLING_TENSORS = ("teacher", "epsilon", "draft_tokens", "uniforms")
# What a sampler is called with, in that order. `numbers` holds the temperature and top_p; top_k and
# valid_vocab are 0 where there are none, the ids of eos_map −1.
_SAMPLING = (
    "Tensor student, Tensor? teacher, Tensor? epsilon, Tensor? drafts, Tensor? uniforms, "
    "Tensor numbers, SymInt top_k, SymInt valid_vocab, SymInt student_eos, SymInt teacher_eos"
)

_library = torch.library.Library("opdc", "DEF")
for _schema in (
    f"loss(Tensor student, {_CALL}, bool with_gradient, bool with_metrics)"
    " -> (Tensor value, Tensor gradient, Tensor rows, Tensor metrics)",
    f"loss_(Tensor(a!) student, {_CALL}, bool with_metrics)"
    " -> (Tensor value, Tensor rows, Tensor metrics)",
    f"gradient(Tensor student, {_CALL}, Tensor rows, Tensor upstream) -> Tensor",
    "scale(Tensor gradient, Tensor upstream) -> Tensor",
    "topk(Tensor logits, SymInt k, Tensor temperature, SymInt valid_vocab)"
    " -> (Tensor ids, Tensor logprobs)",
    f"sample({_SAMPLING}) -> (Tensor tokens, Tensor columns)",
    f"blend({_SAMPLING}) -> (Tensor logprobs, Tensor columns)",
    "drift_gate(Tensor logprobs, Tensor old_logprobs, Tensor? mask, int block, Tensor kappa)"
    " -> Tensor",
    "scale_(Tensor(a!) gradient, Tensor upstream) -> ()",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

# Loosely typed: their arguments are passed on as they come.
_core_loss: Callable[..., None] = _C.loss
_core_gradient: Callable[..., None] = _C.gradient
_core_sample: Callable[..., None] = _C.sample
_core_blend: Callable[..., None] = _C.blend
_loss_operator: Callable[..., tuple[Tensor, ...]] = torch.ops.opdc.loss.default
_loss_inplace_operator: Callable[..., tuple[Tensor, ...]] = torch.ops.opdc.loss_.default
_gradient_operator: Callable[..., Tensor] = torch.ops.opdc.gradient.default
_scale_operator: Callable[..., Tensor] = torch.ops.opdc.scale.default
_scale_inplace_operator: Callable[..., None] = torch.ops.opdc.scale_.default
_topk_operator: Callable[..., tuple[Tensor, Tensor]] = torch.ops.opdc.topk.default
_sample_operator: Callable[..., tuple[Tensor, Tensor]] = torch.ops.opdc.sample.default
_blend_operator: Callable[..., tuple[Tensor, Tensor]] = torch.ops.opdc.blend.default
_drift_gate_operator: Callable[..., Tensor] = torch.ops.opdc.drift_gate.default


def _arithmetic(student: Tensor, teacher: Tensor | None = None) -> torch.dtype:
    """The dtype that is computed in, and that numbers come out in."""
    double = torch.float64 in (student.dtype, None if teacher is None else teacher.dtype)
    return torch.float64 if double else torch.float32


def _outputs(
    student: Tensor, arithmetic: torch.dtype, reduction: int, with_metrics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty value, rows and metrics of a call."""
    positions = student.shape[:-1]
    value = student.new_empty(positions if reduction == _PER_POSITION else (), dtype=arithmetic)
    rows = student.new_empty((math.prod(positions), _C.ROW), dtype=torch.float64)
    metrics = student.new_empty(len(METRICS) if with_metrics else 0, dtype=torch.float64)
    return value, rows, metrics


def _in_order(student: Tensor, call: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of an operator as the C core takes them."""
    *tensors, settings = call[: len(TENSORS) + 1]
    method, *integers = call[len(TENSORS) + 1 :]
    return method, student, *tensors, settings, *integers


def _loss_kernel(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *call, with_gradient, with_metrics = arguments
    arithmetic = _arithmetic(student, call[0])
    value, rows, metrics = _outputs(student, arithmetic, call[_REDUCTION], with_metrics)
    # Not empty_like: that would copy the strides of transposed logits.
    gradient = student.new_empty(student.shape if with_gradient else 0)
    outputs = (value, gradient if with_gradient else None, rows, metrics if with_metrics else None)
    _core_loss(*_in_order(student, call), *outputs, torch.get_num_threads())
    return value, gradient, rows, metrics


def _loss_inplace_kernel(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *call, with_metrics = arguments
    teacher = call[0]
    if teacher is not None:
        require_apart(student, teacher)
    arithmetic = _arithmetic(student, teacher)
    value, rows, metrics = _outputs(student, arithmetic, call[_REDUCTION], with_metrics)
    outputs = (value, student, rows, metrics if with_metrics else None)
    _core_loss(*_in_order(student, call), *outputs, torch.get_num_threads())
    _overwritten(student)
    return value, rows, metrics


def require_apart(student: Tensor, teacher: Tensor) -> None:
    if _share_memory(student, teacher):
        raise ValueError(
            "inplace=True would overwrite the teacher, whose memory overlaps with the student's: "
            "give teacher.clone(), or inplace=False"
        )


def _share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether the stretches of memory from first to last element overlap. (Of tensors on different
    devices, which the core refuses, addresses mean nothing.)"""

    def last_byte(tensor: Tensor) -> int:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        offset = sum((size - 1) * stride for size, stride in steps)
        return tensor.data_ptr() + (offset + 1) * tensor.element_size() - 1

    if not first.numel() or not second.numel() or first.device != second.device:
        return False
    return first.data_ptr() <= last_byte(second) and second.data_ptr() <= last_byte(first)


def _gradient_kernel(student: Tensor, *arguments: Any) -> Tensor:
    *call, rows, upstream = arguments
    gradient = student.new_empty(student.shape)
    _core_gradient(*_in_order(student, call), rows, upstream, gradient, torch.get_num_threads())
    return gradient


def _scale_kernel(gradient: Tensor, upstream: Tensor) -> Tensor:
    output = gradient.new_empty(gradient.shape)
    _C.scale(gradient, upstream, output, torch.get_num_threads())
    return output


def _scale_inplace_kernel(gradient: Tensor, upstream: Tensor) -> None:
    _C.scale(gradient, upstream, gradient, torch.get_num_threads())
    _overwritten(gradient)


def _overwritten(tensor: Tensor) -> None:
    """Tell autograd: whoever saved the old contents raises instead of computing with the new."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def check_devices(
    first: Tensor,
    tensors: Sequence[Tensor | None],
    names: Sequence[str] = TENSORS,
    name_of_first: str = "student",
) -> None:
    """What the core checks, for those that come before it: fake kernels, which beside a meta tensor
    run for real and would return uninitialised memory, and what is done with tensors in Python."""
    for name, tensor in zip(names, tensors, strict=False):
        if tensor is not None and tensor.device != first.device:
            raise TypeError(
                f"{name} is on {tensor.device} but {name_of_first} is on {first.device}: "
                "move them to the same device"
            )


def _loss_fake(student: Tensor, *call: Any) -> tuple[Tensor, ...]:
    *_, with_gradient, with_metrics = call
    check_devices(student, call)
    arithmetic = _arithmetic(student, call[0])
    value, rows, metrics = _outputs(student, arithmetic, call[_REDUCTION], with_metrics)
    return value, student.new_empty(student.shape if with_gradient else 0), rows, metrics


def _loss_inplace_fake(student: Tensor, *call: Any) -> tuple[Tensor, ...]:
    check_devices(student, call)
    return _outputs(student, _arithmetic(student, call[0]), call[_REDUCTION], call[-1])


def _gradient_fake(student: Tensor, *call: Any) -> Tensor:
    check_devices(student, call)
    return student.new_empty(student.shape)


def _scale_fake(gradient: Tensor, upstream: Tensor) -> Tensor:
    check_devices(gradient, (upstream,), ("upstream",), "gradient")
    return gradient.new_empty(gradient.shape)


def _scale_inplace_fake(gradient: Tensor, upstream: Tensor) -> None:
    _scale_fake(gradient, upstream)


def _topk_fake(
    logits: Tensor, k: int, temperature: Tensor, valid_vocab: int
) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k)
    ids = logits.new_empty(shape, dtype=torch.int64)
    return ids, logits.new_empty(shape, dtype=_arithmetic(logits))


def _topk_kernel(
    logits: Tensor, k: int, temperature: Tensor, valid_vocab: int
) -> tuple[Tensor, Tensor]:
    ids, logprobs = _topk_fake(logits, k, temperature, valid_vocab)
    number = temperature.item()
    _C.topk(logits, number, valid_vocab, ids, logprobs, torch.get_num_threads())
    return ids, logprobs


def _sampled(student: Tensor, tensors: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Empty tokens and columns of a sampler."""
    positions = student.shape[:-1]
    columns = student.new_empty(
        (*positions, _C.SAMPLE_COLUMNS), dtype=_arithmetic(student, tensors[0])
    )
    return student.new_empty(positions, dtype=torch.int64), columns


def _blended(student: Tensor, tensors: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Empty log-probs and columns of a blend."""
    _, columns = _sampled(student, tensors)
    return columns.new_empty(student.shape), columns


def _sample_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    check_devices(student, arguments, SAMPLING_TENSORS)
    return _sampled(student, arguments)


def _blend_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    check_devices(student, arguments, SAMPLING_TENSORS)
    return _blended(student, arguments)


def _sampling_in_order(student: Tensor, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of a sampler as the C core takes them."""
    *tensors, numbers = arguments[:5]
    return student, *tensors, *numbers.tolist(), *arguments[5:]


def _sample_kernel(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    outputs = _sampled(student, arguments)
    _core_sample(*_sampling_in_order(student, arguments), *outputs, torch.get_num_threads())
    return outputs


def _blend_kernel(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    outputs = _blended(student, arguments)
    _core_blend(*_sampling_in_order(student, arguments), *outputs, torch.get_num_threads())
    return outputs


def _drift_gate_fake(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor | None, block: int, kappa: Tensor
) -> Tensor:
    check_devices(logprobs, (old_logprobs, mask), ("old_logprobs", "mask"), "logprobs")
    dtype = torch.promote_types(logprobs.dtype, old_logprobs.dtype)
    return logprobs.new_empty(logprobs.shape, dtype=torch.promote_types(dtype, torch.float32))


def _drift_gate_kernel(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor | None, block: int, kappa: Tensor
) -> Tensor:
    weights = _drift_gate_fake(logprobs, old_logprobs, mask, block, kappa)
    _C.drift_gate(logprobs, old_logprobs, mask, weights, block, kappa.item())
    return weights


def _refuse_device(*arguments: Any) -> NoReturn:
    devices = {str(x.device) for x in arguments if isinstance(x, Tensor) and not x.is_cpu}
    raise TypeError(
        f"got tensors on {', '.join(sorted(devices))}: opdc computes on CPUs and on CUDA GPUs; "
        "move them with .cpu()"
    )


def implement(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give an operator its kernel, and what it is to tensors without data."""
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    for others in ("MPS", "XPU", "PrivateUse1"):
        _library.impl(name, _refuse_device, others)
    torch.library.register_fake(f"opdc::{name}", fake, lib=_library)


for _name, _kernel, _fake in (
    ("loss", _loss_kernel, _loss_fake),
    ("loss_", _loss_inplace_kernel, _loss_inplace_fake),
    ("gradient", _gradient_kernel, _gradient_fake),
    ("scale", _scale_kernel, _scale_fake),
    ("scale_", _scale_inplace_kernel, _scale_inplace_fake),
    ("topk", _topk_kernel, _topk_fake),
    ("sample", _sample_kernel, _sample_fake),
    ("blend", _blend_kernel, _blend_fake),
    ("drift_gate", _drift_gate_kernel, _drift_gate_fake),
):
    implement(_name, _kernel, _fake)


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
    if not gradient.numel():  # e.g. of hidden states of size 0
        return gradient
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
        with_gradient: bool,
        with_metrics: bool,
    ) -> tuple[Tensor, ...]:
        tensors = (
            *(teacher, tokens, mask, weights, teacher_logprobs, old_logprobs, reference_logprobs),
            *(slot_ids, slot_logprobs, teacher_entropy, tail_logprobs, prefix_mask, uniforms),
            settings,
        )
        integers = (reduction, advantage, support, normalize, region, outlier, k, valid_vocab)
        return _without_derivative(
            _loss_operator, student, *tensors, method, *integers, with_gradient, with_metrics
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
            tensors = len(TENSORS) + 2  # with the student and the settings
            ctx.save_for_backward(*call[:tensors], rows)
            ctx.options = call[tensors:]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (_ARGUMENTS + 2)
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
        nothing = (None,) * (_ARGUMENTS + 1)
        if upstream is None:
            return None, *nothing
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, upstream), *nothing


# ----------------------------------------------------------------- what functional.py calls


def settings(numbers: Mapping[str, float], num_items: float | Tensor | None) -> Tensor:
    """The numbers of a call as the tensor that `opdc_settings` describes, on the CPU."""
    first = tuple({**NUMBERS, **numbers}.values())
    items = math.nan if num_items is None else num_items
    if isinstance(items, Tensor):
        last = items.detach().to("cpu", torch.float64)
        return torch.cat([scheduled(*first), last.reshape(1)])
    return scheduled(*first, items)


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether the host would have to wait to read it."""
    return tensor.is_cuda


def fold(
    num_items: Tensor, student: Tensor, mask: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mask and weights with a denominator in them that only a GPU knows: beside them `num_items` is
    1. `student` are logits or hidden states."""
    check_devices(student, (mask, weights), ("mask", "weights"))
    positions = student.shape[:-1]
    items = num_items.detach().to(student.device, torch.float64)
    counts = items != 0  # a share of nothing is not evaluated: 0, where 0 / 0 would be NaN
    mask = counts.expand(positions) if mask is None else mask & counts
    # NaN for what the core refuses where it can look. Its factors are in float64 too.
    items = items.where((items >= 0) & (items <= 1e300), math.nan).where(counts, 1)
    if weights is None:
        return mask, (1 / items).expand(positions)
    # Others than floating ones are for the core to refuse.
    return mask, weights.double() / items if weights.is_floating_point() else weights


def scheduled(*numbers: float) -> Tensor:
    """Numbers that may have a schedule: torch.compile would compile a float for every value."""
    if torch.compiler.is_compiling():  # which would do the same with torch.tensor(numbers)
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return torch.stack([one * number for number in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def loss(
    student: Tensor,
    method: str,
    tensors: Mapping[str, Tensor | None],
    settings: Tensor,
    integers: Mapping[str, int],
    valid_vocab: int,
    *,
    inplace: bool = False,
    with_metrics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Value and metrics; what is missing in `tensors` is None, in `integers` 0."""
    call = (
        student,
        *(tensors.get(name) for name in TENSORS),
        settings,
        method,
        *(integers.get(name, 0) for name in INTEGERS),
        valid_vocab,
    )
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    if not needs_gradient and not transforms_active():
        value, _, _, metrics = _without_derivative(_loss_operator, *call, False, with_metrics)
    elif inplace:
        value, _, metrics = _apply(_LossInplace, *call, with_metrics)
    else:
        # A float16 gradient under a mean underflows before a loss scale reaches it: backward
        # computes it with the scale in it.
        early = integers["reduction"] != _PER_POSITION and student.dtype is not torch.float16
        with_gradient = needs_gradient and early
        value, _, _, metrics = _apply(_Loss, *call, with_gradient, with_metrics)
    return value, metrics


def topk(logits: Tensor, k: int, temperature: Tensor, valid_vocab: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probs."""
    return _topk_operator(logits, k, temperature, valid_vocab)


def sample(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Tokens and the columns that opdc.h lists."""
    return _sample_operator(student, *arguments)


def blend(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Log-probs of the blend, and the columns."""
    return _blend_operator(student, *arguments)


def drift_gate(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor | None, block: int, kappa: Tensor
) -> Tensor:
    return _drift_gate_operator(logprobs, old_logprobs, mask, block, kappa)
