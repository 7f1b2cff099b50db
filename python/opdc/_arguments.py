"""What the public functions share: they check and complete their arguments here, and call the core.

What an argument means is said where it is public; what only the core can see, such as shapes and
ids, it checks itself.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _dtensor, _ops, _projected
from .projection import Projection
from .support import TopK

if TYPE_CHECKING:
    from ._ranks import Meeting

# Tensor, or (Tensor, dict[str, Tensor]) with return_metrics=True. A union would make every caller
# of a type checker take it apart.
Loss: TypeAlias = Any

Logits: TypeAlias = Tensor | Projection
Teacher: TypeAlias = Tensor | Projection | TopK
_Parameters = ParamSpec("_Parameters")

Tensors: TypeAlias = dict[str, Tensor | Projection | None]  # a Projection only as "teacher"


@_dtensor.of_whole_tensors
def evaluate(
    method: str,
    student: Logits,
    tensors: Mapping[str, Tensor | Projection | None] | None = None,
    *,
    process_group: ProcessGroup | Meeting | None = None,
    **keywords: Any,
) -> Loss:
    """The loss `method` with its own tensors, integers and settings, and the common arguments."""
    if process_group is None:
        return _evaluate(method, student, tensors, **keywords)
    with _meeting(process_group) as meeting:
        return _evaluate(method, student, tensors, meeting=meeting, **keywords)


def _meeting(process_group: ProcessGroup | Meeting) -> Meeting:
    from . import _ranks

    if isinstance(process_group, _ranks.Meeting):
        return process_group
    return _ranks.Meeting(process_group)


def together(function: Callable[_Parameters, Loss]) -> Callable[_Parameters, Loss]:
    """A public loss whose ranks, with a process_group, hear of whatever one of them raises."""

    @functools.wraps(function)
    def loss(*arguments: _Parameters.args, **keywords: _Parameters.kwargs) -> Loss:
        group: Any = keywords.get("process_group")
        if group is None:
            return function(*arguments, **keywords)
        with _meeting(group) as meeting:
            keywords["process_group"] = meeting
            return function(*arguments, **keywords)

    return loss


def _evaluate(
    method: str,
    student: Logits,
    tensors: Mapping[str, Tensor | Projection | None] | None = None,
    *,
    name: str = "student",
    integers: Mapping[str, int] | None = None,
    settings: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    return_metrics: bool = False,
    meeting: Meeting | None = None,
) -> Loss:
    reduction_index = choice("reduction", reduction, _ops.REDUCTIONS)
    if num_items is not None:
        if reduction not in ("mean", "seq_mean"):
            raise ValueError(
                f'num_items replaces the denominator of reduction="mean" or "seq_mean"; '
                f'"{reduction}" has none'
            )
        num_items = count("num_items", num_items)
    if isinstance(student, Projection):
        student = projection(name, student)
    else:
        require_tensor(name, student)
    mask = None if mask is None else active("mask", mask)
    weights = constant_or_none("weights", weights)
    if isinstance(num_items, Tensor) and _ops.is_on_gpu(num_items):
        given = student.hidden if isinstance(student, Projection) else student
        mask, weights = _ops.fold(num_items, given, mask, weights)
        num_items = 1
    all_tensors: Tensors = {**(tensors or {}), "mask": mask, "weights": weights}
    all_integers = {**(integers or {}), "reduction": reduction_index}
    if meeting is not None:
        student, all_tensors["teacher"] = meeting.open(student, all_tensors.get("teacher"))
    teacher = all_tensors.get("teacher")
    if meeting is None:
        require_ids(name, student)
        require_ids("teacher", teacher)
    gathered = isinstance(student, Projection) and reads_only_slots(all_tensors, all_integers)
    if inplace:
        require_overwritable(student, teacher)
    if isinstance(student, Projection) and student.sparse_gradient and not gathered:
        raise ValueError(
            f"{name}.sparse_gradient is True, but the loss reads the whole head, whose gradient is "
            'dense: only lsm and divergences with normalize="both" from a TopK teacher read a few '
            "rows of it; leave sparse_gradient out"
        )
    call: tuple[Any, ...] = (
        *(student if isinstance(student, Projection) else with_dense_rows(student), method),
        all_tensors,
        _ops.settings(
            {**(settings or {}), "temperature": number("temperature", temperature)}, num_items
        ),
        *(all_integers, vocabulary_size(valid_vocab)),
    )
    if gathered:
        from . import _gathered

        evaluate_gathered = _gathered.loss if meeting is None else meeting.gathered
        value, named_metrics = evaluate_gathered(*call, with_metrics=return_metrics)
        return (value, named_metrics) if return_metrics else value
    if meeting is not None:
        value, metrics = meeting.loss(*call, inplace=inplace, with_metrics=return_metrics)
    elif isinstance(student, Projection) or isinstance(teacher, Projection):
        value, metrics = _projected.loss(*call, with_metrics=return_metrics)
    else:
        value, metrics = _ops.loss(*call, inplace=inplace, with_metrics=return_metrics)
    if not return_metrics:
        return value
    computed = _ops.METRICS_OF[method, teacher is not None, all_integers.get("support", 0)]
    named = zip(_ops.METRICS, metrics.unbind(), strict=True)
    return value, {name: metric for name, metric in named if name in computed}


# ----------------------------------------------------------------- teachers and supports


def teacher_logits(teacher: Logits) -> Tensors:
    return {"teacher": logits("teacher", teacher)}


def teacher_on_support(teacher: Teacher) -> Tensors:
    """Logits, or what a sparse teacher gives."""
    if not isinstance(teacher, TopK):
        return teacher_logits(teacher)
    return {
        "slot_ids": with_dense_rows(token_ids("teacher.ids", teacher.ids)),
        "slot_logprobs": with_dense_rows(constant("teacher.logprobs", teacher.logprobs)),
        "teacher_logprobs": constant_or_none("teacher.token_logprobs", teacher.token_logprobs),
        "teacher_entropy": constant_or_none("teacher.entropy", teacher.entropy),
        "tail_logprobs": constant_or_none("teacher.tail_logprob", teacher.tail_logprob),
    }


def teacher_of_tokens(student: Logits, teacher: Teacher) -> Tensors:
    """Logits, or log-probs of the tokens, by themselves or from a sparse teacher."""
    axes = len(positions("student", student)) + 1
    if isinstance(teacher, TopK):
        if teacher.token_logprobs is None:
            raise TypeError(
                "teacher.token_logprobs is None: the loss needs the teacher's log-probs of the "
                "tokens; give them in TopK(..., token_logprobs=...)"
            )
        return {
            "teacher_logprobs": constant("teacher.token_logprobs", teacher.token_logprobs),
        }
    if isinstance(teacher, Projection):
        return teacher_logits(teacher)
    teacher = constant("teacher", teacher)
    if teacher.dim() == axes:
        return {"teacher": with_dense_rows(teacher)}
    if teacher.dim() == axes - 1:
        return {"teacher_logprobs": teacher}
    raise ValueError(
        f"teacher has the shape {tuple(teacher.shape)} beside a student of the shape "
        f"{(*positions('student', student), vocabulary('student', student))}: give its logits "
        "(..., V), or its log-probs of the tokens (...)"
    )


def reads_only_slots(
    tensors: Mapping[str, Tensor | Projection | None], integers: Mapping[str, int]
) -> bool:
    """Whether a loss reads the student's logits on the ids of a sparse teacher only."""
    on_slots = integers.get("support", 0) and tensors.get("slot_ids") is not None
    return bool(on_slots) and integers["normalize"] == _ops.NORMALIZATIONS.index("both")


