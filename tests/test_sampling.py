"""opdc.sample: the law of what it draws, the edges of top-k, top-p and u, rows of every kind."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import opdc
import oracle
import oracle_sampling
from judge import FP64_BOUND
from regimes import REGIMES, make_inputs
from test_build import LEVELS, on_linux, output_of, runnable_levels
from test_memory_and_threads import huge

INFINITY = math.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One draw of each kind that a user asks for. No regime has an id of exactly 0.95.
TRUNCATIONS = (
    {},
    {"top_k": 5},
    {"top_p": 0.95},
    {"top_k": 7, "top_p": 0.6},
    {"temperature": 0.7, "top_p": 0.5},
    {"temperature": 1.3, "top_k": 20},
)
BELOW_ONE = math.nextafter(1.0, 0.0)  # 1 − 2⁻⁵³
EDGES = (0.0, 5e-324, 2.0**-53, 2.0**-32, 0.5, 1 - 2.0**-24, 1 - 2.0**-32, BELOW_ONE)
# What fp32 knows of a cumulative mass: a few units in the last place of 1.
MASS_SLACK = {torch.float32: 1e-6, torch.float64: FP64_BOUND}


def numbers_of(*logits: Tensor) -> torch.dtype:
    wide = any(x.dtype == torch.float64 for x in logits)
    return torch.float64 if wide else torch.float32


def log_slack(dtype: torch.dtype, *logs: Tensor) -> Tensor:
    """A few units in the last place of log-probs that were made from these."""
    unit = FP64_BOUND if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    return unit * (1 + sum(x.abs() for x in logs))


def assert_drawn(law: Tensor, token: int, u: float, slack: float) -> None:
    """`token` is what u draws from the log-probs `law`, up to `slack` of cumulative mass."""
    mass = law.exp()
    cumulative = mass.cumsum(-1) / mass.sum()
    assert law[token] > -INFINITY, f"id {token} is impossible"
    start = float(cumulative[token - 1]) if token else 0.0
    assert start - slack <= u <= float(cumulative[token]) + slack, (start, u, cumulative[token])


def is_decided(law: Tensor, top_k: int | None = None, top_p: float = 1.0) -> bool:
    """Whether the set of top-p is the same for every mass within fp32 of `top_p`."""
    near = (
        oracle_sampling.truncated(law, law, top_k, p) > -INFINITY
        for p in (top_p * (1 - 1e-5), min(1.0, top_p * (1 + 1e-5)))
    )
    return torch.equal(*near)


def check(logits: Tensor, uniforms: Tensor | None = None, **options) -> opdc.Sample:
    """One draw a row: the form of the answer, the token, and both log-probs of that token."""
    shape = logits.shape[:-1]
    if uniforms is None:
        uniforms = torch.rand(shape, dtype=torch.float64)
    kept, kept_uniforms = logits.clone(), uniforms.clone()
    result = opdc.sample(logits, uniforms=uniforms, **options)
    assert isinstance(result, opdc.Sample)
    dtype = numbers_of(logits)
    assert result.tokens.dtype == torch.int64
    assert result.logprobs.dtype == result.untruncated_logprobs.dtype == dtype
    assert all(x.shape == shape and not x.requires_grad for x in result)
    top_k, top_p = options.get("top_k"), options.get("top_p", 1.0)
    size = options.get("valid_vocab") or logits.shape[-1]
    laws = oracle_sampling.log_law(logits, options.get("temperature", 1.0), size)
    rows = zip(
        logits[..., :size].reshape(-1, size),
        laws.reshape(-1, size),
        uniforms.reshape(-1).tolist(),
        *(x.reshape(-1) for x in result),
        strict=True,
    )
    for values, law, u, token, logprob, untruncated in rows:
        if law.isnan().any():
            assert token == -1
            assert logprob.isnan()
            assert untruncated.isnan()
            continue
        cut = oracle_sampling.truncated(law, values, top_k, top_p)
        assert_drawn(cut, int(token), u, MASS_SLACK[dtype])
        limit = log_slack(dtype, law[token], cut[token])
        assert abs(logprob.double() - cut[token]) <= limit
        assert abs(untruncated.double() - law[token]) <= limit
    torch.testing.assert_close(logits, kept, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(uniforms, kept_uniforms, rtol=0, atol=0)
    return result


def same(first: tuple, second: tuple, index=...) -> bool:
    """Bits, NaN included."""
    return all(
        torch.equal(a[index].nan_to_num(-7e7), b.nan_to_num(-7e7))
        for a, b in zip(first, second, strict=True)
    )


def interval_lengths(
    tokens_at: Callable[[Tensor], Tensor], vocabulary: int, *leading: int
) -> Tensor:
    """The exact law of a draw by inverse CDF, from the function itself.

    The token grows with u, so that the u that draw an id are an interval, whose ends a bisection
    finds to 2⁻⁴⁴. `tokens_at` takes uniforms `(*leading, vocabulary)`.
    """
    ids = torch.arange(vocabulary)
    low = torch.zeros(*leading, vocabulary, dtype=torch.float64)
    high = torch.ones_like(low)
    for _ in range(44):
        middle = (low + high) / 2
        below = tokens_at(middle) <= ids
        low, high = middle.where(below, low), high.where(below, middle)
    return high.diff(prepend=torch.zeros_like(high[..., :1]))


def chi_square(tokens: Tensor, law: Tensor, weights: Tensor | None = None) -> float:
    """Pearson's statistic of the counts; no draw may be of an id without mass."""
    count = torch.bincount(tokens.reshape(-1), weights, minlength=len(law)).double()
    possible = law > 0
    assert (count[~possible] == 0).all()
    wanted = count.sum() * law[possible]
    return float(((count[possible] - wanted).square() / wanted).sum())


