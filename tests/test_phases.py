"""The phases of a loss called by themselves: what comes back from outside may be anything."""

from __future__ import annotations

import math

import pytest
import torch

import opdc
from core import core_call
from opdc import _C, _ops

PHASES = ("measure", "combine", "measure_again", "combine_again", "settle")
NAMES = ("parts", "rows", "entries", "value", "metrics", "upstream", "gradient", "sums")
POSITIONS, IDS, K = 4, 12, 3
CALLS = {
    "reverse_kl": {},
    "jsd": {},
    "forward_kl": {
        "support": _ops.SUPPORTS.index("teacher"),
        "normalize": _ops.NORMALIZATIONS.index("tail"),
        "k": K,
    },
}


def run(phase, method, *, count=1, first=0, vocabulary=IDS, with_metrics=False, **tensors):
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, POSITIONS, IDS, generator=generator).unbind()
    call = core_call(method, student, teacher, **CALLS[method]).values()
    given = (tensors.get(name) for name in NAMES)
    getattr(_C, phase)(*call, first, vocabulary, count, with_metrics, *given, 1)


def memory(method, filled_with=0.0):
    columns = _C.PART + 3 * CALLS[method].get("k", 0)
    shapes = {
        "parts": (POSITIONS, columns),
        "rows": (POSITIONS, _C.ROW),
        "entries": (POSITIONS, 4 * (CALLS[method].get("k", 0) + 1)),
        "sums": (POSITIONS, 1),
    }
    numbers = {
        name: torch.full(shape, filled_with, dtype=torch.float64) for name, shape in shapes.items()
    }
    return {
        **numbers,
        "value": torch.zeros(()),
        "upstream": torch.ones(()),
        "gradient": torch.zeros(POSITIONS, IDS),
    }


@pytest.mark.parametrize("count", [0, 2, 2**62 + 1])
def test_hazard_08_parts_of_another_number_of_slices_are_refused(count):
    with pytest.raises(ValueError, match=r"count|parts"):
        run("combine", "reverse_kl", count=count, **memory("reverse_kl"))


@pytest.mark.parametrize("missing", ["parts", "rows"])
def test_what_a_phase_needs_must_be_there(missing):
    with pytest.raises(TypeError, match=missing):
        run("combine", "reverse_kl", **{**memory("reverse_kl"), missing: None})


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300, -1e300, 7.5, 5e-324])
def test_numbers_from_outside_lead_nowhere_outside(method, garbage):
    looks_again = method != "reverse_kl"
    tensors = memory(method, garbage)
    for phase in (*PHASES, "slice_gradient", "finish_gradient"):
        if phase.endswith("again") and not looks_again:
            continue
        for name in ("parts", "rows", "entries", "sums"):
            tensors[name].fill_(garbage)
        tensors["rows"][:, -2] = 1  # active
        parts = tensors["parts"]
        if phase.endswith("again"):
            parts = parts[:, : _C.PART].contiguous()
        run(phase, method, first=3, **{**tensors, "parts": parts})


def test_hidden_states_of_no_size_have_gradients():
    hidden, bias = torch.zeros(3, 0, requires_grad=True), torch.randn(5, requires_grad=True)
    weight = torch.zeros(5, 0, requires_grad=True)
    teacher = torch.randn(3, 5)
    opdc.reverse_kl(opdc.Projection(hidden, weight, bias), teacher).backward()
    assert hidden.grad.shape == (3, 0) and weight.grad.shape == (5, 0)
    logits = bias.detach().expand(3, 5).clone().requires_grad_()
    opdc.reverse_kl(logits, teacher).backward()
    assert torch.allclose(bias.grad, logits.grad.sum(0), atol=1e-6)
