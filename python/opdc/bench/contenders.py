"""What is measured: the losses in textbook PyTorch and in opdc, and the inputs of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import opdc

from . import textbook

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BETA = 0.5  # of the Jensen-Shannon divergence
ALPHA = 0.1  # of the skew divergences


@dataclass(frozen=True)
class Function:
    """One loss, twice: in textbook PyTorch and in opdc, both called (student, teacher, tokens)."""

    title: str
    textbook: Callable[[Tensor, Tensor, Tensor], Tensor]
    opdc: Callable[..., Tensor]  # takes inplace= too, where `inplace` is true
    matrices: int  # logits read and gradients written: what has to cross the memory bus
    teacher_logprobs: bool = False  # the teacher is the log-probs of the tokens
    inplace: bool = True


FUNCTIONS = {
    "reverse_kl": Function(
        "reverse KL",
        lambda z, t, _: textbook.reverse_kl(z, t).mean(),
        lambda z, t, _, **options: opdc.reverse_kl(z, t, **options),
        matrices=3,
    ),
    "forward_kl": Function(
        "forward KL",
        lambda z, t, _: textbook.forward_kl(z, t).mean(),
        lambda z, t, _, **options: opdc.forward_kl(z, t, **options),
        matrices=3,
    ),
    "jsd": Function(
        "JSD",
        lambda z, t, _: textbook.jsd(z, t, BETA).mean(),
        lambda z, t, _, **options: opdc.jsd(z, t, beta=BETA, **options),
        matrices=3,
    ),
    "skew_forward_kl": Function(
        "skew forward KL",
        lambda z, t, _: textbook.skew_forward_kl(z, t, ALPHA).mean(),
        lambda z, t, _, **options: opdc.skew_kl(z, t, alpha=ALPHA, direction="forward", **options),
        matrices=3,
    ),
    "skew_reverse_kl": Function(
        "skew reverse KL",
        lambda z, t, _: textbook.skew_reverse_kl(z, t, ALPHA).mean(),
        lambda z, t, _, **options: opdc.skew_kl(z, t, alpha=ALPHA, direction="reverse", **options),
        matrices=3,
    ),
    "k1": Function(
        "K1, teacher logits",
        lambda z, t, y: textbook.k1(z, t, y).mean(),
        lambda z, t, y, **options: opdc.k1(z, t, y, **options),
        matrices=3,
    ),
    "k1_given": Function(
        "K1, teacher log-probs",
        lambda z, t, y: textbook.k1_given(z, t, y).mean(),
        lambda z, t, y, **options: opdc.k1(z, t, y, **options),
        matrices=2,
        teacher_logprobs=True,
    ),
    "k2": Function(
        "K2",
        lambda z, t, y: textbook.k2(z, t, y).mean(),
        lambda z, t, y, **options: opdc.k2(z, t, y, **options),
        matrices=3,
    ),
    "k3": Function(
        "K3",
        lambda z, t, y: textbook.k3(z, t, y).mean(),
        lambda z, t, y, **options: opdc.k3(z, t, y, **options),
        matrices=3,
    ),
    "token_logprobs": Function(
        "token log-probs",
        lambda z, _, y: textbook.token_logprobs(z, y).mean(),
        lambda z, _, y: opdc.token_logprobs(z, y).mean(),
        matrices=2,
        inplace=False,
    ),
    "entropy": Function(
        "entropy",
        lambda z, _t, _y: textbook.entropy(z).mean(),
        lambda z, _t, _y: opdc.entropy(z).mean(),
        matrices=2,
        inplace=False,
    ),
}


@dataclass
class Inputs:
    """The tensors of one dtype, one row per position."""

    student: Tensor
    teacher: Tensor
    teacher_logprobs: Tensor
    tokens: Tensor
    scratch: Tensor  # the student's logits again, for in-place calls to overwrite

    def __len__(self) -> int:
        return len(self.tokens)

    def teacher_of(self, function: Function) -> Tensor:
        return self.teacher_logprobs if function.teacher_logprobs else self.teacher

    def slice(self, start: int, stop: int) -> Inputs:
        return Inputs(**{name: tensor[start:stop] for name, tensor in vars(self).items()})

    def to(self, dtype: torch.dtype) -> Inputs:
        student, teacher = self.student.to(dtype), self.teacher.to(dtype)
        return Inputs(student, teacher, self.teacher_logprobs, self.tokens, student.clone())


def make_inputs(rows: int, vocabulary: int, seed: int = 0) -> Inputs:
    """Logits as language models make them, in float32.

    Tokens are frequent or rare (Zipf), a handful at each position is far above the rest, and
    the student is the teacher plus noise. Values and speed both depend on such things: on zeros
    or tiny noise most branches are never taken.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency = -torch.arange(1, vocabulary + 1).log()[
        torch.randperm(vocabulary, generator=generator)
    ]
    student, teacher = torch.empty(rows, vocabulary), torch.empty(rows, vocabulary)
    tokens = torch.empty(rows, dtype=torch.int64)
    teacher_logprobs = torch.empty(rows)
    candidates = min(20, vocabulary)
    for start in range(0, rows, 32):  # in pieces, for the temporary tensors to stay small
        piece = slice(start, min(start + 32, rows))
        t, z = teacher[piece], student[piece]
        t.normal_(0, 1.5, generator=generator).add_(frequency)
        ids = torch.randint(vocabulary, (len(t), candidates), generator=generator)
        t.scatter_(-1, ids, torch.empty(ids.shape).exponential_(0.25, generator=generator) + 4)
        z.normal_(0, 0.5, generator=generator).add_(t)
        tokens[piece] = torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(-1)
        teacher_logprobs[piece] = textbook.token_logprobs(t, tokens[piece])
    return Inputs(student, teacher, teacher_logprobs, tokens, student.clone())


class _FromBuffer(torch.autograd.Function):
    """A tensor over the memory of a buffer, with a history as the output of a model has one.

    In-place losses refuse leaves, which would lose their values; this is the cheapest non-leaf.
    """

    @staticmethod
    def forward(_: Any, anchor: Tensor, buffer: Tensor) -> Tensor:
        return buffer.data  # not a view, which autograd would watch for in-place changes

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


@dataclass
class Contender:
    """One way to do a piece of work. Only ``run`` is timed; what it returns is freed afterwards."""

    run: Callable[[], Any]
    prepare: Callable[[], None] = field(default=lambda: None)


def loss_and_gradient(
    call: Callable[..., Tensor],
    function: Function,
    inputs: Inputs,
    *,
    inplace: bool = False,
    pieces: int = 1,
) -> Contender:
    """Loss and gradient of one function. ``run`` gives the gradient of the first piece."""
    size = math.ceil(len(inputs) / pieces)
    parts = [inputs.slice(start, start + size) for start in range(0, len(inputs), size)]
    students: list[Tensor] = []

    def prepare() -> None:
        students.clear()
        if inplace:
            inputs.scratch.copy_(inputs.student)
            anchor = torch.zeros((), requires_grad=True)
            for part in parts:
                students.append(_FromBuffer.apply(anchor, part.scratch))  # type: ignore[no-untyped-call]
        else:
            students.extend(part.student.detach().requires_grad_() for part in parts)

    options = {"inplace": True} if inplace else {}

    def run() -> Tensor:
        first = None
        for student, part in zip(students, parts, strict=True):
            loss = call(student, part.teacher_of(function), part.tokens, **options)
            if len(parts) > 1:
                loss = loss * (len(part) / len(inputs))
            (gradient,) = torch.autograd.grad(loss, student)
            first = gradient if first is None else first
        assert first is not None
        return first

    return Contender(run, prepare)
