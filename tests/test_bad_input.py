"""Wrong input ends in an error that names the argument and says what to do; nothing is written."""

from __future__ import annotations

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch

import opdc
import oracle
from capsules import CUDA, READ_ONLY, Producer
from core import SETTINGS, core_call
from fuzz import REFUSALS, answered_calls
from opdc import _C

POSITIONS, V = (2, 3), 7


def make_student(**options):
    return torch.randn(*POSITIONS, V, **options)


def make_tokens():
    return torch.randint(0, V, POSITIONS)


STUDENT, TEACHER = (torch.linspace(-2, 2, 42).sin().reshape(2, 3, 7) * k for k in (3.0, 5.0))
TOKENS = torch.arange(6).reshape(POSITIONS)
LOGPROBS = -torch.ones(POSITIONS)


def divergence(**keywords):
    return lambda: opdc.reverse_kl(STUDENT, TEACHER, **keywords)


def policy(**keywords):
    return lambda: opdc.k1(STUDENT, TEACHER, TOKENS, **keywords)


SHAPES = {
    "student and teacher of different positions": (
        lambda: opdc.reverse_kl(STUDENT, TEACHER[:1]),
        ["teacher", "1", "2"],
    ),
    "different vocabularies": (
        lambda: opdc.reverse_kl(STUDENT, TEACHER[..., :5]),
        ["teacher", "5", "7", "valid_vocab"],
    ),
    "different numbers of axes": (lambda: opdc.reverse_kl(STUDENT, TEACHER[0]), ["teacher"]),
    "a number for logits": (lambda: opdc.reverse_kl(torch.tensor(1.0), TEACHER), ["student"]),
    "an empty vocabulary": (
        lambda: opdc.reverse_kl(STUDENT[..., :0], TEACHER[..., :0]),
        ["student", "vocabulary"],
    ),
    "teacher of k1 is neither logits nor log-probs": (
        lambda: opdc.k1(STUDENT, torch.zeros(()), TOKENS),
        ["teacher", "log-probs"],
    ),
    "log-probs of other positions": (
        lambda: opdc.k2(STUDENT, LOGPROBS[:, :2], TOKENS),
        ["teacher", "(2, 2)", "(2, 3)"],
    ),
    "tokens": (lambda: opdc.k3(STUDENT, TEACHER, TOKENS[:, :2]), ["tokens", "(2, 2)", "(2, 3)"]),
    "mask": (divergence(mask=torch.ones(2, dtype=torch.bool)), ["mask", "(2,)", "(2, 3)"]),
    "weights": (divergence(weights=torch.ones(3, 2)), ["weights", "(3, 2)", "(2, 3)"]),
    "old_logprobs": (policy(old_logprobs=LOGPROBS[0]), ["old_logprobs", "(3,)"]),
    "reference_logprobs": (policy(reference_logprobs=LOGPROBS[0]), ["reference_logprobs", "(3,)"]),
    "num_items": (divergence(num_items=torch.ones(2)), ["num_items", "(2,)"]),
}