def rare(freedom: int, deviations: float = 3.7) -> float:
    """What chi-square exceeds once in 10⁴ (Wilson and Hilferty)."""
    share = 2 / (9 * freedom)
    return freedom * (1 - share + deviations * math.sqrt(share)) ** 3


# ----------------------------------------------------------------- the law


def test_worked_example():
    """p = (0, 1/2, 1/4, 1/4): cumulative 0, 1/2, 3/4, 1. Of top-p 0.6 the ids 1 and 2 are left, of
    the masses 2/3 and 1/3."""
    logits = torch.tensor([0.0, 0.5, 0.25, 0.25]).log() + 3.0
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.999])
    result = opdc.sample(logits.expand(6, 4), uniforms=uniforms)
    assert result.tokens.tolist() == [1, 1, 2, 2, 3, 3]
    wanted = torch.tensor([-0.6931, -0.6931, -1.3863, -1.3863, -1.3863, -1.3863])
    torch.testing.assert_close(result.logprobs, wanted, rtol=0, atol=1e-4)
    assert torch.equal(result.logprobs, result.untruncated_logprobs)
    cut = opdc.sample(logits.expand(6, 4), top_p=0.6, uniforms=uniforms)
    assert cut.tokens.tolist() == [1, 1, 1, 2, 2, 2]
    wanted = torch.tensor([-0.4055, -0.4055, -0.4055, -1.0986, -1.0986, -1.0986])
    torch.testing.assert_close(cut.logprobs, wanted, rtol=0, atol=1e-4)
    wanted = torch.tensor([-0.6931, -0.6931, -0.6931, -1.3863, -1.3863, -1.3863])
    torch.testing.assert_close(cut.untruncated_logprobs, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_every_id_is_drawn_by_an_interval_as_long_as_its_probability(options, dtype):
    logits = torch.tensor([-INFINITY, 0.3, 2.0, -1.0, -INFINITY, 1.5, -9.0, 0.9, -0.2, -INFINITY])
    logits = logits.to(dtype)

    def tokens_at(uniforms):
        return opdc.sample(logits.expand(10, 10), uniforms=uniforms, **options).tokens

    law = oracle_sampling.log_law(logits, options.get("temperature", 1.0))
    cut = oracle_sampling.truncated(law, logits, options.get("top_k"), options.get("top_p", 1.0))
    lengths = interval_lengths(tokens_at, 10)
    assert (lengths - cut.exp()).abs().max() < MASS_SLACK[numbers_of(logits)]
    assert (lengths[cut == -INFINITY] <= 2.0**-43).all()


MILLION = 1_000_000


def test_a_million_draws_on_a_grid_have_the_law():
    logits = torch.tensor([0.3, 2.0, -INFINITY, -3.0, 1.5, -1.0, 0.9, -0.2])
    law = oracle_sampling.log_law(logits).exp()
    grid = (torch.arange(MILLION, dtype=torch.float64) + 0.5) / MILLION
    tokens = opdc.sample(logits.expand(MILLION, 8), uniforms=grid).tokens
    # An interval of length μ holds Nμ points of the grid, give or take one at each end.
    counts = torch.bincount(tokens, minlength=8)
    assert ((counts - MILLION * law).abs() <= 2 + MILLION * MASS_SLACK[torch.float32]).all()
    assert chi_square(tokens, law) < 0.1


def test_a_million_random_draws_have_the_law():
    logits = torch.tensor([0.3, 2.0, -INFINITY, -3.0, 1.5, -1.0, 0.9, -0.2])
    law = oracle_sampling.truncated(oracle_sampling.log_law(logits), logits, 6, 0.9).exp()
    generator = torch.Generator().manual_seed(7)
    rows = logits.expand(MILLION, 8)
    tokens = opdc.sample(rows, generator=generator, top_k=6, top_p=0.9).tokens
    assert chi_square(tokens, law) < rare(int((law > 0).sum()) - 1)


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_regime(regime, options):
    for vocabulary, dtype in ((300, torch.float32), (300, torch.float64), (1500, torch.bfloat16)):
        logits = make_inputs(regime, (3,), vocabulary, dtype).student
        check(logits, **options)


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 127, 128, 129, 1023, 1024, 1025, 5003])
def test_vocabulary_size(vocabulary):
    logits = make_inputs("realistic", (3,), vocabulary).student
    for options in TRUNCATIONS:
        for u in (0.0, 0.37, 0.93, BELOW_ONE):
            check(logits, torch.full((3,), u, dtype=torch.float64), **options)


