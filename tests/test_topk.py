"""opdc.topk: value first, then the lower id, whatever the order, ties and holes of a row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opdc
import oracle
from judge import FP64_BOUND
from regimes import REGIMES, make_inputs

INFINITY = math.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Sizes around the blocks a kernel may work in, and none that any block divides.
SIZES = (1, 2, 17, 127, 128, 129, 1000, 1023, 1024, 1025, 5003, 32003)


def check(logits: torch.Tensor, k: int, **options) -> opdc.TopK:
    """Ids exactly, log-probs to a few units in the last place, and the form of the answer."""
    kept = logits.clone()
    result = opdc.topk(logits, k, **options)
    truth = oracle.topk(logits, k, **options)
    assert isinstance(result, opdc.TopK)
    assert result.token_logprobs is result.entropy is result.tail_logprob is None
    assert result.ids.dtype == torch.int64
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert result.logprobs.dtype == wide
    assert result.ids.shape == result.logprobs.shape == (*logits.shape[:-1], k)
    assert torch.equal(result.ids, truth.ids), (result.ids, truth.ids)
    unit = FP64_BOUND if wide == torch.float64 else 4 * torch.finfo(wide).eps
    limit = unit * (1 + truth.logprobs.abs())
    finite = truth.logprobs.isfinite()
    error = (result.logprobs.double() - truth.logprobs).abs()
    assert (error[finite] <= limit[finite]).all(), (error[finite] / limit[finite]).max()
    missing = ~finite
    torch.testing.assert_close(
        result.logprobs[missing].double(), truth.logprobs[missing], equal_nan=True
    )
    torch.testing.assert_close(logits, kept, rtol=0, atol=0, equal_nan=True)
    return result


def bits(result: opdc.TopK) -> tuple[bytes, bytes]:
    return result.ids.numpy().tobytes(), result.logprobs.numpy().tobytes()


# ----------------------------------------------------------------- any K, any V, any dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_k_from_1_to_the_vocabulary(dtype):
    logits = (3 * torch.randn(3, 37)).to(dtype)
    for k in range(1, 38):
        check(logits, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", SIZES)
def test_vocabulary_size(vocabulary, dtype):
    logits = make_inputs("realistic", (2,), vocabulary, dtype).student
    for k in {1, 2, 16, 31, 32, 33, 64, 100, 1000, vocabulary}:
        if k <= vocabulary:
            check(logits, k)


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_regime(regime):
    inputs = make_inputs(regime, (4,), 1025)
    for logits in (inputs.student, inputs.teacher):
        check(logits, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabulary_of_a_language_model(dtype):
    logits = make_inputs("realistic", (2,), 151_936, dtype).student
    logits[1] = logits[1].sort().values
    check(logits, 64)


def test_a_vocabulary_of_one():
    result = check(torch.tensor([[3.0], [-1e4], [-INFINITY]]), 1)
    assert result.ids.tolist() == [[0], [0], [-1]]
    assert result.logprobs[:2].tolist() == [[0.0], [0.0]]
    assert result.logprobs[2].isnan()


def test_worked_example():
    """p = (1/8, 1/2, 1/8, 1/4, 0): log ½ = −0.6931 of id 1, log ¼ = −1.3863 of id 3, then the
    ids 0 and 2 with log ⅛ = −2.0794, the lower first; id 4 does not exist."""
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25, 0.0]).log() + 7.0
    result = opdc.topk(logits, 5)
    assert result.ids.tolist() == [1, 3, 0, 2, -1]
    wanted = torch.tensor([-0.6931, -1.3863, -2.0794, -2.0794, -INFINITY])
    torch.testing.assert_close(result.logprobs, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(50,), (1, 50), (2, 3, 50), (0, 50), (2, 0, 50)], ids=str)
def test_any_leading_shape(shape):
    check(torch.randn(shape), 7)


# ----------------------------------------------------------------- ties


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 100, 1025, 5003])
def test_hazard_13_constant_rows_give_the_first_ids(vocabulary, dtype):
    logits = torch.tensor([0.0, -7.5, 3.25, 1000.0]).to(dtype)[:, None].expand(4, vocabulary)
    for k in {1, min(vocabulary, 64), vocabulary}:
        assert (check(logits, k).ids == torch.arange(k)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [2, 3, 10, 40])
def test_hazard_13_few_different_values(values, dtype):
    """Integers in a small range: nearly every cut lies among equal values."""
    logits = torch.randint(-values, 1, (3, 1500)).to(dtype)
    for k in (1, 2, 31, 32, 64, 129, 700, 1500):
        check(logits, k)


def test_hazard_13_the_cut_lies_among_duplicates_in_every_block():
    """9 ids above, 300 equal at the cut, spread over the row: the lowest of them fill the rest."""
    for step in (1, 7, 13, 16):
        logits = torch.randn(1, 5003).clamp(max=1.0)
        equal = torch.arange(300) * step + 11
        logits[0, equal] = 2.0
        above = torch.tensor([5002, 4000, 3000, 128, 127, 1024, 1023, 11, 12])
        logits[0, above] = 3.0 + torch.arange(9.0) % 3
        for k in (9, 10, 32, 64, 300, 305):
            check(logits, k)


def test_hazard_13_negative_and_positive_zero_are_equal():
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0], [-1.0, 0.0, -0.0, 0.0, -0.0]])
    for dtype in DTYPES:
        assert check(logits.to(dtype), 4).ids.tolist() == [[1, 2, 3, 4]] * 2


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("offset", [0.0, 5.0, -3e3, 1e6])
def test_hazard_13_neighbouring_floats_are_no_ties(offset, temperature):
    """Rounded log-probs, or rounded quotients z/T, would make ties of them."""
    base = torch.full((40,), offset)
    for _ in range(3):
        base[1:] = torch.nextafter(base[1:], torch.tensor(INFINITY))
        base[20:] = torch.nextafter(base[20:], torch.tensor(INFINITY))
    logits = torch.stack([base[torch.randperm(40)] for _ in range(6)])
    for k in (1, 5, 20, 40):
        check(logits, k, temperature=temperature)


def test_hazard_13_the_smallest_numbers_are_no_ties():
    tiny = torch.tensor([0.0, 1e-45, -1e-45, 1e-40, -1e-40, 2e-38])
    assert check(tiny[None], 6).ids.tolist() == [[5, 3, 1, 0, 2, 4]]


@settings(max_examples=150)
@given(
    values=st.lists(
        st.sampled_from([-INFINITY, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 60.0]), min_size=1, max_size=90
    ),
    fraction=st.floats(0, 1),
    repeat=st.sampled_from([1, 2, 20]),
    dtype=st.sampled_from(DTYPES),
)
def test_hazard_13_any_pattern_of_ties_and_holes(values, fraction, repeat, dtype):
    logits = torch.tensor(values, dtype=dtype).repeat(repeat)[None]
    vocabulary = logits.shape[-1]
    check(logits, 1 + round(fraction * (vocabulary - 1)))


# ----------------------------------------------------------------- adversarial order


def organ_pipe(vocabulary):
    return -(torch.arange(vocabulary) - vocabulary / 2).abs()


ORDERS = {
    "ascending": lambda v: torch.arange(float(v)) / 64,
    "descending": lambda v: -torch.arange(float(v)) / 64,
    "organ pipe": organ_pipe,
    "valley": lambda v: -organ_pipe(v),
    "sawtooth": lambda v: torch.arange(float(v)) % 128,
    "falling sawtooth": lambda v: -(torch.arange(float(v)) % 129),
    "one largest in each block": lambda v: torch.where(
        torch.arange(v) % 128 == 77, 5.0 + torch.randn(v), torch.randn(v) - 5
    ),
    "largest at the ends of blocks": lambda v: torch.where(
        torch.arange(v) % 128 >= 126, 9.0, torch.randn(v)
    ),
    "all the largest side by side": lambda v: torch.where(
        (torch.arange(v) - v // 2).abs() < 40, 9.0 + torch.randn(v), torch.randn(v)
    ),
    "ascending with a plateau at the end": lambda v: (torch.arange(float(v)) / 64).clamp(max=12.0),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vocabulary", [130, 1025, 5003])
def test_hazard_13_order_of_the_row(order, vocabulary):
    row = ORDERS[order](vocabulary)
    logits = torch.stack([row, row.flip(0), 0.01 * row])
    for k in (1, 32, 64, 127, vocabulary - 1, vocabulary):
        check(logits, k)
    check(logits.bfloat16(), 32)  # which makes ties of most of it


# ----------------------------------------------------------------- ids that do not exist


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("existing", [1, 2, 15, 16, 31, 32, 33, 200])
def test_hazard_02_missing_slots_where_fewer_ids_exist(existing, dtype):
    logits = torch.full((3, 1500), -INFINITY, dtype=dtype)
    for row in range(3):
        logits[row, torch.randperm(1500)[:existing]] = torch.randn(existing).to(dtype)
    for k in (1, 16, 32, 1500):
        result = check(logits, k)
        missing = max(0, k - existing)
        assert ((result.ids == -1).sum(-1) == missing).all()
        assert ((result.logprobs == -INFINITY).sum(-1) == missing).all()


@pytest.mark.parametrize("vocabulary", [17, 1025, 5003])
def test_long_runs_of_masked_ids(vocabulary):
    for keep in (slice(0, 3), slice(vocabulary // 2, vocabulary // 2 + 3), slice(-3, None)):
        logits = torch.full((2, vocabulary), -INFINITY)
        logits[:, keep] = torch.randn(2, 3)
        check(logits, 8)


# ----------------------------------------------------------------- rows that say nothing


POISONS = {
    "nan": lambda row, place: row.__setitem__(place, math.nan),
    "negative nan": lambda row, place: row.__setitem__(place, -torch.tensor(math.nan)),
    "plus infinity": lambda row, place: row.__setitem__(place, INFINITY),
    "all minus infinity": lambda row, place: row.fill_(-INFINITY),
    "all nan": lambda row, place: row.fill_(math.nan),
    "nan among minus infinity": lambda row, place: row.fill_(-INFINITY).__setitem__(
        place, math.nan
    ),
    "nan below the top": lambda row, place: row[:50].add_(100.0) if place >= 50 else None,
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [300, 2050])
def test_hazard_13_and_04_an_undefined_row_has_no_ids_and_is_alone(poison, dtype, vocabulary):
    logits = make_inputs("far", (4,), vocabulary, dtype).student
    usual = opdc.topk(logits, 20)
    places = {0, 1, 63, 127, 128, 255, 299, 1023, 1024, vocabulary - 2, vocabulary - 1}
    for place in sorted(place for place in places if place < vocabulary):
        poisoned = logits.clone()
        POISONS[poison](poisoned[1], place)
        if poison == "nan below the top":
            poisoned[1, place] = math.nan
        result = check(poisoned, 20)
        assert (result.ids[1] == -1).all()
        assert result.logprobs[1].isnan().all()
        good = torch.tensor([0, 2, 3])
        assert torch.equal(result.ids[good], usual.ids[good])
        assert torch.equal(result.logprobs[good], usual.logprobs[good])


# ----------------------------------------------------------------- options, layouts, threads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 0.7, 2.0, 10.0])
def test_temperature_changes_log_probs_and_not_the_order(temperature, dtype):
    logits = make_inputs("realistic", (3,), 500, dtype).student
    result = check(logits, 40, temperature=temperature)
    assert torch.equal(result.ids, opdc.topk(logits, 40).ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [0.0, 500.0, math.nan, INFINITY, -INFINITY])
def test_hazard_16_valid_vocab_is_the_shorter_vocabulary(padding, dtype):
    short = make_inputs("far", (3,), 257, dtype).student
    padded = torch.cat([short, torch.full((3, 30), padding, dtype=dtype)], -1)
    for k in (1, 32, 257):
        assert bits(check(padded, k, valid_vocab=257)) == bits(opdc.topk(short, k))
    with pytest.raises(ValueError, match=r"\bk\b"):
        opdc.topk(padded, 258, valid_vocab=257)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hazard_17_every_layout(dtype):
    logits = make_inputs("far", (3, 4), 300, dtype).student
    usual = bits(opdc.topk(logits, 20))
    wide = torch.full((3, 4, 350), math.nan, dtype=dtype)
    for start in (0, 1, 7, 50):
        wide[..., start : start + 300] = logits
        assert bits(opdc.topk(wide[..., start : start + 300], 20)) == usual
        wide.fill_(math.nan)
    longer = torch.full((3, 5, 300), math.nan, dtype=dtype)
    longer[:, :4] = logits
    assert bits(opdc.topk(longer[:, :4], 20)) == usual
    transposed = logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert bits(opdc.topk(transposed, 20)) == usual
    moved = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert bits(opdc.topk(moved, 20)) == usual
    shared = logits[:1, :1].expand(3, 4, 300)
    assert bits(opdc.topk(shared, 20)) == bits(opdc.topk(shared.clone(), 20))


def test_hazard_28_bits_do_not_depend_on_threads_or_company():
    logits = make_inputs("realistic", (9,), 5003).student
    usual = opdc.topk(logits, 40)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert bits(opdc.topk(logits, 40)) == bits(usual)
    torch.set_num_threads(1)
    order = torch.randperm(9)
    moved = opdc.topk(logits[order], 40)
    assert torch.equal(moved.ids, usual.ids[order])
    assert torch.equal(moved.logprobs, usual.logprobs[order])


def test_a_shorter_list_is_the_beginning_of_a_longer_one():
    logits = make_inputs("realistic", (3,), 2050).student
    everything = opdc.topk(logits, 2050)
    for k in (1, 2, 15, 16, 17, 63, 64, 65, 500, 1024, 2049):
        result = opdc.topk(logits, k)
        assert torch.equal(result.ids, everything.ids[:, :k])
        assert torch.equal(result.logprobs, everything.logprobs[:, :k])


def test_nothing_here_receives_a_gradient():
    logits = torch.randn(2, 30, requires_grad=True)
    result = opdc.topk(logits, 4)
    assert not result.logprobs.requires_grad
    assert not result.ids.requires_grad


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_hazard_21_read_only_logits():
    array = np.random.default_rng(0).normal(size=(2, 30)).astype(np.float32)
    array.setflags(write=False)
    logits = torch.from_numpy(array)
    assert torch.equal(opdc.topk(logits, 4).ids, opdc.topk(logits.clone(), 4).ids)


def test_integers_of_other_kinds_count_too():
    logits = torch.randn(2, 30)
    assert torch.equal(opdc.topk(logits, np.int64(4)).ids, opdc.topk(logits, 4).ids)


# ----------------------------------------------------------------- bad input


@pytest.mark.parametrize("k", [0, -1, 31, 2**31, 2**63, -(2**70), 1.5, 4.0, "4", None, True, [4]])
def test_hazard_32_k_out_of_range_is_an_error_that_names_it(k):
    with pytest.raises((ValueError, TypeError), match=r"\bk\b"):
        opdc.topk(torch.randn(2, 30), k)


BAD = {
    "a list": (lambda: opdc.topk([1.0, 2.0], 1), "logits"),
    "integers": (lambda: opdc.topk(torch.arange(10), 1), "logits"),
    "a number": (lambda: opdc.topk(torch.tensor(1.0), 1), "logits"),
    "an empty vocabulary": (lambda: opdc.topk(torch.zeros(2, 0), 1), "vocabulary"),
    **{
        f"temperature {value}": (
            lambda value=value: opdc.topk(torch.randn(2, 5), 1, temperature=value),
            "temperature",
        )
        for value in (0.0, -1.0, math.nan, INFINITY, "1")
    },
    **{
        f"valid_vocab {value}": (
            lambda value=value: opdc.topk(torch.randn(2, 5), 1, valid_vocab=value),
            "valid_vocab",
        )
        for value in (0, -1, 6, 2.0)
    },
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_an_error_that_names_the_argument(bad):
    call, name = BAD[bad]
    with pytest.raises((ValueError, TypeError), match=name):
        call()
