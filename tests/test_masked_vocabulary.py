"""Ids that do not exist, rows that say nothing, positions that are not read."""

from __future__ import annotations

import math

import pytest
import torch

import opdc
from judge import check, expected, measured
from regimes import BY_NAME, CASES, DIVERGENCES, POLICY, STATISTICS, Case, make_inputs

INFINITY = math.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = (*DIVERGENCES, *POLICY)
MIXED = [
    case
    for case in DIVERGENCES
    if case.function == "skew_kl" or case.name in ("jsd", "jsd_0.1", "jsd_0.9")
]
PLAIN_KL = [case for case in DIVERGENCES if case not in MIXED]


def takes_student_log(case: Case) -> bool:
    """Whether the formula takes log p where only q weighs it: the forward KL."""
    return case.name in ("forward_kl", "jsd_0")


# ----------------------------------------------------------------- −inf, value and gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hazard_02_and_03_ids_masked_in_both_models_do_not_exist(case, dtype):
    """The result is that of the shorter vocabulary, and the gradient at the ids is 0."""
    inputs = make_inputs("realistic", (4,), 300, dtype)
    absent = torch.rand(300) < 0.3
    absent[inputs.tokens] = False
    inputs.student[:, absent] = inputs.teacher[:, absent] = -INFINITY
    upstream = inputs.upstream
    result = measured(case, inputs, upstream)
    assert (result.gradient[:, absent] == 0).all()
    check(case, inputs, result, expected(case, inputs, upstream), upstream)
    short = make_inputs("realistic", (4,), 300, dtype)
    for name in ("student", "teacher"):
        setattr(short, name, getattr(inputs, name)[:, ~absent].contiguous())
    short.tokens = (~absent).cumsum(0)[inputs.tokens] - 1
    removed = measured(case, short, upstream)
    torch.testing.assert_close(result.value, removed.value, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        result.gradient[:, ~absent].float(), removed.gradient.float(), rtol=1e-2, atol=2e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "regime"),
    [
        (case, regime)
        for case in DIVERGENCES
        for regime in ("masked_teacher", "masked_student")
        if case.is_finite_in(BY_NAME[regime])
    ],
    ids=str,
)
def test_hazard_02_and_03_minus_infinity_times_probability_zero_adds_nothing(case, regime, dtype):
    inputs = make_inputs(regime, (4,), 300, dtype)
    result = measured(case, inputs, inputs.upstream)
    check(case, inputs, result, expected(case, inputs, inputs.upstream), inputs.upstream)
    if regime == "masked_student":
        assert (result.gradient[inputs.student == -INFINITY] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PLAIN_KL, ids=str)
def test_hazard_02_and_03_mass_against_minus_infinity_is_infinite_with_nan_gradient(case, dtype):
    inputs = make_inputs("far", (4,), 300, dtype)
    poisoned = inputs.student if takes_student_log(case) else inputs.teacher
    poisoned[2, 17] = -INFINITY
    result = measured(case, inputs)
    good = torch.tensor([0, 1, 3])
    assert result.value[2] == INFINITY
    assert result.gradient[2].isnan().all()
    truth = expected(case, inputs)
    assert truth.value[2] == INFINITY
    assert truth.gradient[2].isnan().all()
    assert result.value[good].isfinite().all()
    assert result.gradient[good].isfinite().all()


