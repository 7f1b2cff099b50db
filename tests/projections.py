"""Small heads of language models, the logits that they stand for, and how results are compared.

`logits` says in float64 PyTorch what an `opdc.Projection` is; with the oracles of whole logits
behind it, autograd gives the true gradient of every tensor of a projection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import opdc
import oracle
import oracle_published
from judge import LOW_PRECISION, half_spacing
from regimes import Case, Inputs, Regime, make_inputs

# How far the student is from the teacher: the size of the logits that it has on top of them.
NOISES = {"far": 3.0, "mixed": 0.8, "peaked": 0.5, "near_1e-02": 1e-2, "near_1e-04": 1e-4}
PARTS = ("hidden", "weight", "bias", "adapter_inputs", "adapter_weight")


@dataclass
class Models:
    """Student and teacher as projections; `inputs` has what else a loss takes."""

    student: opdc.Projection
    teacher: opdc.Projection
    inputs: Inputs


def parts(projection: opdc.Projection) -> dict[str, Tensor]:
    """The tensors of a projection, by name."""
    adapter = projection.adapter or (None, None)
    tensors = (projection.hidden, projection.weight, projection.bias, *adapter)
    return {name: x for name, x in zip(PARTS, tensors, strict=True) if x is not None}


def with_parts(projection: opdc.Projection, tensors: dict[str, Tensor]) -> opdc.Projection:
    """The projection with some of its tensors replaced."""
    new = parts(projection) | tensors
    adapter = (new["adapter_inputs"], new["adapter_weight"]) if "adapter_inputs" in new else None
    return projection._replace(
        hidden=new["hidden"], weight=new["weight"], bias=new.get("bias"), adapter=adapter
    )


def leaves(
    projection: opdc.Projection, dtype: torch.dtype | None = None, needed: Any = PARTS
) -> opdc.Projection:
    """Copies of the tensors; those named in `needed` ask for a gradient."""
    return with_parts(
        projection,
        {
            name: x.detach().to(dtype, copy=True).requires_grad_(name in needed)
            for name, x in parts(projection).items()
        },
    )


def logits(projection: opdc.Projection) -> Tensor:
    """softcap · tanh(scale (h Wᵀ + b + a Bᵀ) / softcap), float64, attached to every tensor."""
    wide = {name: x.double() for name, x in parts(projection).items()}
    result = wide["hidden"] @ wide["weight"].T
    if "bias" in wide:
        result = result + wide["bias"]
    if "adapter_inputs" in wide:
        result = result + wide["adapter_inputs"] @ wide["adapter_weight"].T
    result = projection.scale * result
    cap = projection.softcap
    return result if cap is None else cap * torch.tanh(result / cap)


def logit_sizes(projection: opdc.Projection) -> Tensor:
    """What the rounding of a logit is proportional to: the sum of the sizes of its terms."""
    sizes = {name: x.detach().abs() for name, x in parts(projection).items()}
    return logits(with_parts(projection, sizes)._replace(scale=abs(projection.scale), softcap=None))


def make_projections(
    regime: str = "mixed",
    positions: tuple[int, ...] = (2, 4),
    vocabulary: int = 60,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    *,
    sizes: tuple[int, int] = (17, 12),
    bias: bool = True,
    rank: int = 2,
    scale: float = 1.0,
    softcap: float | None = None,
    seed: int = 0,
) -> Models:
    """A student of hidden size `sizes[0]` and a teacher of `sizes[1]`, at most as large.

    The student has the teacher's hidden states and head in its first entries; the others are
    noise. `rank` is that of an adapter of either head, 0 for none.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    noise, more = NOISES[regime], sizes[0] - sizes[1]
    weight = normal(vocabulary, sizes[1]) / sizes[1] ** 0.5
    if regime == "peaked":
        favourites = torch.randint(0, vocabulary, positions, generator=generator)
        hidden = 20.0 * weight[favourites] + normal(*positions, sizes[1])
    else:  # certain and uncertain positions, so that every gate opens and closes
        certainty = torch.tensor([0.6, 1.5, 3.0, 5.0], dtype=torch.float64)
        rows = normal(*positions, sizes[1])
        order = torch.arange(rows[..., 0].numel()).reshape(positions)
        hidden = certainty[order % 4, None] * rows
    teacher = {"hidden": hidden, "weight": weight}
    student = {
        "hidden": torch.cat([hidden, normal(*positions, more)], -1),
        "weight": torch.cat([weight, noise * normal(vocabulary, more) / max(more, 1) ** 0.5], -1),
    }
    for tensors, size in ((teacher, 0.0), (student, noise)):
        if bias:
            common = teacher.get("bias", 0.5 * normal(vocabulary))
            tensors["bias"] = common + 0.3 * size * normal(vocabulary)
        if rank:
            tensors["adapter_inputs"] = teacher.get("adapter_inputs", normal(*positions, rank))
            common = teacher.get("adapter_weight", 0.3 * normal(vocabulary, rank))
            tensors["adapter_weight"] = common + 0.1 * size * normal(vocabulary, rank)

    weight_dtype = weight_dtype or dtype

    def projection(tensors: dict[str, Tensor]) -> opdc.Projection:
        of_positions = ("hidden", "adapter_inputs")
        cast = {
            name: x.to(dtype if name in of_positions else weight_dtype)
            for name, x in tensors.items()
        }
        bare = opdc.Projection(cast["hidden"], cast["weight"], scale=scale, softcap=softcap)
        return with_parts(bare, cast)

    pair = projection(student), projection(teacher)
    wide = torch.float64 in (dtype, weight_dtype)
    given = Regime("given", lambda *_: tuple(logits(model) for model in pair))
    number = torch.float64 if wide else torch.float32
    inputs = make_inputs(given, positions, vocabulary, number, seed=seed)
    inputs.uniforms = torch.rand(positions, generator=inputs.generator, dtype=number)
    inputs.prefix_mask = torch.rand(positions, generator=inputs.generator) < 0.3
    return Models(*pair, inputs)


