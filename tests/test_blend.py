"""opdc.blend and opdc.blend_sample: the trust region, the law inside of it, the draws from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import opdc
import oracle_sampling
from oracle_sampling import blended, kl, largest_beta, log_law
from regimes import NEAR_NOISES, REGIMES, Regime
from test_memory_and_threads import huge
from test_sampling import (
    BELOW_ONE,
    DTYPES,
    EDGES,
    MASS_SLACK,
    MILLION,
    POISONS,
    TRUNCATIONS,
    assert_drawn,
    chi_square,
    interval_lengths,
    layouts,
    log_slack,
    numbers_of,
    rare,
    same,
)

INFINITY = math.inf
EPSILONS = (0.0, *(10.0**power for power in range(-6, 4)), INFINITY)
BUDGET_TOLERANCE = 1e-4  # |KL(μ ‖ p) − ε| / ε
FEW = (0.0, 1e-4, 0.02, 1.0, 50.0, INFINITY)


# ----------------------------------------------------------------- more regimes


def _lacking(student_lacks: slice, teacher_lacks: slice):
    def make(rows, vocabulary, generator):
        student, teacher = (
            2 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
            for _ in range(2)
        )
        student[:, student_lacks] = teacher[:, teacher_lacks] = -INFINITY
        return student, teacher

    return make


def _favourites(gap: float):
    """Each model wants an id of its own, `gap` nats above everything: between the two, μ_β turns
    from one to the other within a step of β of 1/gap."""

    def make(rows, vocabulary, generator):
        student, teacher = (
            0.3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
            for _ in range(2)
        )
        student[:, vocabulary // 3] += gap
        teacher[:, vocabulary // 2] += 0.7 * gap
        return student, teacher

    return make


def _one_word_apart(gap: float):
    """Equal models but for one rare id, which the teacher wants."""

    def make(rows, vocabulary, generator):
        student = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
        student[:, vocabulary // 2] = -gap / 2
        teacher = student.clone()
        teacher[:, vocabulary // 2] = gap / 2
        return student, teacher

    return make


OVERLAPS = (
    Regime("disjoint", _lacking(slice(0, None, 2), slice(1, None, 2))),
    Regime("halves", _lacking(slice(0, 40), slice(-40, None))),
    Regime("one_shared_id", _lacking(slice(0, 70), slice(71, None))),
    Regime("one_id_of_the_teacher", _lacking(slice(0, 0), slice(1, None))),
    Regime("one_id_of_the_student", _lacking(slice(1, None), slice(0, 0))),
    Regime("nearly_everything_shared", _lacking(slice(0, 1), slice(-1, None))),
)
PEAKS = (
    *(Regime(f"favourites_{gap:.0e}", _favourites(gap)) for gap in (1e1, 1e2, 1e3, 1e4)),
    *(Regime(f"one_word_apart_{gap:.0e}", _one_word_apart(gap)) for gap in (1e1, 1e2, 1e3, 1e4)),
)
ALL_REGIMES = (*REGIMES, *OVERLAPS, *PEAKS)
BY_NAME = {regime.name: regime for regime in ALL_REGIMES}


def logits_of(
    regime: Regime | str,
    positions: tuple[int, ...],
    vocabulary: int,
    student_dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Student and teacher of a regime, without the tokens of `regimes.make_inputs`: there are none
    where the models share no id."""
    regime = BY_NAME[regime] if isinstance(regime, str) else regime
    generator = torch.Generator().manual_seed(0)
    student, teacher = regime.make(math.prod(positions), vocabulary, generator)
    return (
        student.to(student_dtype).reshape(*positions, vocabulary),
        teacher.to(teacher_dtype or student_dtype).reshape(*positions, vocabulary),
    )


# ----------------------------------------------------------------- the judge


def unit_of(dtype: torch.dtype) -> float:
    """Of the arithmetic; in fp64, of the oracle's as well."""
    return 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps


def rounding_of_kl(law: Tensor, base: Tensor, share: Tensor, spread: Tensor, unit: float) -> Tensor:
    """What rounding does to KL(μ ‖ b), `d = log μ − b = share · r − const`: it changes the d of an
    id by a few units in the last place of its terms, and the KL by the covariance of that with d
    under μ. Relative to the KL it is next to nothing unless logits differ by 1e3 and more."""
    d = (law - base).where((law > -INFINITY) & (base > -INFINITY), 0.0)
    mean = (law.exp() * d).sum(-1, keepdim=True)
    error = 4 * unit * (share[..., None] * spread + d.abs())
    return (law.exp() * error * (d - mean).abs()).sum(-1)