@pytest.mark.parametrize("reduction", ["sum", "mean", "seq_mean"])
@pytest.mark.parametrize("case", PLAIN_KL, ids=str)
def test_hazard_03_infinite_row_spoils_its_own_gradient_only(case, reduction):
    inputs = make_inputs("far", (2, 2), 300)
    usual = measured(case, inputs, reduction=reduction)
    poisoned = inputs.student if takes_student_log(case) else inputs.teacher
    poisoned[1, 0, 17] = -INFINITY
    result = measured(case, inputs, reduction=reduction)
    assert result.value == INFINITY
    assert result.gradient[1, 0].isnan().all()
    for row in ((0, 0), (0, 1), (1, 1)):
        assert torch.equal(result.gradient[row], usual.gradient[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_hazard_02_and_03_disjoint_supports_are_finite_for_mixtures(case, dtype):
    """No id in common: JSD = the entropy of its weight, skew = −log α."""
    inputs = make_inputs("far", (3,), 64, dtype)
    inputs.student[:, :32] = -INFINITY
    inputs.teacher[:, 32:] = -INFINITY
    result = measured(case, inputs)
    if case.function == "jsd":
        beta = case.options.get("beta", 0.5)
        limit = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    else:
        limit = -math.log(case.options.get("alpha", 0.1))
    torch.testing.assert_close(
        result.value, torch.full_like(result.value, limit), rtol=2e-6, atol=0
    )
    assert result.gradient.float().abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", POLICY, ids=str)
def test_hazard_02_and_03_a_token_the_teacher_excludes_is_infinitely_bad(case, dtype):
    inputs = make_inputs("far", (4, 1), 50, dtype)
    for form in ("logits", "logprobs"):
        if form == "logits":
            inputs.teacher[2, 0, inputs.tokens[2, 0]] = -INFINITY
        else:
            inputs.teacher = opdc.token_logprobs(inputs.teacher, inputs.tokens)
            assert inputs.teacher[2, 0] == -INFINITY
        result = measured(case, inputs)
        assert result.value[2, 0] == INFINITY, form
        assert result.gradient[2].isnan().all(), form
        good = torch.tensor([0, 1, 3])
        assert result.value[good].isfinite().all()
        assert result.gradient[good].isfinite().all()


@pytest.mark.parametrize("case", POLICY, ids=str)
def test_a_token_the_student_cannot_have_sampled_is_never_a_silent_zero(case):
    inputs = make_inputs("far", (4, 1), 50)
    inputs.student[2, 0, inputs.tokens[2, 0]] = -INFINITY
    result = measured(case, inputs)
    assert not result.gradient[2].isfinite().any()
    assert result.gradient[torch.tensor([0, 1, 3])].isfinite().all()


def test_token_logprobs_of_an_impossible_id_is_minus_infinity():
    logits = torch.tensor([[0.0, -INFINITY, 1.0]])
    assert opdc.token_logprobs(logits, torch.tensor([1])).item() == -INFINITY


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_of_a_single_possible_id_is_zero(dtype):
    logits = torch.full((2, 100), -INFINITY, dtype=dtype)
    logits[:, 3] = 5.0
    logits.requires_grad_()
    value = opdc.entropy(logits)
    value.sum().backward()
    assert (value == 0).all()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("vocabulary", [17, 1024, 1025, 5003])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_long_runs_of_masked_ids(case, vocabulary):
    """Whole blocks of −inf at the start, in the middle and at the end of a row."""
    regime = BY_NAME["far"]
    inputs = make_inputs(regime, (2,), vocabulary)
    inputs.tokens = torch.tensor([vocabulary - 2, vocabulary // 2])
    for row, token in enumerate(inputs.tokens.tolist()):
        keep = torch.zeros(vocabulary, dtype=torch.bool)
        keep[token - 1 : token + 2] = True
        inputs.student[row, ~keep] = inputs.teacher[row, ~keep] = -INFINITY
    inputs.old_logprobs = torch.tensor([-1.0, -0.5])
    inputs.reference_logprobs = torch.tensor([-0.7, -1.5])
    result = measured(case, inputs, inputs.upstream)
    check(case, inputs, result, expected(case, inputs, inputs.upstream), inputs.upstream)


# ----------------------------------------------------------------- rows that say nothing


POISONS = {
    "nan": lambda row: row.__setitem__(11, math.nan),
    "all_minus_infinity": lambda row: row.fill_(-INFINITY),
    "plus_infinity": lambda row: row.__setitem__(11, INFINITY),
    "all_nan": lambda row: row.fill_(math.nan),
    "nan_among_minus_infinity": lambda row: row.fill_(-INFINITY).__setitem__(299, math.nan),
    "two_plus_infinities": lambda row: row[5:7].fill_(INFINITY),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "who"),
    [
        (case, who)
        for case in CASES
        for who in ("student", "teacher")
        if "discount" not in case.options and not (who == "teacher" and case in STATISTICS)
    ],
    ids=str,
)
def test_hazard_04_an_undefined_row_is_nan_and_alone(case, who, dtype, poison):
    inputs = make_inputs("far", (4,), 300, dtype)
    usual = measured(case, inputs, inputs.upstream)
    POISONS[poison](getattr(inputs, who)[1])
    result = measured(case, inputs, inputs.upstream)
    assert result.value[1].isnan()
    assert result.gradient[1].isnan().all()
    good = torch.tensor([0, 2, 3])
    assert torch.equal(result.value[good], usual.value[good])
    assert torch.equal(result.gradient[good], usual.gradient[good])


@pytest.mark.parametrize("reduction", ["sum", "mean", "seq_mean"])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_hazard_04_the_gradients_of_other_rows_stay_finite_under_a_mean(case, poison, reduction):
    inputs = make_inputs("far", (2, 2), 300)
    usual = measured(case, inputs, reduction=reduction)
    POISONS[poison](inputs.student[1, 0])
    result = measured(case, inputs, reduction=reduction)
    assert result.value.isnan()
    assert result.gradient[1, 0].isnan().all()
    for row in ((0, 0), (0, 1), (1, 1)):
        assert torch.equal(result.gradient[row], usual.gradient[row])


def test_hazard_04_a_discounted_sum_before_an_undefined_row_is_nan():
    inputs = make_inputs("far", (2, 4), 50)
    case = Case("", "k1", {"discount": 0.5})
    inputs.teacher[1, 2] = math.nan
    value = measured(case, inputs).value
    assert value[1, :3].isnan().all()
    assert value[0].isfinite().all()
    assert value[1, 3].isfinite()


@pytest.mark.parametrize("case", DIVERGENCES, ids=str)
def test_hazard_04_a_weight_of_zero_does_not_hide_an_undefined_row(case):
    inputs = make_inputs("far", (3,), 50)
    inputs.student[1, 7] = math.nan
    weights = torch.tensor([1.0, 0.0, 1.0])
    result = measured(case, inputs, weights=weights)
    assert result.value[1].isnan()
    assert result.gradient[1].isnan().all()


# ----------------------------------------------------------------- positions that are not read


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hazard_05_inactive_rows_are_never_read(case, dtype):
    inputs = make_inputs("far", (3, 4), 300, dtype)
    mask = inputs.mask
    assert 0 < mask.sum() < 12
    usual = measured(case, inputs, inputs.upstream, mask=mask)
    for garbage in (math.nan, INFINITY, -INFINITY):
        inputs.student[~mask] = garbage
        inputs.teacher[~mask] = garbage
        inputs.tokens[~mask] = -100
        for name in ("old_logprobs", "reference_logprobs", "weights"):
            getattr(inputs, name)[~mask] = garbage
        result = measured(case, inputs, inputs.upstream, mask=mask)
        assert torch.equal(result.value, usual.value)
        assert torch.equal(result.gradient, usual.gradient)
        assert (result.value[~mask] == 0).all()
        assert (result.gradient[~mask] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "seq_mean"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_hazard_05_inactive_rows_are_never_read_with_weights_and_logprobs(case, reduction):
    inputs = make_inputs("far", (3, 4), 300)
    if case in POLICY:
        inputs.teacher = opdc.token_logprobs(inputs.teacher, inputs.tokens)
    mask = inputs.mask
    common = {"mask": mask, "weights": inputs.weights, "reduction": reduction}
    usual = measured(case, inputs, **common)
    for name in ("student", "teacher", "weights", "old_logprobs", "reference_logprobs"):
        getattr(inputs, name)[~mask] = math.nan
    result = measured(case, inputs, **common)
    assert torch.equal(result.value, usual.value)
    assert torch.equal(result.gradient, usual.gradient)


# ----------------------------------------------------------------- valid_vocab


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [0.0, 50.0, math.nan, INFINITY, -INFINITY])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hazard_16_valid_vocab_is_the_shorter_vocabulary(case, padding, dtype):
    inputs = make_inputs("far", (4,), 257, dtype)
    short = measured(case, inputs, inputs.upstream)
    for name, width in (("student", 30), ("teacher", 12)):
        logits = getattr(inputs, name)
        tail = torch.full((4, width), padding, dtype=dtype)
        setattr(inputs, name, torch.cat([logits, tail], -1))
    result = measured(case, inputs, inputs.upstream, valid_vocab=257)
    assert torch.equal(result.value, short.value)
    assert torch.equal(result.gradient[:, :257], short.gradient)
    assert (result.gradient[:, 257:] == 0).all()


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_hazard_16_vocabularies_that_differ_are_an_error_that_says_what_to_do(case):
    inputs = make_inputs("far", (2,), 64)
    inputs.teacher = torch.cat([inputs.teacher, torch.zeros(2, 3)], -1)
    with pytest.raises(ValueError, match="valid_vocab") as raised:
        measured(case, inputs)
    assert "64" in str(raised.value)
    assert "67" in str(raised.value)


@pytest.mark.parametrize("bad", [0, -1, 65])
def test_valid_vocab_must_fit_both_models(bad):
    inputs = make_inputs("far", (2,), 64)
    with pytest.raises(ValueError, match="valid_vocab"):
        opdc.reverse_kl(inputs.student, inputs.teacher, valid_vocab=bad)
