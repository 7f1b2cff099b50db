"""The sparse head: logits of the ids of a sparse teacher only, from hidden states; nothing else of
the head is read. The kernels against float64 NumPy, the losses against those of all logits."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import opdc
from opdc import _C

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 3, 15, 16, 17, 1000)  # of hidden states: around the groups that sums are kept in
PAIRS = [(hidden, weight) for hidden in DTYPES for weight in DTYPES]
POSITIONS, IDS, SLOTS = 7, 23, 6
INFINITY = math.inf


def arithmetic(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def some_ids(positions: int = POSITIONS, slots: int = SLOTS, vocabulary: int = IDS) -> Tensor:
    """Ids that come again in other positions; some are missing, and all of position 2 are."""
    ids = torch.randint(0, vocabulary, (positions, slots))
    ids[:, ::4] %= 3
    ids[torch.rand(positions, slots) < 0.15] = -1
    ids[2:3] = -1
    return ids


def model(size: int, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, positions=POSITIONS):
    hidden = torch.randn(positions, size).to(hidden_dtype)
    return hidden, torch.randn(IDS, size).to(weight_dtype), torch.randn(IDS)


def gathered_logits(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None, threads: int = 1
) -> Tensor:
    found = torch.full(ids.shape, math.nan, dtype=arithmetic(hidden, weight))
    _C.gathered_logits(hidden, weight, bias, ids, found, threads)
    return found


def named(ids: Tensor) -> Tensor:
    return ids[ids >= 0].unique().long()


def gathered_gradient(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    upstream: Tensor,
    threads: int = 1,
    dtypes: tuple[torch.dtype | None, ...] = (None, None, None),
    whole: bool = False,
) -> tuple[Tensor, ...]:
    """Of hidden, weight, bias: in the dtype of the arithmetic unless they have one of their own."""
    rows = named(ids)
    count = len(weight) if whole else len(rows)
    shapes = (hidden.shape, (count, weight.shape[1]), (count,))
    found = [
        torch.full(shape, 7.0, dtype=dtype or arithmetic(hidden, weight))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    _C.gathered_gradient(hidden, weight, ids, upstream, found[0], rows, *found[1:], threads)
    return tuple(found)


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


# ----------------------------------------------------------------- the kernels


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_hazard_22_logits_of_any_dtypes(size, hidden_dtype, weight_dtype):
    hidden, weight, bias = model(size, hidden_dtype, weight_dtype)
    unit = torch.finfo(arithmetic(hidden, weight)).eps
    for ids in (some_ids(), some_ids(slots=1), some_ids().int()):
        for given in (None, bias, bias.double(), bias.bfloat16()):
            found = exact(gathered_logits(hidden, weight, ids, given))
            products = exact(hidden)[:, None] * exact(weight)[ids]
            wanted = products.sum(-1) + (0 if given is None else exact(given)[ids])
            # Each of sixteen sums side by side rounds `size / 16` times, one of doubles `size`.
            limit = unit * (abs(products).sum(-1) * (size / 8 + 4) + abs(wanted) + 1e-30)
            there = ids.numpy() >= 0
            assert (abs(found - wanted) <= limit)[there].all()
            assert (found[~there] == -INFINITY).all()


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_hazard_22_gradients_of_any_dtypes(size, hidden_dtype, weight_dtype):
    hidden, weight, _ = model(size, hidden_dtype, weight_dtype)
    ids, wide = some_ids(), arithmetic(hidden, weight)
    upstream = torch.randn(ids.shape, dtype=wide)
    rows, there = named(ids), ids >= 0
    factors = exact(upstream * there)
    one_hot = exact(there[..., None] & (ids[..., None] == rows))
    wanted = [
        np.einsum("nk,nkh->nh", factors, exact(weight)[ids]),
        np.einsum("nku,nk,nh->uh", one_hot, factors, exact(hidden)),
        np.einsum("nku,nk->u", one_hot, factors),
    ]
    size_of_terms = [
        np.einsum("nk,nkh->nh", abs(factors), abs(exact(weight))[ids]),
        np.einsum("nku,nk,nh->uh", one_hot, abs(factors), abs(exact(hidden))),
        np.einsum("nku,nk->u", one_hot, abs(factors)),
    ]
    narrow = (hidden_dtype, weight_dtype, torch.float32)
    for dtypes in ((None, None, None), narrow):
        found = gathered_gradient(hidden, weight, ids, upstream, dtypes=dtypes)
        for gradient, truth, terms in zip(found, wanted, size_of_terms, strict=True):
            rounding = torch.finfo(gradient.dtype)
            limit = torch.finfo(wide).eps * terms * POSITIONS * SLOTS + rounding.eps * abs(truth)
            assert (abs(exact(gradient) - truth) <= limit + rounding.tiny).all()


def test_gradients_of_all_rows_leave_the_others_alone():
    hidden, weight, _ = model(17, torch.float32, torch.float32)
    ids = some_ids(slots=2)
    upstream = torch.randn(ids.shape)
    rows = named(ids)
    some = gathered_gradient(hidden, weight, ids, upstream)
    d_hidden, d_weight, d_bias = gathered_gradient(hidden, weight, ids, upstream, whole=True)
    others = torch.ones(IDS, dtype=torch.bool)
    others[rows] = False
    assert others.any()
    assert torch.equal(d_hidden, some[0])
    assert torch.equal(d_weight[rows], some[1])
    assert torch.equal(d_bias[rows], some[2])
    assert (d_weight[others] == 7).all()
    assert (d_bias[others] == 7).all()


def test_rows_that_no_id_names_have_a_gradient_of_zero():
    hidden, weight, _ = model(16, torch.float32, torch.float32)
    ids = torch.full((POSITIONS, 2), 5)
    rows = torch.tensor([0, 5, 22])
    d_weight, d_bias = torch.full((3, 16), 7.0), torch.full((3,), 7.0)
    upstream = torch.randn(ids.shape)
    _C.gathered_gradient(hidden, weight, ids, upstream, None, rows, d_weight, d_bias, 1)
    for gradient in (d_weight, d_bias):
        assert (gradient[[0, 2]] == 0).all()
        assert (gradient[1] != 0).all()


def test_gradients_that_are_not_asked_for():
    hidden, weight, _ = model(16, torch.float32, torch.float32)
    ids = some_ids()
    upstream, rows = torch.randn(ids.shape), named(ids)
    wanted = gathered_gradient(hidden, weight, ids, upstream)
    for i in range(3):
        alone = [torch.full_like(g, 7.0) if i == j else None for j, g in enumerate(wanted)]
        given = rows if i else None
        _C.gathered_gradient(hidden, weight, ids, upstream, alone[0], given, *alone[1:], 1)
        assert torch.equal(alone[i], wanted[i])


@pytest.mark.parametrize("slots", [1, 3, 4, 5, 255, 256, 257, 600])
def test_more_slots_than_are_worked_on_at_a_time(slots):
    hidden, weight, bias = model(40, torch.float32, torch.bfloat16)
    ids = some_ids(slots=slots)
    found = gathered_logits(hidden, weight, ids, bias)
    every = exact(hidden) @ exact(weight).T + exact(bias)
    wanted = np.take_along_axis(every, ids.clamp(min=0).numpy(), 1)
    there = ids.numpy() >= 0
    np.testing.assert_allclose(exact(found)[there], wanted[there], rtol=1e-5, atol=1e-4)
    upstream = torch.randn(ids.shape)
    d_hidden, d_weight, _ = gathered_gradient(hidden, weight, ids, upstream)
    scattered = np.zeros((POSITIONS, IDS))
    factors = np.where(there, exact(upstream), 0)
    np.add.at(scattered, (np.arange(POSITIONS)[:, None], ids.clamp(min=0).numpy()), factors)
    np.testing.assert_allclose(exact(d_hidden), scattered @ exact(weight), rtol=1e-4, atol=1e-3)
    d_rows = (scattered.T @ exact(hidden))[named(ids)]
    np.testing.assert_allclose(exact(d_weight), d_rows, rtol=1e-4, atol=1e-3)


def test_a_missing_id_stands_for_a_row_of_zeros():
    """So that only NaN and infinity of its upstream spoil the hidden state's gradient."""
    hidden, weight, _ = model(5, torch.float32, torch.float32)
    ids = torch.full((POSITIONS, 3), -1)
    upstream = torch.zeros(POSITIONS, 3)
    upstream[0], upstream[1, 2], upstream[3, 0] = 4.0, math.nan, INFINITY
    d_hidden, d_weight, _ = gathered_gradient(hidden, weight, ids, upstream)
    assert d_hidden.isnan().any(1).tolist() == [False, True, False, True, False, False, False]
    assert (d_hidden.nan_to_num() == 0).all()
    assert d_weight.shape == (0, 5)