def judge(student: Tensor, teacher: Tensor, epsilon: Tensor, result: opdc.Blend, **common) -> None:
    """Every number of `blend`, for rows that all say something, against the bisection."""
    dtype = numbers_of(student, teacher)
    unit = unit_of(dtype)
    assert isinstance(result, opdc.Blend)
    assert result.logprobs.shape == student.shape
    assert all(x.shape == student.shape[:-1] for x in result[1:])
    assert all(x.dtype == dtype and not x.requires_grad for x in result)
    size = common.get("valid_vocab")
    s, tau = log_law(student, **common), log_law(teacher, **common)
    epsilon = epsilon.double().expand(s.shape[:-1])
    log_mu, beta, student_kl, teacher_kl = (x.double() for x in result)
    if size is not None:
        assert (log_mu[..., size:] == -INFINITY).all()
        log_mu = log_mu[..., :size]
    wanted = largest_beta(s, tau, epsilon)

    # No mass where either model has none, unless μ is p itself.
    possible = (s > -INFINITY) & ((tau > -INFINITY) | (wanted == 0)[..., None])
    assert torch.equal(log_mu > -INFINITY, possible)
    assert (log_mu <= 0).all()
    total = log_mu.exp().sum(-1)
    assert (abs(total - 1) <= 10 * unit * (1 + s.shape[-1] ** 0.5)).all(), total

    # The ends of the trust region are exact.
    for end in (0.0, 1.0):
        assert torch.equal(beta == end, wanted == end), (beta, wanted)
    inside = (beta > 0) & (beta < 1)
    # The budget is met by the KL that is reported,
    slack = BUDGET_TOLERANCE * epsilon[inside]
    missed = (student_kl - epsilon)[inside].abs()
    assert (missed <= slack * 1.001).all(), (missed / epsilon[inside]).max()
    assert (student_kl <= epsilon * (1 + 1.001 * BUDGET_TOLERANCE))[beta > 0].all()
    # by that of the β that is reported, which lies between the neighbours that it was rounded from,
    neighbours = torch.stack([beta * (1 - unit), beta, (beta * (1 + unit)).clamp(max=1.0)])
    laws = blended(s.expand(3, *s.shape), tau.expand(3, *s.shape), neighbours)
    below, law, above = laws
    to_student, to_teacher = kl(laws, s.expand_as(laws)), kl(laws, tau.expand_as(laws))
    spread = (s.abs() + tau.abs()).where((s > -INFINITY) & (tau > -INFINITY), 0.0)
    noise = rounding_of_kl(law, s, beta, spread, unit)
    assert (to_student[0] <= epsilon * (1 + BUDGET_TOLERANCE) + noise)[inside].all()
    assert (to_student[2] >= epsilon * (1 - BUDGET_TOLERANCE) - noise)[inside].all(), (
        to_student[2] / epsilon
    )[inside].min()
    # and by that of the log μ that is reported.
    seen = kl(log_mu - total.log()[..., None], s)
    d = (log_mu - s).where(possible, 0.0)
    rounded = unit * (log_mu.exp() * (1 + log_mu.where(possible, 0.0).abs()) * d.abs()).sum(-1)
    missed = (seen - epsilon).abs() - BUDGET_TOLERANCE * epsilon - noise - rounded
    assert (missed <= 0)[inside].all(), (missed / epsilon)[inside].max()

    # log μ is that of this β,
    apart = (above - below).where(possible, 0.0).abs()
    sizes = (spread + s.abs() + law.abs()).where(possible, 0.0)
    error = (log_mu - law).where(possible, 0.0).abs()
    limit = apart + 4 * unit * (1 + sizes)
    assert (error <= limit).all(), (error / limit).max()
    # and so are both divergences: the student's grows with β, the teacher's falls.
    relative, tiny = (1e-5, 1e-16) if dtype == torch.float32 else (1e-9, 1e-24)
    to_the_teacher = rounding_of_kl(law, tau, 1 - beta, spread, unit)
    for value, (least, middle, most), rounding in (
        (student_kl, to_student, noise),
        (teacher_kl, to_teacher.flip(0), to_the_teacher),
    ):
        assert (value >= 0).all()
        assert torch.equal(value == INFINITY, middle == INFINITY)
        finite = middle < INFINITY
        margin = relative * middle + rounding + tiny
        assert (value >= least - margin)[finite].all(), (value, least)
        assert (value <= most + margin)[finite].all(), (value, most)


def check(student: Tensor, teacher: Tensor, epsilon: float | Tensor, **common) -> opdc.Blend:
    kept = student.clone(), teacher.clone()
    result = opdc.blend(student, teacher, epsilon, **common)
    judge(student, teacher, torch.as_tensor(epsilon, dtype=torch.float64), result, **common)
    for logits, before in zip((student, teacher), kept, strict=True):
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    return result


def for_every_epsilon(
    rows: tuple[Tensor, Tensor], epsilons: Sequence[float] = EPSILONS
) -> tuple[Tensor, Tensor, Tensor]:
    """The same rows under each budget: `(epsilons, rows, V)` without a copy, ε `(epsilons, 1)`."""
    student, teacher = (x.expand(len(epsilons), *x.shape) for x in rows)
    return student, teacher, torch.tensor(epsilons, dtype=torch.float64)[:, None]


