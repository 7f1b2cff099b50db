"""Losses from hidden states: opdc's `Projection` against the matrix products that nobody can do
without, against logits that are held as a whole, and against the chunked losses of TRL and Liger.

The hidden states and heads are random, such that their logits are as language models make them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import opdc

from . import textbook
from .contenders import BETA, CHECKED_ROWS, FUNCTIONS, TOP, Contender, Function
from .contenders import PACKAGES as LOGITS_PACKAGES

HIDDEN = "hidden"
PACKAGES = {"trl": "trl", "liger": LOGITS_PACKAGES["liger"]}  # may not be there
LOSSES = ("reverse_kl", "jsd", "tropd", "lsm_given")
SIZES = [1024, 2048]  # of a hidden state, the student's as the teacher's
PIECE = 128  # rows of logits that are held at a time where inputs and references are made
COMPILED = ("compile", "liger")  # what runs the first time is not what is to be measured
MATRICES = {"logits": 2, "eager": 14, "compile": 6, "liger": 14}  # of logits, at the most


@dataclass
class Inputs:
    """Hidden states and heads of both models, and what else the losses take; row by row."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    teacher_hidden: Tensor  # (N, H)
    teacher_weight: Tensor  # (V, H)
    tokens: Tensor
    uniforms: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    @property
    def teacher(self) -> opdc.Projection:
        return opdc.Projection(self.teacher_hidden, self.teacher_weight)

    @property
    def teacher_topk(self) -> opdc.TopK:
        return opdc.TopK(self.top_ids, self.top_logprobs)

    def of(self, function: Function) -> list[Any]:
        """What a loss is called with after the student."""
        return [getattr(self, name) for name in function.takes]

    def bytes(self, function: Function) -> int:
        """Of all that a loss is called with."""
        values = [self.hidden, self.weight]
        for value in self.of(function):
            values.extend(value if isinstance(value, tuple) else [value])
        return sum(value.nbytes for value in values if isinstance(value, Tensor))


def make_inputs(rows: int, vocabulary: int, size: int, seed: int = 0) -> Inputs:
    """Hidden states whose logits are like those of `contenders.make_inputs`.

    The first column of the head is the frequency of an id (Zipf), on which the first number of a
    hidden state is 1. A hidden state is a sum of a handful of rows of the head, whose ids are thus
    far above the rest, and of noise; the student's is the teacher's and more noise.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, size, generator=generator).mul_(size**-0.5)
    places = torch.randperm(vocabulary, generator=generator)
    weight[:, 0] = -torch.arange(1, vocabulary + 1).log()[places]
    ids = torch.randint(vocabulary, (rows, min(20, vocabulary)), generator=generator)
    heights = torch.empty(ids.shape).exponential_(0.25, generator=generator) + 4
    teacher_hidden = torch.randn(rows, size, generator=generator) * 1.5
    for row, chosen, height in zip(teacher_hidden, ids, heights, strict=True):
        row += height @ weight[chosen]
    hidden = teacher_hidden + 0.5 * torch.randn(rows, size, generator=generator)
    teacher_hidden[:, 0] = hidden[:, 0] = 1.0

    top = min(TOP, vocabulary)
    tokens = torch.empty(rows, dtype=torch.int64)
    top_ids, top_logprobs = torch.empty(rows, top, dtype=torch.int64), torch.empty(rows, top)
    for start in range(0, rows, PIECE):
        piece = slice(start, start + PIECE)
        probs = textbook.probs(hidden[piece] @ weight.T)
        tokens[piece] = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
        top_ids[piece], top_logprobs[piece] = textbook.topk(teacher_hidden[piece] @ weight.T, top)
    uniforms = torch.rand(rows, generator=generator)
    return Inputs(
        hidden, weight, teacher_hidden, weight.clone(), tokens, uniforms, top_ids, top_logprobs
    )


# ---- the contenders --------------------------------------------------------------------------


def bare_products(function: Function, inputs: Inputs) -> Contender:
    """The matrix products that gradients for hidden states and head need from whole logits: one
    for the logits of each model that has a head, two backward; into memory that is there before.
    """
    logits = torch.zeros(len(inputs.hidden), len(inputs.weight))
    hidden_gradient, weight_gradient = map(torch.zeros_like, (inputs.hidden, inputs.weight))

    def run() -> None:
        if "teacher" in function.takes:
            torch.mm(inputs.teacher_hidden, inputs.teacher_weight.T, out=logits)
        torch.mm(inputs.hidden, inputs.weight.T, out=logits)
        torch.mm(logits, inputs.weight, out=hidden_gradient)  # any matrix of the size of logits
        torch.mm(logits.T, inputs.hidden, out=weight_gradient)

    return Contender(run)


def from_logits(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of logits as one of projections, whose logits are all made at once."""

    def of_projections(*values: Any) -> Tensor:
        return loss(*(F.linear(v[0], v[1]) if _is_projection(v) else v for v in values))

    return of_projections


def _is_projection(value: Any) -> bool:
    return isinstance(value, opdc.Projection)


def _sparse(function: Function) -> Callable[..., Tensor]:
    def loss(student: opdc.Projection, *given: Any) -> Tensor:
        result: Tensor = function.opdc(student._replace(sparse_gradient=True), *given)
        return result

    return loss


