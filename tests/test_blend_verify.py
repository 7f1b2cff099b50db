"""opdc.blend_verify: drafts of the student become draws from the blend, exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import opdc
import oracle_sampling
from oracle_sampling import log_law
from test_blend import ALL_REGIMES, FEW, SMALL, logits_of
from test_sampling import (
    BELOW_ONE,
    DTYPES,
    EDGES,
    MASS_SLACK,
    MILLION,
    POISONS,
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
# The blend of a verification may be truncated; its drafts come from the whole student.
CUTS = ({}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.8}, {"top_k": 1})
GOLDEN = (math.sqrt(5) - 1) / 2
VERY_SMALL = (
    torch.tensor([-INFINITY, 0.3, 2.0, -1.0, 0.9, 1.4]),
    torch.tensor([0.5, 1.9, 0.2, -1.0, -0.7, 2.0]),
)


def students_drafts(student: Tensor, seed: int = 0, **common) -> Tensor:
    """One token a row from the whole student."""
    generator = torch.Generator().manual_seed(seed)
    law = log_law(student, **common).exp().nan_to_num(1.0)
    rows = law.reshape(-1, law.shape[-1])
    return torch.multinomial(rows, 1, generator=generator).reshape(student.shape[:-1])


def truncated_blend(
    student: Tensor, teacher: Tensor, epsilon: float, cut: dict, **common
) -> Tensor:
    """log μ of one row, cut; from the library's own blend, which is judged elsewhere."""
    law = opdc.blend(student, teacher, epsilon, **common).logprobs.double()
    law = law[: common.get("valid_vocab")]
    return oracle_sampling.truncated(law, law, cut.get("top_k"), cut.get("top_p", 1.0))