# ----------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize(
    "regime", ["uniform", "near_1e-03", "near_1e-06", "far", "offset_1e4_student"]
)
def test_the_oracle_against_60_digits(regime):
    student, teacher = (x[0] for x in logits_of(regime, (1,), 30, torch.float64))
    s, tau = log_law(student), log_law(teacher)
    for share in (1e-6, 0.01, 0.6):
        epsilon = share * kl(tau, s)
        beta = largest_beta(s, tau, epsilon)
        law = blended(s, tau, beta)
        exact = oracle_sampling.exact_kl(student.tolist(), teacher.tolist(), float(beta))
        assert abs(float(exact[0] / float(epsilon)) - 1) < 1e-9 + 1e-14 / float(epsilon) ** 0.5
        for value, wanted in zip((kl(law, s), kl(law, tau)), exact, strict=True):
            # Differences of logs of size 10, known to 1e-15, of which the KL is the mean square.
            assert abs(float(float(value) / wanted) - 1) < 1e-9 + 1e-14 / float(wanted) ** 0.5


def test_worked_example():
    """p = (1/2, 1/2), q = (1/5, 4/5): μ_½ ∝ (√.1, √.4) = (1/3, 2/3), KL(μ_½ ‖ p) = ⅓ log ⅔ + ⅔ log
    4/3 = 0.056633 and KL(μ_½ ‖ q) = ⅓ log 5/3 + ⅔ log 5/6 = 0.048728."""
    student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.2, 0.8]).log()
    result = opdc.blend(student, teacher, 0.0566330)
    expected = opdc.Blend(
        torch.tensor([1 / 3, 2 / 3]).log(), *map(torch.tensor, (0.5, 0.056633, 0.048728))
    )
    for value, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=2e-4, atol=0)
    # KL(q ‖ p) = 0.192745: at 0.2 the teacher is inside the trust region.
    whole = opdc.blend(student, teacher, 0.2)
    assert whole.beta == 1
    torch.testing.assert_close(whole.logprobs, teacher)
    torch.testing.assert_close(whole.student_kl, torch.tensor(0.192745), rtol=1e-4, atol=0)
    assert whole.teacher_kl.abs() < 1e-12


# ----------------------------------------------------------------- the trust region


def assert_moves_to_the_teacher(result: opdc.Blend) -> None:
    """Along a growing budget, the first axis."""
    assert (result.beta.diff(dim=0) >= 0).all()
    assert (result.student_kl.diff(dim=0) >= 0).all()
    # Budgets of 1e-6 and less change a large KL by less than its last place.
    rounding = 1 + 4 * torch.finfo(result.beta.dtype).eps
    assert (result.teacher_kl[1:] <= result.teacher_kl[:-1] * rounding).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ALL_REGIMES, ids=str)
def test_regime(regime, dtype):
    # Wider than a block of ids in fp32; every budget in the others, two of which compute in fp32.
    vocabulary, epsilons = (1100, FEW) if dtype == torch.float32 else (130, EPSILONS)
    rows = logits_of(regime, (2,), vocabulary, dtype)
    student, teacher, epsilon = for_every_epsilon(rows, epsilons)
    result = check(student, teacher, epsilon)
    assert_moves_to_the_teacher(result)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
@pytest.mark.parametrize("regime", ["far", "halves", "near_1e-01"])
def test_hazard_22_mixed_dtypes(regime, dtypes):
    check(*for_every_epsilon(logits_of(regime, (2,), 130, *dtypes), FEW))


@pytest.mark.parametrize("regime", ["far", "near_1e-02", "masked_teacher", "wide_1e2"])
def test_identity_11_beta_grows_with_the_budget_in_small_steps(regime):
    epsilons = tuple(1e-4 * 1.05**step for step in range(300))
    student, teacher, epsilon = for_every_epsilon(logits_of(regime, (2,), 200), epsilons)
    result = opdc.blend(student, teacher, epsilon)
    assert_moves_to_the_teacher(result)
    assert (result.student_kl <= epsilon * (1 + 1.001 * BUDGET_TOLERANCE)).all()


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 127, 128, 129, 1023, 1024, 1025, 5003])
def test_vocabulary_size(vocabulary):
    check(*for_every_epsilon(logits_of("realistic", (1,), vocabulary), FEW))


