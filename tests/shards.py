"""A call of a loss as whole, and as what each process makes of its share of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

import opdc
from projections import PARTS, leaves, parts, with_parts

Columns = tuple[int, int]
Arguments = dict[str, Any]
SPLIT_AXES = {"logits": -1, "weight": 0, "bias": 0, "adapter_weight": 0}


@dataclass
class Call:
    """`opdc.<function>(student, **arguments)`, and what is pulled back through its value."""

    function: str
    student: Any  # logits or an opdc.Projection
    arguments: Arguments
    upstream: Tensor | None = None


@dataclass
class Answer:
    """Value, metrics and the gradients of the student's tensors, by name."""

    value: Tensor
    metrics: dict[str, Tensor]
    gradients: dict[str, Tensor]


def is_projection(value: Any) -> bool:
    return isinstance(value, opdc.Projection)


def cut(value: Any, columns: Columns) -> Any:
    """The ids `columns` of logits or of a head; whatever else is left whole."""
    first, last = columns
    if is_projection(value):
        split = parts(value).items()
        return with_parts(value, {name: x[first:last] for name, x in split if name in SPLIT_AXES})
    return value[..., first:last].contiguous() if isinstance(value, Tensor) else value


def with_leaves(student: Any, frozen: tuple[str, ...] = ()) -> tuple[Any, dict[str, Tensor]]:
    """The student with tensors of its own that require a gradient, and these by name."""
    if is_projection(student):
        student = leaves(student, needed=[name for name in PARTS if name not in frozen])
        return student, {name: x for name, x in parts(student).items() if x.requires_grad}
    logits = student.detach().clone().requires_grad_()
    return logits, {"logits": logits}


def answer(
    call: Call,
    columns: Columns | None = None,
    group: ProcessGroup | None = None,
    frozen: tuple[str, ...] = (),
) -> Answer:
    """Of the whole call or, with a group, of the ids `columns` of both models."""
    student, arguments = call.student, dict(call.arguments)
    if columns is not None:
        positions = student.hidden.dim() if is_projection(student) else student.dim()
        teacher = arguments.get("teacher")
        if is_projection(teacher) or (isinstance(teacher, Tensor) and teacher.dim() == positions):
            arguments["teacher"] = cut(teacher, columns)
        student = cut(student, columns)
        arguments["process_group"] = group
    student, tensors = with_leaves(student, frozen)
    value = getattr(opdc, call.function)(student, **arguments)
    value, metrics = value if isinstance(value, tuple) else (value, {})
    value.backward(torch.ones_like(value) if call.upstream is None else call.upstream)
    gradients = {
        name: leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad
        for name, leaf in tensors.items()
    }
    return Answer(value.detach(), metrics, gradients)


def columns_of(group: ProcessGroup, widths: tuple[int, ...]) -> Columns:
    rank = torch.distributed.get_rank(group)
    return sum(widths[:rank]), sum(widths[: rank + 1])


def answers(
    group: ProcessGroup,
    calls: list[Call],
    widths: tuple[int, ...],
    frozen: tuple[str, ...] = (),
) -> list[Answer]:
    return [answer(call, columns_of(group, widths), group, frozen) for call in calls]


# ----------------------------------------------------------------- what is sent

_COLLECTIVES = tuple(
    name
    for name in vars(c10d.ProcessGroup)
    if name.lstrip("_").startswith(("all", "broadcast", "gather", "reduce", "scatter", "send"))
)


def bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0


class Sent:
    """Inside of it, the collectives of this process, each with the bytes of all its tensors."""

    def __enter__(self) -> list[tuple[str, int]]:
        collectives: list[tuple[str, int]] = []

        def counted(name: str) -> Any:
            method = getattr(c10d.ProcessGroup, name)

            def call(group: ProcessGroup, *arguments: Any, **keywords: Any) -> Any:
                collectives.append((name, bytes_of([*arguments, *keywords.values()])))
                return method(group, *arguments, **keywords)

            return call

        # As they stand in the class: what getattr returns would not bind again.
        methods = vars(c10d.ProcessGroup)
        self.methods = {name: methods[name] for name in _COLLECTIVES}
        for name in self.methods:
            setattr(c10d.ProcessGroup, name, counted(name))
        return collectives

    def __exit__(self, *_: object) -> None:
        for name, method in self.methods.items():
            setattr(c10d.ProcessGroup, name, method)


def collectives(
    group: ProcessGroup, call: Call, widths: tuple[int, ...]
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Those of the loss, and those of its backward."""
    student, _ = with_leaves(cut(call.student, columns_of(group, widths)))
    arguments = dict(call.arguments)
    arguments["teacher"] = cut(arguments["teacher"], columns_of(group, widths))
    with Sent() as forward:
        value = getattr(opdc, call.function)(student, **arguments, process_group=group)
    with Sent() as backward:
        value.sum().backward()
    return forward, backward