LARGE = {
    "flat": lambda v: 0.1 * torch.randn(1, v),
    "constant": lambda v: torch.full((1, v), 3.0),
    "realistic": lambda v: make_inputs("realistic", (1,), v).student,
    "peaked": lambda v: make_inputs("peaked_0.99", (1,), v).student,
    "ascending": lambda v: torch.linspace(-10, 10, v)[None],
    "one id, the last": lambda v: torch.where(torch.arange(v) == v - 1, 100.0, torch.zeros(1, v)),
}


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 9000, "top_p": 0.3}], ids=str
)
@pytest.mark.parametrize("shape", LARGE)
def test_vocabulary_of_a_language_model(shape, options):
    """The token on both sides of the boundaries of cumulative mass, and how much mass is kept."""
    logits = LARGE[shape](151_936)
    law = oracle_sampling.log_law(logits)[0]
    cut = oracle_sampling.truncated(law, logits[0], options.get("top_k"), options.get("top_p", 1.0))
    mass = cut.exp()
    cumulative = mass.cumsum(-1)
    places = torch.searchsorted(cumulative, torch.linspace(0, 0.999, 9, dtype=torch.float64))
    ends = cumulative[places].clamp(max=BELOW_ONE)
    extremes = torch.tensor([0.0, BELOW_ONE], dtype=torch.float64)
    uniforms = torch.cat([extremes, ends, ends - mass[places] / 2])
    rows = logits.expand(len(uniforms), -1)
    result = opdc.sample(rows, uniforms=uniforms, **options)
    for token, u in zip(result.tokens.tolist(), uniforms.tolist(), strict=True):
        assert_drawn(cut, token, u, MASS_SLACK[torch.float32])
    kept = (result.untruncated_logprobs - result.logprobs).double().exp()
    wanted = (law - cut)[result.tokens].exp()
    torch.testing.assert_close(kept, wanted, rtol=1e-5, atol=0)
    limit = log_slack(torch.float32, law[result.tokens])
    assert ((result.untruncated_logprobs - law[result.tokens]).abs() <= limit).all()