@pytest.mark.parametrize("regime", ["realistic", "near_1e-02", "peaked_0.99", "masked_teacher"])
def test_vocabulary_of_a_language_model(regime):
    student, teacher = logits_of(regime, (1,), 151_936)
    s, tau = log_law(student), log_law(teacher)
    for epsilon in (1e-3, 0.02, 0.5):
        result = opdc.blend(student, teacher, epsilon)
        law = blended(s, tau, result.beta.double())
        if 0 < result.beta < 1:
            assert abs(kl(law, s) / epsilon - 1) < 1.1 * BUDGET_TOLERANCE
            assert abs(result.student_kl.double() / epsilon - 1) < 1.001 * BUDGET_TOLERANCE
        torch.testing.assert_close(result.teacher_kl.double(), kl(law, tau), rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(result.logprobs.double(), law, rtol=1e-6, atol=4e-6)


def test_a_budget_of_0_is_the_student_and_an_unlimited_one_the_teacher():
    for dtype in DTYPES:
        student, teacher = logits_of("far", (3,), 300, dtype)
        nothing, everything = (opdc.blend(student, teacher, x) for x in (0, INFINITY))
        assert (nothing.beta == 0).all()
        assert (nothing.student_kl == 0).all()
        assert (everything.beta == 1).all()
        assert (everything.teacher_kl == 0).all()
        for result, logits in ((nothing, student), (everything, teacher)):
            law = log_law(logits)
            assert ((result.logprobs - law).abs() <= log_slack(numbers_of(logits), law)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["far", "masked_both", "wide_1e4", "offset_1e4_both"])
def test_hazard_10_identical_models_have_no_divergence(regime, dtype):
    logits, _ = logits_of(regime, (3,), 300, dtype)
    for epsilon in FEW:
        result = opdc.blend(logits, logits.clone(), epsilon)
        assert (result.beta == (epsilon > 0)).all()
        assert (result.student_kl == 0).all()
        assert (result.teacher_kl == 0).all()


def test_hazard_02_ids_that_one_model_lacks():
    """p = (½, ¼, ¼, 0), q = (0, ½, ¼, ¼): on the shared ids 1 and 2 q is (⅔, ⅓), and even β → 0+
    costs −log ½."""
    student = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()
    teacher = torch.tensor([0.0, 0.5, 0.25, 0.25]).log()
    for epsilon in (0.0, 1e-6, 0.6931):
        result = check(student, teacher, epsilon)
        assert result.beta == result.student_kl == 0
        assert result.teacher_kl == INFINITY
        torch.testing.assert_close(result.logprobs, student)
    inside = check(student, teacher, 0.7)
    assert 0 < inside.beta < 1
    wanted = torch.tensor([0.0, 2 / 3, 1 / 3, 0.0]).log()
    for epsilon in (0.76, 5.0, INFINITY):  # KL(μ_1 ‖ p) = log 2 + 0.0566 = 0.7498
        result = check(student, teacher, epsilon)
        assert result.beta == 1
        torch.testing.assert_close(result.logprobs, wanted)
        torch.testing.assert_close(result.teacher_kl, torch.tensor(4 / 3).log())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_02_without_a_shared_id_the_student_is_left(dtype):
    student = torch.tensor([1.0, -INFINITY, 0.5, -INFINITY, -INFINITY], dtype=dtype)
    teacher = torch.tensor([-INFINITY, 2.0, -INFINITY, 0.1, -INFINITY], dtype=dtype)
    for epsilon in EPSILONS:
        result = check(student, teacher, epsilon)
        assert result.beta == result.student_kl == 0
        assert result.teacher_kl == INFINITY


@pytest.mark.parametrize("gap", [1e2, 1e3, 1e4])
def test_hazard_12_a_budget_spent_on_one_id_of_a_confident_student(gap):
    """Two ids, p = (1 − e^−gap, e^−gap) and q the other way round: a share w of the second costs
    w · gap − H(w), whatever the shape of the way there."""
    student, teacher = torch.tensor([[gap, 0.0], [0.0, gap]])
    for epsilon in (1e-6, 1e-3, 0.02, 1.0, 50.0):
        check(student, teacher, epsilon)
        check(student.double(), teacher.double(), epsilon)


@pytest.mark.parametrize("noise", NEAR_NOISES)
def test_hazard_10_models_that_almost_agree(noise):
    """Budgets around KL(q ‖ p) itself, down to 1e-12, where the plain sums are noise."""
    for dtype in (torch.float32, torch.float64):
        student, teacher = logits_of(f"near_{noise:.0e}", (2,), 300, dtype)
        s, tau = log_law(student), log_law(teacher)
        for share in (1e-3, 0.3, 0.9, 1.1):
            epsilon = share * kl(tau, s)
            result = opdc.blend(student, teacher, epsilon)
            truth = largest_beta(s, tau, epsilon)
            torch.testing.assert_close(result.beta.double(), truth, rtol=1e-4, atol=0)
            wanted = kl(blended(s, tau, truth), s)
            torch.testing.assert_close(result.student_kl.double(), wanted, rtol=1.2e-4, atol=0)


@pytest.mark.parametrize("offsets", [(1e4, 0.0), (0.0, -1e6), (1e6, 1e6)], ids=str)
def test_hazard_09_offsets_of_the_logits_change_nothing(offsets):
    """Logits on a grid that fp32 keeps at 1e6."""
    student, teacher = (torch.randn(2, 3, 200) * 32).round() / 16
    usual = opdc.blend(student, teacher, 0.05)
    moved = opdc.blend(student + offsets[0], teacher + offsets[1], 0.05)
    for value, wanted in zip(moved, usual, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@given(data=st.data(), size=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_any_two_rows(data, size, dtype):
    value = st.floats(-60, 60, width=16) | st.sampled_from([-INFINITY, 0.0, 1.0])
    student, teacher = (
        torch.tensor([data.draw(st.lists(value, min_size=size, max_size=size))], dtype=dtype)
        for _ in range(2)
    )
    for logits in (student, teacher):
        logits[0, 0] = logits[0, 0].nan_to_num(neginf=0.5)
    exponent = data.draw(st.integers(-12, 6))
    check(student, teacher, 2.0**exponent, temperature=data.draw(st.sampled_from([1.0, 0.5, 3.0])))


# ----------------------------------------------------------------- options of both functions


@pytest.mark.parametrize("temperature", [0.3, 0.7, 2.0, 10.0])
@pytest.mark.parametrize("regime", ["far", "masked_student", "near_1e-02"])
def test_the_temperature_comes_before_the_blend(regime, temperature):
    for dtype in (torch.float32, torch.float64):
        rows = logits_of(regime, (2,), 200, dtype)
        check(*for_every_epsilon(rows, FEW), temperature=temperature)


def test_epsilon_per_row_broadcasts_to_the_positions():
    student, teacher = logits_of("far", (3, 4), 100)
    everywhere = torch.rand(3, 4, dtype=torch.float64)
    usual = check(student, teacher, everywhere)
    for row in range(3):
        for column in range(4):
            place = row, column
            alone = opdc.blend(student[place], teacher[place], float(everywhere[place]))
            assert same(tuple(x[place] for x in usual), alone)
    for shape in ((), (1,), (4,), (3, 1), (1, 4), (1, 1)):
        epsilon = torch.rand(shape, dtype=torch.float64)
        expected = opdc.blend(student, teacher, epsilon.expand(3, 4).clone())
        assert same(opdc.blend(student, teacher, epsilon), expected)
    for dtype in DTYPES:  # any number is the number it holds
        epsilon = torch.rand(3, 4).to(dtype)
        expected = opdc.blend(student, teacher, epsilon.double())
        assert same(opdc.blend(student, teacher, epsilon), expected)
    assert same(opdc.blend(student, teacher, 1), opdc.blend(student, teacher, 1.0))
    strange = everywhere.t().contiguous().t()
    assert same(opdc.blend(student, teacher, strange), usual)


@pytest.mark.parametrize("padding", [0.0, 500.0, math.nan, INFINITY, -INFINITY])
def test_hazard_16_valid_vocab_is_the_shorter_vocabulary(padding):
    student, teacher = logits_of("far", (3,), 257)
    padded = torch.cat([student, torch.full((3, 30), padding)], -1)
    longer = torch.cat([teacher, torch.full((3, 11), padding)], -1)
    for epsilon in FEW:
        expected = opdc.blend(student, teacher, epsilon)
        result = opdc.blend(padded, longer, epsilon, valid_vocab=257)
        assert result.logprobs.shape == padded.shape
        assert (result.logprobs[:, 257:] == -INFINITY).all()
        assert same((result.logprobs[:, :257], *result[1:]), expected)
        uniforms = torch.rand(3)
        assert same(
            opdc.blend_sample(padded, longer, epsilon, valid_vocab=257, uniforms=uniforms),
            opdc.blend_sample(student, teacher, epsilon, uniforms=uniforms),
        )


@pytest.mark.parametrize("eos_map", [(50, 3), (0, 129)], ids=str)
@pytest.mark.parametrize("regime", ["far", "realistic"])
def test_eos_map_moves_the_mass_of_the_teachers_end_to_the_students(regime, eos_map):
    own, other = eos_map
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = logits_of(regime, (2,), 130, dtype)
        rows[0][0, own] += 3.0
        rows[1][:, other] += 6.0
        for temperature in (1.0, 0.6):
            options = {"eos_map": eos_map, "temperature": temperature}
            student, teacher, epsilon = for_every_epsilon(rows, FEW)
            result = check(student, teacher, epsilon, **options)
            assert (result.logprobs[..., other] == -INFINITY).all()
            uniforms = torch.rand(student.shape[:-1], dtype=torch.float64)
            check_draw(student, teacher, epsilon, uniforms, **options)


def test_eos_map_where_one_model_lacks_an_end():
    """Each model knows its own end only: without the map they share no end at all."""
    student, teacher = torch.randn(2, 3, 20)
    student[:, 7] = teacher[:, 2] = -INFINITY
    teacher[:, 7] = 4.0
    for epsilon in FEW:
        result = check(student, teacher, epsilon, eos_map=(2, 7))
        assert (result.logprobs[:, 2] > -INFINITY).all()
    for lacking in (student, teacher):  # and where neither end is possible
        lacking[:, [2, 7]] = -INFINITY
    for epsilon in FEW:
        result = check(student, teacher, epsilon, eos_map=(2, 7))
        assert (result.logprobs[:, [2, 7]] == -INFINITY).all()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_04_an_undefined_row_draws_nothing_and_is_alone(dtype, side, poison):
    rows = dict(zip(("student", "teacher"), logits_of("far", (4,), 300, dtype), strict=True))
    uniforms = torch.rand(4, dtype=torch.float64)
    options = {"eos_map": (1, 2), "valid_vocab": 290}

    def answers():
        for epsilon in FEW:
            mu = opdc.blend(*rows.values(), epsilon, **options)
            yield mu, opdc.blend_sample(*rows.values(), epsilon, uniforms=uniforms, **options)

    usual = list(answers())
    POISONS[poison](rows[side][1, :290])
    for (mu, drawn), before in zip(answers(), usual, strict=True):
        good = torch.tensor([0, 2, 3])
        for result, expected in zip((mu, drawn), before, strict=True):
            assert same(tuple(x[good] for x in result), tuple(x[good] for x in expected))
        assert drawn.tokens[1] == -1
        assert all(x[1].isnan().all() for x in (*mu, *drawn[1:]))


# ----------------------------------------------------------------- what is drawn


def check_draw(
    student: Tensor,
    teacher: Tensor,
    epsilon: float | Tensor,
    uniforms: Tensor,
    top_k: int | None = None,
    top_p: float = 1.0,
    **common,
) -> opdc.BlendSample:
    """The token and its log-probs, from the law at the β of the answer; β itself is `blend`'s."""
    options = {"top_k": top_k, "top_p": top_p, **common}
    result = opdc.blend_sample(student, teacher, epsilon, uniforms=uniforms, **options)
    mu = opdc.blend(student, teacher, epsilon, **common)
    assert isinstance(result, opdc.BlendSample)
    assert same(result[4:], mu[1:])
    dtype = numbers_of(student, teacher)
    assert result.tokens.dtype == torch.int64
    assert all(x.shape == student.shape[:-1] for x in result)
    assert all(x.dtype == dtype and not x.requires_grad for x in result[1:])
    size = common.get("valid_vocab") or student.shape[-1]
    laws = zip(
        *(x.reshape(-1, size) for x in (log_law(student, **common), log_law(teacher, **common))),
        mu.logprobs[..., :size].double().reshape(-1, size),
        uniforms.double().reshape(-1).tolist(),
        *(x.reshape(-1) for x in result[:4]),
        strict=True,
    )
    for s, tau, law, u, token, logprob, student_logprob, teacher_logprob in laws:
        cut = oracle_sampling.truncated(law, law, top_k, top_p)
        assert_drawn(cut, int(token), u, 2 * MASS_SLACK[dtype])
        for value, wanted in (
            (logprob, cut[token]),
            (student_logprob, s[token]),
            (teacher_logprob, tau[token]),
        ):
            if wanted == -INFINITY:
                assert value == -INFINITY
            else:
                assert abs(value.double() - wanted) <= log_slack(dtype, wanted, law[token])
    return result


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("regime", [x for x in ALL_REGIMES if "near" not in x.name], ids=str)
def test_draws_in_every_regime(regime, options):
    for dtype in (torch.float32, torch.float64):
        student, teacher, epsilon = for_every_epsilon(logits_of(regime, (1,), 130, dtype), FEW)
        uniforms = torch.rand(len(FEW), 1, dtype=torch.float64)
        check_draw(student, teacher, epsilon, uniforms, **options)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 50}], ids=str)
