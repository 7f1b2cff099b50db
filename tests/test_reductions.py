"""From positions to a loss: the four reductions, masks, weights, and counts over a whole step."""

from __future__ import annotations

import pytest
import torch

import opdc
from judge import expected, measured
from regimes import DIVERGENCES, POLICY, STATISTICS, make_inputs

LOSSES = (*DIVERGENCES, *POLICY)
SAMPLE = [case for case in LOSSES if case.name in ("reverse_kl", "jsd", "skew_forward", "k1_clip")]
REDUCTIONS = ("none", "sum", "mean", "seq_mean")
SCALARS = REDUCTIONS[1:]


def agree(case, inputs, upstream, tolerance=4e-6, **common):
    """Sums have terms of both signs: errors are judged on the scale of the sum of sizes."""
    truth = expected(case, inputs, upstream, **common)
    result = measured(case, inputs, upstream, **common)
    sizes = expected(case, inputs, **{**common, "reduction": "none"}).value.abs()
    items = common.get("num_items") or max(float(sizes.count_nonzero()), 1.0)
    scale = float(sizes.sum()) / (1.0 if common["reduction"] in ("none", "sum") else items)
    torch.testing.assert_close(
        result.value.double(), truth.value, rtol=tolerance, atol=tolerance * scale
    )
    scale = truth.gradient.abs().amax(-1, keepdim=True)
    error = (result.gradient.double() - truth.gradient).abs()
    assert (error <= 2 * tolerance * scale).all()
    return result


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_reduction(case, with_mask, with_weights, reduction):
    inputs = make_inputs("realistic", (4, 5), 60)
    inputs.mask[2] = False  # a sequence with nothing in it
    common = {"reduction": reduction}
    if with_mask:
        common["mask"] = inputs.mask
    if with_weights:
        common["weights"] = inputs.weights
    upstream = inputs.upstream if reduction == "none" else torch.tensor(-2.5)
    result = agree(case, inputs, upstream, **common)
    assert result.value.shape == ((4, 5) if reduction == "none" else ())
    assert result.value.dtype == torch.float32


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
@pytest.mark.parametrize("reduction", ["mean", "seq_mean"])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_num_items_replaces_the_count(case, reduction, kind):
    inputs = make_inputs("realistic", (4, 5), 60)
    common = {"mask": inputs.mask, "weights": inputs.weights, "reduction": reduction}
    agree(case, inputs, torch.tensor(1.5), num_items=kind(37), **common)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_num_items_without_a_mean_is_an_error(case, reduction):
    inputs = make_inputs("realistic", (4, 5), 60)
    with pytest.raises(ValueError, match="num_items"):
        measured(case, inputs, reduction=reduction, num_items=3)


def test_an_unknown_reduction_is_an_error():
    inputs = make_inputs("realistic", (4, 5), 60)
    with pytest.raises(ValueError, match="reduction"):
        opdc.reverse_kl(inputs.student, inputs.teacher, reduction="batchmean")


@pytest.mark.parametrize("reduction", ["mean", "seq_mean"])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_num_items_zero_gives_zero(case, reduction):
    inputs = make_inputs("realistic", (4, 5), 60)
    result = measured(case, inputs, reduction=reduction, num_items=0)
    assert result.value == 0
    assert (result.gradient == 0).all()


# ----------------------------------------------------------------- nothing to average


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_hazard_06_nothing_active_is_zero_and_stays_connected(case, reduction):
    inputs = make_inputs("realistic", (3, 4), 60)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    result = measured(case, inputs, reduction=reduction, mask=nothing)
    assert (result.value == 0).all()
    assert (result.gradient == 0).all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("case", [*SAMPLE, *STATISTICS], ids=str)
def test_hazard_06_an_empty_batch_is_zero(case, shape):
    inputs = make_inputs("realistic", shape, 60)
    for reduction in ("none",) if case in STATISTICS else REDUCTIONS:
        keywords = {} if case in STATISTICS else {"reduction": reduction}
        result = measured(case, inputs, **keywords)
        assert result.value.shape == (shape if reduction == "none" else ())
        assert (result.value == 0).all()
        assert result.gradient.shape == (*shape, 60)


def test_hazard_06_a_sequence_with_nothing_active_leaves_seq_mean():
    inputs = make_inputs("realistic", (3, 4), 60)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    kept = torch.tensor([0, 2])
    with_hole = opdc.reverse_kl(inputs.student, inputs.teacher, mask=mask, reduction="seq_mean")
    without = opdc.reverse_kl(inputs.student[kept], inputs.teacher[kept], reduction="seq_mean")
    torch.testing.assert_close(with_hole, without, rtol=1e-6, atol=0)


# ----------------------------------------------------------------- accumulation


