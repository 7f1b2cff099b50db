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
