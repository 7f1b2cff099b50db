"""The sampled-token losses: the forms of K1, and k2 and k3."""

from __future__ import annotations

import math

import pytest
import torch

import opdc
import oracle
from judge import check, expected, measured
from regimes import POLICY, Case, make_inputs

K1 = {case.name: case for case in POLICY}


def one_row(s_y: float) -> torch.Tensor:
    """Logits over two ids of which the first has log-probability s_y."""
    return torch.tensor([[s_y, math.log(-math.expm1(s_y))]], dtype=torch.float64)


@pytest.mark.parametrize("case", POLICY, ids=str)
def test_teacher_may_be_given_as_logprobs_of_the_tokens(case):
    inputs = make_inputs("far", (2, 4), 90, torch.float64)
    common = {"temperature": 1.3, "mask": inputs.mask, "weights": inputs.weights}
    from_logits = measured(case, inputs, inputs.upstream, **common)
    inputs.teacher = oracle.token_logprobs(inputs.teacher, inputs.tokens, temperature=1.3)
    from_logprobs = measured(case, inputs, inputs.upstream, **common)
    torch.testing.assert_close(from_logprobs.value, from_logits.value, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(from_logprobs.gradient, from_logits.gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", ["far", "realistic", "peaked_0.99", "masked_both"])
@pytest.mark.parametrize("case", POLICY, ids=str)
def test_given_logprobs_against_the_oracle(case, regime, dtype):
    inputs = make_inputs(regime, (2, 4), 300, dtype)
    teacher = oracle.token_logprobs(inputs.teacher, inputs.tokens, temperature=0.8)
    inputs.teacher = teacher.float()  # temperature never touches log-probs that come in
    truth = expected(case, inputs, inputs.upstream, temperature=0.8)
    result = measured(case, inputs, inputs.upstream, temperature=0.8)
    check(case, inputs, result, truth, inputs.upstream, temperature=0.8)


@pytest.mark.parametrize("case", POLICY, ids=str)
def test_sequences_with_holes(case):
    inputs = make_inputs("far", (3, 6), 40)
    for mask in (
        inputs.mask,
        torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0]]).bool(),
    ):
        truth = expected(case, inputs, inputs.upstream, mask=mask)
        result = measured(case, inputs, inputs.upstream, mask=mask)
        check(case, inputs, result, truth, inputs.upstream, mask=mask)


# ----------------------------------------------------------------- by hand


def test_k1_by_hand():
    """s_y = log ½, τ_y = log ¼: A = −log 2, value log 2, gradient log 2 · (1_y − p)."""
    student, teacher = one_row(math.log(0.5)).requires_grad_(), one_row(math.log(0.25))
    loss = opdc.k1(student, teacher, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-14)
    expected_row = [0.5 * math.log(2), -0.5 * math.log(2)]
    assert student.grad[0].tolist() == pytest.approx(expected_row, rel=1e-14)


@pytest.mark.parametrize(
    ("ratio", "log_teacher_over_old", "value_factor", "is_clipped"),
    [
        (1.1, +0.5, 1.1, False),  # inside the range
        (1.5, +0.5, 1.2, True),  # A > 0 and ρ above 1 + ε: no further reward
        (0.5, +0.5, 0.5, False),  # A > 0 and ρ low: still pulled up
        (0.5, -0.5, 0.9, True),  # A < 0 and ρ below 1 − ε: no further punishment
        (1.5, -0.5, 1.5, False),  # A < 0 and ρ high: still pushed down
    ],
)
def test_clip_by_hand(ratio, log_teacher_over_old, value_factor, is_clipped):
    s_y = math.log(0.3)
    old = s_y - math.log(ratio)
    student = one_row(s_y).requires_grad_()
    advantage = log_teacher_over_old
    loss = opdc.k1(
        student,
        torch.tensor([old + advantage], dtype=torch.float64),
        torch.tensor([0]),
        old_logprobs=torch.tensor([old], dtype=torch.float64),
        clip_range=(0.1, 0.2),
    )
    loss.backward()
    assert loss.item() == pytest.approx(-value_factor * advantage, rel=1e-12)
    coefficient = 0.0 if is_clipped else -ratio * advantage
    row = [coefficient * 0.7, -coefficient * 0.7]
    assert student.grad[0].tolist() == pytest.approx(row, rel=1e-12, abs=1e-15)


def test_one_clip_number_is_both_sides():
    inputs = make_inputs("far", (20,), 30)
    one = measured(Case("", "k1", {"clip_range": 0.2}, ("old_logprobs",)), inputs)
    two = measured(Case("", "k1", {"clip_range": (0.2, 0.2)}, ("old_logprobs",)), inputs)
    assert torch.equal(one.value, two.value)
    assert torch.equal(one.gradient, two.gradient)
    assert (one.gradient == 0).all(-1).any(), "no row was clipped: the test tests nothing"


