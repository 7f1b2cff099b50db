"""What benchmarks/mutations.py planted and no other test noticed."""

from __future__ import annotations

import math

import pytest

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