NUMBERS = {
    "token below": (lambda: opdc.k1(STUDENT, TEACHER, TOKENS - 1), ["tokens", "-1", "mask"]),
    "token above": (lambda: opdc.k1(STUDENT, TEACHER, TOKENS + V - 5), ["tokens", "7"]),
    "largest token": (
        lambda: opdc.token_logprobs(STUDENT, torch.full(POSITIONS, 2**63 - 1)),
        ["tokens", "9223372036854775807"],
    ),
    "label of ignored tokens": (
        lambda: opdc.token_logprobs(STUDENT, torch.full(POSITIONS, -100)),
        ["tokens", "-100"],
    ),
    "token beyond valid_vocab": (policy(valid_vocab=4), ["tokens", "4"]),
    **{
        f"temperature {value}": (divergence(temperature=value), ["temperature"])
        for value in (0.0, -1.0, math.nan, math.inf, 0)
    },
    "temperature beyond float64": (divergence(temperature=10**400), ["temperature"]),
    **{
        f"valid_vocab {value}": (divergence(valid_vocab=value), ["valid_vocab", str(value)])
        for value in (0, -1, V + 1, 2**63, -(2**70))
    },
    **{
        f"beta {value}": (lambda value=value: opdc.jsd(STUDENT, TEACHER, beta=value), ["beta"])
        for value in (-0.1, 1.1, math.nan)
    },
    **{
        f"alpha {value}": (
            lambda value=value: opdc.skew_kl(STUDENT, TEACHER, alpha=value),
            ["alpha"],
        )
        for value in (-0.1, 1.5, math.nan)
    },
    **{
        f"clip_range {value}": (policy(old_logprobs=LOGPROBS, clip_range=value), ["clip_range"])
        for value in (-0.1, math.nan, (0.1, -0.2), (0.1,), (0.1, 0.2, 0.3))
    },
    **{
        f"discount {value}": (policy(discount=value), ["discount"])
        for value in (-0.1, 1.1, math.nan)
    },
    "reward_scale": (
        policy(reference_logprobs=LOGPROBS, reward_scale=math.nan),
        ["reward_scale"],
    ),
    **{
        f"num_items {value}": (divergence(num_items=value), ["num_items"])
        for value in (-1, -0.5, math.inf, math.nan)
    },
    "num_items as a tensor": (divergence(num_items=torch.tensor(-3)), ["num_items"]),
}

COMBINATIONS = {
    "clip_range without old_logprobs": (policy(clip_range=0.2), ["clip_range", "old_logprobs"]),
    "reward_scale without reference": (
        policy(reward_scale=1.25),
        ["reward_scale", "reference_logprobs"],
    ),
    **{
        f"num_items with {reduction}": (
            divergence(num_items=3, reduction=reduction),
            ["num_items", reduction],
        )
        for reduction in ("none", "sum")
    },
    "reduction": (divergence(reduction="avg"), ["reduction", "avg", "seq_mean"]),
    "reduction of another type": (divergence(reduction=["mean"]), ["reduction"]),
    "direction": (
        lambda: opdc.skew_kl(STUDENT, TEACHER, direction="up"),
        ["direction", "up", "forward", "reverse"],
    ),
    "advantage": (policy(advantage="new"), ["advantage", "new", "old", "current"]),
}

TYPES = {
    "a list": (lambda: opdc.reverse_kl([[1.0]], TEACHER), ["student", "list"]),
    "None for the teacher": (lambda: opdc.reverse_kl(STUDENT, None), ["teacher", "NoneType"]),
    "NumPy": (lambda: opdc.reverse_kl(STUDENT.numpy(), TEACHER), ["student", "ndarray"]),
    "None for tokens": (lambda: opdc.k1(STUDENT, TEACHER, None), ["tokens", "NoneType"]),
    "mask as a list": (divergence(mask=[1, 0]), ["mask", "list"]),
    "logits of token_logprobs": (lambda: opdc.token_logprobs(None, TOKENS), ["logits"]),
    "sparse": (lambda: opdc.reverse_kl(STUDENT.to_sparse(), TEACHER), ["student", "dense"]),
    "integer logits": (lambda: opdc.reverse_kl(STUDENT.long(), TEACHER), ["student", "int64"]),
    "complex logits": (
        lambda: opdc.reverse_kl(STUDENT, TEACHER.to(torch.complex64)),
        ["teacher", "complex"],
    ),
    "float8 logits": (
        lambda: opdc.reverse_kl(STUDENT.to(torch.float8_e4m3fn), TEACHER),
        ["student", "float32"],
    ),
    "floating tokens": (lambda: opdc.k1(STUDENT, TEACHER, TOKENS.float()), ["tokens", "float32"]),
    "bool tokens": (lambda: opdc.k1(STUDENT, TEACHER, TOKENS > 1), ["tokens", "bool"]),
    "integer weights": (divergence(weights=TOKENS), ["weights", "int64"]),
    "integer old_logprobs": (policy(old_logprobs=TOKENS), ["old_logprobs", "int64"]),
    "temperature as text": (divergence(temperature="1"), ["temperature", "str"]),
    "temperature as a tensor": (divergence(temperature=torch.ones(())), ["temperature", "Tensor"]),
    "temperature as a bool": (divergence(temperature=True), ["temperature", "bool"]),
    "num_items as a bool": (divergence(num_items=True), ["num_items", "bool"]),
    "discount as None": (policy(discount=None), ["discount", "NoneType"]),
    "clip_range as text": (policy(old_logprobs=LOGPROBS, clip_range="01"), ["clip_range", "str"]),
    "valid_vocab as a float": (divergence(valid_vocab=5.0), ["valid_vocab", "float"]),
    "an unknown keyword": (divergence(labels=TOKENS), ["labels"]),
    "student on another device": (
        lambda: opdc.reverse_kl(STUDENT.to("meta"), TEACHER),
        ["teacher", "meta", "cpu"],
    ),
    "mask on another device": (divergence(mask=TOKENS.to("meta") > 0), ["mask", "meta", "cpu"]),
}