def served(inputs: Inputs, k: int = 5, size: int | None = None) -> opdc.TopK:
    """What a teacher server sends about the teacher's logits: everything a loss may ask for."""
    teacher = inputs.teacher[..., :size]
    ids, logprobs = oracle.topk(teacher, k)[:2]
    number = inputs.upstream.dtype
    return opdc.TopK(
        ids,
        logprobs.to(number),
        oracle.token_logprobs(teacher, inputs.tokens).to(number),
        oracle.entropy(teacher).to(number),
    )


# ----------------------------------------------------------------- calls


@dataclass
class Answer:
    value: Tensor
    gradients: dict[str, Tensor | None]


def arguments(case: Case, student: Any, teacher: Any, inputs: Inputs) -> tuple:
    if case.function == "entropy":
        return (student,)
    if case.function == "token_logprobs":
        return (student, inputs.tokens)
    divergences = ("reverse_kl", "forward_kl", "jsd", "skew_kl", "lsm")
    return (student, teacher) if case.function in divergences else (student, teacher, inputs.tokens)


def is_statistic(case: Case) -> bool:
    return case.function in ("entropy", "token_logprobs")


def call(function: Any, case: Case, student: Any, teacher: Any, inputs: Inputs, **common: Any):
    if not is_statistic(case):
        common = {"reduction": "none"} | common
    positional = arguments(case, student, teacher, inputs)
    return function(*positional, **inputs.keywords(case), **common)


def pull(value: Tensor, student: Any, inputs: Inputs, upstream: Tensor | None = None) -> Answer:
    """Backward, by default with numbers that differ from position to position."""
    if upstream is None:
        of_positions = value.shape == inputs.upstream.shape
        upstream = inputs.upstream if of_positions else inputs.upstream.new_tensor(-1.7)
    value.backward(upstream.to(value.dtype))
    tensors = {"logits": student} if isinstance(student, Tensor) else parts(student)
    return Answer(value.detach(), {name: x.grad for name, x in tensors.items()})


def measured(
    case: Case,
    models: Models,
    *,
    student: Any = None,
    teacher: Any = None,
    upstream: Tensor | None = None,
    needed: Any = PARTS,
    **common: Any,
) -> Answer:
    """The library's answer; `student` and `teacher` replace the projections of the models."""
    student = models.student if student is None else student
    teacher = models.teacher if teacher is None else teacher
    if isinstance(student, Tensor):
        leaf = student.detach().clone().requires_grad_()
    else:
        leaf = leaves(student, needed=needed)
    value = call(getattr(opdc, case.function), case, leaf, teacher, models.inputs, **common)
    return pull(value, leaf, models.inputs, upstream)


