"""What the public functions share: they check and complete their arguments here, and call the core.

What an argument means is said where it is public; what only the core can see, such as shapes and
ids, it checks itself.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import _ops
from .support import TopK

# Tensor, or (Tensor, dict[str, Tensor]) with return_metrics=True. A union would make every caller
# of a type checker take it apart.
Loss: TypeAlias = Any


def evaluate(
    method: str,
    student: Tensor,
    tensors: Mapping[str, Tensor | None] | None = None,
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
) -> Loss:
    """The loss `method` with its own tensors, integers and settings, and the common arguments."""
    reduction_index = choice("reduction", reduction, _ops.REDUCTIONS)
    if num_items is not None:
        if reduction not in ("mean", "seq_mean"):
            raise ValueError(
                f'num_items replaces the denominator of reduction="mean" or "seq_mean"; '
                f'"{reduction}" has none'
            )
        num_items = count("num_items", num_items)
    require_tensor(name, student)
    if inplace:
        require_overwritable(student)
    all_tensors = {
        **(tensors or {}),
        "mask": None if mask is None else active("mask", mask),
        "weights": constant_or_none("weights", weights),
    }
    all_integers = {**(integers or {}), "reduction": reduction_index}
    value, metrics = _ops.loss(
        with_dense_rows(student),
        method,
        all_tensors,
        _ops.settings(
            {**(settings or {}), "temperature": number("temperature", temperature)}, num_items
        ),
        all_integers,
        vocabulary_size(valid_vocab),
        inplace=inplace,
        with_metrics=return_metrics,
    )
    if not return_metrics:
        return value
    teacher_logits = all_tensors.get("teacher") is not None
    computed = _ops.METRICS_OF[method, teacher_logits, all_integers.get("support", 0)]
    named = zip(_ops.METRICS, metrics.unbind(), strict=True)
    return value, {name: metric for name, metric in named if name in computed}


# ----------------------------------------------------------------- teachers and supports


def teacher_logits(teacher: Tensor) -> dict[str, Tensor | None]:
    return {"teacher": logits("teacher", teacher)}


def teacher_on_support(teacher: Tensor | TopK) -> dict[str, Tensor | None]:
    """Logits, or what a sparse teacher gives."""
    if not isinstance(teacher, TopK):
        return teacher_logits(teacher)
    return {
        "slot_ids": with_dense_rows(token_ids("teacher.ids", teacher.ids)),
        "slot_logprobs": logits("teacher.logprobs", teacher.logprobs),
        "teacher_logprobs": constant_or_none("teacher.token_logprobs", teacher.token_logprobs),
        "teacher_entropy": constant_or_none("teacher.entropy", teacher.entropy),
        "tail_logprobs": constant_or_none("teacher.tail_logprob", teacher.tail_logprob),
    }


def teacher_of_tokens(student: Tensor, teacher: Tensor | TopK) -> dict[str, Tensor | None]:
    """Logits, or log-probs of the tokens, by themselves or from a sparse teacher."""
    require_tensor("student", student)
    if isinstance(teacher, TopK):
        if teacher.token_logprobs is None:
            raise TypeError(
                "teacher.token_logprobs is None: the loss needs the teacher's log-probs of the "
                "tokens; give them in TopK(..., token_logprobs=...)"
            )
        return {
            "teacher_logprobs": constant("teacher.token_logprobs", teacher.token_logprobs),
        }
    teacher = constant("teacher", teacher)
    if teacher.dim() == student.dim():
        return {"teacher": with_dense_rows(teacher)}
    if teacher.dim() == student.dim() - 1:
        return {"teacher_logprobs": teacher}
    raise ValueError(
        f"teacher has the shape {tuple(teacher.shape)} beside a student of the shape "
        f"{tuple(student.shape)}: give its logits (..., V), or its log-probs of the tokens (...)"
    )


def support_integers(
    student: Tensor,
    teacher: Tensor | TopK,
    support: str | None,
    k: int | None,
    normalize: str | None,
    *,
    default_k: int | None = None,
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
    if default_k is not None:
        require_tensor("student", student)
        if student.dim():
            vocabulary = student.shape[-1] if valid_vocab is None else valid_vocab
            default_k = min(default_k, vocabulary)
    return {
        "support": index,
        "normalize": choice("normalize", normalize, _ops.NORMALIZATIONS),
        "k": support_size(teacher, k, default_k),
    }


def support_size(teacher: Tensor | TopK, k: int | None, default: int | None) -> int:
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


def logits(name: str, value: Tensor) -> Tensor:
    return with_dense_rows(constant(name, value))


def active(name: str, mask: Tensor) -> Tensor:
    require_tensor(name, mask)
    return mask if mask.dtype is torch.bool else mask != 0


_NARROW_INTEGERS = frozenset(
    {torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


def token_ids(name: str, tokens: Tensor) -> Tensor:
    require_tensor(name, tokens)
    return tokens.long() if tokens.dtype in _NARROW_INTEGERS else tokens


def require_overwritable(student: Tensor) -> None:
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