def test_discount_by_hand():
    """γ = ½ over positions 0, 2, 3 of four: the hole at 1 still counts one step."""
    student = torch.zeros(4, 2, dtype=torch.float64)  # s_y = −log 2 everywhere
    advantages = torch.tensor([1.0, 100.0, 2.0, 4.0], dtype=torch.float64)
    teacher = advantages - math.log(2)
    loss = opdc.k1(
        student[None],
        teacher[None],
        torch.zeros(1, 4, dtype=torch.long),
        discount=0.5,
        mask=torch.tensor([[1, 0, 1, 1]]).bool(),
        reduction="none",
    )
    wanted = [-(1.0 + 0.25 * 2.0 + 0.125 * 4.0), 0.0, -(2.0 + 0.5 * 4.0), -4.0]
    assert loss[0].tolist() == pytest.approx(wanted, rel=1e-13)


def test_discount_of_one_is_the_reward_to_go():
    inputs = make_inputs("far", (2, 5), 30, torch.float64)
    plain = measured(K1["k1"], inputs).value
    summed = measured(Case("", "k1", {"discount": 1.0}), inputs).value
    torch.testing.assert_close(summed, plain.flip(-1).cumsum(-1).flip(-1))


# ----------------------------------------------------------------- forms that must coincide


def test_without_old_logprobs_the_current_policy_stands_for_them():
    inputs = make_inputs("far", (6,), 60, torch.float64)
    inputs.old_logprobs = oracle.token_logprobs(inputs.student, inputs.tokens)
    for plain, with_old in (("k1", "k1_old"), ("k1_reference", "k1_reference_old")):
        first, second = measured(K1[plain], inputs), measured(K1[with_old], inputs)
        torch.testing.assert_close(first.value, second.value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(first.gradient, second.gradient, rtol=1e-11, atol=1e-13)
    current = measured(K1["k1_current"], inputs)
    torch.testing.assert_close(current.value, measured(K1["k1"], inputs).value)


def test_a_reference_with_scale_one_changes_nothing():
    inputs = make_inputs("far", (6,), 60, torch.float64)
    for extra in ((), ("old_logprobs",)):
        plain = measured(Case("", "k1", {}, extra), inputs)
        with_reference = measured(
            Case("", "k1", {"reward_scale": 1.0}, (*extra, "reference_logprobs")), inputs
        )
        torch.testing.assert_close(with_reference.value, plain.value, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(with_reference.gradient, plain.gradient, rtol=1e-11, atol=1e-12)


def test_ratio_never_leaves_a_range_that_is_wide_enough():
    inputs = make_inputs("far", (6,), 60)
    free = measured(K1["k1_old"], inputs)
    wide = measured(Case("", "k1", {"clip_range": (0.999999, 1e6)}, ("old_logprobs",)), inputs)
    assert torch.equal(free.value, wide.value)
    assert torch.equal(free.gradient, wide.gradient)


def test_no_gradient_flows_into_the_advantage():
    """Differentiating the value s_y − τ_y instead would give the gradient 1_y − p, without A."""
    inputs = make_inputs("far", (5,), 60, torch.float64)
    gradient = measured(K1["k1"], inputs).gradient
    value = measured(K1["k1"], inputs).value
    direction = torch.nn.functional.one_hot(inputs.tokens, 60) - inputs.student.softmax(-1)
    torch.testing.assert_close(gradient, value[:, None] * direction, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", POLICY, ids=str)
def test_k1_gradients_are_multiples_of_the_score(case):
    inputs = make_inputs("far", (2, 4), 60, torch.float64)
    gradient = measured(case, inputs).gradient
    direction = torch.nn.functional.one_hot(inputs.tokens, 60) - inputs.student.softmax(-1)
    multiple = (gradient * direction).sum(-1) / (direction * direction).sum(-1)
    torch.testing.assert_close(gradient, multiple[..., None] * direction, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [K1["k2"], K1["k3"]], ids=str)
def test_k2_and_k3_are_never_negative(case):
    for regime in ("near_1e-06", "near_1e-03", "far", "peaked_0.9999999", "realistic"):
        inputs = make_inputs(regime, (30,), 200)
        assert (measured(case, inputs).value >= 0).all()


# ----------------------------------------------------------------- errors


@pytest.mark.cpu_only
@pytest.mark.parametrize("bad", [-1, 50, 2**63 - 1, -(2**63), 2**31, -100])
@pytest.mark.parametrize("case", [*POLICY, Case("token_logprobs", "token_logprobs")], ids=str)
def test_hazard_08_token_out_of_range_is_an_error_before_anything_is_written(case, bad):
    inputs = make_inputs("far", (4,), 50)
    inputs.tokens[2] = bad
    before = inputs.student.clone()
    with pytest.raises((ValueError, IndexError), match="token"):
        measured(case, inputs)
    assert torch.equal(before, inputs.student)
    if case.function != "token_logprobs":
        student = inputs.student.clone().requires_grad_() * 1.0
        with pytest.raises((ValueError, IndexError), match="token"):
            getattr(opdc, case.function)(
                *inputs.arguments(case, student), **inputs.keywords(case), inplace=True
            )
        assert torch.equal(before, student.detach())


@pytest.mark.parametrize("bad", [-1, -100, 50, 2**63 - 1])
@pytest.mark.parametrize("case", [*POLICY, Case("token_logprobs", "token_logprobs")], ids=str)
def test_hazard_08_tokens_of_inactive_positions_are_not_looked_at(case, bad):
    inputs = make_inputs("far", (2, 4), 50)
    inputs.mask = torch.ones(2, 4, dtype=torch.bool)
    inputs.mask[1, 2] = False
    usual = measured(case, inputs, inputs.upstream, mask=inputs.mask)
    inputs.tokens[1, 2] = bad
    result = measured(case, inputs, inputs.upstream, mask=inputs.mask)
    assert torch.equal(usual.value, result.value)
    assert torch.equal(usual.gradient, result.gradient)


@pytest.mark.cpu_only
def test_hazard_08_the_valid_vocabulary_bounds_the_tokens():
    inputs = make_inputs("far", (4,), 50)
    inputs.tokens[:] = torch.tensor([0, 7, 39, 40])
    with pytest.raises((ValueError, IndexError), match="token"):
        opdc.k1(inputs.student, inputs.teacher, inputs.tokens, valid_vocab=40)
    inputs.tokens[3] = 39
    opdc.k1(inputs.student, inputs.teacher, inputs.tokens, valid_vocab=40)


@pytest.mark.parametrize(
    ("options", "extra", "names"),
    [
        ({"clip_range": 0.2}, (), "old_logprobs"),
        ({"reward_scale": 1.25}, (), "reference_logprobs"),
        ({"advantage": "new"}, (), "advantage"),
        ({"clip_range": -0.1}, ("old_logprobs",), "clip_range"),
        ({"clip_range": (0.1, float("nan"))}, ("old_logprobs",), "clip_range"),
        ({"discount": float("nan")}, (), "discount"),
    ],
)
def test_options_that_mean_nothing_are_errors(options, extra, names):
    inputs = make_inputs("far", (4,), 50)
    with pytest.raises((ValueError, TypeError), match=names):
        measured(Case("", "k1", options, extra), inputs)


# ----------------------------------------------------------------- metrics


@pytest.mark.parametrize("case", POLICY, ids=str)
def test_metrics_are_unweighted_sums_over_active_positions(case):
    inputs = make_inputs("far", (3, 4), 60)
    function = getattr(opdc, case.function)
    _, metrics = function(
        *inputs.arguments(case, inputs.student),
        **inputs.keywords(case),
        mask=inputs.mask,
        weights=inputs.weights,
        return_metrics=True,
    )
    s = oracle.token_logprobs(inputs.student, inputs.tokens)[inputs.mask]
    tau = oracle.token_logprobs(inputs.teacher, inputs.tokens)[inputs.mask]
    log_ratio = tau - s
    wanted = {
        "positions": float(inputs.mask.sum()),
        "k1": float(-log_ratio.sum()),
        "k2": float((0.5 * log_ratio**2).sum()),
        "k3": float((torch.expm1(log_ratio) - log_ratio).sum()),
        "log_ratio_min": float(log_ratio.min()),
        "log_ratio_max": float(log_ratio.max()),
    }
    assert {"positions", "k1", "k2", "k3"} <= metrics.keys()
    for name in wanted.keys() & metrics.keys():
        assert metrics[name].item() == pytest.approx(wanted[name], rel=3e-6), name
        assert metrics[name].dim() == 0
        assert not metrics[name].requires_grad


def test_metrics_count_the_clipped_branch():
    inputs = make_inputs("far", (40,), 30)
    case = K1["k1_clip"]
    clipped = (measured(case, inputs).gradient == 0).all(-1).sum()
    _, metrics = opdc.k1(
        *inputs.arguments(case, inputs.student), **inputs.keywords(case), return_metrics=True
    )
    assert metrics["clipped"].item() == clipped.item() > 0
