"""Top-K divergences: every cell of support × normalize × divergence, for teachers given as logits
and as the few log-probs that a server sends."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import opdc
import oracle
from judge import (
    FP64_BOUND,
    LOW_PRECISION,
    ORACLE_NOISE,
    Result,
    arithmetic,
    bound,
    half_spacing,
    mixture_condition,
)
from regimes import BY_NAME, NEAR_NOISES, Case, Inputs, make_inputs
from test_build import LEVELS, on_linux, output_of, runnable_levels

INFINITY = math.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SUPPORTS = ("teacher", "student", "teacher+token")
REDUCTIONS = ("none", "sum", "mean", "seq_mean")


@dataclass(frozen=True)
class Cell:
    """One divergence with one way to treat what lies outside the support."""

    function: str
    normalize: str
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return "-".join([self.function, *map(str, self.options.values()), self.normalize])

    @property
    def is_divergence(self) -> bool:
        """Never negative, and 0 for identical models."""
        return self.normalize in ("both", "tail", "generalized")

    @property
    def is_forward(self) -> bool:
        return self.function == "forward_kl" or self.options.get("beta") == 0.0


FORWARD = tuple(Cell("forward_kl", name) for name in ("none", "teacher", "both", "tail"))
REVERSE = tuple(
    Cell("reverse_kl", name) for name in ("none", "teacher", "both", "tail", "generalized")
)
MIXED = tuple(
    Cell("jsd", name, {"beta": beta}) for name in ("both", "tail") for beta in (0.5, 0.1, 0.9)
)
ENDS = tuple(Cell("jsd", name, {"beta": beta}) for name in ("both", "tail") for beta in (0.0, 1.0))
CELLS = (*FORWARD, *REVERSE, *MIXED, *ENDS)
FEW = (*FORWARD, *REVERSE, *MIXED[::3])  # every formula once
BOTH = tuple(cell for cell in FEW if cell.normalize == "both")


def call(module, cell: Cell, student: Tensor, teacher, inputs: Inputs, support, k=None, **common):
    return getattr(module, cell.function)(
        student,
        teacher,
        support=support,
        k=k,
        normalize=cell.normalize,
        tokens=inputs.tokens if support == "teacher+token" else None,
        **cell.options,
        **common,
    )


def run(module, cell, inputs, support, k=None, teacher=None, upstream=None, **common) -> Result:
    """Value and gradient; by default per position, under the random upstream of the inputs."""
    dtype = torch.float64 if module is oracle else None
    leaf = inputs.student.detach().to(dtype, copy=True).requires_grad_()
    teacher = inputs.teacher if teacher is None else teacher
    common.setdefault("reduction", "none")
    value = call(module, cell, leaf, teacher, inputs, support, k, **common)
    if upstream is None:
        upstream = inputs.upstream if common["reduction"] == "none" else torch.tensor(1.0)
    value.backward(upstream.to(value.dtype))
    return Result(value.detach(), leaf.grad)


def served(
    inputs: Inputs, k: int, dtype=torch.float32, tail: bool = False, temperature=1.0
) -> opdc.TopK:
    """What a server sends for these logits: the slots in any order, the token, perhaps the tail."""
    best = oracle.topk(inputs.teacher, k, temperature=temperature)
    order = torch.rand(best.ids.shape, generator=inputs.generator).argsort(-1)
    ids, logprobs = best.ids.gather(-1, order), best.logprobs.gather(-1, order)
    if tail:
        whole = torch.log_softmax(inputs.teacher.double() / temperature, -1)
        for slot in range(k):
            present = ids[..., slot, None] == torch.arange(whole.shape[-1])
            whole = whole.masked_fill(present, -INFINITY)
        return opdc.TopK(ids, logprobs.to(dtype), tail_logprob=whole.logsumexp(-1).to(dtype))
    token = oracle.token_logprobs(inputs.teacher, inputs.tokens, temperature=temperature)
    return opdc.TopK(ids, logprobs.to(dtype), token_logprobs=token.to(dtype))


def bits(result: Result) -> tuple[bytes, bytes]:
    return result.value.numpy().tobytes(), result.gradient.numpy().tobytes()


# ----------------------------------------------------------------- how a result is judged


def unit(inputs: Inputs) -> float:
    """The error granted to a log-prob, over 1 + its size: two units in the last place of fp32."""
    wide = arithmetic(inputs.student) == torch.float64
    return FP64_BOUND / 4 if wide else 2 * torch.finfo(torch.float32).eps


def shaken(numbers: Tensor | None, step: float, draw: int) -> Tensor | None:
    """Log-probs moved by a few units in the last place; equal ones by the same, so no tie ends."""
    if numbers is None:
        return None
    x = numbers.double()
    shake = step * (1.0 + x.abs()) * torch.sin(1e4 * (draw + 1) * x)
    return torch.where(x.isfinite(), x + shake, x)


def shaken_logits(logits: Tensor, step: float, draw: int) -> Tensor:
    top = logits.double().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    return top + shaken(logits.double() - top, step, draw)


def moved(cell, inputs, support, k, teacher, truth, **common) -> tuple[Tensor, Tensor]:
    """How far value and gradient row of the truth move when its log-probs are shaken."""
    step = unit(inputs)
    value, gradient = torch.zeros_like(truth.value), torch.zeros_like(truth.value)
    kept = inputs.student
    for draw in range(3):
        inputs.student = shaken_logits(kept, step, draw)
        if oracle.is_sparse(teacher):
            parts = (shaken(numbers, step, draw + 7) for numbers in teacher[1:])
            other = opdc.TopK(teacher.ids, *parts)
        else:
            other = shaken_logits(teacher, step, draw + 7)
        result = run(oracle, cell, inputs, support, k, other, **common)
        value = value.maximum((result.value - truth.value).abs())
        gradient = gradient.maximum((result.gradient - truth.gradient).norm(dim=-1))
    inputs.student = kept
    return value, gradient


def judge(
    cell, inputs, support, k=None, teacher=None, floor=ORACLE_NOISE, tolerance=0.0, **common
) -> Result:
    """The library against the oracle, value and gradient rows.

    `both` on logits is a sum of terms of one sign (Bregman form), and is held to the bound of the
    arithmetic. The other cells cancel: terms of both signs, log(1 − P) and log(1 − Q) from sums, a
    server's log-probs less the student's. They must be the truth of inputs whose log-probs differ
    by a few units in the last place. Rows that are not finite must be so in the same way. `floor`
    is the absolute error of the gradient of a saturated row, where everything cancels; `tolerance`
    the relative error, where it is not that of the arithmetic.
    """
    teacher = inputs.teacher if teacher is None else teacher
    sparse = oracle.is_sparse(teacher)
    result = run(opdc, cell, inputs, support, k, teacher, **common)
    truth = run(oracle, cell, inputs, support, k, teacher, **common)
    numbers = teacher.logprobs if sparse else teacher
    assert result.value.dtype == arithmetic(inputs.student, numbers)
    assert result.gradient.dtype == inputs.student.dtype

    finite = truth.value.isfinite()
    torch.testing.assert_close(
        result.value[~finite].double(), truth.value[~finite], equal_nan=True, rtol=0, atol=0
    )
    assert result.gradient[~finite].isnan().all()
    assert truth.gradient[~finite].isnan().all()

    tolerance = max(tolerance, bound(inputs.student, numbers))
    tolerance *= mixture_condition(Case("", cell.function, cell.options))
    value_error = (result.value.double() - truth.value).abs()
    strict = cell.normalize == "both" and not sparse
    value_limit = tolerance * truth.value.abs() + (1e-20 if strict else ORACLE_NOISE)
    error = result.gradient.double() - truth.gradient
    if inputs.student.dtype in LOW_PRECISION:
        rounding = half_spacing(truth.gradient, inputs.student.dtype)
        gradient_error = (error.abs() - rounding).amax(-1)
    else:
        gradient_error = error.norm(dim=-1)
    size = truth.gradient.norm(dim=-1)
    gradient_limit = tolerance * size + floor

    def within() -> Tensor:
        return (value_error <= value_limit) & (gradient_error <= gradient_limit) | ~finite

    if not within().all() and not strict:
        value_room, gradient_room = moved(cell, inputs, support, k, teacher, truth, **common)
        value_limit += 4 * value_room
        gradient_limit += 4 * gradient_room
        if not cell.is_divergence:  # what is left of terms that add to nothing
            value_limit += unit(inputs) * common.get("weights", torch.ones(())).double().abs()
        if not cell.is_forward:  # p_j (u_j − ℓ): a difference of numbers of the size of the loss
            gradient_limit += 2 * unit(inputs) * (truth.value * inputs.upstream).abs()
    for place in (~within()).nonzero().tolist():
        row = tuple(place)
        pytest.fail(
            f"position {place}: value {truth.value[row]:.9g} off by {value_error[row]:.2e}, "
            f"allowed {value_limit[row]:.2e}; gradient of norm {size[row]:.3g} off by "
            f"{gradient_error[row]:.2e}, allowed {gradient_limit[row]:.2e}"
        )
    return result


# ----------------------------------------------------------------- the reference is judged first


def closed_form(cell: Cell, z: Tensor, t: Tensor, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Value and gradient as a table of formulas, in plain float64 at T = 1."""
    s, tau = z.log_softmax(-1), t.log_softmax(-1)
    p, q = s.exp(), tau.exp()
    on = torch.zeros_like(z)
    on[ids] = 1.0
    mass_p, mass_q = (on * p).sum(), (on * q).sum()
    tail_p, tail_q = ((1 - on) * p).sum(), ((1 - on) * q).sum()
    p_hat, q_hat = on * p / mass_p, on * q / mass_q
    log_p_hat, log_q_hat = s - mass_p.log(), tau - mass_q.log()
    name, normalize = cell.function, cell.normalize
    if name == "forward_kl":
        if normalize == "none":
            return (on * q * (tau - s)).sum(), mass_q * p - on * q
        if normalize == "teacher":
            return (q_hat * (log_q_hat - s)).sum(), p - q_hat
        if normalize == "both":
            return (q_hat * (log_q_hat - log_p_hat)).sum(), p_hat - q_hat
        value = (on * q * (tau - s)).sum() + tail_q * (tail_q / tail_p).log()
        return value, on * (p - q) + (1 - on) * p * (1 - tail_q / tail_p)
    if name == "reverse_kl":
        if normalize in ("none", "teacher"):
            against = tau if normalize == "none" else log_q_hat
            c = on * p * (s - against + 1)
            return (on * p * (s - against)).sum(), c - p * c.sum()
        if normalize == "generalized":
            c = on * p * (s - tau)
            return (c + on * (q - p)).sum(), c - p * c.sum()
        if normalize == "both":
            value = (p_hat * (log_p_hat - log_q_hat)).sum()
            return value, p_hat * (log_p_hat - log_q_hat - value)
        u_tail = (tail_p / tail_q).log()
        value = (on * p * (s - tau)).sum() + tail_p * u_tail
        return value, p * (on * (s - tau) + (1 - on) * u_tail - value)
    beta = cell.options["beta"]
    if normalize == "both":
        mixture = (beta * q_hat + (1 - beta) * p_hat)[ids].log()
        u = torch.zeros_like(z)
        u[ids] = (1 - beta) * (p_hat * log_p_hat)[ids] - (1 - beta) * p_hat[ids] * mixture
        value = beta * (q_hat[ids] * (log_q_hat[ids] - mixture)).sum() + u.sum()
        return value, u - p_hat * u.sum()
    mixture = (beta * q + (1 - beta) * p).log()
    mixture_tail = (beta * tail_q + (1 - beta) * tail_p).log()
    u = on * (1 - beta) * p * (s - mixture)
    u_tail = (1 - beta) * tail_p * (tail_p.log() - mixture_tail)
    total = u.sum() + u_tail
    value = beta * (
        (on * q * (tau - mixture)).sum() + tail_q * (tail_q.log() - mixture_tail)
    ) + total  # fmt: skip
    return value, u + (1 - on) * p * u_tail / tail_p - p * total


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("cell", [*FORWARD, *REVERSE, *MIXED], ids=str)
def test_the_oracle_agrees_with_the_closed_form(cell, support):
    inputs = make_inputs("uniform", (4,), 12, torch.float64)
    inputs.student, inputs.teacher = 15 * inputs.student, 15 * inputs.teacher
    result = run(oracle, cell, inputs, support, 4, upstream=torch.ones(4))
    for row in range(4):
        z, t = inputs.student[row], inputs.teacher[row]
        ids = (z if support == "student" else t).topk(4).indices.tolist()
        if support == "teacher+token":
            ids = sorted({*ids, int(inputs.tokens[row])})
        value, gradient = closed_form(cell, z, t, ids)
        torch.testing.assert_close(result.value[row], value, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(result.gradient[row], gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("cell", [*FORWARD, *REVERSE, *MIXED], ids=str)
def test_the_oracle_takes_a_server_for_the_logits(cell):
    inputs = make_inputs("far", (4,), 30, torch.float64)
    for tail in (False, True):
        dense = run(oracle, cell, inputs, "teacher", 5, temperature=1.3)
        teacher = served(inputs, 5, torch.float64, tail, temperature=1.3)
        sent = run(oracle, cell, inputs, "teacher", teacher=teacher, temperature=1.3)
        torch.testing.assert_close(sent.value, dense.value, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(sent.gradient, dense.gradient, rtol=1e-10, atol=1e-13)


# ----------------------------------------------------------------- worked examples


# p = (1/2, 1/8, 1/8, 1/4), q = (1/8, 1/2, 1/8, 1/4): the teacher's two best are the ids 1 and 3.
P = torch.tensor([[1 / 2, 1 / 8, 1 / 8, 1 / 4]], dtype=torch.float64)
Q = torch.tensor([[1 / 8, 1 / 2, 1 / 8, 1 / 4]], dtype=torch.float64)
SERVER = opdc.TopK(
    torch.tensor([[1, 3]]), torch.tensor([[1 / 2, 1 / 4]], dtype=torch.float64).log()
)


def by_hand(function, value: float, gradient: list[float], **keywords):
    """The same for a teacher's logits, its two best log-probs, and them with a missing slot."""
    missing = opdc.TopK(
        torch.tensor([[3, -1, 1]]),
        torch.tensor([[1 / 4, math.nan, 1 / 2]], dtype=torch.float64).log(),
    )
    for teacher, k in ((Q.log() + 3.0, 2), (SERVER, None), (missing, None)):
        student = (P.log() - 5.0).requires_grad_()
        loss = function(student, teacher, support="teacher", k=k, **keywords)
        loss.backward()
        wanted = torch.tensor([gradient], dtype=torch.float64)
        torch.testing.assert_close(loss.detach(), wanted.new_tensor(value), rtol=0, atol=1e-6)
        torch.testing.assert_close(student.grad, wanted, rtol=0, atol=1e-6)


def test_worked_example_of_lsm():
    """p̂ = (1/8, 1/4)/(3/8) = (1/3, 2/3), q̂ = (1/2, 1/4)/(3/4) = (2/3, 1/3):

    ℓ = 1/3 log ½ + 2/3 log 2 = 1/3 log 2 = 0.231049,
    gradient of id 1: 1/3 (−log 2 − ℓ) = −4/9 log 2 = −0.308065, of id 3: +0.308065.
    """
    by_hand(opdc.lsm, 0.231049, [0.0, -0.308065, 0.0, 0.308065])
    by_hand(opdc.reverse_kl, 0.231049, [0.0, -0.308065, 0.0, 0.308065], normalize="both")


def test_worked_example_of_the_forward_kl_on_the_support():
    """1/2 log(½ / ⅛) + 1/4 log(¼ / ¼) = log 2 = 0.693147, and Q = 3/4:

    gradient Q p − q 1[S] = (3/8, 3/32 − 1/2, 3/32, 3/16 − 1/4).
    """
    by_hand(opdc.forward_kl, 0.693147, [0.375, -0.40625, 0.09375, -0.0625], normalize="none")


def test_worked_example_of_the_forward_kl_to_the_renormalised_teacher():
    """q̂ = (2/3, 1/3): 2/3 log(2/3 · 8) + 1/3 log(1/3 · 4) = 1.115984 + 0.095894 = 1.211878,

    gradient p − q̂ 1[S] = (1/2, 1/8 − 2/3, 1/8, 1/4 − 1/3).
    """
    gradient = [0.5, -0.5416667, 0.125, -0.0833333]
    by_hand(opdc.forward_kl, 1.211878, gradient, normalize="teacher")


def test_worked_example_of_the_forward_kl_with_the_tail_as_a_bucket():
    """1 − P = 5/8, 1 − Q = 1/4: log 2 + 1/4 log(2/5) = 0.693147 − 0.229073 = 0.464074,

    gradient p − q = (−3/8, 0) on S and p (1 − 2/5) = (3/10, 3/40) off S.
    """
    by_hand(opdc.forward_kl, 0.464074, [0.3, -0.375, 0.075, 0.0], normalize="tail")


def test_worked_example_of_the_reverse_kl_on_the_support():
    """1/8 log(⅛ / ½) + 1/4 log 1 = −1/4 log 2 = −0.173287: negative, and not clamped at 0.

    c = p (s − τ + 1) = (1/8 (1 − log 4), 1/4) = (−0.048287, 0.25), Σc = 0.201713:
    gradient c 1[S] − p Σc = (−0.100857, −0.073501, −0.025214, 0.199572).
    """
    gradient = [-0.1008566, -0.0735008, -0.0252142, 0.1995717]
    by_hand(opdc.reverse_kl, -0.173287, gradient, normalize="none")


# ----------------------------------------------------------------- every cell, teacher as logits


REGIME_NAMES = (
    "uniform",
    "far",
    "near_1e-02",
    "realistic",
    "peaked_0.99",
    "peaked_against_flat",
    "flat_against_peaked",
    "offset_1e4_both",
    "offset_1e4_student",
    "masked_both",
    "masked_teacher",
    "masked_student",
    "wide_1e2",
)


@pytest.mark.parametrize(
    ("cell", "regime"),
    [
        (cell, regime)
        for cell in CELLS
        for regime in (REGIME_NAMES if cell in FEW else ("far", "realistic", "masked_both"))
    ],
    ids=str,
)
def test_regime(cell, regime):
    floor = ORACLE_NOISE + 4 * torch.finfo(torch.float32).eps * BY_NAME[regime].gap
    inputs = make_inputs(regime, (4,), 65)
    for support in SUPPORTS:
        judge(cell, inputs, support, 5, floor=floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", ["far", "realistic", "peaked_0.99", "masked_student"])
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_low_precision(cell, regime, dtype):
    inputs = make_inputs(regime, (3,), 65, dtype)
    for support in SUPPORTS:
        judge(cell, inputs, support, 5)


@pytest.mark.parametrize("regime", ["uniform", "far", "realistic", "masked_both"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_float64(cell, regime):
    inputs = make_inputs(regime, (2, 2), 65, torch.float64)
    for support in SUPPORTS:
        judge(cell, inputs, support, 6, temperature=1.3)


@pytest.mark.parametrize(
    ("k", "vocabulary"), [(2, 17), (16, 129), (32, 1023), (33, 1025), (64, 2050), (700, 701)]
)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_vocabulary_that_no_block_divides(cell, k, vocabulary):
    inputs = make_inputs("realistic", (1,), vocabulary)
    for support in SUPPORTS:
        judge(cell, inputs, support, k)


@pytest.mark.parametrize("cell", [FORWARD[0], FORWARD[3], REVERSE[2], REVERSE[3]], ids=str)
def test_vocabulary_of_a_language_model(cell):
    inputs = make_inputs("realistic", (1,), 151_936)
    for support in ("teacher", "student"):
        judge(cell, inputs, support, 64)


@pytest.mark.parametrize("mix", [("f32", "bf16"), ("bf16", "f32"), ("f16", "f64"), ("f64", "f32")])
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_student_and_teacher_of_different_dtypes(cell, mix):
    names = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16,
             "f16": torch.float16}  # fmt: skip
    student, teacher = (names[name] for name in mix)
    for support in SUPPORTS:
        judge(cell, make_inputs("far", (2,), 65, student, teacher), support, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_hazard_13_ties_at_the_cut_go_to_the_lower_id(cell, dtype):
    """Few different values: another choice among equals would be another loss."""
    inputs = make_inputs("far", (2,), 65, dtype)
    inputs.student, inputs.teacher = inputs.student.round(), (inputs.teacher / 2).round()
    for support in SUPPORTS:
        judge(cell, inputs, support, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_hazard_16_temperature_mask_weights_and_valid_vocab(cell, dtype):
    inputs = make_inputs("realistic", (2, 3), 65, dtype)
    inputs.tokens %= 60
    wider = torch.cat([inputs.teacher, inputs.teacher[..., :7] + 50], -1)
    common = {"mask": inputs.mask, "weights": inputs.weights, "valid_vocab": 60}
    for support in SUPPORTS:
        for temperature in (0.5, 2.0):
            result = judge(cell, inputs, support, 6, wider, temperature=temperature, **common)
            assert (result.value[~inputs.mask] == 0).all()
            assert (result.gradient[~inputs.mask] == 0).all()
            assert (result.gradient[..., 60:] == 0).all()


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_a_support_wider_than_what_exists(cell, support):
    """Four ids exist and K = 9: the rest of the slots is missing, and the tail is empty."""
    inputs = make_inputs("uniform", (3,), 40)
    keep = torch.tensor([0, 17, 18, 39])
    for name in ("student", "teacher"):
        logits = torch.full((3, 40), -INFINITY)
        logits[:, keep] = 10 * getattr(inputs, name)[:, keep]
        setattr(inputs, name, logits)
    inputs.tokens = torch.tensor([0, 17, 5])
    judge(cell, inputs, support, 9)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_token_that_the_teacher_excludes_does_not_join_the_support(cell):
    inputs = make_inputs("uniform", (3,), 40)
    inputs.tokens = torch.tensor([3, 4, 5])
    inputs.teacher[:, 3:6] = -INFINITY
    with_token = judge(cell, inputs, "teacher+token", 6)
    without = run(opdc, cell, inputs, "teacher", 6)
    assert torch.equal(with_token.value, without.value)


@pytest.mark.parametrize("cell", FEW, ids=str)
def test_a_token_among_the_best_changes_nothing(cell):
    inputs = make_inputs("far", (3,), 40)
    best = oracle.topk(inputs.teacher, 4).ids
    for slot in range(4):
        inputs.tokens = best[:, slot]
        with_token = judge(cell, inputs, "teacher+token", 4)
        assert bits(with_token) == bits(run(opdc, cell, inputs, "teacher", 4))


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_hazard_02_and_03_mass_against_minus_infinity_on_the_support(cell, support):
    """The loss of the row is +inf with a NaN gradient where its formula takes that logarithm, and
    finite where the other side weighs it with 0; never a silent 0."""
    for who in ("student", "teacher"):
        inputs = make_inputs("uniform", (4,), 40)
        # The best id of the model that ranks has no mass in the other one.
        ranking = inputs.student if support == "student" else inputs.teacher
        best = ranking.argmax(-1)
        getattr(inputs, who)[2, best[2]] = -INFINITY
        judge(cell, inputs, support, 5)


def test_hazard_02_and_03_which_cells_are_infinite():
    inputs = make_inputs("uniform", (2,), 40)
    inputs.student[1, inputs.teacher[1].argmax()] = -INFINITY
    for cell in CELLS:
        result = run(opdc, cell, inputs, "teacher", 5)
        infinite = cell.is_forward
        assert result.value.isinf().tolist() == [False, infinite], str(cell)
        assert result.gradient[1].isnan().all() == infinite
        assert result.gradient[0].isfinite().all()


# ----------------------------------------------------------------- teacher from a server


# The support, and whether the server sends the tail.
SERVED = (("teacher", False), ("teacher", True), ("teacher+token", False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "regime", ["uniform", "far", "near_1e-02", "realistic", "peaked_0.9", "masked_student"]
)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_sparse_regime(cell, regime, dtype):
    inputs = make_inputs(regime, (4,), 65, dtype)
    for support, tail in SERVED:
        judge(cell, inputs, support, None, served(inputs, 5, tail=tail))


@pytest.mark.parametrize("cell", FEW, ids=str)
def test_sparse_float64(cell):
    inputs = make_inputs("far", (2, 2), 65, torch.float64)
    for support, tail in SERVED:
        teacher = served(inputs, 6, torch.float64, tail, temperature=1.3)
        judge(cell, inputs, support, 6, teacher, temperature=1.3)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("support", "tail"), SERVED, ids=str)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_sparse_missing_slots_mask_weights_and_valid_vocab(cell, support, tail, ids_dtype):
    inputs = make_inputs("far", (2, 3), 65)
    inputs.tokens %= 60
    inputs.teacher[..., 60:] = -INFINITY  # these are not served
    teacher = served(inputs, 7, tail=tail, temperature=0.7)
    holes = torch.rand(2, 3, 7, generator=inputs.generator) < 0.3
    holes[..., 0] = False
    teacher.ids[holes] = -1
    if tail:  # the mass of all that is not served
        lost = torch.where(holes, teacher.logprobs, -INFINITY).logsumexp(-1)
        teacher = teacher._replace(tail_logprob=torch.logaddexp(teacher.tail_logprob, lost))
    for garbage in (math.nan, INFINITY, 0.0):  # what a missing slot holds is not read
        teacher.logprobs[holes] = garbage
        common = {"mask": inputs.mask, "weights": inputs.weights, "valid_vocab": 60}
        result = judge(
            cell,
            inputs,
            support,
            None,
            teacher._replace(ids=teacher.ids.to(ids_dtype)),
            temperature=0.7,
            **common,
        )
        assert (result.gradient[..., 60:] == 0).all()
        assert (result.gradient[~inputs.mask] == 0).all()


@pytest.mark.parametrize("cell", FEW, ids=str)
def test_sparse_slots_of_probability_zero_are_missing(cell):
    inputs = make_inputs("far", (3,), 65)
    teacher = served(inputs, 7)
    wide = teacher._replace(
        ids=torch.cat([teacher.ids, (teacher.ids.amax(-1, keepdim=True) + 1) % 65], -1),
        logprobs=torch.cat([teacher.logprobs, torch.full((3, 1), -INFINITY)], -1),
    )
    repeated = (wide.ids[:, -1:] == teacher.ids).any(-1)
    assert not repeated.all()
    wide.ids[repeated, -1] = -1
    result = judge(cell, inputs, "teacher", None, wide)
    usual = run(opdc, cell, inputs, "teacher", None, teacher)
    assert torch.equal(result.value, usual.value)


@pytest.mark.parametrize("cell", FEW, ids=str)
def test_sparse_row_without_a_slot(cell):
    """Nothing to compare is 0; nothing to renormalise is NaN, for that row alone."""
    inputs = make_inputs("far", (3,), 65)
    teacher = served(inputs, 4)
    usual = run(opdc, cell, inputs, "teacher", None, teacher)
    teacher.ids[1] = -1
    result = judge(cell, inputs, "teacher", None, teacher)
    if cell.normalize in ("teacher", "both"):
        assert result.value[1].isnan()
        assert result.gradient[1].isnan().all()
    else:
        assert result.value[1] == 0
        assert (result.gradient[1] == 0).all()
    good = torch.tensor([0, 2])
    assert torch.equal(result.value[good], usual.value[good])
    assert torch.equal(result.gradient[good], usual.gradient[good])


@pytest.mark.parametrize("cell", BOTH, ids=str)
def test_one_slot_left_of_a_row_is_zero_under_both(cell):
    inputs = make_inputs("far", (3,), 65)
    teacher = served(inputs, 4)
    teacher.ids[1, 1:] = -1
    result = run(opdc, cell, inputs, "teacher", None, teacher)
    assert result.value[1] == 0
    assert (result.gradient[1] == 0).all()
    assert (result.value[[0, 2]] > 0).all()


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (cell, name)
        for cell in FEW
        for name in ("logprobs", "token_logprobs", "tail_logprob")
        if name != "tail_logprob" or cell.normalize == "tail"
    ],
    ids=str,
)
def test_hazard_04_a_nan_from_the_server_spoils_its_row_alone(cell, name):
    inputs = make_inputs("far", (3,), 65)
    support = "teacher+token" if name == "token_logprobs" else "teacher"
    teacher = served(inputs, 4, tail=name == "tail_logprob")
    served_ids = [set(row) for row in teacher.ids.tolist()]
    inputs.tokens = torch.tensor([min(set(range(65)) - ids) for ids in served_ids])
    usual = run(opdc, cell, inputs, support, None, teacher)
    getattr(teacher, name)[1] = math.nan
    result = run(opdc, cell, inputs, support, None, teacher)
    assert result.value[1].isnan()
    assert result.gradient[1].isnan().all()
    good = torch.tensor([0, 2])
    assert torch.equal(result.value[good], usual.value[good])
    assert torch.equal(result.gradient[good], usual.gradient[good])


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.normalize == "tail"], ids=str)
def test_a_mass_that_rounding_lifted_above_one_leaves_no_tail(cell):
    inputs = make_inputs("peaked_0.9", (3,), 40)
    teacher = served(inputs, 8)
    lifted = teacher.logprobs - teacher.logprobs.logsumexp(-1, keepdim=True) + 5e-5
    judge(cell, inputs, "teacher", None, teacher._replace(logprobs=lifted))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.normalize == "tail"], ids=str)
def test_the_tail_that_is_sent_is_the_one_that_counts(cell):
    """Even where it is not what the slots leave of 1."""
    inputs = make_inputs("far", (3,), 40)
    teacher = served(inputs, 8, tail=True)
    for tail in ([-0.5, -3.0, -20.0], [-INFINITY, 0.0, -1.0]):
        judge(cell, inputs, "teacher", None, teacher._replace(tail_logprob=torch.tensor(tail)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_topk_of_the_teacher_stands_for_the_teacher(cell, dtype):
    inputs = make_inputs("far", (2, 3), 300, dtype)
    for temperature in (1.0, 1.7):
        best = opdc.topk(inputs.teacher, 8, temperature=temperature)
        sent = run(opdc, cell, inputs, "teacher", None, best, temperature=temperature)
        dense = run(opdc, cell, inputs, "teacher", 8, temperature=temperature)
        wide = dtype == torch.float64
        close = {"rtol": 1e-11, "atol": 1e-13} if wide else {"rtol": 2e-5, "atol": 2e-6}
        torch.testing.assert_close(sent.value, dense.value, **close)
        if dtype in LOW_PRECISION:
            close["rtol"] = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(sent.gradient, dense.gradient, **close)
        token = opdc.token_logprobs(inputs.teacher, inputs.tokens, temperature=temperature)
        sent = run(opdc, cell, inputs, "teacher+token", None,
                    best._replace(token_logprobs=token), temperature=temperature)  # fmt: skip
        dense = run(opdc, cell, inputs, "teacher+token", 8, temperature=temperature)
        torch.testing.assert_close(sent.gradient, dense.gradient, **close)


def test_a_server_and_its_defaults():
    """Support "teacher" and K from the slots; lsm is the reverse KL with both renormalised."""
    inputs = make_inputs("far", (2, 3), 65)
    teacher = served(inputs, 6)
    wanted = opdc.reverse_kl(inputs.student, teacher, support="teacher", k=6, normalize="both")
    for loss in (
        opdc.reverse_kl(inputs.student, teacher, normalize="both"),
        opdc.lsm(inputs.student, teacher),
        opdc.lsm(inputs.student, teacher, k=6, support="teacher"),
        opdc.lsm(inputs.student, opdc.TopK(teacher.ids, teacher.logprobs)),
    ):
        assert torch.equal(loss, wanted)
    joined = opdc.lsm(inputs.student, teacher, support="teacher+token", tokens=inputs.tokens)
    truth = oracle.lsm(inputs.student, teacher, support="teacher+token", tokens=inputs.tokens)
    torch.testing.assert_close(joined.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("support", [None, *SUPPORTS])
def test_lsm_is_the_reverse_kl_of_32_renormalised_ids(support):
    inputs = make_inputs("realistic", (2, 3), 200)
    tokens = inputs.tokens if support == "teacher+token" else None
    student = inputs.student.clone().requires_grad_()
    loss = opdc.lsm(student, inputs.teacher, support=support, tokens=tokens)
    loss.backward()
    cell = Cell("reverse_kl", "both")
    plain = run(opdc, cell, inputs, support or "teacher", 32, reduction="mean")
    assert torch.equal(loss, plain.value)
    assert torch.equal(student.grad, plain.gradient)
    assert (student.grad != 0).sum(-1).max() <= (33 if tokens is not None else 32)


# ----------------------------------------------------------------- anything


@settings(max_examples=120)
@given(
    cell=st.sampled_from(CELLS),
    regime=st.sampled_from(REGIME_NAMES[:-1]),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    vocabulary=st.one_of(st.integers(2, 70), st.sampled_from([127, 128, 129, 1023, 1024, 1025])),
    k=st.integers(2, 40),
    form=st.sampled_from([*SUPPORTS, "served", "served and tail", "served and token"]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.7, 1.7, 5.0]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_call_agrees_with_the_oracle(
    cell, regime, shape, vocabulary, k, form, dtype, temperature, masked, seed
):
    inputs = make_inputs(regime, shape, vocabulary, dtype, seed=seed)
    common = {"temperature": temperature}
    if masked:
        common |= {"mask": inputs.mask, "weights": inputs.weights}
    common["tolerance"] = 1e-8  # the oracle's own, where offsets and near models meet float64
    # Not all ids: 1 − Q of rounded log-probs would be tail mass where no id is left for it.
    k = max(2, min(k, vocabulary if form in SUPPORTS else vocabulary // 2))
    if form in SUPPORTS:
        judge(cell, inputs, form, k, **common)
        return
    number = torch.float64 if dtype == torch.float64 else torch.float32
    teacher = served(inputs, k, number, form == "served and tail", temperature)
    support = "teacher+token" if form == "served and token" else "teacher"
    judge(cell, inputs, support, None, teacher, **common)


# ----------------------------------------------------------------- what is not read, not written


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", ["logits", "server", "server and token"])
@pytest.mark.parametrize("cell", BOTH, ids=str)
def test_hazard_04_and_05_both_does_not_read_the_student_off_the_support(cell, form, inplace):
    inputs = make_inputs("far", (3,), 300)
    teacher, k = (inputs.teacher, 6) if form == "logits" else (served(inputs, 6), None)
    support = "teacher+token" if form == "server and token" else "teacher"

    def answer(student):
        leaf = student.clone().requires_grad_()
        value = call(
            opdc, cell, leaf * 1.0, teacher, inputs, support, k, reduction="sum", inplace=inplace
        )
        value.backward()
        return Result(value.detach(), leaf.grad)

    usual = answer(inputs.student)
    on = torch.zeros(3, 300, dtype=torch.bool)
    on.scatter_(-1, oracle.topk(inputs.teacher, 6).ids, True)
    if support == "teacher+token":
        on.scatter_(-1, inputs.tokens[:, None], True)
    assert (usual.gradient[~on] == 0).all()
    for garbage in (math.nan, INFINITY, -INFINITY):
        poisoned = inputs.student.masked_fill(~on, garbage)
        assert bits(answer(poisoned)) == bits(usual), garbage


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_hazard_04_an_undefined_row_is_nan_and_alone(cell, who, support):
    inputs = make_inputs("far", (3,), 300)
    usual = run(opdc, cell, inputs, support, 6)
    ranking = inputs.student if support == "student" else inputs.teacher
    best = int(ranking[1].argmax())
    for poison in (math.nan, INFINITY):
        # On the support: even `both` reads it.
        kept = getattr(inputs, who).clone()
        getattr(inputs, who)[1, best] = poison
        result = run(opdc, cell, inputs, support, 6)
        setattr(inputs, who, kept)
        assert result.value[1].isnan()
        assert result.gradient[1].isnan().all()
        good = torch.tensor([0, 2])
        assert torch.equal(result.value[good], usual.value[good])
        assert torch.equal(result.gradient[good], usual.gradient[good])
    getattr(inputs, who)[1] = -INFINITY
    result = run(opdc, cell, inputs, support, 6)
    assert result.value[1].isnan()
    assert result.gradient[1].isnan().all()


@pytest.mark.parametrize("form", ["logits", "server"])
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_hazard_05_inactive_rows_are_never_read(cell, form):
    inputs = make_inputs("far", (3, 4), 65)
    mask = inputs.mask
    assert 0 < mask.sum() < 12
    teacher, k = (inputs.teacher, 6) if form == "logits" else (served(inputs, 6), None)
    common = {"mask": mask, "weights": inputs.weights}
    usual = [
        run(opdc, cell, inputs, "teacher+token", k, teacher, reduction=name, **common)
        for name in REDUCTIONS
    ]
    inputs.student[~mask] = inputs.teacher[~mask] = math.nan
    inputs.tokens[~mask], inputs.weights[~mask] = -100, math.nan
    if form == "server":
        teacher.ids[~mask] = 2**40  # out of range, and repeated
        teacher.logprobs[~mask] = 30.0
        teacher.token_logprobs[~mask] = math.nan
    for name, before in zip(REDUCTIONS, usual, strict=True):
        after = run(opdc, cell, inputs, "teacher+token", k, teacher, reduction=name, **common)
        assert bits(after) == bits(before), name
        assert (after.gradient[~mask] == 0).all()


def test_hazard_06_nothing_active():
    inputs = make_inputs("far", (2, 3), 65)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for cell in FEW:
        for teacher, k in ((inputs.teacher, 6), (served(inputs, 6), None)):
            for reduction in REDUCTIONS:
                result = run(
                    opdc, cell, inputs, "teacher", k, teacher, reduction=reduction, mask=nothing
                )
                assert (result.value == 0).all()
                assert (result.gradient == 0).all()


# ----------------------------------------------------------------- reductions and upstreams


@pytest.mark.parametrize("form", ["logits", "server"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "seq_mean"])
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_hazard_07_reductions(cell, reduction, form):
    inputs = make_inputs("far", (3, 4), 65, torch.float64)
    inputs.mask[1] = False
    teacher, k = inputs.teacher, 6
    if form == "server":
        teacher, k = served(inputs, 6, torch.float64), None
    for num_items in (None, 7) if reduction != "sum" else (None,):
        common = {
            "mask": inputs.mask,
            "weights": inputs.weights,
            "reduction": reduction,
            "num_items": num_items,
        }
        result = run(opdc, cell, inputs, "teacher", k, teacher, **common)
        truth = run(oracle, cell, inputs, "teacher", k, teacher, **common)
        torch.testing.assert_close(result.value, truth.value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(result.gradient, truth.gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_gradient_from_the_forward_call_is_the_recomputed_one(cell, support):
    """Scalar reductions take their gradient in the forward call, `none` in the backward."""
    inputs = make_inputs("far", (5,), 1025)
    none = run(opdc, cell, inputs, support, 6, upstream=torch.ones(5))
    summed = run(opdc, cell, inputs, support, 6, reduction="sum")
    assert torch.equal(none.gradient, summed.gradient)
    torch.testing.assert_close(summed.value, none.value.sum(), rtol=1e-6, atol=1e-6)
    teacher = served(inputs, 6)
    if support != "student":
        none = run(opdc, cell, inputs, support, None, teacher, upstream=torch.ones(5))
        summed = run(opdc, cell, inputs, support, None, teacher, reduction="sum")
        assert torch.equal(none.gradient, summed.gradient)


@pytest.mark.parametrize("form", ["logits", "server"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_hazard_19_inplace_gives_the_same_gradient(cell, reduction, form):
    inputs = make_inputs("far", (2, 3), 70)
    teacher, k = (inputs.teacher, 6) if form == "logits" else (served(inputs, 6), None)
    common = {"reduction": reduction, "mask": inputs.mask, "weights": inputs.weights}
    supports = SUPPORTS if form == "logits" else ("teacher", "teacher+token")
    for support in supports:
        results = []
        for inplace in (False, True):
            leaf = inputs.student.clone().requires_grad_()
            value = call(
                opdc, cell, leaf * 1.0, teacher, inputs, support, k, inplace=inplace, **common
            )
            value.backward(inputs.upstream if reduction == "none" else torch.tensor(1.0))
            results.append(Result(value.detach(), leaf.grad))
        assert torch.equal(results[0].value, results[1].value)
        if reduction == "none":  # kept until the upstream arrives, the gradient is rounded twice
            torch.testing.assert_close(
                results[0].gradient, results[1].gradient, rtol=4e-7, atol=1e-30
            )
        else:
            assert torch.equal(results[0].gradient, results[1].gradient)


@pytest.mark.parametrize("cell", FEW, ids=str)
def test_hazard_17_and_18_every_layout(cell):
    inputs = make_inputs("far", (3, 4), 50)
    teacher = served(inputs, 6)
    usual = run(opdc, cell, inputs, "teacher", 6)
    usual_sparse = run(opdc, cell, inputs, "teacher+token", None, teacher)

    def spread(tensor):  # every other number of a wider tensor, last axis too
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]

    def transposed(tensor):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    for layout in (spread, transposed):
        dense = run(opdc, cell, inputs, "teacher", 6, layout(inputs.teacher),
                    layout(inputs.upstream))  # fmt: skip
        assert bits(dense) == bits(usual)
        moved = opdc.TopK(*(None if part is None else layout(part) for part in teacher))
        sent = run(opdc, cell, inputs, "teacher+token", None, moved, layout(inputs.upstream))
        assert bits(sent) == bits(usual_sparse)


@pytest.mark.parametrize("reduction", ["none", "seq_mean"])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_gradcheck(cell, support, reduction):
    inputs = make_inputs("uniform", (2, 3), 8, torch.float64)
    inputs.student, inputs.teacher = 8 * inputs.student, 8 * inputs.teacher
    inputs.mask[0, 1], inputs.mask[1, 1], inputs.mask[0, 0] = False, True, True
    inputs.tokens %= 7
    common = {"temperature": 1.3, "mask": inputs.mask, "weights": inputs.weights, "valid_vocab": 7,
              "reduction": reduction}  # fmt: skip
    if reduction == "seq_mean":
        common["num_items"] = 7
    teachers = [(inputs.teacher, 3)]
    if support != "student":
        inputs.teacher[..., 7:] = -INFINITY
        teachers.append((served(inputs, 3, torch.float64, temperature=1.3), None))
    for teacher, k in teachers:
        assert torch.autograd.gradcheck(
            lambda student: call(opdc, cell, student, teacher, inputs, support, k, **common),
            inputs.student.clone().requires_grad_(),
            atol=1e-7,
            rtol=1e-5,
        )


def test_hazard_20_second_derivatives_are_refused():
    inputs = make_inputs("far", (2, 3), 20, torch.float64)
    for cell in FEW:
        student = inputs.student.clone().requires_grad_()
        loss = call(opdc, cell, student, inputs.teacher, inputs, "teacher", 4)
        with pytest.raises(RuntimeError):
            (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
            gradient.sum().backward()


def test_the_teacher_and_the_support_receive_no_gradient():
    inputs = make_inputs("far", (2, 3), 20)
    for cell in FEW:
        teacher = inputs.teacher.clone().requires_grad_()
        student = inputs.student.clone().requires_grad_()
        call(opdc, cell, student, teacher, inputs, "teacher", 4).backward()
        assert teacher.grad is None or (teacher.grad == 0).all()
        best = served(inputs, 4)
        best.logprobs.requires_grad_()
        student.grad = None
        call(opdc, cell, student, best, inputs, "teacher").backward()
        assert best.logprobs.grad is None or (best.logprobs.grad == 0).all()
        assert student.grad.abs().sum() > 0


# ----------------------------------------------------------------- identities


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("regime", ["far", "masked_both"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_identity_01_the_whole_vocabulary_as_support_is_the_full_divergence(cell, regime, dtype):
    inputs = make_inputs(regime, (4,), 65, dtype)
    leaf = inputs.student.clone().requires_grad_()
    full = getattr(opdc, cell.function)(leaf, inputs.teacher, reduction="none", **cell.options)
    full.backward(inputs.upstream)
    close = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5,
                                                                          "atol": 2e-6}  # fmt: skip
    for support in SUPPORTS:
        result = run(opdc, cell, inputs, support, 65)
        torch.testing.assert_close(result.value, full.detach(), **close)
        torch.testing.assert_close(result.gradient, leaf.grad, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.is_divergence], ids=str)
def test_identity_03_identical_models_have_divergence_zero_and_no_gradient(cell, dtype):
    for regime in ("uniform", "far", "realistic", "masked_both", "wide_1e3"):
        inputs = make_inputs(regime, (3,), 300, dtype)
        inputs.teacher = inputs.student.clone()
        for support in SUPPORTS:
            for k in (2, 32, 300):
                result = run(opdc, cell, inputs, support, k)
                assert (result.value == 0).all(), (regime, support, k)
                assert (result.gradient == 0).all(), (regime, support, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["uniform", "far", "realistic", "masked_both"])
def test_identity_03_lsm_of_a_server_of_the_same_model_is_zero_to_rounding(regime, dtype):
    inputs = make_inputs(regime, (3,), 300, dtype)
    best = opdc.topk(inputs.student, 16)
    student = inputs.student.clone().requires_grad_()
    loss = opdc.lsm(student, best, reduction="sum")
    loss.backward()
    limit = 1e-13 if dtype == torch.float64 else 1e-5
    assert 0 <= loss.detach() < limit**2
    assert student.grad.abs().max() < limit


@pytest.mark.parametrize("regime", ["uniform", "far", "realistic", "near_1e-02"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_identity_07_bucketed_reverse_kl_in_parts(support, regime):
    """RKL of K + 1 buckets = P · LSM + P log(P/Q) + (1 − P) log((1 − P)/(1 − Q))."""
    inputs = make_inputs(regime, (6,), 65, torch.float64)
    bucketed = run(opdc, Cell("reverse_kl", "tail"), inputs, support, 5).value
    lsm = run(opdc, Cell("reverse_kl", "both"), inputs, support, 5).value
    on = torch.zeros(6, 65, dtype=torch.bool)
    ranking = inputs.student if support == "student" else inputs.teacher
    on.scatter_(-1, opdc.topk(ranking, 5).ids, True)
    if support == "teacher+token":
        on.scatter_(-1, inputs.tokens[:, None], True)
    p, q = inputs.student.softmax(-1), inputs.teacher.softmax(-1)
    mass_p, mass_q = (p * on).sum(-1), (q * on).sum(-1)
    tail_p, tail_q = (p * ~on).sum(-1), (q * ~on).sum(-1)
    parts = mass_p * lsm + mass_p * (mass_p / mass_q).log() + tail_p * (tail_p / tail_q).log()
    torch.testing.assert_close(bucketed, parts, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("regime", ["uniform", "near_1e-04", "far", "realistic", "masked_both"])
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_identity_08_each_gradient_row_sums_to_zero(cell, regime):
    inputs = make_inputs(regime, (4,), 1025)
    ones = torch.ones(4)
    results = [run(opdc, cell, inputs, support, 20, upstream=ones) for support in SUPPORTS]
    results.append(run(opdc, cell, inputs, "teacher", None, served(inputs, 20), ones))
    for result in results:
        gradient = result.gradient.double()
        limit = 2e-6 * gradient.abs().sum(-1) + 2e-7 * result.value.abs() + 1e-9
        assert (gradient.sum(-1).abs() <= limit).all()


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_identity_09_adding_a_constant_to_a_row_changes_nothing(cell, support):
    inputs = make_inputs("far", (4,), 300)
    for name in ("student", "teacher"):  # multiples of 1/64: the shifts below are exact
        setattr(inputs, name, torch.round(getattr(inputs, name) * 64) / 64)
    before = run(opdc, cell, inputs, support, 20)
    inputs.student = inputs.student + torch.tensor([1.0, -30.0, 512.0, 4096.0])[:, None]
    inputs.teacher = inputs.teacher + torch.tensor([-7.0, 2048.0, 0.5, 4.0])[:, None]
    after = run(opdc, cell, inputs, support, 20)
    torch.testing.assert_close(after.value, before.value, rtol=4e-6, atol=2e-6)
    torch.testing.assert_close(after.gradient, before.gradient, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", ["logits", "server"])
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_identity_09_permuting_ids_permutes_gradients(cell, form):
    inputs = make_inputs("far", (4,), 1100)
    teacher = served(inputs, 20)
    order = torch.randperm(1100)
    place = order.argsort()
    supports = SUPPORTS if form == "logits" else ("teacher", "teacher+token")

    def answers(teacher, k):
        return [run(opdc, cell, inputs, support, k, teacher) for support in supports]

    before = answers(None, 20) if form == "logits" else answers(teacher, None)
    inputs.student, inputs.teacher = inputs.student[:, order], inputs.teacher[:, order]
    inputs.tokens = place[inputs.tokens]
    moved = teacher._replace(ids=place[teacher.ids])
    after = answers(None, 20) if form == "logits" else answers(moved, None)
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(second.value, first.value, rtol=4e-6, atol=2e-6)
        torch.testing.assert_close(second.gradient, first.gradient[:, order], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("cell", FEW, ids=str)
def test_identity_12_bits_do_not_depend_on_threads_or_company(cell):
    inputs = make_inputs("far", (9,), 5003)  # more than one thread's work
    teacher = served(inputs, 20)
    order = torch.randperm(9)

    def answers():
        yield run(opdc, cell, inputs, "teacher", 20)
        yield run(opdc, cell, inputs, "student", 20)
        yield run(opdc, cell, inputs, "teacher+token", None, teacher)
        yield run(opdc, cell, inputs, "teacher", 20, reduction="mean", weights=inputs.weights)

    usual = list(answers())
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert [bits(result) for result in answers()] == [bits(result) for result in usual]
    torch.set_num_threads(1)
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor):
            setattr(inputs, name, value[order])
    teacher = opdc.TopK(*(None if part is None else part[order] for part in teacher))
    for before, after in zip(usual[:3], list(answers())[:3], strict=True):
        assert torch.equal(after.value, before.value[order])
        assert torch.equal(after.gradient, before.gradient[order])


def digest_of_every_cell() -> str:
    """A hash of values, gradients and supports, with rows that are undefined in every way."""
    digest = hashlib.sha256()

    def add(*tensors):
        for tensor in tensors:
            digest.update(tensor.float().nan_to_num(nan=-7.0).contiguous().numpy().tobytes())

    for dtype in DTYPES:
        inputs = make_inputs("far", (12,), 1100, dtype)
        inputs.student[0, 700] = inputs.teacher[1, 701] = math.nan
        inputs.student[2, 702] = inputs.teacher[3, 703] = INFINITY
        inputs.student[4], inputs.teacher[5] = -INFINITY, -INFINITY
        inputs.student[6, ::2] = inputs.teacher[7, 1::2] = -INFINITY
        ids = inputs.teacher[8:].float().topk(5).indices
        ids = torch.cat([torch.arange(5).expand(8, 5), ids])
        logprobs = -1.7 - torch.rand(12, 5, generator=inputs.generator)
        logprobs[9, 3], ids[10, 2] = math.nan, -1
        tail = torch.full((12,), -1.0)
        tail[11] = math.nan
        token = torch.full((12,), -9.0)
        token[8] = math.nan
        teacher = opdc.TopK(ids, logprobs, token_logprobs=token)
        for k in (3, 40, 1000):
            add(*opdc.topk(inputs.student, k)[:2], *opdc.topk(inputs.teacher.round(), k)[:2])
        for cell in FEW:
            results = [run(opdc, cell, inputs, support, 20) for support in SUPPORTS]
            results.append(run(opdc, cell, inputs, "teacher+token", None, teacher))
            lost = teacher._replace(token_logprobs=None, tail_logprob=tail)
            results.append(run(opdc, cell, inputs, "teacher", None, lost))
            for result in results:
                add(result.value, result.gradient)
    return digest.hexdigest()


@on_linux
@pytest.mark.parametrize("level", LEVELS)
def test_hazard_29_every_instruction_set_gives_the_same_bits(level):
    if level not in runnable_levels():
        pytest.skip(f"this processor has no {level}")
    script = "import sys; sys.path.insert(0, {!r}); import test_support as cells; "
    script = script.format(str(Path(__file__).parent)) + "print(cells.digest_of_every_cell())"
    assert output_of(script, OPDC_ISA=level) == digest_of_every_cell()


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.is_divergence], ids=str)
def test_hazard_10_divergences_are_never_negative_near_the_teacher(cell):
    for noise in NEAR_NOISES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            inputs = make_inputs(f"near_{noise:.0e}", (6,), 130, dtype)
            for support in SUPPORTS:
                for k in (2, 20, 130):
                    assert (run(opdc, cell, inputs, support, k).value >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise", NEAR_NOISES)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.normalize == "both"], ids=str)
def test_hazard_10_both_near_the_teacher(cell, noise, dtype):
    inputs = make_inputs(f"near_{noise:.0e}", (4,), 130, dtype, torch.float32)
    for support in SUPPORTS:
        judge(cell, inputs, support, 20)


def test_pieces_fit_together():
    """generalized = none − P + Q (reverse), teacher = none / Q − log Q (forward), jsd ends."""
    inputs = make_inputs("far", (5,), 65, torch.float64)
    best = opdc.topk(inputs.teacher, 7)
    mass_q = best.logprobs.exp().sum(-1)
    mass_p = inputs.student.softmax(-1).gather(-1, best.ids).sum(-1)

    def value(function, normalize, **options):
        return run(opdc, Cell(function, normalize, options), inputs, "teacher", 7).value

    torch.testing.assert_close(
        value("reverse_kl", "generalized"),
        value("reverse_kl", "none") - mass_p + mass_q,
        rtol=1e-11,
        atol=1e-13,
    )
    torch.testing.assert_close(
        value("forward_kl", "teacher"),
        value("forward_kl", "none") / mass_q - mass_q.log(),
        rtol=1e-11,
        atol=1e-13,
    )
    for normalize in ("both", "tail"):
        assert torch.equal(value("jsd", normalize, beta=0.0), value("forward_kl", normalize))
        assert torch.equal(value("jsd", normalize, beta=1.0), value("reverse_kl", normalize))


def test_temperature_is_a_division_of_both_logits():
    inputs = make_inputs("far", (4,), 200, torch.float64)
    for cell in FEW:
        whole = run(opdc, cell, inputs, "teacher", 9, temperature=4.0)
        kept = inputs.student, inputs.teacher
        inputs.student, inputs.teacher = inputs.student / 4, inputs.teacher / 4
        divided = run(opdc, cell, inputs, "teacher", 9)
        inputs.student, inputs.teacher = kept
        torch.testing.assert_close(whole.value, divided.value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(whole.gradient, divided.gradient / 4, rtol=1e-11, atol=1e-13)


# ----------------------------------------------------------------- metrics


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_metrics_of_the_support(cell, support):
    """Masses, and how many of S are among the |S| best of the student; unweighted sums."""
    inputs = make_inputs("realistic", (2, 4), 65, torch.float64)
    mask = inputs.mask
    _, metrics = call(opdc, cell, inputs.student, inputs.teacher, inputs, support, 6,
                      mask=mask, weights=inputs.weights, return_metrics=True)  # fmt: skip
    ranking = inputs.student if support == "student" else inputs.teacher
    on = torch.zeros_like(inputs.student, dtype=torch.bool)
    on.scatter_(-1, opdc.topk(ranking, 6).ids, True)
    if support == "teacher+token":
        on.scatter_(-1, inputs.tokens[..., None], True)
    overlap = torch.zeros(2, 4)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        row, chosen = inputs.student[tuple(place)], on[tuple(place)]
        best = opdc.topk(row, int(chosen.sum())).ids
        overlap[tuple(place)] = chosen[best].sum()
    wanted = {
        "positions": mask.sum(),
        "slots": on.sum(-1)[mask].sum(),
        "overlap": overlap[mask].sum(),
        "student_mass": (inputs.student.softmax(-1) * on).sum(-1)[mask].sum(),
        "teacher_mass": (inputs.teacher.softmax(-1) * on).sum(-1)[mask].sum(),
    }
    for name, number in wanted.items():
        torch.testing.assert_close(
            metrics[name].double(), number.double(), rtol=1e-6, atol=1e-9, msg=lambda m: name + m
        )


# ----------------------------------------------------------------- errors


LOGITS = torch.linspace(-2, 2, 60).sin().reshape(2, 3, 10) * 3
OTHER = torch.linspace(-2, 2, 60).cos().reshape(2, 3, 10) * 5
TOKENS = torch.arange(6).reshape(2, 3)
IDS = torch.arange(3).expand(2, 3, 3).clone()
LOG_THIRDS = torch.full((2, 3, 3), math.log(0.3))
TOP = opdc.TopK(IDS, LOG_THIRDS)


def changed(tensor: Tensor, value: float) -> Tensor:
    """The tensor with one number, of the last position, replaced."""
    result = tensor.clone()
    result.view(-1)[-1] = value
    return result


def with_ids(value: int) -> opdc.TopK:
    return TOP._replace(ids=changed(IDS, value))


CELL_ERRORS = {
    "no normalize": ("reverse_kl", {"support": "teacher", "k": 3}, ["normalize"]),
    "no normalize for a student support": (
        "forward_kl",
        {"support": "student", "k": 3},
        ["normalize"],
    ),
    "normalize of the full vocabulary": ("reverse_kl", {"normalize": "both"}, ["normalize"]),
    "normalize of the full vocabulary by name": (
        "jsd",
        {"support": "full", "normalize": "tail"},
        ["normalize"],
    ),
    "generalized forward KL": (
        "forward_kl",
        {"support": "teacher", "k": 3, "normalize": "generalized"},
        ["normalize", "generalized"],
    ),
    **{
        f"jsd {normalize}": (
            "jsd",
            {"support": "teacher", "k": 3, "normalize": normalize},
            ["normalize"],
        )
        for normalize in ("none", "teacher", "generalized")
    },
    "unknown normalize": (
        "reverse_kl",
        {"support": "teacher", "k": 3, "normalize": "all"},
        ["normalize", "all"],
    ),
    "unknown support": (
        "reverse_kl",
        {"support": "top", "k": 3, "normalize": "both"},
        ["support", "top"],
    ),
    "no k": ("reverse_kl", {"support": "teacher", "normalize": "both"}, ["k"]),
    **{
        f"k = {k}": ("reverse_kl", {"support": "teacher", "k": k, "normalize": "none"}, ["k"])
        for k in (0, -1, 11, 2**63, 2.5, "3", True)
    },
    "k beyond valid_vocab": (
        "reverse_kl",
        {"support": "student", "k": 8, "normalize": "none", "valid_vocab": 7},
        ["k"],
    ),
    "k = 1 with both": (
        "reverse_kl",
        {"support": "teacher", "k": 1, "normalize": "both"},
        ["k", "both"],
    ),
    "k = 1 with both, jsd": (
        "jsd",
        {"support": "student", "k": 1, "normalize": "both"},
        ["k", "both"],
    ),
    "no tokens": (
        "forward_kl",
        {"support": "teacher+token", "k": 3, "normalize": "none"},
        ["tokens"],
    ),
    "token out of range": (
        "forward_kl",
        {
            "support": "teacher+token",
            "k": 3,
            "normalize": "none",
            "tokens": changed(TOKENS, 10),
        },
        ["tokens", "10"],
    ),
    "negative token": (
        "forward_kl",
        {"support": "teacher+token", "k": 3, "normalize": "none", "tokens": changed(TOKENS, -1)},
        ["tokens", "-1"],
    ),
    "tokens of other positions": (
        "forward_kl",
        {"support": "teacher+token", "k": 3, "normalize": "none", "tokens": TOKENS[:1]},
        ["tokens"],
    ),
    "lsm of the full vocabulary": ("lsm", {"support": "full", "k": 3}, ["support"]),
    "lsm of one id": ("lsm", {"k": 1}, ["k"]),
}

SPARSE_ERRORS = {
    "no normalize": (TOP, {}, ["normalize"]),
    "full support": (TOP, {"support": "full", "normalize": None}, ["support", "full"]),
    "student support": (TOP, {"support": "student", "normalize": "none"}, ["support", "student"]),
    "another k": (TOP, {"k": 2, "normalize": "none"}, ["k", "3"]),
    "repeated ids": (with_ids(0), {"normalize": "none"}, ["ids", "0"]),
    "id of the vocabulary size": (with_ids(10), {"normalize": "none"}, ["ids", "10"]),
    "huge id": (with_ids(2**63 - 1), {"normalize": "none"}, ["ids", str(2**63 - 1)]),
    "id of 2³² + 1": (with_ids(2**32 + 3), {"normalize": "none"}, ["ids"]),
    "id beyond valid_vocab": (with_ids(7), {"normalize": "none", "valid_vocab": 7}, ["ids", "7"]),
    "repeated ids under both": (with_ids(1), {"normalize": "both"}, ["ids"]),
    "id out of range under both": (with_ids(10), {"normalize": "both"}, ["ids"]),
    "too much mass": (
        TOP._replace(logprobs=changed(LOG_THIRDS, math.log(0.4003))),
        {"normalize": "none"},
        ["logprobs"],
    ),
    "too much mass under both": (
        TOP._replace(logprobs=changed(LOG_THIRDS, 0.0)),
        {"normalize": "both"},
        ["logprobs"],
    ),
    "infinite mass": (
        TOP._replace(logprobs=changed(LOG_THIRDS, INFINITY)),
        {"normalize": "none"},
        ["logprobs"],
    ),
    "logits in the place of log-probs": (
        TOP._replace(logprobs=LOG_THIRDS + 20),
        {"normalize": "tail"},
        ["logprobs"],
    ),
    "no log-probs of the tokens": (
        TOP,
        {"support": "teacher+token", "tokens": TOKENS, "normalize": "none"},
        ["token_logprobs"],
    ),
    "no tokens": (
        TOP._replace(token_logprobs=LOG_THIRDS[..., 0]),
        {"support": "teacher+token", "normalize": "none"},
        ["tokens"],
    ),
    "tail with another support": (
        TOP._replace(token_logprobs=LOG_THIRDS[..., 0], tail_logprob=LOG_THIRDS[..., 0]),
        {"support": "teacher+token", "tokens": TOKENS, "normalize": "tail"},
        ["tail_logprob", "teacher+token"],
    ),
    "one slot with both": (
        opdc.TopK(IDS[..., :1], LOG_THIRDS[..., :1]),
        {"normalize": "both"},
        ["both"],
    ),
    "no slots": (opdc.TopK(IDS[..., :0], LOG_THIRDS[..., :0]), {"normalize": "none"}, ["0"]),
    "fewer log-probs than ids": (
        TOP._replace(logprobs=LOG_THIRDS[..., :2]),
        {"normalize": "none"},
        ["logprobs"],
    ),
    "other positions": (
        opdc.TopK(IDS[:1], LOG_THIRDS[:1]),
        {"normalize": "none"},
        ["teacher"],
    ),
    "ids that are no integers": (
        TOP._replace(ids=IDS.float()),
        {"normalize": "none"},
        ["ids"],
    ),
    "log-probs that are integers": (
        TOP._replace(logprobs=IDS),
        {"normalize": "none"},
        ["logprobs"],
    ),
    "ids as a list": (TOP._replace(ids=IDS.tolist()), {"normalize": "none"}, ["ids"]),
    "tail of other positions": (
        TOP._replace(tail_logprob=LOG_THIRDS[:1, :, 0]),
        {"normalize": "tail"},
        ["tail_logprob"],
    ),
    "token_logprobs of other positions": (
        TOP._replace(token_logprobs=LOG_THIRDS[:1, :, 0]),
        {"support": "teacher+token", "tokens": TOKENS, "normalize": "none"},
        ["token_logprobs"],
    ),
}


def assert_refused(function, teacher, keywords, fragments):
    """An error that says what it is about, raised before anything is written."""
    for options in ({}, {"reduction": "none"}, {"inplace": True}):
        leaf = LOGITS.clone().requires_grad_()
        student = leaf * 1.0
        with pytest.raises((ValueError, TypeError)) as raised:
            getattr(opdc, function)(student, teacher, **keywords, **options)
        for fragment in fragments:
            assert fragment in str(raised.value).replace("`", ""), str(raised.value)
        assert torch.equal(student.detach(), LOGITS)


@pytest.mark.cpu_only
@pytest.mark.parametrize("error", CELL_ERRORS)
def test_hazard_08_and_32_cells_that_mean_nothing_are_refused(error):
    function, keywords, fragments = CELL_ERRORS[error]
    assert_refused(function, OTHER, keywords, fragments)


@pytest.mark.cpu_only
@pytest.mark.parametrize("error", SPARSE_ERRORS)
def test_hazard_08_what_a_server_sends_is_checked(error):
    teacher, keywords, fragments = SPARSE_ERRORS[error]
    assert_refused("reverse_kl", teacher, keywords, fragments)


def test_functions_without_a_support_take_no_topk():
    with pytest.raises((ValueError, TypeError), match="teacher"):
        opdc.skew_kl(LOGITS, TOP)


@pytest.mark.parametrize("k", [1, 2, 10])
def test_hazard_32_extreme_k(k):
    inputs = make_inputs("far", (3,), 10)
    for cell in FEW:
        if k > 1 or cell.normalize != "both":
            for support in SUPPORTS:
                judge(cell, inputs, support, k)


def test_hazard_32_a_vocabulary_of_one():
    inputs = make_inputs("far", (3,), 1)
    for cell in FEW:
        if cell.normalize != "both":
            result = run(opdc, cell, inputs, "teacher", 1)
            assert (result.value == 0).all()
            assert (result.gradient == 0).all()


@pytest.mark.parametrize("shape", [(10,), (0, 10), (2, 0, 10), (1, 2, 3, 10)], ids=str)
def test_any_leading_shape(shape):
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    best = opdc.topk(teacher, 3)
    for source, k in ((teacher, 3), (best, None)):
        loss = opdc.reverse_kl(
            student, source, support="teacher", k=k, normalize="both", reduction="none"
        )
        assert loss.shape == shape[:-1]
        loss.sum().backward()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_hazard_21_read_only_teacher_log_probs():
    array = np.full((2, 3, 3), math.log(0.3), dtype=np.float32)
    array.setflags(write=False)
    logprobs = torch.from_numpy(array)
    loss = opdc.lsm(LOGITS, opdc.TopK(IDS, logprobs))
    assert torch.equal(loss, opdc.lsm(LOGITS, TOP))
