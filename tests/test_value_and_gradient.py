"""Value and gradient of every function, against the float64 oracle, in every regime and dtype, with
upstream gradients that differ from position to position."""

from __future__ import annotations

import pytest
import torch

import opdc
from judge import (
    ORACLE_NOISE,
    check,
    eager_answer,
    exact,
    expected,
    measured,
    mixture_condition,
    row_errors,
    run,
    typical,
    value_errors,
)
from regimes import (
    BY_NAME,
    CASES,
    DIVERGENCES,
    NEAR_NOISES,
    PEAKS,
    POLICY,
    REGIMES,
    STATISTICS,
    VOCABULARY_SIZES,
    Case,
    Regime,
    make_inputs,
)

FLOATS = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
MIXES = [
    ("f32", "bf16"),
    ("bf16", "f32"),
    ("f16", "bf16"),
    ("bf16", "f16"),
    ("f32", "f64"),
    ("f64", "f32"),
    ("bf16", "f64"),
]
PLAIN = [
    case
    for case in CASES
    if not case.extra and not {"discount", "reward_scale"} & case.options.keys()
]
FINITE = [(case, regime) for case in CASES for regime in REGIMES if case.is_finite_in(regime)]


def saturation_floor(regime: Regime) -> float:
    """A saturated row has a true gradient of 1e-80; what cancels has the size of the logits."""
    return ORACLE_NOISE + 4 * torch.finfo(torch.float32).eps * regime.gap


def judge_case(case, regime, inputs, tolerance=None, **common):
    truth = expected(case, inputs, inputs.upstream, **common)
    result = measured(case, inputs, inputs.upstream, **common)
    check(
        case,
        inputs,
        result,
        truth,
        inputs.upstream,
        floor=saturation_floor(regime),
        tolerance=tolerance,
        **common,
    )
    return result


# ----------------------------------------------------------------- every case in every regime


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("case", "regime"), FINITE, ids=str)
def test_regime(case, regime, dtype):
    inputs = make_inputs(regime, (4,), 1025, FLOATS[dtype])
    result = judge_case(case, regime, inputs)
    assert result.value.dtype == torch.float32
    if case.is_divergence:
        assert (result.value >= 0).all()


@pytest.mark.parametrize(
    ("case", "regime"),
    [
        (case, regime)
        for case, regime in FINITE
        if case in PLAIN and "masked" not in regime.name and case.name not in ("jsd_0", "jsd_1")
    ],
    ids=str,
)
def test_float64_against_60_digits(case, regime):
    inputs = make_inputs(regime, (2,), 33, torch.float64)
    truth, ones = exact(case, inputs), torch.ones(2, dtype=torch.float64)
    result = measured(case, inputs, ones)
    floor = 1e-11 if regime.saturates else 0.0
    # Logits near 1e4 less logits near 0: that difference alone rounds at 1e-12 in float64.
    tolerance = 1e-9 if regime.name in ("offset_1e4_student", "offset_1e4_teacher") else None
    check(case, inputs, result, truth, ones, floor=floor, tolerance=tolerance)
    assert result.value.dtype == torch.float64