def check(
    drafts: Tensor, student: Tensor, teacher: Tensor, epsilon, uniforms: Tensor, **options
) -> opdc.BlendVerify:
    """Each position that counts: what was decided at u₀, the token at u₁, and all its numbers."""
    kept = [x.clone() for x in (drafts, student, teacher, uniforms)]
    result = opdc.blend_verify(drafts, student, teacher, epsilon, uniforms=uniforms, **options)
    assert isinstance(result, opdc.BlendVerify)
    dtype = numbers_of(student, teacher)
    assert result.tokens.dtype == torch.int64
    assert result.accepted.dtype == result.valid.dtype == torch.bool
    assert all(x.dtype == dtype for x in result[1:7])
    assert all(x.shape == drafts.shape and not x.requires_grad for x in result)

    # After the first position that does not stand, nothing counts and nothing is said.
    accepted = result.accepted if drafts.dim() else result.accepted[None]
    before = torch.cat([torch.ones_like(accepted[..., :1]), accepted[..., :-1]], -1)
    assert torch.equal(result.valid, before.cumprod(-1).bool().reshape(drafts.shape))
    void = ~result.valid
    assert (result.tokens[void] == -1).all()
    assert all(x[void].isnan().all() for x in result[1:7])
    assert not result.accepted[void].any()

    cut = {name: options.pop(name) for name in ("top_k", "top_p") if name in options}
    mu = opdc.blend(student, teacher, epsilon, **options)
    assert all(torch.equal(x[~void], y[~void]) for x, y in zip(result[4:7], mu[1:], strict=True))
    s, tau = log_law(student, **options), log_law(teacher, **options)
    own, other = options.get("eos_map") or (None, None)
    size, slack = s.shape[-1], 4 * MASS_SLACK[dtype]
    rows = zip(
        *(x.reshape(-1, size) for x in (s, tau, mu.logprobs[..., :size].double())),
        drafts.reshape(-1).tolist(),
        uniforms.double().reshape(-1, 2).tolist(),
        *(x.reshape(-1) for x in (*result[:4], result.accepted, result.valid)),
        strict=True,
    )
    for p, q, law, draft, (
        u0,
        u1,
    ), token, logprob, student_logprob, teacher_logprob, stood, counts in rows:
        if not counts:
            continue
        law = oracle_sampling.truncated(law, law, cut.get("top_k"), cut.get("top_p", 1.0))
        draft = own if draft == other else draft
        # p is known to `slack` of its size, and so is the ratio.
        chance, noise = 0.0, 0.0
        if p[draft] > -INFINITY:
            chance = float((law[draft] - p[draft]).exp())
            noise = slack * (1 + abs(float(p[draft]))) * chance
        if stood:
            assert u0 < chance + noise, (u0, chance)
            assert token == draft
        else:
            assert u0 >= chance - noise, (u0, chance)
            surplus = (law.exp() - p.exp()).clamp_min(0.0)
            # Where μ = p all but for rounding, what is left over is rounding too.
            if surplus.sum() > 1e3 * slack:
                assert_drawn(surplus.log(), int(token), u1, slack / float(surplus.sum()))
            assert law[token] > -INFINITY
        for value, wanted in (
            (logprob, law[token]),
            (student_logprob, p[token]),
            (teacher_logprob, q[token]),
        ):
            if wanted == -INFINITY:
                assert value == -INFINITY
            else:
                assert abs(value.double() - wanted) <= log_slack(dtype, wanted, law[token])
    for tensor, copy in zip((drafts, student, teacher, uniforms), kept, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
    return result


# ----------------------------------------------------------------- the law


def test_worked_example():
    """p = (¾, ¼), q = (1/12, 11/12): μ_½ ∝ (√9, √33) = (0.3430, 0.6570). A draft 0 stands with the
    chance 0.3430/0.75 = 0.4574 and becomes 1 otherwise; a draft 1 always stands."""
    student, teacher = torch.tensor([3.0, 1.0]).log(), torch.tensor([1.0, 11.0]).log()
    epsilon = 0.3430 * math.log(0.3430 / 0.75) + 0.6570 * math.log(0.6570 / 0.25)
    rows = student.expand(4, 1, 2), teacher.expand(4, 1, 2)
    drafts = torch.tensor([0, 0, 1, 1])[:, None]
    uniforms = torch.tensor([[0.45, 0.9], [0.47, 0.0], [0.0, 0.5], [0.999, 0.5]])[:, None]
    result = opdc.blend_verify(drafts, *rows, epsilon, uniforms=uniforms)
    assert result.tokens.flatten().tolist() == [0, 1, 1, 1]
    assert result.accepted.flatten().tolist() == [True, False, True, True]
    assert result.valid.all()
    torch.testing.assert_close(result.beta, torch.full((4, 1), 0.5), rtol=1e-3, atol=0)
    wanted = torch.tensor([0.3430, 0.6570, 0.6570, 0.6570]).log()[:, None]
    torch.testing.assert_close(result.logprobs, wanted, rtol=0, atol=1e-3)
    wanted = torch.tensor([0.75, 0.25, 0.25, 0.25]).log()[:, None]
    torch.testing.assert_close(result.student_logprobs, wanted)


def enumerated_law(
    student: Tensor, teacher: Tensor, epsilon: float, **options
) -> tuple[Tensor, Tensor]:
    """Σ_a p(a) [accepted → a, else the law of the correction], and the rate of rejections, from
    the exact ends of the intervals of u₀ and u₁ that the function itself shows."""
    vocabulary = len(student)
    law = log_law(student, options.get("temperature", 1.0)).exp()
    possible = law.nonzero()[:, 0]
    ids = len(possible)

    def verify(u0: Tensor, u1: Tensor) -> opdc.BlendVerify:
        """Each possible draft (first axis) at uniforms `(ids, n)`; blocks of one."""
        uniforms = torch.stack([u0, u1], -1)[:, :, None]
        shape = uniforms.shape[:-1]
        return opdc.blend_verify(
            possible[:, None, None].expand(shape),
            *(x.expand(*shape, vocabulary) for x in (student, teacher)),
            epsilon,
            uniforms=uniforms,
            **options,
        )

    # Where a draft stops standing: it stands from u₀ = 0 on.
    stands = interval_lengths(
        lambda u: 1 - verify(u, torch.zeros_like(u)).accepted[..., 0].long(), 2, ids
    )
    accepted = 1 - stands[:, 1]
    if (stands[:, 0] == 0).any():  # not even at 0
        accepted = stands[:, 0]

    def corrections(u1: Tensor) -> Tensor:
        """Tokens in the place of rejected drafts; one that always stands counts for nothing."""
        result = verify(torch.full_like(u1, BELOW_ONE), u1)
        return torch.where(result.accepted, 0, result.tokens)[..., 0]

    corrected = interval_lengths(corrections, vocabulary, ids)
    mixture = torch.zeros(vocabulary, dtype=torch.float64)
    mixture[possible] = law[possible] * accepted
    rejected = law[possible] * (1 - accepted)
    return mixture + (rejected[:, None] * corrected).sum(0), rejected.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_enumerated_over_the_drafts_the_result_is_distributed_as_the_blend(cut, dtype):
    student, teacher = (x.to(dtype) for x in SMALL)
    shared = teacher.clone()
    shared[4] = 0.7  # with it q lacks nothing that p has, and every budget is feasible
    slack = 1e-6 if dtype == torch.float32 else 1e-11
    for other in (shared, teacher):
        for epsilon, temperature in ((0, 1), (1e-3, 1), (0.02, 1), (0.4, 0.7), (INFINITY, 1)):
            common = {"temperature": temperature}
            law = truncated_blend(student, other, epsilon, cut, **common).exp()
            enumerated, rejected = enumerated_law(student, other, epsilon, **cut, **common)
            assert (enumerated - law).abs().max() < slack
            assert (enumerated[law == 0] <= 2.0**-40).all()
            # A maximal coupling: the rate of rejections is the total variation of p and μ.
            variation = (log_law(student, temperature).exp() - law).clamp_min(0).sum()
            assert abs(rejected - variation) < slack
            if not cut:
                assert rejected <= math.sqrt(epsilon / 2) * (1 + 1e-4) + slack


def test_a_million_verifications_on_a_lattice_have_the_law():
    """Every draft on a lattice of (u₀, u₁), counted with the probability of the draft."""
    student, teacher = VERY_SMALL
    p, law = log_law(student).exp(), truncated_blend(student, teacher, 0.05, {}).exp()
    possible = p.nonzero()[:, 0]
    index = torch.arange(MILLION // len(possible), dtype=torch.float64)
    lattice = torch.stack([(index + 0.5) / len(index), (index * GOLDEN) % 1], -1)
    shape = len(possible), len(index), 1
    result = opdc.blend_verify(
        possible[:, None, None].expand(shape),
        *(x.expand(*shape, 6) for x in VERY_SMALL),
        0.05,
        uniforms=lattice[:, None].expand(*shape, 2),
    )
    weights = (p[possible] * len(possible))[:, None].expand(shape[:2]).reshape(-1)
    measured = torch.bincount(result.tokens.reshape(-1), weights, minlength=6) / MILLION
    assert (measured - law).abs().max() < 2e-5
    assert chi_square(result.tokens, law, weights) < 0.1


def test_a_million_random_drafts_and_uniforms_have_the_law():
    student, teacher = VERY_SMALL
    cut = {"top_k": 4, "top_p": 0.8}
    p, law = log_law(student).exp(), truncated_blend(student, teacher, 0.05, cut).exp()
    generator = torch.Generator().manual_seed(3)
    drafts = torch.multinomial(p, MILLION, replacement=True, generator=generator)[:, None]
    rows = (x.expand(MILLION, 1, 6) for x in VERY_SMALL)
    result = opdc.blend_verify(drafts, *rows, 0.05, generator=generator, **cut)
    assert chi_square(result.tokens, law) < rare(int((law > 0).sum()) - 1)
    variation = float((p - law).clamp_min(0).sum())
    rejected = 1 - result.accepted.double().mean()
    assert abs(rejected - variation) < 3.7 * math.sqrt(variation / MILLION)


@pytest.mark.parametrize("regime", [x for x in ALL_REGIMES if "near" not in x.name], ids=str)
def test_regime(regime):
    for dtype in (torch.float32, torch.float64):
        student, teacher = logits_of(regime, (3, 2), 130, dtype)
        drafts = students_drafts(student)
        for cut, epsilon in zip((*[{}] * 4, *CUTS), (*FEW[::2], *FEW), strict=False):
            uniforms = torch.rand(3, 2, 2, dtype=torch.float64)
            check(drafts, student, teacher, epsilon, uniforms, **cut)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_hazard_22_dtypes_and_temperature(dtypes):
    student, teacher = logits_of("realistic", (5, 3), 1100, *dtypes)
    uniforms = torch.rand(5, 3, 2)
    for temperature in (0.6, 2.5):
        drafts = students_drafts(student, temperature=temperature)
        check(drafts, student, teacher, 0.1, uniforms, temperature=temperature, top_p=0.97)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 50}], ids=str)