def expected(
    case: Case,
    models: Models,
    *,
    student: Any = None,
    teacher: Any = None,
    upstream: Tensor | None = None,
    shake: int | None = None,
    **common: Any,
) -> Answer:
    """The oracle's answer for the same numbers. With `shake`, the seed of a draw, every logit of a
    projection is moved by about what its rounding in float32 may be."""
    student = models.student if student is None else student
    teacher = models.teacher if teacher is None else teacher

    def whole(model: Any, draw: int) -> Any:
        if not isinstance(model, opdc.Projection):
            return model
        exact = logits(model)
        if shake is None:
            return exact
        generator = torch.Generator().manual_seed(shake + draw)
        signs = torch.randint(0, 2, exact.shape, generator=generator) * 2 - 1
        step = 2 * torch.finfo(torch.float32).eps
        return exact + step * signs * logit_sizes(model).detach()

    if isinstance(student, Tensor):
        leaf = read = student.detach().double().requires_grad_()
    else:
        leaf = leaves(student, torch.float64)
        read = whole(leaf, 100)
    function = getattr(oracle, case.function, None) or getattr(oracle_published, case.function)
    other = whole(teacher, 200)
    other = other.detach() if isinstance(other, Tensor) else other
    value = call(function, case, read, other, models.inputs, **common)
    return pull(value, leaf, models.inputs, upstream)


# ----------------------------------------------------------------- comparisons


def close(result: Answer, truth: Answer, tolerance: float = 1e-11) -> None:
    """Equal to a fraction of the largest entry of each tensor."""
    pairs = {"value": (result.value, truth.value)}
    assert result.gradients.keys() == truth.gradients.keys()
    pairs |= {name: (result.gradients[name], truth.gradients[name]) for name in truth.gradients}
    for name, (mine, right) in pairs.items():
        assert (mine is None) == (right is None), name
        if right is None or right.numel() == 0:
            continue
        assert mine.shape == right.shape, name
        error = (mine.to_dense().double() - right.to_dense().double()).abs().max()
        limit = tolerance * float(right.to_dense().abs().max()) + 1e-15
        assert error <= limit, f"{name} off by {error:.2e}, allowed {limit:.2e}"


def judge(case: Case, models: Models, tolerance: float = 4e-6, **changes: Any) -> Answer:
    """In float32 and below: the truth of logits that are off by their rounding, rounded once.

    Values are judged by position, tensors by their norm, entries of bf16 and fp16 by their
    distance from the numbers that one rounding may give.
    """
    result, truth = measured(case, models, **changes), expected(case, models, **changes)
    shaken = [expected(case, models, shake=draw, **changes) for draw in (1, 2)]

    room = torch.stack([(other.value - truth.value).abs() for other in shaken]).amax(0)
    error = (result.value.double() - truth.value).abs()
    limit = tolerance * truth.value.abs() + 4 * room + 1e-12
    assert (error <= limit).all(), f"value off by {error / limit} of what is allowed"

    for name, right in truth.gradients.items():
        mine = result.gradients[name]
        assert mine.dtype == parts(changes.get("student") or models.student)[name].dtype, name
        room = torch.stack([(other.gradients[name] - right).norm() for other in shaken]).amax()
        limit = tolerance * right.norm() + 4 * room + 1e-12
        error = mine.double() - right
        if mine.dtype in LOW_PRECISION:
            excess = (error.abs() - half_spacing(right, mine.dtype)).max()
            assert excess <= limit, f"{name} beyond one rounding by {excess:.2e} of {limit:.2e}"
        else:
            assert error.norm() <= limit, f"{name} off by {error.norm():.2e} of {limit:.2e}"
    return result


def same_bits(first: Answer, second: Answer) -> bool:
    assert first.gradients.keys() == second.gradients.keys()
    return torch.equal(first.value, second.value) and all(
        torch.equal(x, second.gradients[name]) for name, x in first.gradients.items()
    )


def with_budget(projection: Any, max_bytes: int | None) -> Any:
    """The projection with this budget; whatever else takes the place of logits as it is."""
    is_projection = isinstance(projection, opdc.Projection)
    return projection._replace(max_bytes=max_bytes) if is_projection else projection


def bytes_of_a_position(case: Case, models: Models, **changes: Any) -> int:
    """The smallest budget that the loss takes, which its error names."""
    student, teacher = (
        with_budget(changes.pop(name, getattr(models, name)), 1) for name in ("student", "teacher")
    )
    with pytest.raises(ValueError, match="max_bytes") as caught:
        measured(case, models, student=student, teacher=teacher, **changes)
    return max(
        int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", str(caught.value))
    )
