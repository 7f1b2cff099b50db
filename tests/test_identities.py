"""Facts that hold for any correct implementation, whatever its numerics."""

from __future__ import annotations

import math

import pytest
import torch

import opdc
from judge import measured
from regimes import CASES, DIVERGENCES, POLICY, STATISTICS, Case, make_inputs

REVERSE, FORWARD = DIVERGENCES[0], DIVERGENCES[1]


def gradient_of(case: Case, inputs, **keywords) -> torch.Tensor:
    return measured(case, inputs, **keywords).gradient


# ----------------------------------------------------------------- K1 descends the reverse KL


def test_identity_02_mean_k1_gradient_over_the_policy_is_the_reverse_kl_gradient():
    vocabulary = 40
    inputs = make_inputs("far", (1,), vocabulary, torch.float64)
    law = inputs.student.softmax(-1)
    reverse = gradient_of(REVERSE, inputs)
    student = inputs.student.expand(vocabulary, -1).clone().requires_grad_()
    teacher = inputs.teacher.expand(vocabulary, -1)
    tokens = torch.arange(vocabulary)
    opdc.k1(student, teacher, tokens, weights=law[0], reduction="sum").backward()
    torch.testing.assert_close(student.grad.sum(0), reverse[0], rtol=1e-11, atol=1e-13)


def test_mean_k2_and_k3_gradients_descend_what_their_docstrings_say():
    """k2: the reverse KL in expectation; k3: the forward KL."""
    vocabulary = 40
    inputs = make_inputs("uniform", (1,), vocabulary, torch.float64)
    inputs.student, inputs.teacher = 10 * inputs.student, 10 * inputs.teacher
    law = inputs.student.softmax(-1)
    tokens = torch.arange(vocabulary)
    for function, case in ((opdc.k2, REVERSE), (opdc.k3, FORWARD)):
        student = inputs.student.expand(vocabulary, -1).clone().requires_grad_()
        teacher = inputs.teacher.expand(vocabulary, -1)
        function(student, teacher, tokens, weights=law[0], reduction="sum").backward()
        torch.testing.assert_close(
            student.grad.sum(0), gradient_of(case, inputs)[0], rtol=1e-10, atol=1e-12
        )


def test_mean_of_the_estimators_over_the_policy_is_the_reverse_kl():
    vocabulary = 40
    inputs = make_inputs("uniform", (1,), vocabulary, torch.float64)
    law = inputs.student.softmax(-1)[0]
    student, teacher = (x.expand(vocabulary, -1) for x in (inputs.student, inputs.teacher))
    tokens = torch.arange(vocabulary)
    truth = opdc.reverse_kl(inputs.student, inputs.teacher, reduction="sum")
    for function in (opdc.k1, opdc.k3):  # k2 is biased
        mean = function(student, teacher, tokens, weights=law, reduction="sum")
        torch.testing.assert_close(mean, truth, rtol=1e-11, atol=1e-13)


# ----------------------------------------------------------------- identical models


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_identity_03_identical_models_have_no_policy_gradient(name, dtype):
    case = next(case for case in POLICY if case.name == name)
    for regime in ("uniform", "far", "realistic", "offset_1e4_both", "wide_1e3"):
        inputs = make_inputs(regime, (3,), 500, dtype)
        inputs.teacher = inputs.student.clone()
        result = measured(case, inputs, inputs.upstream)
        assert (result.value == 0).all(), regime
        assert (result.gradient == 0).all(), regime


# ----------------------------------------------------------------- shifts and permutations