BETAS = {"reverse_kl": 1.0, "jsd": BETA}  # what TRL and Liger call these divergences


def _trl(name: str) -> Callable[..., Tensor]:
    loss = import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss

    def of_projections(student: opdc.Projection, teacher: opdc.Projection) -> Tensor:
        mask = torch.ones(1, len(student.hidden), dtype=torch.int64)
        hidden = student.hidden.unsqueeze(0), teacher.hidden.unsqueeze(0)
        value, *_ = loss(*hidden, student.weight, teacher.weight, mask, BETAS[name])
        return value  # type: ignore[no-any-return]

    return of_projections


def _liger(name: str) -> Callable[..., Tensor]:
    module = import_module("liger_kernel.chunked_loss")
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[name]
    )

    def of_projections(student: opdc.Projection, teacher: opdc.Projection) -> Tensor:
        labels = torch.zeros(len(student.hidden), dtype=torch.int64)
        value: Tensor = loss(*student[:2], *teacher[:2], labels)
        return value

    return of_projections


def losses(name: str) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """How to get each contender's form of a loss, the most important first.

    All are called with the student's projection and what the function takes; getting one fails
    where its package is missing.
    """
    function = FUNCTIONS[name]

    def in_place(*logits: Any) -> Tensor:
        value: Tensor = function.opdc(*logits, inplace=True)
        return value

    found = {
        "opdc": lambda: function.opdc,
        "opdc_sparse": lambda: _sparse(function),
        "logits": lambda: from_logits(in_place),
        "trl": lambda: _trl(name),
        "eager": lambda: from_logits(function.textbook),
        "compile": lambda: torch.compile(
            from_logits(function.textbook), fullgraph=True, dynamic=False
        ),
        "liger": lambda: _liger(name),
    }
    if "teacher_topk" not in function.takes:
        del found["opdc_sparse"]
    if name not in BETAS:
        del found["trl"], found["liger"]
    return found


def contender(loss: Callable[..., Tensor], function: Function, inputs: Inputs) -> Contender:
    """``run`` gives the gradients of the student's hidden states and of its head."""
    given = inputs.of(function)

    def run() -> tuple[Tensor, ...]:
        hidden, weight = (t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight))
        return torch.autograd.grad(loss(opdc.Projection(hidden, weight), *given), (hidden, weight))

    return Contender(run)


# ---- the check -------------------------------------------------------------------------------


def exact(function: Function, inputs: Inputs) -> Tensor:
    """What the gradient of the first hidden states should be, by the textbook in float64."""
    few = slice(0, CHECKED_ROWS)

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        pieces = [hidden[few].double() @ piece.double().T for piece in weight.split(PIECE * 64)]
        return torch.cat(pieces, dim=-1)

    given = [_first(value, few, logits) for value in inputs.of(function)]
    student = logits(inputs.hidden, inputs.weight).requires_grad_()
    loss = function.textbook(student, *given) * (len(student) / len(inputs.hidden))
    (gradient,) = torch.autograd.grad(loss, student)
    pieces = zip(gradient.split(PIECE * 64, dim=-1), inputs.weight.split(PIECE * 64), strict=True)
    return sum(
        (left @ right.double() for left, right in pieces), torch.zeros((), dtype=torch.double)
    )


def _first(value: Any, few: slice, logits: Callable[[Tensor, Tensor], Tensor]) -> Any:
    if isinstance(value, opdc.Projection):
        return logits(value.hidden, value.weight)
    if isinstance(value, opdc.TopK):
        return opdc.TopK(value.ids[few], value.logprobs[few].double())
    return value[few].double() if value.is_floating_point() else value[few]


def errors(gradients: tuple[Tensor, Tensor], reference: Tensor, inputs: Inputs) -> float:
    """How far gradients are off: relative, of hidden states in norm, of the head in one number.

    With `G` the gradient of the logits `Z = h Wᵀ` both `Σ h ∘ (G W)` and `Σ W ∘ (Gᵀ h)` are
    `Σ G ∘ Z`, which tells the gradient of a head that is too large for a reference.
    """
    hidden, weight = gradients
    first = hidden[: len(reference)].double()
    of_hidden = float((first - reference).norm() / reference.norm())
    expected = float((inputs.hidden.double() * hidden.double()).sum())
    return max(of_hidden, abs(_inner_product(weight, inputs.weight) / expected - 1))


def _inner_product(gradient: Tensor, weight: Tensor) -> float:
    if gradient.is_sparse:
        ids, gradient = gradient._indices().squeeze(0), gradient._values()
        weight = weight[ids]
    pieces = zip(gradient.split(PIECE * 64), weight.split(PIECE * 64), strict=True)
    return sum(float((left.double() * right.double()).sum()) for left, right in pieces)


def gradient_bytes(gradients: tuple[Tensor, Tensor]) -> int:
    """Of a sparse gradient what it stores."""
    hidden, weight = gradients
    if weight.is_sparse:
        return hidden.nbytes + weight._indices().nbytes + weight._values().nbytes
    return hidden.nbytes + weight.nbytes