def all_bits(hidden, weight, ids, threads=1, bias=None) -> tuple[Tensor, ...]:
    found = gathered_logits(hidden, weight, ids, bias, threads)
    upstream = found.where(found > -INFINITY, 0.0)
    return found, *gathered_gradient(hidden, weight, ids, upstream, threads)


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_28_same_bits_for_any_number_of_threads(dtype):
    for positions in (37, 300):  # the second is worked on several positions at a time
        hidden, weight, bias = model(333, dtype, dtype, positions)
        ids = some_ids(positions, 9)
        expected = all_bits(hidden, weight, ids, bias=bias)
        for threads in (2, 3, 64):
            assert same(all_bits(hidden, weight, ids, threads, bias), expected)


def test_a_position_does_not_depend_on_the_others():
    hidden, weight, _ = model(100, torch.float32, torch.float32, 40)
    ids = some_ids(40)
    logits, d_hidden, *_ = all_bits(hidden, weight, ids)
    for i in range(40):
        alone = all_bits(hidden[i : i + 1], weight, ids[i : i + 1])
        assert same(alone[:2], (logits[i : i + 1], d_hidden[i : i + 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_17_same_bits_for_any_stride_and_alignment(dtype):
    hidden, weight, _ = model(37, dtype, dtype)
    ids = some_ids()
    expected = all_bits(hidden, weight, ids)

    def moved(tensor: Tensor) -> list[Tensor]:
        rows, columns = tensor.shape
        wide = torch.full((2, rows, columns + 5), 9).to(tensor.dtype)
        every_other = torch.full((2 * rows, columns), 9).to(tensor.dtype)
        views = (wide[0, :, 3:-2], wide[1, :, 1:-4], every_other[::2])
        return [view.copy_(tensor) for view in views]

    for h, w, i in zip(moved(hidden), moved(weight), moved(ids), strict=True):
        assert same(all_bits(h, w, i), expected)
    shape = (1, POSITIONS, 1)  # more axes of positions
    lead = all_bits(hidden.view(*shape, -1), weight, ids.view(*shape, -1))
    assert same((lead[0].view(POSITIONS, -1), lead[1].view(POSITIONS, -1), *lead[2:]), expected)
    if dtype is not torch.bfloat16:  # which NumPy does not have
        backwards = [np.ascontiguousarray(x.numpy()[::-1])[::-1] for x in (hidden, weight, ids)]
        found = torch.empty_like(expected[0])
        _C.gathered_logits(*backwards[:2], None, backwards[2], found, 1)
        assert torch.equal(found, expected[0])
    repeated = all_bits(hidden[:1].expand(3, -1), weight, ids[:1].expand(3, -1))
    assert same(repeated[:2], tuple(x[:1].expand(3, -1) for x in expected[:2]))
    one_row = gathered_logits(hidden, weight[:1].expand(IDS, -1), ids)
    assert torch.equal(one_row, gathered_logits(hidden, weight, ids.clamp(max=0)))


def digest_of_all_kernels() -> str:
    torch.manual_seed(7)
    digest = hashlib.sha256()
    for hidden_dtype, weight_dtype in PAIRS:
        for size in (1, 7, 16, 31, 64, 1000):
            hidden, weight, bias = model(size, hidden_dtype, weight_dtype)
            hidden[3, 0], weight[5, size // 2] = math.nan, INFINITY
            found = all_bits(hidden, weight, some_ids(slots=11), bias=bias)
            for tensor in found:
                digest.update(tensor.double().nan_to_num(nan=-7.0).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the instruction sets of x86 and Linux")
@pytest.mark.parametrize("level", _C.instruction_sets())
def test_hazard_29_every_instruction_set_gives_the_same_bits(level):
    script = "import sys; sys.path.insert(0, {!r}); import test_gathered as tests; "
    script = script.format(str(Path(__file__).parent)) + "print(tests.digest_of_all_kernels())"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=dict(os.environ, OPDC_ISA=level),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == digest_of_all_kernels()


@pytest.mark.parametrize("positions, slots, size", [(0, 3, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)])
def test_hazard_32_empty(positions, slots, size):
    hidden, weight = torch.randn(positions, size), torch.randn(IDS, size)
    ids = torch.randint(-1, IDS, (positions, slots))
    bias = torch.randn(IDS)
    found = gathered_logits(hidden, weight, ids, bias)
    if size == 0:
        assert torch.equal(found, bias[ids].where(ids >= 0, -INFINITY))
    upstream = torch.randn(ids.shape)
    d_hidden, d_weight, d_bias = gathered_gradient(hidden, weight, ids, upstream)
    assert (d_hidden == 0).all()
    assert d_weight.shape == (len(named(ids)), size)
    assert d_bias.shape == (len(named(ids)),)
    nothing = torch.empty(2, 0, dtype=torch.int64)
    assert gathered_logits(torch.randn(2, 3), torch.randn(0, 3), nothing).shape == (2, 0)


# What is wrong, and what the error must say. The changes are to the arguments by name.
REFUSED: dict[str, tuple[dict[str, Callable[[Tensor], Any]], str]] = {
    "hidden of integers": ({"hidden": Tensor.long}, r"student.hidden: got dtype int64, want float"),
    "hidden a number": ({"hidden": Tensor.sum}, r"student.hidden: got a single number"),
    "hidden by columns": ({"hidden": lambda x: x.t().contiguous().t()}, r"student.hidden.*stride"),
    "weight of integers": ({"weight": Tensor.int}, r"student.weight: got dtype int32"),
    "weight too wide": (
        {"weight": lambda x: torch.zeros(IDS, 9)},
        rf"student.weight: got shape \({IDS}, 9\), want \(V, 8\)",
    ),
    "weight with three axes": ({"weight": lambda x: x[None]}, r"student.weight: got shape \(1, "),
    "weight by columns": ({"weight": lambda x: x.t().contiguous().t()}, r"student.weight.*stride"),
    "ids of floats": ({"ids": Tensor.float}, r"ids: got dtype float32, want int64 or int32"),
    "ids for fewer positions": ({"ids": lambda x: x[1:]}, r"ids: got shape.*positions \(7,\)"),
    "an id beyond": ({"ids": lambda x: x.clamp(min=IDS)}, rf"ids: got id {IDS} at position 0"),
    "threads": ({"threads": lambda x: 0}, r"threads"),
}
REFUSED_LOGITS = REFUSED | {
    "bias too short": ({"bias": lambda x: x[1:]}, r"student.bias: want one .* of the 23 rows"),
    "bias of integers": ({"bias": Tensor.long}, r"student.bias: got dtype int64"),
    "logits too few": ({"logits": lambda x: x[:, 1:]}, r"logits: got shape \(7, 5\), want rows of"),
    "logits of doubles": ({"logits": Tensor.double}, r"logits: want float32"),
    "logits that overlap": ({"logits": lambda x: x[:1].expand(7, 6)}, r"logits.*overlap"),
}
REFUSED_GRADIENT = REFUSED | {
    "upstream of doubles": ({"upstream": Tensor.double}, r"upstream: want float32"),
    "upstream too few": ({"upstream": lambda x: x[:, :2]}, r"upstream: got shape \(7, 2\)"),
    "rows that lack one": (
        dict.fromkeys(("rows", "d_weight", "d_bias"), lambda x: x[1:]),
        r"rows: lack the id 0",
    ),
    "rows out of order": ({"rows": lambda x: x.flip(0)}, r"rows: got id .* at place 1.*in order"),
    "rows twice": ({"rows": lambda x: x.clamp(min=1)}, r"rows: got id 1 at place 1"),
    "rows beyond": ({"rows": lambda x: x + 1}, r"rows: got id 23"),
    "rows of int32": ({"rows": Tensor.int}, r"rows: want ids \(U,\) of int64"),
    "no rows": ({"rows": lambda x: None}, r"rows: got None"),
    "hidden_gradient too wide": (
        {"d_hidden": lambda x: torch.full((7, 9), 7.0)},
        r"hidden_gradient: got shape \(7, 9\), want rows of 8",
    ),
    "hidden_gradient of doubles": ({"d_hidden": Tensor.double}, r"hidden_gradient.*float64, want"),
    "hidden_gradient overlaps": (
        {"d_hidden": lambda x: x[:1].expand(7, 8)},
        r"hidden_gradient.*overlap",
    ),
    "weight_gradient too short": ({"d_weight": lambda x: x[1:]}, r"weight_gradient: got shape"),
    "weight_gradient of integers": ({"d_weight": Tensor.int}, r"weight_gradient: got dtype int32"),
    "bias_gradient too short": ({"d_bias": lambda x: x[1:]}, r"bias_gradient: want one number"),
}


def refused(call, arguments, outputs, changes, message):
    """The error says what is wrong, and nothing was written."""
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises((ValueError, TypeError), match=message):
        call(*arguments.values())
    for name in outputs:
        assert (arguments[name] == 7).all(), name


@pytest.mark.parametrize("case", REFUSED_LOGITS)
def test_hazard_08_wrong_logits_are_refused_before_anything_is_written(case):
    hidden, weight, bias = model(8, torch.float32, torch.float32)
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "ids": some_ids(),
        "logits": torch.full((POSITIONS, SLOTS), 7.0),
        "threads": 1,
    }
    refused(_C.gathered_logits, arguments, ("logits",), *REFUSED_LOGITS[case])


@pytest.mark.parametrize("case", REFUSED_GRADIENT)
def test_hazard_08_wrong_gradients_are_refused_before_anything_is_written(case):
    hidden, weight, _ = model(8, torch.float32, torch.float32)
    ids = torch.arange(POSITIONS * SLOTS).view(POSITIONS, SLOTS) % IDS
    ids[ids == IDS - 2] = IDS - 1  # all but one
    rows = named(ids)
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "ids": ids,
        "upstream": torch.randn(ids.shape),
        "d_hidden": torch.full((POSITIONS, 8), 7.0),
        "rows": rows,
        "d_weight": torch.full((len(rows), 8), 7.0),
        "d_bias": torch.full((len(rows),), 7.0),
        "threads": 1,
    }
    outputs = ("d_hidden", "d_weight", "d_bias")
    refused(_C.gathered_gradient, arguments, outputs, *REFUSED_GRADIENT[case])


# ----------------------------------------------------------------- the losses

LOSSES: dict[str, Callable[..., Any]] = {
    "lsm": opdc.lsm,
    "reverse_kl": lambda *a, **k: opdc.reverse_kl(*a, normalize="both", **k),
    "forward_kl": lambda *a, **k: opdc.forward_kl(*a, normalize="both", **k),
    "jsd": lambda *a, **k: opdc.jsd(*a, beta=0.3, normalize="both", **k),
}
SHAPE, WIDTH, RANK = (2, 5), 19, 3
ACTIVE = torch.tensor([[True, True, False, True, True], [True, False, True, True, True]])


class Problem:
    """A head with all that it may have, and a teacher that is known on a few ids: some slots are
    missing, one has no mass, tokens are in the slots, outside of them, and at that one."""

    def __init__(self, dtype: torch.dtype = torch.float64, requires: bool = True) -> None:
        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype).requires_grad_(requires)

        self.parts = {
            "hidden": leaf(*SHAPE, WIDTH),
            "weight": leaf(IDS, WIDTH),
            "bias": leaf(IDS),
            "inputs": leaf(*SHAPE, RANK),
            "adapter": leaf(IDS, RANK),
        }
        logprobs = torch.randn(*SHAPE, IDS).log_softmax(-1)
        values, ids = logprobs.topk(SLOTS)
        self.tokens = torch.randint(0, IDS, SHAPE)
        self.tokens[0, 0], self.tokens[1, 0] = ids[0, 0, 2], ids[1, 0, 4]
        self.tokens[1, 2] = logprobs[1, 2].argmin()
        self.token_logprobs = logprobs.gather(-1, self.tokens[..., None])[..., 0].clone()
        self.token_logprobs[1, 3] = -INFINITY
        ids[0, 1, 3] = ids[1, 4, 0] = -2
        values[1, 0, 4] = -INFINITY
        self.teacher = opdc.TopK(ids, values, token_logprobs=self.token_logprobs)

    def projection(self, **changes: Any) -> opdc.Projection:
        at = self.parts
        given = {"bias": at["bias"], "adapter": (at["inputs"], at["adapter"]), **changes}
        given = {"scale": 0.25, "softcap": 3.0, **given}
        return opdc.Projection(at["hidden"], at["weight"], **given)

    def logits(self, wide: torch.dtype) -> Tensor:
        at = {name: part.to(wide) for name, part in self.parts.items()}
        dots = at["hidden"] @ at["weight"].T + at["bias"] + at["inputs"] @ at["adapter"].T
        return 3.0 * torch.tanh(0.25 * dots / 3.0)

    def common(self, support: str, **changes: Any) -> dict[str, Any]:
        tokens = {"tokens": self.tokens} if support == "teacher+token" else {}
        weights = torch.linspace(-0.5, 1.5, 10).view(SHAPE)
        return {
            "support": support,
            "mask": ACTIVE,
            "weights": weights,
            "temperature": 1.3,
            **tokens,
            **changes,
        }

    def gradients(self, value: Tensor) -> tuple[Tensor, ...]:
        upstream = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).view(value.shape)
        return torch.autograd.grad(value, tuple(self.parts.values()), upstream)


@pytest.mark.parametrize("support", ["teacher", "teacher+token"])
@pytest.mark.parametrize("reduction", ["none", "mean", "seq_mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_gradients_and_metrics_of_all_logits(name, reduction, support):
    problem = Problem()
    common = problem.common(support, reduction=reduction, return_metrics=True)
    value, metrics = LOSSES[name](problem.projection(), problem.teacher, **common)
    expected, others = LOSSES[name](problem.logits(torch.float64), problem.teacher, **common)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-15)
    for mine, truth in zip(problem.gradients(value), problem.gradients(expected), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-15)
    assert list(metrics) == ["positions", "nonfinite_rows", "teacher_mass", "slots"]
    for metric, number in metrics.items():
        torch.testing.assert_close(number, others[metric], rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_22_gradients_are_rounded_once_to_the_dtype_of_their_tensor(dtype):
    """Autocast changes nothing."""
    problem = Problem(dtype)
    common = problem.common("teacher+token")
    with torch.autocast("cpu", torch.bfloat16):
        value = opdc.lsm(problem.projection(), problem.teacher, **common)
    found = problem.gradients(value)
    expected = opdc.lsm(problem.logits(torch.float64), problem.teacher, **common)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    double = Problem.__new__(Problem)
    double.parts = {n: p.detach().double().requires_grad_() for n, p in problem.parts.items()}
    truth = double.gradients(opdc.lsm(double.logits(torch.float64), problem.teacher, **common))
    for part, mine, exactly in zip(problem.parts.values(), found, truth, strict=True):
        assert mine.dtype == part.dtype
        rounding = torch.finfo(dtype).eps / 2 + 2e-5 * (dtype != torch.float64)
        limit = rounding * exactly.abs() + 1e-6 * exactly.abs().max()
        assert ((mine.double() - exactly).abs() <= limit + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sparse_gradient_holds_the_rows_of_the_dense_one(dtype):
    problem = Problem(dtype)
    common = problem.common("teacher+token")
    dense = problem.gradients(opdc.lsm(problem.projection(), problem.teacher, **common))
    projection = problem.projection(sparse_gradient=True)
    sparse = problem.gradients(opdc.lsm(projection, problem.teacher, **common))
    for name, one, other in zip(problem.parts, dense, sparse, strict=True):
        assert other.is_sparse == (name in ("weight", "bias", "adapter"))
        if other.is_sparse:
            assert other.is_coalesced()
            assert other.dtype == one.dtype
            assert other._nnz() < IDS
            other = other.to_dense()
        assert torch.equal(one, other), name
    embedding = problem.parts["weight"]
    opdc.lsm(projection, problem.teacher, **common).backward()
    assert embedding.grad.is_sparse
    torch.optim.SGD([embedding], lr=0.1).step()


def test_an_optimizer_of_a_large_head_takes_the_dense_gradient():
    """Its memory is untouched where no id is named, and no other than any tensor's."""
    weight = torch.randn(3000, 128, requires_grad=True)
    hidden = torch.randn(4, 128)
    ids = torch.tensor([[5, 2999], [0, 5], [7, 8], [2999, 0]])
    teacher = opdc.TopK(ids, torch.full((4, 2), -1.0) - torch.rand(4, 2))
    for _ in range(2):  # the second adds to the first
        opdc.lsm(opdc.Projection(hidden, weight), teacher).backward()
    once = torch.autograd.grad(opdc.lsm(hidden @ weight.T, teacher), weight)[0]
    torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-4, atol=1e-5)
    torch.optim.AdamW([weight]).step()
    weight.grad.zero_()
    assert (weight.grad == 0).all()


def test_hazard_05_inactive_positions_are_never_read():
    problem = Problem()
    common = problem.common("teacher+token")
    value = opdc.lsm(problem.projection(), problem.teacher, **common)
    expected = value, problem.gradients(value)
    with torch.no_grad():
        for name in ("hidden", "inputs"):
            problem.parts[name][~ACTIVE] = math.nan
    problem.teacher.ids[~ACTIVE] = 10**6
    problem.teacher.logprobs[~ACTIVE] = math.nan
    problem.tokens[~ACTIVE] = -1
    value = opdc.lsm(problem.projection(), problem.teacher, **common)
    found = problem.gradients(value)
    assert torch.equal(value, expected[0])
    assert same(found, expected[1])
    assert (found[0][~ACTIVE] == 0).all()


def test_rows_of_the_head_that_no_id_names_are_never_read():
    """Nor that of an id to which the teacher gives no mass."""
    problem = Problem()
    common = problem.common("teacher")
    ids, has_mass = problem.teacher.ids, problem.teacher.logprobs > -INFINITY
    unread = torch.ones(IDS + 1, dtype=torch.bool)
    unread[ids[ACTIVE[..., None] & has_mass].clamp(min=-1)] = False
    unread = unread[:-1].nonzero()[:, 0]
    assert ACTIVE[1, 0]
    assert not has_mass[1, 0, 4]
    ids[1, 0, 4] = unread[0]
    expected = opdc.lsm(problem.projection(), problem.teacher, **common)
    with torch.no_grad():
        for name in ("weight", "bias", "adapter"):
            problem.parts[name][unread] = math.nan
    value = opdc.lsm(problem.projection(), problem.teacher, **common)
    assert torch.equal(value, expected)
    assert all(gradient.isfinite().all() for gradient in problem.gradients(value))


def test_hazard_04_an_undefined_position_spoils_its_own_gradient_and_the_heads():
    problem = Problem()
    with torch.no_grad():
        problem.parts["hidden"][0, 3, 4] = math.nan
    problem.teacher.ids[1, 4] = -1  # no id at all: no distribution
    common = problem.common("teacher", reduction="none")
    value = opdc.lsm(problem.projection(), problem.teacher, **common)
    expected = opdc.lsm(problem.logits(torch.float64), problem.teacher, **common)
    undefined = torch.zeros(SHAPE, dtype=torch.bool)
    undefined[0, 3] = undefined[1, 4] = True
    assert torch.equal(value.isnan(), undefined)
    assert torch.equal(expected.isnan(), undefined)
    d_hidden, d_weight, *_ = problem.gradients(value)
    assert torch.equal(d_hidden.isnan().all(-1), undefined)
    assert torch.equal(d_hidden.isnan().any(-1), undefined)
    assert d_weight.isnan().any()


@pytest.mark.parametrize("how", ["masked", "num_items", "no position"])
def test_hazard_06_nothing_active(how):
    problem = Problem()
    with torch.no_grad():
        problem.parts["hidden"].fill_(math.nan)
    teacher, projection = problem.teacher, problem.projection()
    common: dict[str, Any] = {"mask": torch.zeros(SHAPE)} if how == "masked" else {}
    if how == "num_items":
        common = {"num_items": 0}
    if how == "no position":
        teacher = opdc.TopK(teacher.ids[:, :0], teacher.logprobs[:, :0])
        inputs, adapter = projection.adapter
        projection = projection._replace(
            hidden=projection.hidden[:, :0], adapter=(inputs[:, :0], adapter)
        )
    value = opdc.lsm(projection, teacher, **common)
    assert value == 0
    assert all((gradient == 0).all() for gradient in problem.gradients(value))


def test_the_head_alone_or_the_hidden_states_alone():
    problem = Problem()
    common = problem.common("teacher")
    every = problem.gradients(opdc.lsm(problem.projection(), problem.teacher, **common))
    for name, gradient in zip(problem.parts, every, strict=True):
        for part in problem.parts.values():
            part.requires_grad_(False)
        part = problem.parts[name].requires_grad_()
        value = opdc.lsm(problem.projection(), problem.teacher, **common)
        assert torch.equal(torch.autograd.grad(value, part)[0] * 0.5, gradient)
    problem.parts["adapter"].requires_grad_(False)
    assert not opdc.lsm(problem.projection(), problem.teacher, **common).requires_grad


def test_finite_differences():
    problem = Problem()
    small = {name: part.detach()[..., :4] for name, part in problem.parts.items()}
    small["bias"] = problem.parts["bias"].detach()
    inputs = tuple(part.clone().requires_grad_() for part in small.values())

    def loss(hidden, weight, bias, more, adapter):
        projection = opdc.Projection(hidden, weight, bias, 0.5, 2.0, (more, adapter))
        return opdc.lsm(projection, problem.teacher, **problem.common("teacher+token"))

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_torch_func():
    problem = Problem(requires=False)
    hidden, weight = problem.parts["hidden"], problem.parts["weight"]

    def loss(hidden, weight):
        return opdc.jsd(opdc.Projection(hidden, weight), problem.teacher, normalize="both")

    found = torch.func.grad(loss, argnums=(0, 1))(hidden, weight)
    leaves = [part.clone().requires_grad_() for part in (hidden, weight)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert same(found, expected)
    batch = torch.stack([hidden + 1, hidden])
    every = torch.func.vmap(torch.func.grad(loss), (0, None))(batch, weight)
    assert torch.equal(every[1], expected[0])


def test_hazard_20_second_derivatives_are_refused():
    problem = Problem()
    value = opdc.lsm(problem.projection(), problem.teacher)
    gradient = torch.autograd.grad(value, problem.parts["weight"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


def test_compile():
    torch._dynamo.reset()
    problem = Problem()
    common = problem.common("teacher+token")

    def loss(scale):
        return opdc.lsm(problem.projection(scale=scale), problem.teacher, **common)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = loss(0.25)
    assert torch.equal(compiled(0.25), expected)
    assert same(problem.gradients(compiled(0.25)), problem.gradients(expected))
    torch._dynamo.reset()


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an id beyond": ({"ids": lambda x: x + IDS}, {}, r"teacher.ids: got id"),
    "an id beyond valid_vocab": ({}, {"valid_vocab": 3}, r"teacher.ids: got id"),
    "an id twice": ({"ids": torch.zeros_like}, {}, r"teacher.ids: got id 0 twice at position 0"),
    "too much mass": ({"logprobs": torch.zeros_like}, {}, r"teacher.logprobs: got a mass"),
    "one slot": (
        {"ids": lambda x: x[..., :1], "logprobs": lambda x: x[..., :1]},
        {},
        r"k: got 1 with normalize",
    ),
    "other positions": ({"ids": lambda x: x[:1]}, {}, r"teacher.ids: got shape"),
    "ids of floats": ({"ids": Tensor.float}, {}, r"teacher.ids: got dtype float32"),
    "a token beyond": (
        {},
        {"support": "teacher+token", "tokens": torch.full(SHAPE, IDS)},
        r"tokens: got id 23",
    ),
    "no tokens": ({}, {"support": "teacher+token"}, r"tokens: got None"),
    "mask of another shape": ({}, {"mask": ACTIVE[:, :1]}, r"mask: got shape"),
    "weights of another shape": ({}, {"weights": torch.ones(5)}, r"weights: got shape"),
    "temperature": ({}, {"temperature": 0.0}, r"temperature"),
    "valid_vocab": ({}, {"valid_vocab": IDS + 1}, r"valid_vocab"),
    "num_items": ({}, {"num_items": -1}, r"num_items"),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", WRONG)
def test_hazard_08_wrong_calls_are_refused_as_with_logits(case):
    of_teacher, options, message = WRONG[case]
    problem = Problem()
    teacher = problem.teacher._replace(
        **{name: change(getattr(problem.teacher, name)) for name, change in of_teacher.items()}
    )
    for student in (problem.projection(), problem.logits(torch.float64)):
        with pytest.raises((ValueError, TypeError), match=message):
            opdc.lsm(student, teacher, **options)


def test_nothing_as_large_as_the_vocabulary_is_allocated():
    """With a sparse gradient; and of the dense one only that gradient."""
    vocabulary, size, positions = 60_000, 32, 16
    hidden = torch.randn(positions, size, requires_grad=True)
    weight = torch.randn(vocabulary, size, requires_grad=True)
    ids = torch.stack([torch.randperm(vocabulary)[:8] for _ in range(positions)])
    teacher = opdc.TopK(ids, torch.randn(positions, 8).log_softmax(-1))
    with torch.profiler.profile(profile_memory=True) as profile:
        projection = opdc.Projection(hidden, weight, sparse_gradient=True)
        torch.autograd.grad(opdc.lsm(projection, teacher), (hidden, weight))
    allocated = [event.self_cpu_memory_usage for event in profile.key_averages()]
    assert sum(max(size, 0) for size in allocated) < positions * vocabulary * 4 // 4