@pytest.mark.parametrize("regime", ["uniform", "near_1e-04", "far", "realistic", "masked_both"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_identity_08_each_gradient_row_sums_to_zero(case, regime):
    inputs = make_inputs(regime, (4,), 1025)
    gradient = gradient_of(case, inputs).double()
    assert (gradient.sum(-1).abs() <= 1e-6 * gradient.abs().sum(-1)).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_identity_09_adding_a_constant_to_a_row_changes_nothing(case):
    inputs = make_inputs("far", (4,), 300)
    for name in ("student", "teacher"):  # multiples of 1/64: the shifts below are exact
        setattr(inputs, name, torch.round(getattr(inputs, name) * 64) / 64)
    before = measured(case, inputs)
    inputs.student = inputs.student + torch.tensor([1.0, -30.0, 512.0, 4096.0])[:, None]
    inputs.teacher = inputs.teacher + torch.tensor([-7.0, 2048.0, 0.5, 4.0])[:, None]
    after = measured(case, inputs)
    torch.testing.assert_close(after.value, before.value, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(after.gradient, before.gradient, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_identity_09_permuting_ids_permutes_gradients(case):
    inputs = make_inputs("far", (4,), 1100)
    before = measured(case, inputs)
    order = torch.randperm(1100)
    inputs.student, inputs.teacher = inputs.student[:, order], inputs.teacher[:, order]
    inputs.tokens = order.argsort()[inputs.tokens]
    after = measured(case, inputs)
    torch.testing.assert_close(after.value, before.value, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(after.gradient, before.gradient[:, order], rtol=2e-5, atol=1e-7)


# ----------------------------------------------------------------- the family of divergences


def values(function, student, teacher, **keywords):
    return function(student, teacher, reduction="none", **keywords)


@pytest.mark.parametrize("regime", ["uniform", "near_1e-03", "far", "masked_both", "wide_1e2"])
def test_identity_10_symmetries_and_bounds(regime):
    inputs = make_inputs(regime, (5,), 300)
    student, teacher = inputs.student, inputs.teacher
    torch.testing.assert_close(
        values(opdc.jsd, student, teacher), values(opdc.jsd, teacher, student), rtol=4e-6, atol=0
    )
    for beta in (0.1, 0.3, 0.7):
        torch.testing.assert_close(
            values(opdc.jsd, student, teacher, beta=beta),
            values(opdc.jsd, teacher, student, beta=1 - beta),
            rtol=4e-6,
            atol=0,
        )
    assert (values(opdc.jsd, student, teacher) <= math.log(2) * (1 + 2e-6)).all()
    for alpha in (0.01, 0.1, 0.5, 0.9):
        for direction in ("forward", "reverse"):
            skew = values(opdc.skew_kl, student, teacher, alpha=alpha, direction=direction)
            assert (skew <= -math.log(alpha) * (1 + 2e-6)).all()
            assert (skew >= 0).all()


@pytest.mark.parametrize("regime", ["uniform", "near_1e-03", "far", "masked_both", "realistic"])
def test_divergences_exchange_their_arguments(regime):
    inputs = make_inputs(regime, (5,), 300)
    student, teacher = inputs.student, inputs.teacher
    torch.testing.assert_close(
        values(opdc.reverse_kl, student, teacher),
        values(opdc.forward_kl, teacher, student),
        rtol=4e-6,
        atol=0,
    )
    torch.testing.assert_close(
        values(opdc.skew_kl, student, teacher),
        values(opdc.skew_kl, teacher, student, direction="reverse"),
        rtol=4e-6,
        atol=0,
    )


@pytest.mark.parametrize(("beta", "limit"), [(0.0, FORWARD), (1.0, REVERSE)])
def test_jsd_ends_are_the_two_kl_divergences_bit_for_bit(beta, limit):
    inputs = make_inputs("far", (5,), 300)
    end = Case("", "jsd", {"beta": beta})
    assert torch.equal(measured(end, inputs).value, measured(limit, inputs).value)
    assert torch.equal(measured(end, inputs).gradient, measured(limit, inputs).gradient)


def test_jsd_over_its_weight_tends_to_the_kl_divergences():
    """JSD(β)/β → forward KL as β → 0: the limits that the ends above stand for."""
    inputs = make_inputs("uniform", (3,), 50, torch.float64)
    forward = values(opdc.forward_kl, inputs.student, inputs.teacher)
    small = values(opdc.jsd, inputs.student, inputs.teacher, beta=1e-7) / 1e-7
    torch.testing.assert_close(small, forward, rtol=1e-5, atol=0)


def test_skew_without_mixing_is_the_plain_divergence():
    inputs = make_inputs("far", (5,), 300)
    for direction, plain in (("forward", FORWARD), ("reverse", REVERSE)):
        case = Case("", "skew_kl", {"alpha": 0.0, "direction": direction})
        result, limit = measured(case, inputs), measured(plain, inputs)
        torch.testing.assert_close(result.value, limit.value, rtol=2e-6, atol=0)
        torch.testing.assert_close(result.gradient, limit.gradient, rtol=2e-6, atol=1e-9)


def test_entropy_ties_forward_kl_to_cross_entropy():
    """H(q, p) = H(q) + KL(q ‖ p), and H(uniform) = log V."""
    inputs = make_inputs("far", (4,), 200, torch.float64)
    q, s = inputs.teacher.softmax(-1), inputs.student.log_softmax(-1)
    cross = -(q * s).sum(-1)
    sum_of_both = opdc.entropy(inputs.teacher) + values(
        opdc.forward_kl, inputs.student, inputs.teacher
    )
    torch.testing.assert_close(sum_of_both, cross, rtol=1e-12, atol=0)
    flat = torch.zeros(2, 1000)
    torch.testing.assert_close(opdc.entropy(flat), torch.full((2,), math.log(1000)))


def test_temperature_is_a_division_of_both_logits():
    inputs = make_inputs("far", (4,), 200, torch.float64)
    for case in CASES:
        whole = measured(case, inputs, temperature=4.0)
        kept = inputs.student, inputs.teacher
        inputs.student, inputs.teacher = inputs.student / 4, inputs.teacher / 4
        divided = measured(case, inputs)
        inputs.student, inputs.teacher = kept
        torch.testing.assert_close(whole.value, divided.value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(whole.gradient, divided.gradient / 4, rtol=1e-11, atol=1e-14)


# ----------------------------------------------------------------- bits do not depend on company


def bits(result) -> tuple[bytes, bytes]:
    return (
        result.value.contiguous().numpy().tobytes(),
        result.gradient.contiguous().view(torch.uint8).numpy().tobytes(),
    )


def subset(inputs, rows):
    """The same positions in another batch."""
    chosen = make_inputs("uniform", (1,), 1)
    for name in vars(inputs):
        value = getattr(inputs, name)
        setattr(chosen, name, value[rows] if isinstance(value, torch.Tensor) else value)
    return chosen


ROWWISE = [case for case in CASES if not case.options.get("discount")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ROWWISE, ids=str)
def test_identity_12_bits_do_not_depend_on_other_rows(case, dtype):
    inputs = make_inputs("far", (7,), 1025, dtype)
    usual = measured(case, inputs, inputs.upstream)
    alone = [subset(inputs, slice(row, row + 1)) for row in range(7)]
    for row, single in enumerate(alone):
        result = measured(case, single, single.upstream)
        assert bits(subset_of(usual, slice(row, row + 1))) == bits(result)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    shuffled = subset(inputs, order)
    result = measured(case, shuffled, shuffled.upstream)
    assert bits(subset_of(usual, order)) == bits(result)
    mask = torch.tensor([True, False, True, True, False, False, True])
    masked = measured(case, inputs, inputs.upstream, mask=mask)
    assert bits(subset_of(usual, mask)) == bits(subset_of(masked, mask))
    folded = subset(inputs, slice(0, 6))
    for name, value in vars(folded).items():
        if isinstance(value, torch.Tensor):
            setattr(folded, name, value.reshape(2, 3, *value.shape[1:]))
    assert bits(subset_of(usual, slice(0, 6))) == bits(measured(case, folded, folded.upstream))


def subset_of(result, rows):
    return type(result)(result.value[rows], result.gradient[rows])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_identity_12_bits_do_not_depend_on_threads(case):
    inputs = make_inputs("far", (9,), 1025)
    usual = [measured(case, inputs, inputs.upstream)]
    if case not in STATISTICS:
        usual.append(measured(case, inputs, reduction="mean", weights=inputs.weights))
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        again = [measured(case, inputs, inputs.upstream)]
        if case not in STATISTICS:
            again.append(measured(case, inputs, reduction="mean", weights=inputs.weights))
        for first, second in zip(usual, again, strict=True):
            assert bits(first) == bits(second), threads


@pytest.mark.parametrize("case", [case for case in CASES if case not in STATISTICS], ids=str)
def test_gradient_of_a_sum_is_the_gradient_of_its_parts_bit_for_bit(case):
    """Scalar reductions take their gradient in the forward call, `none` in the backward."""
    inputs = make_inputs("far", (5,), 1025)
    none = measured(case, inputs)
    summed = measured(case, inputs, reduction="sum")
    assert torch.equal(none.gradient, summed.gradient)
    torch.testing.assert_close(summed.value, none.value.sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_low_precision_logits_are_read_exactly(case, dtype):
    """bf16 and fp16 logits give the fp32 numbers of the same values, and their gradient rounded."""
    inputs = make_inputs("far", (4,), 1025, dtype)
    low = measured(case, inputs, inputs.upstream)
    inputs.student, inputs.teacher = inputs.student.float(), inputs.teacher.float()
    high = measured(case, inputs, inputs.upstream)
    assert torch.equal(low.value, high.value)
    assert torch.equal(low.gradient, high.gradient.to(dtype))