@pytest.mark.parametrize("name", [*SHAPES, *NUMBERS, *COMBINATIONS])
def test_wrong_value(name):
    call, words = (SHAPES | NUMBERS | COMBINATIONS)[name]
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", TYPES)
def test_wrong_type(name):
    call, words = TYPES[name]
    with pytest.raises(TypeError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_errors_come_before_anything_is_written():
    logits = make_student(requires_grad=True) * 1.0
    before = logits.detach().clone()
    with pytest.raises(ValueError, match="tokens"):
        opdc.k1(logits, TEACHER, TOKENS + V, inplace=True)
    with pytest.raises(ValueError, match="temperature"):
        opdc.reverse_kl(logits, TEACHER, inplace=True, temperature=-1.0)
    assert torch.equal(logits, before)
    assert logits._version == 0


def test_freed_storage():
    student = make_student()
    student.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"student.*memory"):
        opdc.reverse_kl(student, TEACHER)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0,)])
def test_hazard_32_no_positions_or_no_vocabulary(shape):
    student = torch.randn(shape, requires_grad=True)
    if shape == (0,):
        with pytest.raises(ValueError, match="vocabulary"):
            opdc.reverse_kl(student, torch.randn(shape))
        return
    for reduction in ("none", "sum", "mean", "seq_mean"):
        loss = opdc.reverse_kl(student, torch.randn(shape), reduction=reduction)
        assert loss.shape == (shape[:-1] if reduction == "none" else ())
        assert loss.sum() == 0
        loss.sum().backward()
        assert student.grad.shape == shape


# ----------------------------------------------------------------- the C functions themselves


def raw_call(**changes):
    """Arguments of `_C.loss` for one reverse KL, in order, with some replaced."""
    arguments = {
        **core_call("reverse_kl", STUDENT, TEACHER),
        "value": torch.full((), 3.0),
        "gradient": torch.full((*POSITIONS, V), 3.0),
        "rows": torch.full((6, _C.ROW), 3.0, dtype=torch.float64),
        "metrics": torch.full((len(_C.metric_names()),), 3.0, dtype=torch.float64),
        "threads": 1,
    }
    assert set(changes) <= set(arguments)
    return arguments | changes


def read_only(array):
    array = np.array(array)
    array.setflags(write=False)
    return array