@pytest.mark.parametrize("regime", ["realistic", "near_1e-02", "peaked_0.99"])
def test_draws_from_the_vocabulary_of_a_language_model(regime, options):
    student, teacher = (x.expand(4, -1) for x in logits_of(regime, (1,), 151_936))
    uniforms = torch.tensor([0.0, 0.4, 0.97, BELOW_ONE], dtype=torch.float64)
    check_draw(student, teacher, 0.02, uniforms, **options)


SMALL = (
    torch.tensor([-INFINITY, 0.3, 2.0, -1.0, 0.5, 1.5, -9.0, 0.9, -0.2, -INFINITY]),
    torch.tensor([-INFINITY, 1.9, -0.5, -1.0, -INFINITY, 1.0, -2.0, 2.2, 0.4, 3.0]),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_every_id_is_drawn_by_an_interval_as_long_as_its_probability(options, dtype):
    student, teacher = (x.to(dtype) for x in SMALL)
    cutting = {name: value for name, value in options.items() if name != "temperature"}
    common = {name: value for name, value in options.items() if name == "temperature"}
    for epsilon in (0.0, 0.05, 0.4, INFINITY):

        def tokens_at(uniforms):
            rows = student.expand(10, 10), teacher.expand(10, 10)
            return opdc.blend_sample(*rows, epsilon, uniforms=uniforms, **options).tokens

        law = opdc.blend(student, teacher, epsilon, **common).logprobs.double()
        cut = oracle_sampling.truncated(
            law, law, cutting.get("top_k"), cutting.get("top_p", 1.0)
        ).exp()
        lengths = interval_lengths(tokens_at, 10)
        assert (lengths - cut).abs().max() < 2 * MASS_SLACK[numbers_of(student)]
        assert (lengths[cut == 0] <= 2.0**-43).all()


def test_a_million_draws_on_a_grid_have_the_law():
    rows = tuple(x.expand(MILLION, 10) for x in SMALL)
    grid = (torch.arange(MILLION, dtype=torch.float64) + 0.5) / MILLION
    result = opdc.blend_sample(*rows, 0.3, uniforms=grid)
    assert 0 < result.beta[0] < 1
    assert (result.beta == result.beta[0]).all()
    law = blended(*map(log_law, SMALL), result.beta[0].double()).exp()
    counts = torch.bincount(result.tokens, minlength=10)
    assert ((counts - MILLION * law).abs() <= 2 + 2 * MILLION * MASS_SLACK[torch.float32]).all()
    assert chi_square(result.tokens, law) < 0.1


def test_a_million_random_draws_have_the_law():
    rows = tuple(x.expand(MILLION, 10) for x in SMALL)
    generator = torch.Generator().manual_seed(11)
    result = opdc.blend_sample(*rows, 0.3, generator=generator, top_k=5, top_p=0.9)
    law = blended(*map(log_law, SMALL), result.beta[0].double())
    law = oracle_sampling.truncated(law, law, 5, 0.9).exp()
    assert chi_square(result.tokens, law) < rare(int((law > 0).sum()) - 1)


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_without_a_budget_or_a_limit_it_draws_from_one_model(options):
    student, teacher = logits_of("far", (20,), 300)
    uniforms = torch.rand(20, dtype=torch.float64)
    for epsilon, logits, column in ((0, student, 2), (INFINITY, teacher, 3)):
        drawn = opdc.blend_sample(student, teacher, epsilon, uniforms=uniforms, **options)
        plain = opdc.sample(logits, uniforms=uniforms, **options)
        assert torch.equal(drawn.tokens, plain.tokens)
        for value, wanted in (
            (drawn.logprobs, plain.logprobs),
            (drawn[column], plain.untruncated_logprobs),
        ):
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def test_hazard_13_ties_of_the_blend_go_to_the_lower_id():
    """Ids equal in both models are equal in every blend."""
    student = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.5])
    teacher = torch.tensor([2.0, 3.0, 3.0, 2.0, 3.0, -4.0])
    uniforms = (torch.arange(600) + 0.5) / 600
    rows = student.expand(600, 6), teacher.expand(600, 6)
    for epsilon in (0.0, 0.01, INFINITY):
        for top_k, kept in ((1, [1]), (2, [1, 2]), (3, [1, 2, 4])):
            drawn = opdc.blend_sample(*rows, epsilon, top_k=top_k, uniforms=uniforms)
            assert drawn.tokens.unique().tolist() == kept
            wanted = torch.full((600,), -math.log(top_k))
            torch.testing.assert_close(drawn.logprobs, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_15_no_u_draws_an_impossible_id(dtype, options):
    """What either model lacks is impossible inside the trust region, what the student lacks is at
    its ends too."""
    student, teacher = (x[0] for x in logits_of("far", (1,), 300, dtype))
    student[:3] = teacher[-5:] = student[150:160] = teacher[155:170] = -INFINITY
    teacher[3] = student[-6] = -600.0
    uniforms = torch.tensor(EDGES, dtype=torch.float64)
    rows = student.expand(len(EDGES), -1), teacher.expand(len(EDGES), -1)
    for epsilon in (0.0, 0.02, 3.0, INFINITY):
        drawn = opdc.blend_sample(*rows, epsilon, uniforms=uniforms, **options)
        assert (student[drawn.tokens] > -INFINITY).all()
        assert ((teacher[drawn.tokens] > -INFINITY) | (drawn.beta == 0)).all()
        assert drawn.logprobs.isfinite().all()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_a_generator_gives_one_float64_uniform_a_row(shape):
    student, teacher = torch.randn(2, *shape, 30)
    uniforms = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = opdc.blend_sample(student, teacher, 0.1, uniforms=uniforms)
    generator = torch.Generator().manual_seed(5)
    assert same(opdc.blend_sample(student, teacher, 0.1, generator=generator), expected)
    torch.manual_seed(5)
    assert same(opdc.blend_sample(student, teacher, 0.1), expected)


# ----------------------------------------------------------------- layouts, company, threads


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0), (0, 3)], ids=str)
def test_hazard_32_any_leading_shape(shape):
    student, teacher = torch.randn(2, *shape, 50)
    result = check(student, teacher, 0.1)
    assert result.beta.shape == shape
    check_draw(student, teacher, 0.1, torch.rand(shape), top_k=9)
    epsilon = torch.rand(shape)
    assert opdc.blend(student, teacher, epsilon).beta.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_32_a_vocabulary_of_one(dtype):
    student, teacher = torch.tensor([[3.0], [-1e4]], dtype=dtype), torch.zeros(2, 1, dtype=dtype)
    for epsilon in FEW:
        result = check(student, teacher, epsilon)
        assert (result.logprobs == 0).all()
        drawn = opdc.blend_sample(student, teacher, epsilon)
        assert (drawn.tokens == 0).all()
        assert (drawn.logprobs == 0).all()