@given(
    row=st.lists(
        st.one_of(st.floats(-40, 40, width=16), st.sampled_from([-INFINITY, 0.0, 1.0])),
        min_size=1,
        max_size=60,
    ),
    u=st.floats(0, 1, exclude_max=True),
    top_k=st.none() | st.integers(1, 70),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-3, 1e-30]) | st.floats(1e-6, 1),
    temperature=st.sampled_from([1.0, 0.3, 2.5]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_row(row, u, top_k, top_p, temperature, dtype):
    logits = torch.tensor([row], dtype=dtype)
    law = oracle_sampling.log_law(logits, temperature)[0]
    assume(law.isnan().any() or is_decided(law, top_k, top_p))
    options = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    check(logits, torch.tensor([u], dtype=torch.float64), **options)


@given(
    row=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    uniforms=st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=20),
    options=st.sampled_from(TRUNCATIONS),
)
def test_the_token_grows_with_u(row, uniforms, options):
    rows = torch.tensor(row).expand(len(uniforms), -1)
    ordered = torch.tensor(sorted(uniforms), dtype=torch.float64)
    tokens = opdc.sample(rows, uniforms=ordered, **options).tokens
    assert (tokens.diff() >= 0).all()


# ----------------------------------------------------------------- top-p and top-k


def kept_ids(logits: Tensor, **options) -> list[int]:
    """The ids that a fine grid of uniforms draws."""
    grid = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    drawn = opdc.sample(logits.expand(4096, -1), uniforms=grid, **options)
    ids = drawn.tokens.unique().tolist()
    # The mass of the set, from any of its ids: untruncated over truncated probability.
    mass = (drawn.untruncated_logprobs - drawn.logprobs).double().exp()
    law = oracle_sampling.log_law(logits, options.get("temperature", 1.0))
    assert (mass - law[ids].exp().sum()).abs().max() < 2e-6
    return ids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 4, 8, 64, 1024, 4096])