def support_integers(
    student: Logits,
    teacher: Teacher,
    support: str | None,
    k: int | None,
    normalize: str | None,
    *,
    default_k: int | None = None,
    process_group: ProcessGroup | None = None,
    valid_vocab: int | None = None,
) -> dict[str, int]:
    """The support of a divergence, as the core takes it. A default never exceeds the vocabulary."""
    sparse = isinstance(teacher, TopK)
    if support is None:
        support = "teacher" if sparse else "full"
    index = choice("support", support, _ops.SUPPORTS)
    if support == "full":
        if sparse:
            raise ValueError(
                'support="full" needs the teacher\'s logits; a TopK has the supports "teacher" and '
                '"teacher+token"'
            )
        for name, value in (("k", k), ("normalize", normalize)):
            if value is not None:
                raise ValueError(
                    f"{name} is {value!r} but the support is the whole vocabulary: name a "
                    f'support, e.g. support="teacher", or leave {name} out'
                )
        return {}
    if support == "student" and sparse:
        raise ValueError(
            'support="student" needs the teacher\'s logits; a TopK has the supports "teacher" and '
            '"teacher+token"'
        )
    if normalize is None:
        raise ValueError(
            f'normalize must be named with support="{support}": one of '
            + ", ".join(f'"{choice}"' for choice in _ops.NORMALIZATIONS)
        )
    if default_k is not None and process_group is not None:
        default_k = -default_k  # at most the ids of all ranks, whose number is not known yet
    elif default_k is not None:
        whole = vocabulary("student", student) if valid_vocab is None else valid_vocab
        default_k = min(default_k, whole) if whole else default_k
    return {
        "support": index,
        "normalize": choice("normalize", normalize, _ops.NORMALIZATIONS),
        "k": support_size(teacher, k, default_k),
    }