def test_vocabulary_of_a_language_model(cut):
    student, teacher = logits_of("realistic", (6, 1), 151_936)
    uniforms = torch.tensor([[0.1, 0.0], [0.99, 0.5], [0.9, BELOW_ONE]], dtype=torch.float64)
    uniforms = uniforms.repeat(2, 1)[:, None]
    result = check(students_drafts(student), student, teacher, 0.3, uniforms, **cut)
    assert result.accepted.any()
    assert not result.accepted.all()


@given(
    data=st.data(),
    size=st.integers(1, 30),
    exponent=st.integers(-12, 4),
    cut=st.sampled_from([{}, {"top_k": 3}, {"top_k": 1}, {"top_k": 20}]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_two_rows(data, size, exponent, cut, dtype):
    value = st.floats(-20, 20, width=16) | st.sampled_from([-INFINITY, 0.0, 1.0])
    row = st.lists(value, min_size=size, max_size=size)
    student, teacher = (torch.tensor([data.draw(row)], dtype=dtype) for _ in range(2))
    for logits in (student, teacher):
        logits[0, 0] = logits[0, 0].nan_to_num(neginf=0.5)
    draft = data.draw(st.integers(0, size - 1))
    uniform = st.floats(0, 1, exclude_max=True)
    uniforms = torch.tensor([[data.draw(uniform), data.draw(uniform)]], dtype=torch.float64)
    check(torch.tensor([draft]), student, teacher, 2.0**exponent, uniforms, **cut)


# ----------------------------------------------------------------- blocks


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_block_is_its_positions_one_after_another(cut):
    student, teacher = logits_of("far", (16, 5), 200)
    drafts = students_drafts(student)
    uniforms = torch.rand(16, 5, 2, dtype=torch.float64)
    block = opdc.blend_verify(drafts, student, teacher, 0.1, uniforms=uniforms, **cut)
    assert block.accepted.any()
    assert not block.valid.all()
    single = opdc.blend_verify(
        *(x[..., None, :] if x.dim() == 3 else x[..., None] for x in (drafts, student, teacher)),
        0.1,
        uniforms=uniforms[..., None, :],
        **cut,
    )
    assert single.valid.all()
    counts = block.valid
    assert same(tuple(x[counts] for x in block), tuple(x[..., 0][counts] for x in single))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_05_positions_after_the_first_rejection_are_not_read(dtype):
    student, teacher = logits_of("far", (16, 5), 200, dtype)
    drafts = students_drafts(student)
    uniforms = torch.rand(16, 5, 2, dtype=torch.float64)
    options = {"uniforms": uniforms, "top_p": 0.9}
    usual = opdc.blend_verify(drafts, student, teacher, 0.1, **options)
    assert not usual.valid.all()
    assert usual.valid[:, 1:].any()
    for poison in (math.nan, INFINITY, -INFINITY):
        student[~usual.valid] = poison
        teacher[~usual.valid] = poison
        assert same(opdc.blend_verify(drafts, student, teacher, 0.1, **options), usual)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_04_an_undefined_row_ends_its_block_and_is_alone(dtype, side, poison):
    """An unlimited budget with q = p: every draft stands, but for the poisoned row."""
    student, _ = logits_of("far", (3, 4), 300, dtype)
    rows = {"student": student, "teacher": student.clone()}
    drafts = students_drafts(student)
    uniforms = torch.rand(3, 4, 2, dtype=torch.float64)
    usual = opdc.blend_verify(drafts, *rows.values(), 0.1, uniforms=uniforms)
    assert usual.accepted.all()
    POISONS[poison](rows[side][1, 2])
    result = opdc.blend_verify(drafts, *rows.values(), 0.1, uniforms=uniforms)
    for untouched in ((0, slice(None)), (2, slice(None)), (1, slice(0, 2))):
        assert same(tuple(x[untouched] for x in result), tuple(x[untouched] for x in usual))
    assert result.tokens[1, 2:].tolist() == [-1, -1]
    assert all(x[1, 2:].isnan().all() for x in result[1:7])
    assert result.accepted[1].tolist() == [True, True, False, False]
    assert result.valid[1].tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("u0", EDGES)
def test_without_a_budget_every_draft_stands(u0, dtype):
    """μ = p, whatever rounding says of the two."""
    student, teacher = logits_of("far", (6, 4), 300, dtype)
    drafts = students_drafts(student)
    uniforms = torch.full((6, 4, 2), u0, dtype=torch.float64)
    for other, epsilon in ((teacher, 0.0), (student.clone(), 0.02), (student.clone(), INFINITY)):
        result = check(drafts, student, other, epsilon, uniforms)
        assert result.accepted.all()
        assert torch.equal(result.tokens, drafts)
        assert torch.equal(result.logprobs, result.student_logprobs)


def test_the_unlimited_budget_gives_the_teachers_law():
    """β = 1: the student only proposes. Also where it lacks an id, which stays without mass."""
    student = torch.tensor([1.0, 0.0, -1.0, -INFINITY, 2.0])
    teacher = torch.tensor([-1.0, 2.0, 0.5, 1.0, -3.0])
    wanted = torch.softmax(teacher.double().masked_fill(student == -INFINITY, -INFINITY), -1)
    enumerated, _ = enumerated_law(student, teacher, INFINITY)
    assert (enumerated - wanted).abs().max() < 1e-6


def test_top_k_of_1_is_greedy_for_every_draft():
    student, teacher = logits_of("far", (40,), 60)
    student, teacher = student[:, None], teacher[:, None]
    best = opdc.blend(student, teacher, 0.2).logprobs.argmax(-1)
    result = check(students_drafts(student), student, teacher, 0.2, torch.rand(40, 1, 2), top_k=1)
    assert torch.equal(result.tokens, best)
    assert (result.logprobs == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_hazard_15_no_u_gives_an_impossible_id(cut, dtype):
    student, teacher = (x[0] for x in logits_of("far", (1,), 300, dtype))
    student[:3] = teacher[-5:] = student[150:160] = teacher[155:170] = -INFINITY
    teacher[3] = student[-6] = -600.0
    edges = torch.tensor(EDGES, dtype=torch.float64)
    uniforms = torch.cartesian_prod(edges, edges)[:, None]
    # From the likeliest to ids that the teacher, or the budget, rules out.
    best = student.float().argsort(descending=True)
    for draft in (best[0], best[7], best[200], torch.tensor(294), torch.tensor(297)):
        shape = len(uniforms), 1
        block = draft.expand(shape), *(x.expand(*shape, 300) for x in (student, teacher))
        for epsilon in (0.0, 0.02, 3.0, INFINITY):
            result = opdc.blend_verify(*block, epsilon, uniforms=uniforms, **cut)
            assert (student[result.tokens] > -INFINITY).all()
            assert ((teacher[result.tokens] > -INFINITY) | (result.beta == 0)).all()
            assert result.logprobs.isfinite().all()


def test_an_impossible_draft_does_not_stand():
    """No student draws it; who sends it all the same gets a possible token."""
    student = torch.tensor([-INFINITY, 1.0, 0.5, -1.0])
    teacher = torch.tensor([3.0, 0.0, 2.0, -INFINITY])
    rows = student.expand(20, 1, 4), teacher.expand(20, 1, 4)
    for epsilon in FEW:
        drafts = torch.zeros(20, 1, dtype=torch.int64)
        result = opdc.blend_verify(drafts, *rows, epsilon, uniforms=torch.rand(20, 1, 2))
        assert not result.accepted.any()
        assert result.valid.all()
        assert (result.tokens > 0).all()
        assert result.logprobs.isfinite().all()


# ----------------------------------------------------------------- options


@pytest.mark.parametrize("eos_map", [(3, 50), (50, 3)], ids=str)
def test_eos_map_counts_the_teachers_end_as_the_students(eos_map):
    own, other = eos_map
    student, teacher = logits_of("far", (12, 3), 130)
    student[..., own] = 6.0
    student[..., other] = 4.0
    teacher[..., other] = 9.0
    drafts = students_drafts(student)
    drafts[:, 0] = torch.tensor([own, other]).repeat(6)
    uniforms = torch.rand(12, 3, 2, dtype=torch.float64)
    uniforms[1::2] = uniforms[::2]
    student[1::2], teacher[1::2] = student[::2].clone(), teacher[::2].clone()
    drafts[1::2, 1:] = drafts[::2, 1:]
    for cut in CUTS:
        result = check(drafts, student, teacher, 0.1, uniforms, eos_map=eos_map, **cut)
        assert (result.tokens != other).all()
        assert same(tuple(x[::2] for x in result), tuple(x[1::2] for x in result))


def test_hazard_16_valid_vocab_is_the_shorter_vocabulary():
    student, teacher = logits_of("far", (6, 3), 257)
    drafts = students_drafts(student)
    uniforms = torch.rand(6, 3, 2)
    for padding in (500.0, math.nan, -INFINITY):
        padded = torch.cat([student, torch.full((6, 3, 30), padding)], -1)
        longer = torch.cat([teacher, torch.full((6, 3, 11), padding)], -1)
        for cut in CUTS:
            expected = opdc.blend_verify(drafts, student, teacher, 0.1, uniforms=uniforms, **cut)
            result = opdc.blend_verify(
                drafts, padded, longer, 0.1, valid_vocab=257, uniforms=uniforms, **cut
            )
            assert same(result, expected)


def test_epsilon_per_position_broadcasts():
    student, teacher = logits_of("far", (4, 3), 100)
    drafts, uniforms = students_drafts(student), torch.rand(4, 3, 2)
    for shape in ((), (3,), (4, 1), (4, 3)):
        epsilon = torch.rand(shape, dtype=torch.float64)
        result = check(drafts, student, teacher, epsilon, uniforms)
        expected = opdc.blend_verify(
            drafts, student, teacher, epsilon.expand(4, 3).clone(), uniforms=uniforms
        )
        assert same(result, expected)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 2, 3)], ids=str)
