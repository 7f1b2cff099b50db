"""The reference is judged first: against PyTorch's own functions, against 60-digit arithmetic, and
against the closed-form gradients that the library implements."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import one_hot

import oracle
from judge import eager_answer, exact, expected, row_errors, value_errors, worst
from regimes import (
    BY_NAME,
    CASES,
    DIVERGENCES,
    NEAR_NOISES,
    POLICY,
    REGIMES,
    Case,
    make_inputs,
)

FINITE_REGIMES = [regime for regime in REGIMES if not regime.name.startswith("masked")]
ORDINARY = ("uniform", "far", "near_1e-01", "realistic", "peaked_0.9", "peaked_against_flat")
SINGLE = [
    case
    for case in CASES
    if case.name not in ("jsd_0", "jsd_1") and not case.extra and "discount" not in case.options
]
NAMED_DIVERGENCES = [case for case in DIVERGENCES if case in SINGLE] + [
    Case("jsd_0.01", "jsd", {"beta": 0.01}),
    Case("skew_forward_0.99", "skew_kl", {"alpha": 0.99}),
    Case("skew_reverse_0.99", "skew_kl", {"alpha": 0.99, "direction": "reverse"}),
]


@pytest.mark.parametrize("regime", FINITE_REGIMES, ids=str)
@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_float64_oracle_agrees_with_60_digits(case, regime):
    inputs = make_inputs(regime, (2,), 40)
    truth, result = exact(case, inputs), expected(case, inputs)
    if case.is_divergence:
        assert worst(value_errors(result.value, truth.value)) < 1e-8
        # Rows of the wide regimes are saturated: gradients of 1e-80 that nothing resolves.
        floor = 1e-13 if regime.saturates else 0.0
        error = (result.gradient - truth.gradient).norm(dim=-1)
        assert (error <= 1e-8 * truth.gradient.norm(dim=-1) + floor).all()
    else:  # near models: τ_y − s_y cancels, in float64 too
        slack = 1e-14 * max(1.0, worst(inputs.student.double().abs()))
        torch.testing.assert_close(result.value, truth.value, rtol=1e-12, atol=slack)
        torch.testing.assert_close(result.gradient, truth.gradient, rtol=1e-12, atol=slack)


@pytest.mark.parametrize("noise", NEAR_NOISES)
@pytest.mark.parametrize("case", NAMED_DIVERGENCES, ids=str)
def test_oracle_resolves_tiny_divergences(case, noise):
    inputs = make_inputs(f"near_{noise:.0e}", (2,), 300)
    truth, result = exact(case, inputs, temperature=0.7), expected(case, inputs, temperature=0.7)
    assert worst(value_errors(result.value, truth.value)) < 1e-8
    assert worst(row_errors(result.gradient, truth.gradient)) < 1e-8


@pytest.mark.parametrize("regime", ORDINARY)
@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_oracle_agrees_with_what_users_write(case, regime):
    inputs = make_inputs(regime, (3,), 257)
    ours = expected(case, inputs, inputs.upstream)
    theirs = eager_answer(case, inputs, inputs.upstream, torch.float64)
    torch.testing.assert_close(ours.value, theirs.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=1e-8, atol=1e-12)


def closed_form(case: Case, z, t, temperature: float):
    """Value and gradient as a table of formulas, in plain float64."""
    s, tau = torch.log_softmax(z / temperature, -1), torch.log_softmax(t / temperature, -1)
    p, q = s.exp(), tau.exp()
    name, options = case.function, case.options
    if name == "jsd" and options.get("beta") in (0.0, 1.0):
        name = "reverse_kl" if options["beta"] else "forward_kl"
    if name == "forward_kl":
        return (q * (tau - s)).sum(), (p - q) / temperature
    if name == "reverse_kl":
        value = (p * (s - tau)).sum()
        return value, p * (s - tau - value) / temperature
    if name == "jsd":
        beta = options.get("beta", 0.5)
        log_mixture = torch.log(beta * q + (1 - beta) * p)
        u = (1 - beta) * p * (s - log_mixture)
        value = beta * (q * (tau - log_mixture)).sum() + u.sum()
    elif options.get("direction", "forward") == "forward":
        alpha = options.get("alpha", 0.1)
        mixture = alpha * q + (1 - alpha) * p
        u = -(1 - alpha) * q * p / mixture
        value = (q * (tau - mixture.log())).sum()
    else:
        alpha = options.get("alpha", 0.1)
        mixture = (1 - alpha) * q + alpha * p
        u = p * (s - mixture.log() + 1 - alpha * p / mixture)
        value = (p * (s - mixture.log())).sum()
    return value, (u - p * u.sum()) / temperature


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("regime", ["uniform", "far", "peaked_0.9", "realistic"])
@pytest.mark.parametrize("case", DIVERGENCES, ids=str)
def test_autograd_agrees_with_the_closed_form(case, regime, temperature):
    inputs = make_inputs(regime, (3,), 64)
    result = expected(case, inputs, temperature=temperature, reduction="sum")
    total = 0.0
    for row in range(3):
        value, gradient = closed_form(
            case, inputs.student[row].double(), inputs.teacher[row].double(), temperature
        )
        total += value
        torch.testing.assert_close(result.gradient[row], gradient, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(result.value, total, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", POLICY, ids=str)
def test_policy_gradients_agree_with_the_closed_form(case):
    """c (1_y − p) with the coefficient written out, all positions of a sequence at once."""
    inputs = make_inputs("far", (2, 5), 30)
    common = {"temperature": 1.3, "mask": inputs.mask}
    result = expected(case, inputs, reduction="sum", **common)
    m = inputs.mask.double()
    s_all = torch.log_softmax(inputs.student.double() / 1.3, -1)
    tau_all = torch.log_softmax(inputs.teacher.double() / 1.3, -1)
    index = inputs.tokens[..., None]
    s, tau = s_all.gather(-1, index)[..., 0], tau_all.gather(-1, index)[..., 0]
    options = case.options
    has_old = "old_logprobs" in case.extra
    old = inputs.old_logprobs.double() if has_old else s
    if case.function == "k1":
        behaviour = s if options.get("advantage") == "current" else old
        scale = options.get("reward_scale", 1.0)
        reference = (
            inputs.reference_logprobs.double()
            if case.extra[:1] == ("reference_logprobs",)
            else torch.zeros_like(s)
        )
        a = (scale * (tau - reference) - (behaviour - reference)) * m
        discount = options.get("discount", 0.0)
        for t in reversed(range(4)):
            a[:, t] += discount * a[:, t + 1]
        ratio = torch.exp(s - old)
        value, c = -ratio * a, -ratio * a
        if "clip_range" in options:
            given = options["clip_range"]
            low, high = given if isinstance(given, tuple) else (given, given)
            outside = ((a > 0) & (ratio > 1 + high)) | ((a < 0) & (ratio < 1 - low))
            value = torch.where(outside, -ratio.clamp(1 - low, 1 + high) * a, value)
            c = torch.where(outside, 0.0, c)
    elif case.function == "k2":
        value, c = 0.5 * (tau - s) ** 2, s - tau
    else:
        value, c = torch.exp(tau - s) - 1 - (tau - s), 1 - torch.exp(tau - s)
    torch.testing.assert_close(result.value, (m * value).sum())
    gradient = one_hot(inputs.tokens, 30) - s_all.exp()
    torch.testing.assert_close(result.gradient, (m * c)[..., None] * gradient / 1.3)


def test_reductions_by_hand():
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    weights = torch.tensor([[2.0, 5.0, -1.0], [1.0, 1.0, 1.0]])

    def reduced(name, num_items=None):
        return float(oracle._reduce(losses, mask, weights, name, num_items))

    assert oracle._reduce(losses, mask, weights, "none", None).tolist() == [[2, 0, -4], [0, 0, 0]]
    assert reduced("sum") == -2.0
    assert reduced("mean") == -1.0
    assert reduced("mean", 8) == -0.25
    assert reduced("seq_mean") == -1.0
    assert reduced("seq_mean", 4) == -0.25
    assert reduced("mean", 0) == 0.0


def test_minus_infinity_rules_of_the_oracle():
    minus = -math.inf
    z = torch.tensor([[0.3, minus, 1.0, 0.2]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.1, minus, 0.4, minus]], dtype=torch.float64)
    assert oracle.reverse_kl(z, t).item() == math.inf
    assert oracle.reverse_kl(t, z).isfinite()
    assert oracle.forward_kl(z, t).isfinite()
    for beta in (0.1, 0.5):
        assert 0 < oracle.jsd(z, t, beta=beta) < math.log(2)
    p, q = z.softmax(-1)[0].detach(), t.softmax(-1)[0]
    (gradient,) = torch.autograd.grad(oracle.forward_kl(z, t), z)
    torch.testing.assert_close(gradient[0], p - q)
    (gradient,) = torch.autograd.grad(oracle.reverse_kl(z, t), z)
    assert gradient.isnan().all()


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_regimes_are_what_they_say(name):
    inputs = make_inputs(name, (3,), 200)
    undefined = inputs.student.isnan().any() or inputs.teacher.isnan().any()
    assert not undefined
    assert (inputs.student == -math.inf).any() == (name in ("masked_both", "masked_student"))
    if name.startswith("peaked_") and "flat" not in name:
        peak = inputs.student.double().softmax(-1).amax(-1)
        wanted = float(name.removeprefix("peaked_"))
        torch.testing.assert_close(1 - peak, torch.full_like(peak, 1 - wanted), rtol=1e-3, atol=0)