def support_size(teacher: Teacher, k: int | None, default: int | None) -> int:
    if isinstance(teacher, TopK):
        require_tensor("teacher.ids", teacher.ids)
        slots = teacher.ids.shape[-1] if teacher.ids.dim() else 0
        if slots == 0:
            raise ValueError(
                f"teacher.ids has the shape {tuple(teacher.ids.shape)}, want (..., K), K at least 1"
            )
        if k is not None and integer("k", k) != slots:
            raise ValueError(
                f"k is {k} but the teacher has {slots} slots: leave k out, or make them equal"
            )
        return slots
    if k is None:
        if default is None:
            raise ValueError("k must be given with a support: the number of its ids")
        return default
    return integer("k", k)


# ----------------------------------------------------------------- single arguments


def constant_or_none(name: str, value: Tensor | None) -> Tensor | None:
    return None if value is None else constant(name, value)


def integer(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not least <= value < 2**63:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def number_or_nan(name: str, value: float | None) -> float:
    """NaN stands for what is not given, so that nobody may give it."""
    if value is None:
        return math.nan
    value = number(name, value)
    if value != value:
        raise ValueError(f"{name} is NaN: give a number, or leave it out")
    return value


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of the layout {value.layout}")


def constant(name: str, value: Tensor) -> Tensor:
    """A tensor that receives no gradient, even if it asks for one."""
    require_tensor(name, value)
    return value.detach() if value.requires_grad else value


def with_dense_rows(logits: Tensor) -> Tensor:
    if logits.dim() == 0 or logits.shape[-1] == 1 or logits.stride(-1) == 1:
        return logits
    return logits.contiguous()


def tensor_of_logits(name: str, value: Tensor) -> Tensor:
    """Logits that receive no gradient, and are no Projection."""
    return with_dense_rows(constant(name, value))


def logits(name: str, value: Logits) -> Logits:
    """Logits that receive no gradient."""
    if not isinstance(value, Projection):
        return tensor_of_logits(name, value)
    value = projection(name, value)
    if value.sparse_gradient:
        raise ValueError(f"{name}.sparse_gradient is True, but {name} receives no gradient")
    return value._replace(
        hidden=value.hidden.detach(),
        weight=value.weight.detach(),
        bias=None if value.bias is None else value.bias.detach(),
        adapter=None
        if value.adapter is None
        else (value.adapter[0].detach(), value.adapter[1].detach()),
    )


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def part(name: str, value: Tensor, of: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """A tensor beside the hidden states `of` a Projection. A size of None is free."""
    require_tensor(name, value)
    if value.dtype not in _FLOATING:
        raise TypeError(
            f"{name} has the dtype {value.dtype}, want float32, float64, bfloat16 or float16; "
            "convert it with .float()"
        )
    fits = value.dim() == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, want {meaning}")
    if value.device != of.device:
        raise TypeError(
            f"{name} is on {value.device} but the hidden states are on {of.device}: move them to "
            "the same device"
        )


def projection(name: str, value: Projection) -> Projection:
    """A Projection whose parts fit together."""
    hidden, weight, adapter = value.hidden, value.weight, value.adapter
    require_tensor(f"{name}.hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError(f"{name}.hidden is a single number, want hidden states (..., H)")
    part(f"{name}.hidden", hidden, hidden, tuple(hidden.shape), "(..., H)")
    positions, width = tuple(hidden.shape[:-1]), hidden.shape[-1]
    part(
        f"{name}.weight",
        weight,
        hidden,
        (None, width),
        f"(V, {width}), a row for each id as wide as {name}.hidden of the shape "
        f"{tuple(hidden.shape)}",
    )
    require_dense_rows(f"{name}.weight", weight)
    ids = weight.shape[0]
    if value.bias is not None:
        meaning = f"({ids},), one for each row of {name}.weight"
        part(f"{name}.bias", value.bias, hidden, (ids,), meaning)
    if adapter is not None:
        if not isinstance(adapter, tuple) or len(adapter) != 2:
            raise TypeError(
                f"{name}.adapter must be a tuple (inputs, weight) of tensors, got "
                f"{type(adapter).__name__}"
            )
        inputs, rows = adapter
        require_tensor(f"{name}.adapter[0]", inputs)
        rank = inputs.shape[-1] if inputs.dim() else 0
        part(
            f"{name}.adapter[0]",
            inputs,
            hidden,
            (*positions, None),
            f"(..., r) for the positions {positions} of {name}.hidden",
        )
        part(
            f"{name}.adapter[1]",
            rows,
            hidden,
            (ids, rank),
            f"{(ids, rank)}, a row for each id as wide as {name}.adapter[0]",
        )
        require_dense_rows(f"{name}.adapter[1]", rows)
    scale = number(f"{name}.scale", value.scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{name}.scale is {scale}, want a finite number")
    softcap = None if value.softcap is None else number(f"{name}.softcap", value.softcap)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}.softcap is {softcap}, want a finite number above 0, or None")
    if value.max_bytes is not None:
        integer(f"{name}.max_bytes", value.max_bytes)
    return value._replace(scale=scale, softcap=softcap)


def require_ids(name: str, logits: Logits | None) -> None:
    """Only a process among several may have no row of the head."""
    if isinstance(logits, Projection) and logits.weight.shape[0] == 0:
        raise ValueError(
            f"{name}.weight has the shape {tuple(logits.weight.shape)}, want (V, H) with a row for "
            "at least one id"
        )


def require_dense_rows(name: str, weight: Tensor) -> None:
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(
            f"{name} has the stride {weight.stride(1)} in its last axis, want 1: give "
            f"{name}.contiguous()"
        )


def positions(name: str, logits: Logits) -> torch.Size:
    """The shape of the positions."""
    given = logits.hidden if isinstance(logits, Projection) else logits
    require_tensor(name if given is logits else f"{name}.hidden", given)
    return given.shape[:-1]


def vocabulary(name: str, logits: Logits) -> int:
    """The number of ids, as far as it is known: 0 where a check is still to come."""
    given = logits.weight if isinstance(logits, Projection) else logits
    require_tensor(name if given is logits else f"{name}.weight", given)
    if not given.dim():
        return 0
    return given.shape[0 if isinstance(logits, Projection) else -1]


def arithmetic(*models: Logits) -> torch.dtype:
    """The dtype that a loss of these logits is computed in."""
    tensors = (
        part
        for model in models
        for part in ((model.hidden, model.weight) if isinstance(model, Projection) else (model,))
    )
    double = torch.float64 in [tensor.dtype for tensor in tensors]
    return torch.float64 if double else torch.float32


def active(name: str, mask: Tensor) -> Tensor:
    require_tensor(name, mask)
    return mask if mask.dtype is torch.bool else mask != 0


_NARROW_INTEGERS = frozenset(
    {torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


def token_ids(name: str, tokens: Tensor) -> Tensor:
    require_tensor(name, tokens)
    return tokens.long() if tokens.dtype in _NARROW_INTEGERS else tokens


def uniforms(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Numbers in [0, 1), drawn on the device of the generator."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    where = device if generator is None else generator.device
    drawn = torch.rand(shape, dtype=dtype, device=where, generator=generator)
    # From the CPU to a GPU nobody has to wait; the other way nobody may go on.
    return drawn.to(device, non_blocking=where.type == "cpu")


def require_overwritable(student: Logits, teacher: Logits | None) -> None:
    if isinstance(student, Projection) or isinstance(teacher, Projection):
        raise ValueError(
            "inplace=True overwrites the student's logits beside those of the teacher, which a "
            "Projection never has all of: use inplace=False"
        )
    fix = "give logits that are the result of a computation, or inplace=False"
    if _ops.transforms_active():
        raise ValueError("inplace=True does not work under torch.func: use inplace=False")
    if student.dim() and student.shape[-1] > 1 and student.stride(-1) != 1:
        raise ValueError(
            f"inplace=True cannot overwrite student with the stride {student.stride(-1)} in its "
            "last axis: give student.contiguous(), or inplace=False"
        )
    if torch.compiler.is_compiling():
        return  # which traces none of the following, and works on a copy of what it was given
    if student.is_neg() or student.is_conj():
        raise ValueError(f"inplace=True cannot overwrite a negated or conjugated view: {fix}")
    if not (torch.is_grad_enabled() and student.requires_grad):
        return
    base = student if student._base is None else student._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace=True would overwrite a leaf that requires grad, a parameter or an input of "
            f"its own, with a gradient: {fix}"
        )


def number(name: str, value: float) -> float:
    if isinstance(value, float):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {value}, which is beyond the range of float64") from None


def count(name: str, value: float | Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        value = number(name, value)
        if value != value:
            raise ValueError(f"{name} is NaN: give a count, or leave it out")
        return value
    if value.dim() or value.is_complex():
        raise ValueError(
            f"{name} must be a number or a 0-dim tensor, got {value.dtype} of the shape "
            f"{tuple(value.shape)}"
        )
    return value


def clip_range(value: float | tuple[float, float]) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)):
        epsilon = number("clip_range", value)
        return epsilon, epsilon
    if len(value) != 2:
        raise ValueError(
            f"clip_range has {len(value)} numbers: give one for both sides, or (low, high)"
        )
    low, high = value
    return number("clip_range", low), number("clip_range", high)


def choice(name: str, value: str, choices: tuple[str, ...]) -> int:
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    wanted = ", ".join(f'"{choice}"' for choice in choices)
    raise ValueError(f"{name} must be one of {wanted}, got {value!r}")


def vocabulary_size(valid_vocab: int | None) -> int:
    """The size for the core, where 0 stands for the whole vocabulary."""
    return 0 if valid_vocab is None else integer("valid_vocab", valid_vocab)