def test_a_generator_gives_two_float64_uniforms_a_row(shape):
    student, teacher = torch.randn(2, *shape, 30)
    drafts = students_drafts(student)
    uniforms = torch.rand(
        *shape, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    expected = check(drafts, student, teacher, 0.1, uniforms)
    generator = torch.Generator().manual_seed(5)
    assert same(opdc.blend_verify(drafts, student, teacher, 0.1, generator=generator), expected)
    torch.manual_seed(5)
    assert same(opdc.blend_verify(drafts, student, teacher, 0.1), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64], ids=str)
def test_drafts_of_any_integer_dtype(dtype):
    student, teacher = logits_of("far", (4, 3), 100)
    drafts, uniforms = students_drafts(student), torch.rand(4, 3, 2)
    expected = opdc.blend_verify(drafts, student, teacher, 0.1, uniforms=uniforms)
    again = opdc.blend_verify(drafts.to(dtype), student, teacher, 0.1, uniforms=uniforms)
    assert same(again, expected)


# ----------------------------------------------------------------- layouts, company, threads


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0), (0, 3)], ids=str)
def test_hazard_32_any_leading_shape(shape):
    student, teacher = torch.randn(2, *shape, 50)
    drafts = torch.randint(50, shape)
    for cut in CUTS:
        check(drafts, student, teacher, 0.1, torch.rand(*shape, 2), **cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_32_a_vocabulary_of_one(dtype):
    student, teacher = torch.tensor([[3.0], [-1e4]], dtype=dtype), torch.zeros(2, 1, dtype=dtype)
    for epsilon in FEW:
        uniforms = torch.tensor([[0.0, 0.0], [BELOW_ONE, BELOW_ONE]], dtype=torch.float64)
        result = check(torch.zeros(2, dtype=torch.int64), student, teacher, epsilon, uniforms)
        assert result.accepted.all()
        assert (result.logprobs == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_17_every_layout(dtype):
    student, teacher = logits_of("far", (3, 4), 131, dtype)
    drafts, uniforms = students_drafts(student), torch.rand(3, 4, 2, dtype=torch.float64)
    options = {"uniforms": uniforms, "top_p": 0.9}
    usual = opdc.blend_verify(drafts, student, teacher, 0.1, **options)
    for moved, other in zip(layouts(student), reversed(list(layouts(teacher))), strict=True):
        assert same(opdc.blend_verify(drafts, moved, other, 0.1, **options), usual)
    for strange in (drafts.repeat_interleave(3, 1)[:, ::3], drafts.t().contiguous().t()):
        assert same(opdc.blend_verify(strange, student, teacher, 0.1, **options), usual)
    for strange in (
        uniforms.repeat_interleave(3, 1)[:, ::3],
        uniforms.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        uniforms.flip(-1).contiguous().flip(-1),
        torch.cat([uniforms, uniforms], -1)[..., :2],
    ):
        options["uniforms"] = strange
        assert same(opdc.blend_verify(drafts, student, teacher, 0.1, **options), usual)


def test_hazard_28_bits_do_not_depend_on_threads_or_company():
    student, teacher = logits_of("realistic", (9, 4), 5003)
    tensors = students_drafts(student), student, teacher, torch.rand(9, 1)
    uniforms = torch.rand(9, 4, 2, dtype=torch.float64)
    usual = opdc.blend_verify(*tensors, uniforms=uniforms, top_p=0.9)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert same(opdc.blend_verify(*tensors, uniforms=uniforms, top_p=0.9), usual)
    torch.set_num_threads(1)
    for part in (torch.randperm(9), slice(0, 4), slice(4, 9), slice(8, 9)):
        again = opdc.blend_verify(*(x[part] for x in tensors), uniforms=uniforms[part], top_p=0.9)
        assert same(tuple(x[part] for x in usual), again)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_hazard_21_read_only_inputs():
    random = np.random.default_rng(0)
    arrays = [
        random.integers(30, size=(2, 3)),
        random.random((2, 3, 30)),
        random.random((2, 3, 30)),
    ]
    arrays += [random.random((2, 3)), random.random((2, 3, 2))]
    for array in arrays:
        array.setflags(write=False)
    tensors = [torch.from_numpy(array) for array in arrays]
    *rows, uniforms = (x.clone() for x in tensors)
    expected = opdc.blend_verify(*rows, uniforms=uniforms)
    assert same(opdc.blend_verify(*tensors[:4], uniforms=tensors[4]), expected)


def test_nothing_here_receives_a_gradient():
    student, teacher = torch.randn(2, 3, 4, 30)
    drafts, epsilon, uniforms = students_drafts(student), torch.rand(3, 4), torch.rand(3, 4, 2)
    expected = opdc.blend_verify(drafts, student, teacher, epsilon, uniforms=uniforms)
    leaves = [x.clone().requires_grad_() for x in (student, teacher, epsilon, uniforms)]
    result = opdc.blend_verify(drafts, *leaves[:3], uniforms=leaves[3])
    assert not any(x.requires_grad for x in result)
    assert same(result, expected)