@pytest.mark.parametrize("reduction", ["mean", "seq_mean"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_hazard_07_micro_batches_with_num_items_are_one_batch(case, reduction):
    inputs = make_inputs("realistic", (6, 5), 60)
    inputs.mask[3] = False
    count = inputs.mask.sum() if reduction == "mean" else inputs.mask.any(-1).sum()
    common = {"reduction": reduction}
    whole = measured(case, inputs, mask=inputs.mask, weights=inputs.weights, **common)
    value, gradients = 0.0, []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = make_inputs("realistic", (1, 1), 1)
        for name, tensor in vars(inputs).items():
            setattr(part, name, tensor[rows] if isinstance(tensor, torch.Tensor) else tensor)
        result = measured(
            case, part, mask=part.mask, weights=part.weights, num_items=int(count), **common
        )
        value = value + result.value
        gradients.append(result.gradient)
    torch.testing.assert_close(value, whole.value, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(gradients), whole.gradient, rtol=1e-6, atol=1e-9)


# ----------------------------------------------------------------- masks and weights


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_of_every_kind(dtype):
    inputs = make_inputs("realistic", (4, 5), 60)
    usual = opdc.reverse_kl(inputs.student, inputs.teacher, mask=inputs.mask)
    assert torch.equal(
        usual, opdc.reverse_kl(inputs.student, inputs.teacher, mask=inputs.mask.to(dtype))
    )


def test_weights_never_enter_the_denominator():
    inputs = make_inputs("realistic", (4, 5), 60)
    once = opdc.reverse_kl(inputs.student, inputs.teacher, weights=torch.ones(4, 5))
    twice = opdc.reverse_kl(inputs.student, inputs.teacher, weights=torch.full((4, 5), 2.0))
    plain = opdc.reverse_kl(inputs.student, inputs.teacher)
    assert torch.equal(once, plain)
    assert torch.equal(twice, 2 * plain)


def test_weights_may_be_zero_or_negative():
    inputs = make_inputs("realistic", (4,), 60)
    weights = torch.tensor([0.0, -1.0, 1.0, -0.0])
    result = measured(DIVERGENCES[0], inputs, weights=weights)
    plain = measured(DIVERGENCES[0], inputs)
    assert torch.equal(result.value, weights * plain.value)
    assert torch.equal(result.gradient, weights[:, None] * plain.gradient)


def test_strided_masks_and_weights():
    inputs = make_inputs("realistic", (4, 5), 60)
    wide_mask = torch.ones(5, 8, dtype=torch.bool)
    wide_weights = torch.randn(5, 8)
    wide_mask[:, ::2], wide_weights[:, ::2] = inputs.mask.t(), inputs.weights.t()
    strided = {"mask": wide_mask[:, ::2].t(), "weights": wide_weights[:, ::2].t()}
    for case in LOSSES:
        usual = measured(case, inputs, mask=inputs.mask, weights=inputs.weights)
        result = measured(case, inputs, **strided)
        assert torch.equal(usual.value, result.value)
        assert torch.equal(usual.gradient, result.gradient)


def test_long_sums_do_not_drift():
    """A sum over many positions keeps the accuracy of its terms."""
    teacher = torch.randn(20000, 5)
    student = teacher + 0.01 * torch.randn(20000, 5)
    per_position = opdc.reverse_kl(student, teacher, reduction="none")
    total = opdc.reverse_kl(student, teacher, reduction="sum")
    assert total.item() == pytest.approx(per_position.double().sum().item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_one_position_without_leading_axes(reduction):
    inputs = make_inputs("realistic", (1,), 60)
    for case in SAMPLE:
        single = make_inputs("realistic", (1,), 60)
        for name, tensor in vars(inputs).items():
            setattr(single, name, tensor[0] if isinstance(tensor, torch.Tensor) else tensor)
        result = measured(case, single, reduction=reduction)
        usual = measured(case, inputs, reduction=reduction)
        assert result.value.shape == ()
        assert torch.equal(result.value, usual.value.reshape(()))
        assert torch.equal(result.gradient, usual.gradient[0])


def test_combined_metrics():
    """Of micro-batches: sums add up, extremes compare, and a name that one lacks adds nothing."""
    parts = [
        {
            "positions": torch.tensor(2.0),
            "k1": torch.tensor(1.0),
            "log_ratio_min": torch.tensor(-3.0),
        },
        {
            "positions": torch.tensor(3.0),
            "k1": torch.tensor(-4.0),
            "log_ratio_max": torch.tensor(2.0),
        },
        {"log_ratio_min": torch.tensor(-1.0), "log_ratio_max": torch.tensor(0.5)},
    ]
    combined = {name: value.item() for name, value in opdc.metrics.combine(parts).items()}
    assert combined == {
        "positions": 5.0,
        "k1": -3.0,
        "log_ratio_min": -3.0,
        "log_ratio_max": 2.0,
    }
    assert opdc.metrics.combine([]) == {}


def test_metrics_of_many_positions_are_those_of_their_parts():
    """They are added in stretches of 256 positions, and those in batches of 16."""
    count = 5000
    student, teacher = torch.randn(2, count, 3, dtype=torch.float64).unbind()
    tokens = torch.randint(0, 3, (count,))
    _, whole = opdc.k1(student, teacher, tokens, return_metrics=True)
    cut = zip(student.split(200), teacher.split(200), tokens.split(200), strict=True)
    parts = [opdc.k1(*part, return_metrics=True)[1] for part in cut]
    torch.testing.assert_close(opdc.metrics.combine(parts), whole)
