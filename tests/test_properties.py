"""Property tests: shapes, options and logits that nobody thought of."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import opdc
from judge import bound, check, expected, measured
from regimes import BY_NAME, CASES, DIVERGENCES, POLICY, REGIMES, STATISTICS, make_inputs

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
positions = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
vocabularies = st.one_of(st.integers(2, 70), st.sampled_from([127, 128, 129, 1023, 1024, 1025]))
temperatures = st.sampled_from([1.0, 0.5, 0.9, 1.7, 5.0])
seeds = st.integers(0, 2**31)
# Regimes whose gradients are not all cancellation, at any vocabulary size.
regimes = st.sampled_from(
    [regime for regime in REGIMES if not regime.saturates and "masked" not in regime.name]
)


@settings(max_examples=250)
@given(
    case=st.sampled_from(CASES),
    regime=regimes,
    shape=positions,
    vocabulary=vocabularies,
    student_dtype=st.sampled_from(DTYPES),
    teacher_dtype=st.sampled_from(DTYPES),
    temperature=temperatures,
    masked=st.booleans(),
    cut=st.booleans(),
    seed=seeds,
)
def test_any_call_agrees_with_the_oracle(
    case, regime, shape, vocabulary, student_dtype, teacher_dtype, temperature, masked, cut, seed
):
    # Sharpened further, 1 − p_y falls below 1e-9, where float64 no longer tells it from 0.
    assume(temperature >= 0.9 or not regime.name.startswith("peaked_0.999"))
    inputs = make_inputs(regime, shape, vocabulary, student_dtype, teacher_dtype, seed)
    common = {"temperature": temperature}
    if masked:
        common["mask"] = inputs.mask
    if cut:
        common["valid_vocab"] = max(1, int(inputs.tokens.max()) + 1, vocabulary // 2)
    truth = expected(case, inputs, inputs.upstream, **common)
    result = measured(case, inputs, inputs.upstream, **common)
    valid = common.pop("valid_vocab", vocabulary)
    assert (result.gradient[..., valid:] == 0).all()
    for name in ("student", "teacher"):
        setattr(inputs, name, getattr(inputs, name)[..., :valid])
    for answer in (result, truth):
        answer.gradient = answer.gradient[..., :valid]
    # The float64 oracle itself keeps 8 digits where the models almost agree.
    tolerance = max(bound(inputs.student, inputs.teacher), 1e-8)
    check(case, inputs, result, truth, inputs.upstream, tolerance=tolerance, **common)


numbers = st.floats(-60, 60, width=32)
rows = st.integers(1, 40).flatmap(
    lambda size: st.tuples(
        st.lists(numbers, min_size=size, max_size=size),
        st.lists(numbers, min_size=size, max_size=size),
    )
)


@settings(max_examples=300)
@given(pair=rows, case=st.sampled_from(DIVERGENCES))
def test_divergences_of_any_two_rows_are_finite_and_not_negative(pair, case):
    student, teacher = (torch.tensor([row]) for row in pair)
    student.requires_grad_()
    value = getattr(opdc, case.function)(student, teacher, **case.options)
    value.backward()
    assert 0 <= value < math.inf
    assert student.grad.isfinite().all()
    assert abs(student.grad.double().sum()) <= 1e-5 * (1 + student.grad.abs().max())


@settings(max_examples=150)
@given(row=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=30))
def test_identical_rows_of_any_size_have_no_divergence(row):
    logits = torch.tensor([row])
    for case in DIVERGENCES:
        student = logits.clone().requires_grad_()
        value = getattr(opdc, case.function)(student, logits, **case.options)
        value.backward()
        assert value == 0
        assert (student.grad == 0).all()


@settings(max_examples=150)
@given(
    pair=rows,
    holes=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=40, max_size=40),
    case=st.sampled_from(DIVERGENCES),
)
def test_any_pattern_of_masked_ids_agrees_with_the_oracle(pair, holes, case):
    student, teacher = (torch.tensor([row]) for row in pair)
    size = student.shape[-1]
    pattern = torch.tensor(holes[:size])
    student[0, pattern[:, 0]] = -math.inf
    teacher[0, pattern[:, 1]] = -math.inf
    inputs = make_inputs("uniform", (1,), size)
    inputs.student, inputs.teacher = student, teacher
    truth, result = expected(case, inputs), measured(case, inputs)
    if truth.value.isfinite().all():
        torch.testing.assert_close(result.value.double(), truth.value, rtol=4e-6, atol=1e-30)
        error = (result.gradient - truth.gradient).norm()
        # Rows over 120 nats are saturated: what cancels is the size of the loss.
        assert error <= 4e-6 * truth.gradient.norm() + 1e-6 * max(1.0, float(truth.value))
    else:
        torch.testing.assert_close(result.value.double(), truth.value, equal_nan=True)
        assert result.gradient.isnan().all()


@given(
    case=st.sampled_from([*DIVERGENCES, *POLICY]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    reduction=st.sampled_from(["none", "sum", "mean", "seq_mean"]),
    scale=st.sampled_from([-3.0, 0.5, 2.0]),
    seed=seeds,
)
def test_losses_are_linear_in_their_weights(case, shape, reduction, scale, seed):
    inputs = make_inputs("far", shape, 33, seed=seed)
    common = {"reduction": reduction, "mask": inputs.mask}
    once = measured(case, inputs, weights=inputs.weights, **common)
    scaled = measured(case, inputs, weights=scale * inputs.weights, **common)
    torch.testing.assert_close(scaled.value, scale * once.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.gradient, scale * once.gradient, rtol=1e-5, atol=1e-7)


@given(case=st.sampled_from([*DIVERGENCES, *POLICY]), rows_=st.integers(1, 12), seed=seeds)
def test_reductions_are_sums_of_positions(case, rows_, seed):
    inputs = make_inputs("far", (rows_, 3), 33, seed=seed)
    common = {"mask": inputs.mask, "weights": inputs.weights}
    none = measured(case, inputs, **common).value.double()
    size = float(none.abs().sum()) * 1e-6 + 1e-12
    count = inputs.mask.sum(-1)
    active = max(int(count.sum()), 1)
    sequences = none.sum(-1) / count.clamp_min(1)
    wanted = {
        "sum": none.sum(),
        "mean": none.sum() / active,
        "seq_mean": sequences.sum() / max(int((count > 0).sum()), 1),
    }
    for reduction, value in wanted.items():
        result = measured(case, inputs, reduction=reduction, **common).value
        assert abs(float(result) - float(value)) <= size, reduction


@given(seed=seeds, vocabulary=vocabularies, dtype=st.sampled_from(DTYPES))
def test_entropy_lies_between_zero_and_log_v(seed, vocabulary, dtype):
    for regime in ("uniform", "far", "wide_1e2", "masked_both"):
        logits = make_inputs(BY_NAME[regime], (2,), vocabulary, dtype, seed=seed).student
        value = opdc.entropy(logits)
        assert (value >= 0).all()
        assert (value <= math.log(vocabulary) * (1 + 1e-6)).all()


@given(seed=seeds, vocabulary=vocabularies, temperature=temperatures)
def test_token_logprobs_are_those_of_a_distribution(seed, vocabulary, temperature):
    logits = make_inputs("far", (1,), vocabulary, seed=seed).student
    every = torch.arange(vocabulary)
    logprobs = opdc.token_logprobs(logits.expand(vocabulary, -1), every, temperature=temperature)
    assert abs(float(logprobs.double().exp().sum()) - 1) < 1e-5
    assert (logprobs <= 0).all()


def test_every_case_was_reached():
    """The lists above name each public function at least once."""
    assert {case.function for case in (*DIVERGENCES, *POLICY, *STATISTICS)} == {
        "reverse_kl",
        "forward_kl",
        "jsd",
        "skew_kl",
        "k1",
        "k2",
        "k3",
        "token_logprobs",
        "entropy",
    }