ADDRESS = STUDENT.data_ptr()
RAW = {
    "method": ({"method": "kl"}, ValueError),
    "method of another type": ({"method": 3}, TypeError),
    "method that is not text": ({"method": "\ud800"}, ValueError),
    "no student": ({"student": None}, TypeError),
    "a type for a tensor": ({"student": torch.Tensor}, TypeError),
    "no settings": ({"settings": None}, TypeError),
    "short settings": ({"settings": SETTINGS[:3]}, ValueError),
    "float32 settings": ({"settings": SETTINGS.float()}, TypeError),
    "reduction": ({"reduction": 4}, ValueError),
    "huge reduction": ({"reduction": 2**100}, ValueError),
    "floating reduction": ({"reduction": 1.0}, TypeError),
    "advantage": ({"advantage": 2}, ValueError),
    "valid_vocab": ({"valid_vocab": -1}, ValueError),
    "threads": ({"threads": 0}, ValueError),
    "too many threads": ({"threads": 2**40}, ValueError),
    "no value": ({"value": None}, TypeError),
    "value per position": ({"value": torch.zeros(POSITIONS)}, ValueError),
    "double value": ({"value": torch.zeros((), dtype=torch.float64)}, TypeError),
    "gradient of another dtype": ({"gradient": make_student(dtype=torch.float64)}, TypeError),
    "gradient of another shape": ({"gradient": torch.zeros(2, 3, 6)}, ValueError),
    "overlapping gradient": ({"gradient": torch.zeros(2, 1, 7).expand(2, 3, 7)}, ValueError),
    "overlapping rows of the gradient": (
        {"gradient": torch.zeros(50).as_strided((2, 3, 7), (20, 6, 1))},
        ValueError,
    ),
    "rows": ({"rows": torch.zeros(5, _C.ROW, dtype=torch.float64)}, ValueError),
    "rows of another dtype": ({"rows": torch.zeros(6, _C.ROW)}, TypeError),
    "strided rows": ({"rows": torch.zeros(6, 48, dtype=torch.float64)[:, ::2]}, ValueError),
    "metrics": ({"metrics": torch.zeros(3, dtype=torch.float64)}, ValueError),
    "transposed student": ({"student": torch.zeros(2, 7, 3).transpose(1, 2)}, ValueError),
    "read-only value": ({"value": read_only(np.float32(0))}, ValueError),
    "read-only gradient": ({"gradient": read_only(STUDENT.numpy())}, ValueError),
    "read-only rows": ({"rows": read_only(np.zeros((6, _C.ROW)))}, ValueError),
    "read-only metrics": ({"metrics": read_only(np.zeros(len(_C.metric_names())))}, ValueError),
    "swapped bytes": ({"student": STUDENT.numpy().astype(">f4")}, TypeError),
    "objects": ({"student": np.array([None])}, TypeError),
    "meta": ({"student": STUDENT.to("meta")}, TypeError),
    "another device": ({"student": Producer(ADDRESS, (2, 3, 7), device=CUDA)}, TypeError),
    "no memory": ({"student": Producer(None, (2, 3, 7))}, ValueError),
    "misaligned": ({"student": Producer(ADDRESS + 1, (1, 1, 7))}, ValueError),
    "misaligned by its offset": ({"student": Producer(ADDRESS, (1, 7), byte_offset=2)}, ValueError),
    "vectors": ({"student": Producer(ADDRESS, (2, 3, 1), lanes=4)}, TypeError),
    "128 bits": ({"student": Producer(ADDRESS, (2, 3, 7), bits=128)}, TypeError),
    "a negative size": ({"student": Producer(ADDRESS, (-1, 7))}, ValueError),
    "hazard 31: sizes whose product overflows": (
        {"student": Producer(ADDRESS, (2**40, 2**40, 7), (0, 0, 1))},
        ValueError,
    ),
    "hazard 31: a vocabulary beyond memory": (
        {"student": Producer(ADDRESS, (1, 2**62), (0, 1))},
        ValueError,
    ),
    "hazard 31: more positions than rows": (
        {"student": Producer(ADDRESS, (2**61, 1), (0, 1))},
        ValueError,
    ),
    "65 axes": ({"student": Producer(ADDRESS, (1,) * 65)}, ValueError),
    "-1 axes": ({"student": Producer(ADDRESS, (1,), axes=-1)}, ValueError),
    "DLPack of the future": ({"student": Producer(ADDRESS, (2, 3, 7), version=(2, 0))}, TypeError),
    "read-only output": (
        {"gradient": Producer(ADDRESS, (2, 3, 7), flags=READ_ONLY)},
        ValueError,
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_core_refuses_and_writes_nothing(name):
    changes, error = RAW[name]
    arguments = raw_call(**changes)
    producers = [value for value in changes.values() if isinstance(value, Producer)]
    with pytest.raises(error):
        _C.loss(*arguments.values())
    for output in ("value", "gradient", "rows", "metrics"):
        if output not in changes:
            assert torch.all(arguments[output] == 3.0)
    for producer in producers:
        assert producer.exported == producer.deleted > 0


@pytest.mark.parametrize("missing", [1, -1, 2, 1000])
def test_wrong_number_of_arguments(missing):
    wanted = len(raw_call())
    count = max(wanted - missing, 0)
    arguments = itertools.islice(itertools.cycle(raw_call().values()), count)
    with pytest.raises(TypeError, match=str(wanted)):
        _C.loss(*arguments)


class Faulty:
    def __init__(self, result):
        self.result = result

    def __dlpack__(self, **_):
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def used_capsule():
    capsule = np.zeros((2, 3, 7), np.float32).__dlpack__(max_version=(1, 3))
    arguments = raw_call(student=Faulty(capsule))
    _C.loss(*arguments.values())
    return capsule


@pytest.mark.parametrize(
    "result", [None, 3, BufferError("not today"), RuntimeError("broken"), "a used capsule"], ids=str
)
def test_a_producer_that_fails_is_named_with_its_reason(result):
    faulty = Faulty(used_capsule() if result == "a used capsule" else result)
    with pytest.raises(TypeError, match=r"^teacher") as caught:
        _C.loss(*raw_call(teacher=faulty).values())
    if isinstance(result, BaseException):
        assert str(result) in str(caught.value)
        assert caught.value.__cause__ is result


# ----------------------------------------------------------------- ten thousand random calls

WRONG_TENSORS = (
    lambda: None,
    lambda: 3,
    lambda: "text",
    lambda: [[1.0]],
    lambda: np.zeros((2, 3, 7), np.float32),
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.zeros(2, 3),
    lambda: torch.zeros(3, 2),
    lambda: torch.zeros(2, 3, 0),
    lambda: torch.zeros(2, 0, 7),
    lambda: torch.zeros(2, 3, 8),
    lambda: torch.zeros(2, 3, 7, dtype=torch.int64),
    lambda: torch.zeros(2, 3, 7, dtype=torch.complex64),
    lambda: torch.zeros(2, 3, 7, device="meta"),
    lambda: torch.zeros(2, 3, 7).to_sparse(),
    lambda: torch.zeros(2, 1, 1).expand(2, 3, 7),
    lambda: torch.zeros(7, 3, 2).transpose(0, 2),
    lambda: torch.full((2, 3, 7), math.nan),
    lambda: torch.full((2, 3, 7), -math.inf),
    lambda: torch.full((2, 3, 7), 3e38),
    lambda: torch.full((2, 3), 2**62),
    lambda: torch.full((2, 3), -1),
    lambda: torch.full((2, 3), math.nan),
    lambda: torch.zeros(2, 3, dtype=torch.bool),
    lambda: torch.zeros((1,) * 20),
    lambda: torch.zeros(2, 3, 7, dtype=torch.float16),
    lambda: torch.zeros(4, 3, 7, dtype=torch.bfloat16)[::2],
    lambda: torch.zeros(2, 3, 7, dtype=torch.float64),
)
WRONG_NUMBERS = (None, "1", True, -1, 0, 1, 2, 7, 8, 2**63, 10**400, -0.5, 0.5, 1e-300, 1e300)
WRONG_NUMBERS += (
    math.nan,
    math.inf,
    -math.inf,
    1j,
    (0.1, 0.2),
    [],
    torch.ones(()),
    np.float32(0.5),
)
WRONG_WORDS = (
    "none",
    "sum",
    "mean",
    "seq_mean",
    "old",
    "current",
    "forward",
    "reverse",
    "",
    None,
    3,
)

COMMON = {
    "temperature": (WRONG_NUMBERS, lambda r: r.choice([0.5, 1.0, 2.0])),
    "mask": (WRONG_TENSORS, lambda _: torch.rand(POSITIONS) > 0.3),
    "weights": (WRONG_TENSORS, lambda _: torch.randn(POSITIONS)),
    "valid_vocab": (WRONG_NUMBERS, lambda _: V),
    "reduction": (WRONG_WORDS, lambda r: r.choice(["none", "sum", "mean", "seq_mean"])),
    "num_items": (WRONG_NUMBERS, lambda _: 4),
    "inplace": ((True, False, None, 1), lambda _: False),
    "return_metrics": ((True, False, None, 1), lambda _: False),
}
POLICY = {
    "old_logprobs": (WRONG_TENSORS, lambda _: torch.randn(POSITIONS) - 2),
    "clip_range": (WRONG_NUMBERS, lambda _: 0.2),
    "advantage": (WRONG_WORDS, lambda r: r.choice(["old", "current"])),
    "discount": (WRONG_NUMBERS, lambda _: 0.5),
    "reference_logprobs": (WRONG_TENSORS, lambda _: torch.randn(POSITIONS) - 2),
    "reward_scale": (WRONG_NUMBERS, lambda _: 1.25),
}
READ_ONLY_CALLS = {"token_logprobs", "entropy"}
CALLS = {
    "reverse_kl": (("student", "teacher"), COMMON),
    "forward_kl": (("student", "teacher"), COMMON),
    "jsd": (("student", "teacher"), COMMON | {"beta": (WRONG_NUMBERS, lambda _: 0.3)}),
    "skew_kl": (
        ("student", "teacher"),
        COMMON
        | {
            "alpha": (WRONG_NUMBERS, lambda _: 0.3),
            "direction": (WRONG_WORDS, lambda r: r.choice(["forward", "reverse"])),
        },
    ),
    "k1": (("student", "teacher", "tokens"), COMMON | POLICY),
    "k2": (("student", "teacher", "tokens"), COMMON),
    "k3": (("student", "teacher", "tokens"), COMMON),
    "token_logprobs": (("student", "tokens"), {k: COMMON[k] for k in ("temperature", "mask")}),
    "entropy": (("student",), {k: COMMON[k] for k in ("temperature", "mask", "valid_vocab")}),
}
RIGHT = {"student": make_student, "teacher": make_student, "tokens": make_tokens}


def random_call(r):
    name = r.choice(list(CALLS))
    positional, keywords = CALLS[name]
    arguments = [RIGHT[key]() for key in positional]
    given = {key: right(r) for key, (_, right) in keywords.items() if r.random() < 0.15}
    for _ in range(r.choice([0, 1, 1, 1, 2, 3])):
        if r.random() < 0.5:
            arguments[r.randrange(len(arguments))] = r.choice(WRONG_TENSORS)()
        else:
            key = r.choice(list(keywords))
            wrong = r.choice(keywords[key][0])
            given[key] = wrong() if callable(wrong) else wrong
    return name, arguments, given


def is_ordinary(tensor):
    return bool((tensor.double().abs() < 1e4).all())


def check_against_the_oracle(name, arguments, given, result):
    metrics = given.pop("return_metrics", False)
    if given.pop("inplace", False):
        return
    value = result[0] if metrics else result
    tensors = [
        x for x in (*arguments, *given.values()) if isinstance(x, torch.Tensor) and x.numel()
    ]
    if value.device.type == "meta" or not all(is_ordinary(x) for x in tensors):
        return
    if isinstance(given.get("clip_range"), list) or abs(given.get("temperature", 1.0)) < 1e-3:
        return
    expected = getattr(oracle, name)(
        *(x.double() if x.is_floating_point() else x.long() for x in arguments), **given
    )
    expected = expected.to(value.dtype)
    torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_random_calls_end_in_an_error_or_a_right_answer(seed):
    r = random.Random(seed)
    torch.manual_seed(seed)
    answered = answered_calls(600, lambda: random_call(r), check_against_the_oracle)
    assert 100 < answered < 500
    for _ in range(400):
        random_raw_call(r)


GUARD = 64


def guarded(shape, dtype):
    """A tensor inside a larger one, whose margins tell of a write outside."""
    size = math.prod(shape)
    whole = torch.full((size + 2 * GUARD,), 3.0, dtype=dtype)
    return whole[GUARD : GUARD + size].view(shape), whole


def margins_are_intact(whole):
    return bool((whole[:GUARD] == 3.0).all() and (whole[-GUARD:] == 3.0).all())


RAW_WRONG = (
    *WRONG_TENSORS,
    lambda: np.zeros((2, 3, 7), np.float32)[:, ::-1],
    lambda: np.zeros((2, 3, 7), np.float32)[..., ::-1],
    lambda: np.zeros((2, 3, 7), ">f4"),
    lambda: np.zeros((2, 3), np.int64)[::-1],
    lambda: read_only(np.zeros((2, 3, 7), np.float32)),
    lambda: Producer(ADDRESS, (2, 3, 7), bits=16),
    lambda: Producer(ADDRESS, (2, 3, 7), unversioned=True),
    lambda: Producer(ADDRESS, (2**33, 2**31, 7), (0, 0, 1)),
    lambda: torch.zeros(6, _C.ROW, dtype=torch.float64),
    lambda: torch.full((7,), math.nan, dtype=torch.float64),
    lambda: -SETTINGS,
)


SHARED = len(core_call("reverse_kl", STUDENT, TEACHER))  # arguments of loss and gradient


def random_raw_call(r):
    kinds = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    dtype, reduction = r.choice(kinds), r.randrange(4)
    arithmetic = torch.float64 if dtype is torch.float64 else torch.float32
    outputs = {
        "value": guarded((2, 3) if reduction == 0 else (), arithmetic),
        "gradient": guarded((2, 3, 7), dtype),
        "rows": guarded((6, _C.ROW), torch.float64),
        "metrics": guarded((len(_C.metric_names()),), torch.float64),
    }
    arguments = raw_call(
        method=r.choice([*_C.methods(), "x"]),
        student=make_student().to(dtype),
        teacher=make_student().to(dtype),
        tokens=make_tokens(),
        reduction=reduction,
        **{name: inner for name, (inner, _) in outputs.items()},
    )
    for _ in range(r.choice([0, 1, 1, 2])):
        name = r.choice(list(arguments)[1:])
        arguments[name] = r.choice([*RAW_WRONG, lambda: r.choice(WRONG_NUMBERS)])()
    try:
        _C.loss(*arguments.values())
        upstream = torch.ones((2, 3) if reduction == 0 else ())
        tail = (arguments["rows"], upstream, arguments["gradient"], 1)
        _C.gradient(*list(arguments.values())[:SHARED], *tail)
        _C.scale(arguments["gradient"], upstream, arguments["gradient"], 1)
    except REFUSALS as error:
        assert str(error)
    assert all(margins_are_intact(whole) for _, whole in outputs.values())


def test_modules_refuse_like_functions():
    for loss, words in (
        (opdc.nn.ReverseKLLoss(reduction="average"), "reduction"),
        (opdc.nn.JSDLoss(beta=2.0), "beta"),
        (opdc.nn.SkewKLLoss(direction="up"), "direction"),
        (opdc.nn.K1Loss(clip_range=0.2), "old_logprobs"),
    ):
        with pytest.raises(ValueError, match=words):
            loss(STUDENT, TEACHER, tokens=TOKENS)
    with pytest.raises(TypeError, match="tokens"):
        opdc.nn.K2Loss()(STUDENT, TEACHER)
    with pytest.raises(TypeError, match="speed"):
        functools.partial(opdc.nn.K2Loss, speed=2)()