@pytest.mark.parametrize("regime", ["uniform", "far", "masked_both", "realistic"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_with_every_option(case, regime):
    judge_case(case, BY_NAME[regime], make_inputs(regime, (2, 3), 130, torch.float64))


@pytest.mark.parametrize("regime", ["near_1e-02", "realistic", "peaked_0.99"])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize("case", [*DIVERGENCES, *POLICY], ids=str)
def test_student_and_teacher_of_different_dtypes(case, mix, regime):
    student, teacher = (FLOATS[name] for name in mix)
    judge_case(case, BY_NAME[regime], make_inputs(regime, (3,), 300, student, teacher))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("vocabulary", VOCABULARY_SIZES)
@pytest.mark.parametrize("case", [*DIVERGENCES[:3], *DIVERGENCES[7:9], *POLICY[:1], *STATISTICS],
                         ids=str)  # fmt: skip
def test_vocabulary_size(case, vocabulary, dtype):
    regime = BY_NAME["realistic"]
    judge_case(case, regime, make_inputs(regime, (2,), vocabulary, FLOATS[dtype]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vocabulary_of_one_has_nothing_to_learn(case):
    inputs = make_inputs("far", (3,), 1)
    result = measured(case, inputs, inputs.upstream)
    assert (result.gradient == 0).all()
    if not case.extra:
        assert (result.value == 0).all()


@pytest.mark.parametrize("temperature", [0.3, 0.7, 2.0, 10.0])
@pytest.mark.parametrize("regime", ["near_1e-04", "far", "realistic", "offset_1e4_both"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_temperature(case, regime, temperature):
    inputs = make_inputs(regime, (3,), 300)
    judge_case(case, BY_NAME[regime], inputs, temperature=temperature)


@pytest.mark.parametrize("regime", ["near_1e-02", "near_1e-05", "realistic"])
@pytest.mark.parametrize("weight", [0.01, 0.99])
@pytest.mark.parametrize(
    "case",
    [
        Case("jsd", "jsd", {"beta": None}),
        Case("skew_forward", "skew_kl", {"alpha": None}),
        Case("skew_reverse", "skew_kl", {"alpha": None, "direction": "reverse"}),
    ],
    ids=str,
)
def test_mixtures_close_to_one_of_their_ends(case, weight, regime):
    """Where β or α leaves little of a model, little of the loss is left: w² of a near KL."""
    filled = {name: weight if value is None else value for name, value in case.options.items()}
    inputs = make_inputs(regime, (8,), 500)
    judge_case(Case(case.name, case.function, filled), BY_NAME[regime], inputs)


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_batched_positions_with_mask_and_weights(case, dtype):
    inputs = make_inputs("realistic", (2, 3, 2), 65, FLOATS[dtype])
    common = {"mask": inputs.mask}
    if case not in STATISTICS:
        common["weights"] = inputs.weights
    truth = expected(case, inputs, inputs.upstream, **common)
    result = measured(case, inputs, inputs.upstream, **common)
    inactive = ~inputs.mask
    assert (result.value[inactive] == 0).all()
    assert (result.gradient[inactive] == 0).all()
    # The weight multiplies value and gradient; dividing it out leaves the judged loss.
    common.pop("weights", None)
    weights = inputs.weights.double() if case not in STATISTICS else torch.ones(2, 3, 2).double()
    for answer in (result, truth):
        answer.value = torch.where(inputs.mask, answer.value.double() / weights, 0.0)
    if dtype == "f32" or dtype == "f64":
        for answer in (result, truth):
            answer.gradient = answer.gradient.double() / weights[..., None]
        result.gradient = result.gradient.to(FLOATS[dtype])
        check(case, inputs, result, truth, inputs.upstream, **common)
    else:
        check(case, inputs, result, truth, inputs.upstream.double() * weights, **common)


# ----------------------------------------------------------------- never worse than PyTorch


@pytest.mark.parametrize(
    ("case", "regime"),
    [(case, regime) for case, regime in FINITE if case in PLAIN and not regime.saturates],
    ids=str,
)
def test_error_is_never_above_that_of_pytorch(case, regime):
    """Root mean square over the rows; 2e-7 (two units in the last place) counts as rounding."""
    inputs = make_inputs(regime, (24,), 600)
    upstream = torch.ones(24)
    truth = expected(case, inputs, upstream)
    ours = measured(case, inputs, upstream)
    theirs = eager_answer(case, inputs, upstream, torch.float32)
    for answer, errors in (("value", value_errors), ("gradient", row_errors)):
        right = getattr(truth, answer)
        mine = typical(errors(getattr(ours, answer), right))
        reference = typical(errors(getattr(theirs, answer), right))
        limit = max(reference, 2e-7 * mixture_condition(case))
        assert mine <= limit, f"{answer}: {mine:.2e}, PyTorch {reference:.2e}"


# ----------------------------------------------------------------- hazards by name


@pytest.mark.parametrize("magnitude", [1e4, 1e5, 1e6])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hazard_09_large_common_offset(case, sign, magnitude):
    inputs = make_inputs("realistic", (3,), 500)
    for name in ("student", "teacher"):  # fp32 keeps 1/16 at 1e6: the sums below are exact
        coarse = torch.round(getattr(inputs, name) * 16) / 16
        setattr(inputs, name, coarse + sign * magnitude)
    judge_case(case, BY_NAME["realistic"], inputs)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("noise", NEAR_NOISES)
@pytest.mark.parametrize("case", DIVERGENCES, ids=str)
def test_hazard_10_student_near_teacher(case, noise, dtype):
    for seed in range(3):
        inputs = make_inputs(f"near_{noise:.0e}", (3,), 700, FLOATS[dtype], torch.float32, seed)
        result = judge_case(case, BY_NAME[f"near_{noise:.0e}"], inputs)
        assert (result.value >= 0).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hazard_11_true_class_gradient_is_not_rounded_early(case, peak, dtype):
    """1 − p_y down to 1e-7: rounding p_y first would leave nothing of it."""
    regime = BY_NAME[f"peaked_{peak:.7g}"]
    inputs = make_inputs(regime, (4,), 257, FLOATS[dtype])
    inputs.tokens = torch.full((4,), (2 * 257) // 3)
    inputs.tokens[-1] = 0  # and one token that the student finds impossible
    # What is left of 1 lies 16 below the largest logit: that difference rounds at 1e-6 in float32.
    judge_case(case, regime, inputs, tolerance=4e-6)


@pytest.mark.parametrize("regime", ["wide_1e2", "wide_1e3", "wide_1e4"])
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hazard_12_confident_rows_reach_their_limits(case, dtype, regime):
    inputs = make_inputs(regime, (3,), 100, FLOATS[dtype])
    judge_case(case, BY_NAME[regime], inputs)


def upstream_layouts(upstream):
    """The same kind of numbers in every memory layout autograd may hand over."""
    rows, columns = upstream.shape
    padded = torch.randn(rows, 2 * columns + 1, dtype=upstream.dtype)
    yield "contiguous", upstream
    yield "strided", padded[:, 1::2]
    yield "transposed", torch.randn(columns, rows, dtype=upstream.dtype).t()
    yield "expanded", torch.randn(1, columns, dtype=upstream.dtype).expand(rows, columns)
    yield "one number", torch.tensor(-1.7, dtype=upstream.dtype).expand(rows, columns)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hazard_17_and_18_every_layout_of_a_non_uniform_upstream(case, dtype):
    inputs = make_inputs("realistic", (3, 4), 50, FLOATS[dtype])
    for name, upstream in upstream_layouts(inputs.upstream):
        result = measured(case, inputs, upstream)
        check(case, inputs, result, expected(case, inputs, upstream), upstream)
        same = measured(case, inputs, upstream.contiguous())
        assert torch.equal(result.gradient, same.gradient), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hazard_17_every_layout_of_the_logits(case):
    inputs = make_inputs("far", (3, 4), 50)
    usual = measured(case, inputs, inputs.upstream)

    def padded(logits):
        wide = torch.full((*logits.shape[:-1], 80), float("nan"))
        wide[..., 7:57] = logits
        return wide[..., 7:57]

    def shifted(logits):  # one float past any alignment, and the sequence axis cut as trainers do
        room = torch.full((3, 5, 50), float("nan"))
        flat = torch.cat([torch.zeros(1), room.flatten()])[1:].view(3, 5, 50)
        flat[:, :4] = logits
        return flat[:, :4]

    def transposed(logits):  # the vocabulary is not the fastest axis
        return logits.transpose(-1, -2).contiguous().transpose(-1, -2)

    for layout in (padded, shifted, transposed):
        student = inputs.student
        leaf = layout(student).requires_grad_()
        assert leaf.stride() != student.stride() or leaf.data_ptr() % 64 != 0
        arguments = inputs.arguments(case, leaf, layout(inputs.teacher))
        options = {} if case in STATISTICS else {"reduction": "none"}
        value = getattr(opdc, case.function)(*arguments, **inputs.keywords(case), **options)
        (gradient,) = torch.autograd.grad(value, leaf, inputs.upstream)
        assert torch.equal(value, usual.value), layout.__name__
        assert torch.equal(gradient, usual.gradient), layout.__name__


def test_hazard_17_one_teacher_row_for_all_positions():
    inputs = make_inputs("far", (4,), 50)
    for case in DIVERGENCES:
        teacher = inputs.teacher[:1].expand(4, 50)
        function = getattr(opdc, case.function)
        shared = function(inputs.student, teacher, reduction="none", **case.options)
        copied = function(inputs.student, teacher.clone(), reduction="none", **case.options)
        assert torch.equal(shared, copied)


# ----------------------------------------------------------------- exact facts


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("regime", ["uniform", "far", "realistic", "masked_both", "wide_1e3"])
@pytest.mark.parametrize("case", DIVERGENCES, ids=str)
def test_identical_models_have_divergence_zero_and_no_gradient(case, regime, dtype):
    inputs = make_inputs(regime, (3,), 700, FLOATS[dtype])
    inputs.teacher = inputs.student.clone()
    result = measured(case, inputs, inputs.upstream)
    assert (result.value == 0).all()
    assert (result.gradient == 0).all()


def test_divergences_are_never_negative():
    """The smallest value over a fuzz of regimes, temperatures and dtypes."""
    smallest = torch.inf
    for regime in REGIMES:
        for case in DIVERGENCES:
            if not case.is_finite_in(regime):
                continue
            for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)):
                inputs = make_inputs(regime, (6,), 90, dtype, seed=seed + 100)
                values = getattr(opdc, case.function)(
                    inputs.student,
                    inputs.teacher,
                    reduction="none",
                    temperature=(0.5, 1.0, 2.0)[seed],
                    **case.options,
                )
                smallest = min(smallest, float(values.min()))
    assert smallest >= 0.0


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "seq_mean"])
@pytest.mark.parametrize("case", [*DIVERGENCES, *POLICY], ids=str)
def test_inplace_gives_the_same_bits(case, reduction):
    inputs = make_inputs("far", (2, 3), 70)
    common = {"reduction": reduction, "mask": inputs.mask, "weights": inputs.weights}
    function = getattr(opdc, case.function)
    results = []
    for inplace in (False, True):
        leaf = inputs.student.clone().requires_grad_()
        student = leaf * 1.0
        value = function(
            *inputs.arguments(case, student), **inputs.keywords(case), **common, inplace=inplace
        )
        value.backward(inputs.upstream if reduction == "none" else torch.tensor(1.0))
        results.append((value.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    if reduction == "none":  # kept until the upstream arrives, the gradient is rounded twice
        torch.testing.assert_close(results[0][1], results[1][1], rtol=4e-7, atol=0)
    else:
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_gradient_is_needed_for_the_value(case):
    inputs = make_inputs("far", (2, 3), 70)
    options = {} if case in STATISTICS else {"reduction": "none"}
    value = getattr(opdc, case.function)(
        *inputs.arguments(case, inputs.student), **inputs.keywords(case), **options
    )
    assert not value.requires_grad
    assert torch.equal(value, measured(case, inputs).value)


def test_the_teacher_never_receives_a_gradient():
    inputs = make_inputs("far", (2, 3), 70)
    for case in (*DIVERGENCES, *POLICY):
        student = inputs.student.clone().requires_grad_()
        teacher = inputs.teacher.clone().requires_grad_()
        value = getattr(opdc, case.function)(
            *inputs.arguments(case, student, teacher), **inputs.keywords(case)
        )
        value.backward()
        assert teacher.grad is None or (teacher.grad == 0).all()
        assert student.grad.abs().sum() > 0


# ----------------------------------------------------------------- finite differences


def differentiable(case: Case) -> bool:
    """Whether the gradient is the derivative of the value. Without old log-probs the value of K1 is
    −A with A detached, and with the current policy's advantage A moves with the logits."""
    if case.function != "k1":
        return True
    return "old_logprobs" in case.extra and case.options.get("advantage", "old") == "old"


@pytest.mark.parametrize(
    ("case", "reduction"),
    [
        (case, reduction)
        for case in CASES
        for reduction in ("none", "sum", "mean", "seq_mean")
        if differentiable(case) and (reduction == "none" or case not in STATISTICS)
    ],
    ids=str,
)
def test_gradcheck(case, reduction):
    inputs = make_inputs("uniform", (2, 3), 6, torch.float64)
    inputs.student, inputs.teacher = 8 * inputs.student, 8 * inputs.teacher
    inputs.mask[0, 1], inputs.mask[1, 1], inputs.mask[0, 0] = False, True, True
    inputs.tokens %= 5
    common = {"temperature": 1.3, "mask": inputs.mask, "valid_vocab": 5}
    if case not in STATISTICS:
        common |= {"weights": inputs.weights, "reduction": reduction}
        if reduction in ("mean", "seq_mean"):
            common["num_items"] = 7
    function = getattr(opdc, case.function)
    assert torch.autograd.gradcheck(
        lambda student: function(
            *inputs.arguments(case, student), **inputs.keywords(case), **common
        ),
        inputs.student.clone().requires_grad_(),
        atol=1e-7,
        rtol=1e-5,
    )


@pytest.mark.parametrize("case", [case for case in CASES if differentiable(case)], ids=str)
def test_directional_derivative_at_every_vocabulary_tail(case):
    """A centred difference along a random direction, at sizes around the inner block."""
    for vocabulary in (17, 1023, 1025):
        inputs = make_inputs("realistic", (2,), vocabulary, torch.float64)
        direction = torch.randn_like(inputs.student)
        result = measured(case, inputs, inputs.upstream)
        slope = (result.gradient * direction).sum()
        function, step = getattr(opdc, case.function), 1e-6
        options = {} if case in STATISTICS else {"reduction": "none"}

        sides = []
        for distance in (step, -step):
            student = inputs.student + distance * direction
            value = function(*inputs.arguments(case, student), **inputs.keywords(case), **options)
            sides.append((value * inputs.upstream).sum())
        difference = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(difference, slope, rtol=1e-6, atol=1e-8)


def test_run_of_the_oracle_is_not_the_library():
    """The judge must not judge itself."""
    inputs = make_inputs("far", (2,), 20)
    case = DIVERGENCES[0]
    assert expected(case, inputs).value.dtype == torch.float64
    assert run(opdc.reverse_kl, case, inputs).value.dtype == torch.float32