def test_hazard_14_a_cumulative_mass_equal_to_top_p_is_enough(vocabulary, dtype):
    """Equal ids: each has exactly 1/V, and n of them exactly n/V."""
    rows = torch.full((vocabulary,), 1.5, dtype=dtype).expand(2, vocabulary)
    ends = torch.tensor([0.0, BELOW_ONE], dtype=torch.float64)
    for count in {1, vocabulary // 4, vocabulary // 2, vocabulary - 1} - {0}:
        share = count / vocabulary
        for top_p, kept in (
            (share, count),
            (math.nextafter(share, 0.0), count),
            (math.nextafter(share, 1.0), count + 1),
            (share - 0.5 / vocabulary, count),
            (share + 0.5 / vocabulary, count + 1),
        ):
            drawn = opdc.sample(rows, top_p=top_p, uniforms=ends)
            assert drawn.tokens.tolist() == [0, kept - 1]
            wanted = torch.full((2,), -math.log(kept), dtype=drawn.logprobs.dtype)
            torch.testing.assert_close(drawn.logprobs, wanted, rtol=1e-6, atol=1e-7)


def test_hazard_14_exact_fractions_among_different_masses():
    """(16, 8, 4, 2, 1, 1)/32 in a shuffled order, in fp64 and one fp32 unit off the cut."""
    law = torch.tensor([2.0, 16.0, 1.0, 4.0, 1.0, 8.0], dtype=torch.float64) / 32
    best_first = [1, 5, 3, 0, 2, 4]
    for dtype in (torch.float64, torch.float32):
        logits = law.log().to(dtype)
        for count, mass in enumerate((16, 24, 28, 30, 31), start=1):
            wanted = sorted(best_first[:count])
            assert kept_ids(logits, top_p=mass / 32 - 1e-6) == wanted
            assert kept_ids(logits, top_p=mass / 32 + 1e-6) == sorted(best_first[: count + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hazard_14_exact_fractions_at_the_end_of_a_digit(dtype):
    """At T = 1 / log 2 a logit less by 1 has half the mass, exactly: (4, 2, 1, 1)/8."""
    logits = torch.tensor([-1.0, 0.0, -2.0, -2.0], dtype=dtype)
    for top_p, wanted in ((0.5, [1]), (0.75, [0, 1]), (0.875, [0, 1, 2])):
        assert kept_ids(logits, top_p=top_p, temperature=1 / math.log(2)) == wanted


def test_hazard_14_top_p_of_1_keeps_ids_of_next_to_no_mass():
    """Mass that fp32 does not see in a sum near 1, drawn from the side of u = 0."""
    for small in (-16.0, -40.0, -80.0):
        logits = torch.tensor([small, 0.0, -INFINITY])
        tokens = opdc.sample(logits, top_p=1.0, uniforms=torch.tensor(0.0)).tokens
        assert tokens == 0
        assert opdc.sample(logits, top_p=0.999999, uniforms=torch.tensor(0.0)).tokens == 1


@pytest.mark.parametrize("top_p", [1e-30, 1e-300, 5e-324, 1e-8])
def test_hazard_14_a_tiny_top_p_is_greedy(top_p):
    logits = make_inputs("realistic", (5,), 1100).student
    uniforms = torch.tensor([0.0, 0.3, 0.9, 0.999, BELOW_ONE], dtype=torch.float64)
    result = opdc.sample(logits, top_p=top_p, uniforms=uniforms)
    assert torch.equal(result.tokens, logits.argmax(-1))
    assert (result.logprobs == 0).all()


def test_hazard_14_top_p_counts_the_mass_within_top_k():
    """Ten equal ids; of 4 of them, 0.5 of the mass is 2: not 5, which hold 0.5 of everything."""
    logits = torch.zeros(10)
    assert kept_ids(logits, top_k=4, top_p=0.5) == [0, 1]
    assert kept_ids(logits, top_k=4, top_p=0.51) == [0, 1, 2]
    assert kept_ids(logits, top_p=0.5) == [0, 1, 2, 3, 4]


def test_hazard_13_ties_go_to_the_lower_id():
    logits = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, -0.0, 0.0])
    assert kept_ids(logits, top_k=1) == [1]
    assert kept_ids(logits, top_k=3) == [0, 1, 3]
    assert kept_ids(logits, top_k=4) == [0, 1, 2, 3]
    assert kept_ids(logits, top_k=6) == [0, 1, 2, 3, 4, 5]
    mass = logits.double().softmax(-1)
    assert kept_ids(logits, top_p=float(mass[[1, 3]].sum() + mass[0] / 2)) == [0, 1, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_13_zeros_of_both_signs_are_equal(dtype):
    for zeros in ([0.0] * 7 + [-0.0], [-0.0, 0.0] * 4, [-0.0] + [0.0] * 7, [-0.0] * 8):
        for logits in (torch.tensor(zeros, dtype=dtype), torch.tensor([*zeros, -1.0]).to(dtype)):
            assert kept_ids(logits, top_k=3) == [0, 1, 2]
            assert kept_ids(logits, top_p=0.3) == [0, 1, 2]
            assert kept_ids(logits, top_p=0.05) == [0]
            assert kept_ids(logits, top_k=6, top_p=0.6) == [0, 1, 2, 3]


@given(
    values=st.lists(st.sampled_from([-INFINITY, -1.0, 0.0, 0.5]), min_size=1, max_size=200),
    top_k=st.integers(1, 210),
    dtype=st.sampled_from(DTYPES),
)
def test_hazard_13_exactly_k_ids_are_left(values, top_k, dtype):
    logits = torch.tensor(values, dtype=dtype)
    assume((logits > -INFINITY).any())
    wanted = sorted(oracle.ranking(logits, top_k))
    assert kept_ids(logits, top_k=top_k) == wanted


def test_hazard_32_more_top_k_than_ids_keeps_them_all():
    logits = torch.tensor([[1.0, -INFINITY, 0.5, -1.0]])
    everything = opdc.sample(logits.expand(9, 4), uniforms=torch.arange(9) / 9.0)
    for top_k in (3, 4, 5, 2**31, 2**62):
        again = opdc.sample(logits.expand(9, 4), top_k=top_k, uniforms=torch.arange(9) / 9.0)
        assert same(again, everything)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top_k_of_1_is_greedy_with_the_log_prob_0(dtype):
    logits = make_inputs("far", (6,), 700, dtype).student.round()
    result = opdc.sample(logits, top_k=1, temperature=0.8)
    assert torch.equal(result.tokens, opdc.topk(logits, 1).ids[:, 0])
    assert (result.logprobs == 0).all()


@pytest.mark.parametrize("offset", [0.0, -3e3, 1e6])
def test_hazard_13_and_09_neighbouring_floats_are_no_ties(offset):
    """The higher id is larger by one unit in the last place, which no exp sees at 1e6."""
    base = torch.tensor(offset)
    logits = torch.stack([base, torch.nextafter(base, torch.tensor(INFINITY))])
    for temperature in (0.1, 1.0, 10.0):
        assert opdc.sample(logits, top_k=1, temperature=temperature).tokens == 1
        assert opdc.sample(logits, top_p=1e-3, temperature=temperature).tokens == 1


# ----------------------------------------------------------------- u


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("vocabulary", [40, 1500])
def test_hazard_15_no_u_draws_an_impossible_id(vocabulary, options, dtype):
    """Masked ids at both ends and between, also where the mass near them underflows."""
    uniforms = torch.tensor(EDGES, dtype=torch.float64)
    rows = make_inputs("far", (3,), vocabulary, dtype).student
    rows[:, :7] = rows[:, -9:] = rows[:, vocabulary // 2] = -INFINITY
    rows[1, 7] = rows[1, -10] = -600.0
    rows[2, 8:-10] = -INFINITY
    for row in rows:
        result = check(row.expand(len(EDGES), -1), uniforms, **options)
        assert (row[result.tokens] > -INFINITY).all()
        assert result.logprobs.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_15_u_of_0_draws_the_first_possible_id(dtype):
    """Even one whose mass is lost beside the others: μ > 0 there."""
    logits = torch.tensor([-INFINITY, -10.0, -INFINITY, 50.0, 0.0, -INFINITY], dtype=dtype)
    assert opdc.sample(logits, uniforms=torch.tensor(0.0)).tokens == 1
    assert opdc.sample(logits, top_k=2, uniforms=torch.tensor(0.0)).tokens == 3
    uniforms = torch.tensor(BELOW_ONE, dtype=torch.float64)
    assert opdc.sample(logits, top_k=2, uniforms=uniforms).tokens in (3, 4)


def test_hazard_15_a_single_possible_id_is_always_drawn():
    for place in (0, 5, 1023, 1024, 2999):
        logits = torch.full((3000,), -INFINITY)
        logits[place] = -7.0
        for options in TRUNCATIONS:
            result = opdc.sample(
                logits.expand(len(EDGES), -1),
                uniforms=torch.tensor(EDGES, dtype=torch.float64),
                **options,
            )
            assert (result.tokens == place).all()
            assert (result.logprobs == 0).all()
            assert (result.untruncated_logprobs == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uniforms_of_any_floating_dtype_are_the_numbers_they_hold(dtype):
    logits = make_inputs("far", (50,), 300).student
    uniforms = torch.rand(50).clamp(max=0.99).to(dtype)
    expected = opdc.sample(logits, uniforms=uniforms.double())
    assert same(opdc.sample(logits, uniforms=uniforms), expected)


def test_a_uniform_is_read_to_its_last_bit():
    """The boundary at 1/2 of two equal ids, which fp32 cannot tell from its neighbours."""
    logits = torch.zeros(3, 2, dtype=torch.float64)
    uniforms = torch.tensor([0.5 - 2.0**-53, 0.5, 0.5 + 2.0**-53], dtype=torch.float64)
    for rows in (logits, logits.float()):
        assert opdc.sample(rows, uniforms=uniforms).tokens.tolist() == [0, 1, 1]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_a_generator_gives_one_float64_uniform_a_row(shape):
    logits = torch.randn(*shape, 30)
    uniforms = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    expected = opdc.sample(logits, uniforms=uniforms, top_p=0.8)
    assert same(opdc.sample(logits, generator=generator, top_p=0.8), expected)
    torch.manual_seed(5)
    assert same(opdc.sample(logits, top_p=0.8), expected)
    following = torch.Generator().manual_seed(5)
    torch.rand(shape, dtype=torch.float64, generator=following)
    assert torch.equal(generator.get_state(), following.get_state())


# ----------------------------------------------------------------- rows that say nothing


POISONS = {
    "nan": lambda row: row.__setitem__(17, math.nan),
    "nan at the end": lambda row: row.__setitem__(-1, math.nan),
    "plus infinity": lambda row: row.__setitem__(0, INFINITY),
    "nothing possible": lambda row: row.fill_(-INFINITY),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", TRUNCATIONS[:4], ids=str)
def test_hazard_04_an_undefined_row_draws_nothing_and_is_alone(options, dtype, poison):
    logits = make_inputs("far", (4,), 1100, dtype).student
    uniforms = torch.rand(4, dtype=torch.float64)
    usual = opdc.sample(logits, uniforms=uniforms, **options)
    POISONS[poison](logits[1])
    result = check(logits, uniforms, **options)
    assert result.tokens[1] == -1
    good = torch.tensor([0, 2, 3])
    assert same(tuple(x[good] for x in result), tuple(x[good] for x in usual))


def test_hazard_16_and_04_what_lies_beyond_valid_vocab_is_not_read():
    short = make_inputs("far", (3,), 257).student
    uniforms = torch.tensor([0.0, 0.6, BELOW_ONE], dtype=torch.float64)
    for padding in (0.0, 500.0, math.nan, INFINITY, -INFINITY):
        padded = torch.cat([short, torch.full((3, 30), padding)], -1)
        for options in TRUNCATIONS:
            result = check(padded, uniforms, valid_vocab=257, **options)
            assert same(result, opdc.sample(short, uniforms=uniforms, **options))


# ----------------------------------------------------------------- layouts, company, threads


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0), (0, 3)], ids=str)
def test_hazard_32_any_leading_shape(shape):
    for options in TRUNCATIONS:
        check(torch.randn(*shape, 50), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_32_a_vocabulary_of_one(dtype):
    logits = torch.tensor([[3.0], [-1e4], [-INFINITY], [math.nan]], dtype=dtype)
    for options in TRUNCATIONS:
        result = check(logits, **options)
        assert result.tokens.tolist() == [0, 0, -1, -1]
        assert result.logprobs[:2].tolist() == [0.0, 0.0]


def layouts(tensor: Tensor) -> Iterator[Tensor]:
    """The same numbers `(rows, columns, V)` in other places and orders of memory."""
    for offset in (1, 2, 3, 7, 15, 31, 63):
        buffer = torch.full((tensor.numel() + offset,), math.nan, dtype=tensor.dtype)
        yield buffer[offset:].view(tensor.shape).copy_(tensor)
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan, dtype=tensor.dtype)
    yield wide[..., 1:-2].copy_(tensor)
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield tensor.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", TRUNCATIONS[:4], ids=str)
def test_hazard_17_every_layout(options, dtype):
    logits = make_inputs("far", (3, 4), 131, dtype).student
    uniforms = torch.rand(3, 4, dtype=torch.float64)
    usual = opdc.sample(logits, uniforms=uniforms, **options)
    for moved in layouts(logits):
        assert same(opdc.sample(moved, uniforms=uniforms, **options), usual)
    strange = uniforms.repeat_interleave(3, 1)[:, ::3], uniforms.t().contiguous().t()
    for moved in strange:
        assert same(opdc.sample(logits, uniforms=moved, **options), usual)
    shared = logits[:1, :1].expand(3, 4, 131)
    expected = opdc.sample(shared.clone(), uniforms=uniforms, **options)
    assert same(opdc.sample(shared, uniforms=uniforms, **options), expected)
    one = uniforms[:1, :1].expand(3, 4)
    expected = opdc.sample(logits, uniforms=one.clone(), **options)
    assert same(opdc.sample(logits, uniforms=one, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hazard_01_offsets_beyond_32_bits(dtype):
    rows, vocabulary, stride = 3, 1000, 2**31 + 64
    memory = huge((rows - 1) * stride + vocabulary, dtype)
    logits = memory.as_strided((rows, vocabulary), (stride, 1))
    dense = torch.randn(rows, vocabulary).to(dtype)
    logits.copy_(dense)
    uniforms = torch.rand(rows)
    for options in TRUNCATIONS[:4]:
        expected = opdc.sample(dense, uniforms=uniforms, **options)
        assert same(opdc.sample(logits, uniforms=uniforms, **options), expected)


@pytest.mark.parametrize("options", TRUNCATIONS[:4], ids=str)
def test_hazard_28_bits_do_not_depend_on_threads_or_company(options):
    logits = make_inputs("realistic", (9,), 5003).student
    uniforms = torch.rand(9, dtype=torch.float64)
    usual = opdc.sample(logits, uniforms=uniforms, **options)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert same(opdc.sample(logits, uniforms=uniforms, **options), usual)
    torch.set_num_threads(1)
    order = torch.randperm(9)
    moved = opdc.sample(logits[order], uniforms=uniforms[order], **options)
    assert same(usual, moved, order)
    for part in (slice(0, 4), slice(4, 9), slice(8, 9)):
        alone = opdc.sample(logits[part], uniforms=uniforms[part], **options)
        assert same(usual, alone, part)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_hazard_21_read_only_inputs():
    arrays = np.random.default_rng(0).random((2, 30)).astype(np.float32), np.array([0.2, 0.7])
    for array in arrays:
        array.setflags(write=False)
    logits, uniforms = map(torch.from_numpy, arrays)
    expected = opdc.sample(logits.clone(), uniforms=uniforms.clone())
    assert same(opdc.sample(logits, uniforms=uniforms), expected)


def test_nothing_here_receives_a_gradient():
    logits = torch.randn(2, 30, requires_grad=True)
    uniforms = torch.rand(2, requires_grad=True)
    result = opdc.sample(logits, uniforms=uniforms, top_k=3)
    assert not any(x.requires_grad for x in result)
    assert same(result, opdc.sample(logits.detach(), uniforms=uniforms.detach(), top_k=3))


def test_integers_of_other_kinds_count_too():
    logits, uniforms = torch.randn(2, 30), torch.rand(2)
    expected = opdc.sample(logits, top_k=4, top_p=1, valid_vocab=20, uniforms=uniforms)
    options = {"top_k": np.int64(4), "top_p": np.float64(1.0), "valid_vocab": np.int64(20)}
    assert same(opdc.sample(logits, uniforms=uniforms, **options), expected)


# ----------------------------------------------------------------- instruction sets


def digest_of_every_draw() -> str:
    """A hash of all samplers on rows of every kind."""
    digest = hashlib.sha256()

    def add(result):
        for tensor in result:
            numbers = tensor.double().nan_to_num(nan=-7.0).contiguous()
            digest.update(numbers.numpy().tobytes())

    for dtype in DTYPES:
        inputs = make_inputs("far", (14,), 1100, dtype)
        student, teacher = inputs.student, inputs.teacher
        student[0, 700] = teacher[1, 701] = math.nan
        student[2, 702] = teacher[3, 703] = INFINITY
        student[4], teacher[5] = -INFINITY, -INFINITY
        student[6, ::2] = teacher[7, 1::2] = -INFINITY
        student[8, ::2] = teacher[8, 1::2] = -INFINITY
        teacher[9] = student[9]
        student[10] *= 300.0
        uniforms = torch.rand(14, 2, dtype=torch.float64, generator=inputs.generator)
        drafts = torch.randint(1100, (14,), generator=inputs.generator).reshape(2, 7)
        for options in TRUNCATIONS:
            add(opdc.sample(student, uniforms=uniforms[:, 0], **options))
            for epsilon in (0.0, 1e-3, 0.5, 30.0, INFINITY):
                options = {"uniforms": uniforms[:, 0], **options}
                add(opdc.blend_sample(student, teacher, epsilon, **options))
                options["uniforms"] = uniforms.reshape(2, 7, 2)
                block = student.reshape(2, 7, -1), teacher.reshape(2, 7, -1)
                add(opdc.blend_verify(drafts, *block, epsilon, **options))
                del options["uniforms"]
        for epsilon in (0.0, 1e-3, 0.5, 30.0, INFINITY):
            add(opdc.blend(student, teacher, epsilon, eos_map=(3, 800)))
    return digest.hexdigest()


@on_linux
@pytest.mark.parametrize("level", LEVELS)
def test_hazard_29_every_instruction_set_gives_the_same_bits(level):
    if level not in runnable_levels():
        pytest.skip(f"this processor has no {level}")
    script = "import sys; sys.path.insert(0, {!r}); import test_sampling as draws; "
    script = script.format(str(Path(__file__).parent)) + "print(draws.digest_of_every_draw())"
    assert output_of(script, OPDC_ISA=level) == digest_of_every_draw()