def both(student, teacher, epsilon, uniforms, **options):
    """Everything that `blend` and `blend_sample` say, in one tuple."""
    return (
        *opdc.blend(student, teacher, epsilon),
        *opdc.blend_sample(student, teacher, epsilon, uniforms=uniforms, **options),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_17_every_layout(dtype):
    student, teacher = logits_of("far", (3, 4), 131, dtype)
    uniforms = torch.rand(3, 4, dtype=torch.float64)
    usual = both(student, teacher, 0.1, uniforms, top_p=0.8)
    for moved, other in zip(layouts(student), reversed(list(layouts(teacher))), strict=True):
        assert same(both(moved, other, 0.1, uniforms, top_p=0.8), usual)
    shared = student[:1, :1].expand(3, 4, 131), teacher[1:2, 2:3].expand(3, 4, 131)
    expected = both(*(x.clone() for x in shared), 0.1, uniforms)
    assert same(both(*shared, 0.1, uniforms), expected)


def test_hazard_01_offsets_beyond_32_bits():
    rows, vocabulary, stride = 3, 1000, 2**31 + 64
    memory = huge((rows - 1) * stride + vocabulary, torch.float32)
    student = memory.as_strided((rows, vocabulary), (stride, 1))
    dense, teacher = torch.randn(2, rows, vocabulary)
    student.copy_(dense)
    uniforms = torch.rand(rows)
    assert same(both(student, teacher, 0.1, uniforms), both(dense, teacher, 0.1, uniforms))
    assert same(both(teacher, student, 0.1, uniforms), both(teacher, dense, 0.1, uniforms))


@pytest.mark.parametrize("options", [{}, {"top_k": 7, "top_p": 0.6}], ids=str)
def test_hazard_28_bits_do_not_depend_on_threads_or_company(options):
    rows = *logits_of("realistic", (9,), 5003), torch.rand(9), torch.rand(9, dtype=torch.float64)
    usual = both(*rows, **options)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert same(both(*rows, **options), usual)
    torch.set_num_threads(1)
    order = torch.randperm(9)
    assert same(tuple(x[order] for x in usual), both(*(x[order] for x in rows), **options))
    for part in (slice(0, 4), slice(4, 9), slice(8, 9)):
        alone = both(*(x[part] for x in rows), **options)
        assert same(tuple(x[part] for x in usual), alone)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_hazard_21_read_only_inputs():
    random = np.random.default_rng(0)
    arrays = [random.random(shape) for shape in ((2, 30), (2, 30), (2,), (2,))]
    for array in arrays:
        array.setflags(write=False)
    tensors = [torch.from_numpy(array) for array in arrays]
    assert same(both(*tensors), both(*(x.clone() for x in tensors)))


def test_nothing_here_receives_a_gradient():
    student, teacher = torch.randn(2, 2, 30)
    epsilon, uniforms = torch.rand(2), torch.rand(2)
    expected = both(student, teacher, epsilon, uniforms)
    leaves = [x.clone().requires_grad_() for x in (student, teacher, epsilon, uniforms)]
    result = both(*leaves)
    assert not any(x.requires_grad for x in result)
    assert same(result, expected)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, -200.0), (torch.float64, -1000.0)])
def test_an_id_that_the_student_excludes_stays_out_where_the_teachers_underflows(dtype, far):
    student = torch.tensor([0.0, 0.0, -INFINITY], dtype=dtype)
    policy = opdc.blend(student, torch.tensor([0.0, 1.0, far], dtype=dtype), INFINITY)
    assert policy.beta == 1
    assert policy.logprobs[2] == -INFINITY


def test_without_a_beta_within_the_budget_the_policy_is_the_student():
    """Any β > 0 that a number can hold moves all the mass to one id."""
    policy = opdc.blend(torch.zeros(3), torch.tensor([-INFINITY, 0.0, -3e38]), 0.5)
    assert policy.beta == policy.student_kl == 0
    torch.testing.assert_close(policy.logprobs, torch.full((3,), -math.log(3)))
