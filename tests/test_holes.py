"""What benchmarks/mutations.py planted and no other test noticed."""

from __future__ import annotations

import math

import pytest
import torch

import opdc
from judge import measured
from regimes import CASES, STATISTICS, make_inputs


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if "discount" not in case.options], ids=str
)
def test_hazard_04_a_nan_among_thousands_of_masked_ids_is_seen(case, who):
    """In a block of nothing but −inf and NaN no largest logit carries the NaN: max() drops it."""
    if who == "teacher" and case in STATISTICS:
        pytest.skip("reads no teacher")
    inputs = make_inputs("far", (2,), 5000)
    inputs.student[:, 1000:] = inputs.teacher[:, 1000:] = -math.inf
    inputs.tokens[:] = 17
    getattr(inputs, who)[1, 3000] = math.nan
    result = measured(case, inputs, inputs.upstream)
    assert result.value.isnan().tolist() == [False, True]
    assert result.gradient[1].isnan().all()
    assert result.gradient[0].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("case", [case for case in CASES if case.is_divergence], ids=str)
def test_hazard_02_ids_masked_by_the_lowest_number(case, who, temperature):
    """Some mask with the most negative float: over a temperature it overflows, and 0 · inf is NaN.

    Whole lanes only, so that no padding makes the row a masked one anyway.
    """
    inputs = make_inputs("uniform", (2,), 48)
    getattr(inputs, who)[:, ::3] = torch.finfo(torch.float32).min
    masked = make_inputs("uniform", (2,), 48)
    getattr(masked, who)[:, ::3] = -math.inf
    result = measured(case, inputs, inputs.upstream, temperature=temperature)
    excluded = measured(case, masked, inputs.upstream, temperature=temperature)
    finite = excluded.value.isfinite()
    torch.testing.assert_close(result.value[finite], excluded.value[finite])
    torch.testing.assert_close(result.gradient[finite], excluded.gradient[finite])
    assert not result.value.isnan().any()


def test_skew_with_a_tiny_alpha_keeps_it():
    """1 − (1 − α) is not α."""
    student = torch.tensor([[9.0, 0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[-math.inf, 0.0, 1.0]], dtype=torch.float64)
    for alpha in (1e-6, 1e-12, 1e-16, 1e-18):
        loss = opdc.skew_kl(student, teacher, alpha=alpha, direction="reverse")
        p, q = student.softmax(-1)[0], teacher.softmax(-1)[0]
        mixture = (1 - alpha) * q + alpha * p
        torch.testing.assert_close(loss, (p * (p / mixture).log()).sum())


def test_the_largest_temperature():
    student, teacher = torch.randn(2, 3, 40)
    assert opdc.reverse_kl(student, teacher, temperature=9e35).isfinite()
    with pytest.raises(ValueError, match="temperature"):
        opdc.reverse_kl(student, teacher, temperature=1e37)


def test_a_float16_gradient_is_scaled_before_it_is_rounded():
    student = torch.randn(64, 500).half().requires_grad_()
    teacher = torch.randn(64, 500).half()
    (65536 * opdc.reverse_kl(student, teacher)).backward()
    exact = student.detach().double().requires_grad_()
    (65536 * opdc.reverse_kl(exact, teacher.double())).backward()
    torch.testing.assert_close(student.grad, exact.grad.half(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("place", [0, 700, 1023, 1024, 1299])
@pytest.mark.parametrize("normalize", ["none", "teacher", "both", "tail"])
@pytest.mark.parametrize("support", ["teacher", "student"])
def test_hazard_04_and_13_an_undefined_ranking_row_has_no_support(
    support, normalize, place, metrics
):
    """Also where the NaN is no candidate for the support, at the ends of blocks and tiles."""
    student, teacher = torch.randn(2, 2, 1300)
    ranking = student if support == "student" else teacher
    ranking[:, place] = -50.0
    ranking[1, place] = math.nan
    options = {"support": support, "normalize": normalize, "k": 6, "reduction": "none"}
    loss = opdc.forward_kl(student, teacher, **options, return_metrics=metrics)
    if metrics:
        loss, found = loss
        assert found["slots"].isnan()
    assert loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize("gap", [10.0, 25.0, 32.0])
@pytest.mark.parametrize("normalize", ["both", "tail"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_hazard_11_and_12_gradient_of_a_sure_id_on_the_support(name, normalize, gap):
    """It is tiny, the difference of large numbers, and still minus the sum of all the others."""
    student = torch.tensor([[gap, 0.0, -1.0, 0.5, -0.3]]).requires_grad_()
    teacher = torch.tensor([[0.7, -0.2, 0.4, 0.1, 0.0]])
    loss = getattr(opdc, name)(student, teacher, support="teacher", k=3, normalize=normalize)
    loss.backward()
    sure, *others = student.grad[0].double()
    torch.testing.assert_close(sure, -sum(others), rtol=1e-5, atol=0)


def test_hazard_28_threads_have_a_workspace_each():
    """Rows large enough that several threads work at a time."""
    student, teacher = torch.randn(2, 64, 40_000)
    tokens = torch.randint(40_000, (64,))
    alone = opdc.topk(student, 200).ids
    expected = opdc.tropd(student, teacher, tokens, region="expected", reduction="none")
    torch.set_num_threads(8)
    for _ in range(3):
        assert torch.equal(opdc.topk(student, 200).ids, alone)
        again = opdc.tropd(student, teacher, tokens, region="expected", reduction="none")
        assert torch.equal(again, expected)
