"""Wrong input of the published methods: an error that names the argument, and nothing written."""

from __future__ import annotations

import math
import random

import pytest
import torch

import opdc
import oracle_published
from fuzz import answered_calls
from test_bad_input import COMMON, WRONG_NUMBERS, WRONG_TENSORS, is_ordinary, make_tokens

POSITIONS, V = (2, 3), 7
STUDENT, TEACHER = (torch.linspace(-2, 2, 42).sin().reshape(2, 3, 7) * k for k in (3.0, 5.0))
TOKENS = torch.arange(6).reshape(POSITIONS)
LOGPROBS = -torch.ones(POSITIONS)
UNIFORMS = torch.linspace(0, 0.9, 6).reshape(POSITIONS)
PREFIX = torch.tensor([[True, False, False], [False, True, False]])
INFINITY = math.inf


def sparse(**changes) -> opdc.TopK:
    """A complete sparse teacher with K = 3, with some fields replaced."""
    logprobs, ids = torch.log_softmax(TEACHER, -1).topk(3)
    fields = {
        "ids": ids,
        "logprobs": logprobs,
        "token_logprobs": LOGPROBS,
        "entropy": torch.ones(POSITIONS),
    }
    return opdc.TopK(**(fields | changes))


def replaced(tensor, value, index=(1, 2)):
    changed = tensor.clone()
    changed[index] = value
    return changed


def call(function, *, teacher=TEACHER, tokens=TOKENS, **keywords):
    """The call as a function of the student's logits (and of `inplace`)."""

    def on(student=STUDENT, **more):
        return getattr(opdc, function)(student, teacher, tokens, **keywords, **more)

    return on


def tropd(**keywords):
    return call("tropd", **({"k": 3, "uniforms": UNIFORMS} | keywords))


def eopd(**keywords):
    return call("eopd", **({"k": 3} | keywords))


def aopd(**keywords):
    return call("aopd", **({"k": 3} | keywords))


def reopold(**keywords):
    return call("reopold", **keywords)


FAMILY = {"tropd": tropd, "eopd": eopd, "aopd": aopd, "reopold": reopold}
WITH_TOPK = {name: make for name, make in FAMILY.items() if name != "reopold"}
OLD = {name: make for name, make in FAMILY.items() if name != "aopd"}

# Each entry: the call, and what its message must contain.
VALUES = {
    "region": (tropd(region="trust"), ["region", "trust", "sampled", "expected", "threshold"]),
    "outlier": (tropd(outlier="drop"), ["outlier", "drop", "forward_kl", "mask", "clip"]),
    "advantage": (tropd(advantage="new"), ["advantage", "new", "old", "current"]),
    "phase": (reopold(phase="warmup"), ["phase", "warmup", "exploration", "refinement"]),
    "tropd clip_range without old_logprobs": (
        tropd(clip_range=0.2),
        ["clip_range", "old_logprobs"],
    ),
    **{
        f"{name} clip_range {value}": (
            make(old_logprobs=LOGPROBS, clip_range=value),
            ["clip_range"],
        )
        for name, make in (("tropd", tropd), ("eopd", eopd))
        for value in (-0.1, math.nan, (0.1, -0.2), (0.1,), (0.1, 0.2, 0.3))
    },
    **{
        f"uniform of {value}": (tropd(uniforms=replaced(UNIFORMS, value)), ["uniforms"])
        for value in (1.0, -0.25, 1.5, math.nan, INFINITY)
    },
    "threshold": (tropd(region="threshold", threshold=math.nan), ["threshold"]),
    **{
        f"prefix_weight {value}": (
            tropd(prefix_mask=PREFIX, prefix_weight=value),
            ["prefix_weight"],
        )
        for value in (math.nan, INFINITY)
    },
    "eopd entropy_threshold": (eopd(entropy_threshold=math.nan), ["entropy_threshold"]),
    "reopold entropy_threshold": (
        reopold(phase="refinement", entropy_threshold=math.nan),
        ["entropy_threshold"],
    ),
    **{
        f"forward_weight {value}": (eopd(forward_weight=value), ["forward_weight"])
        for value in (math.nan, INFINITY)
    },
    "aopd threshold": (aopd(threshold=math.nan), ["threshold"]),
    **{
        f"keep {value}": (reopold(phase="refinement", keep=value), ["keep"])
        for value in (0.0, -0.1, 1.1, math.nan, INFINITY)
    },
    **{
        f"mixture {value}": (reopold(mixture=value), ["mixture"])
        for value in (-0.1, 1.1, math.nan, INFINITY)
    },
    **{
        f"{name} k {value}": (make(k=value), ["k"])
        for name, make in WITH_TOPK.items()
        for value in (0, -1, 2**63)
    },
    # What is wrong with a sparse teacher.
    **{
        f"{name} k of another number of slots": (make(k=2, teacher=sparse()), ["k", "2", "3"])
        for name, make in WITH_TOPK.items()
    },
    **{
        f"{name} id {value}": (
            make(teacher=sparse(ids=replaced(sparse().ids, value, (1, 2, 1)))),
            ["ids", str(value)],
        )
        for name, make in WITH_TOPK.items()
        for value in (V, 2**62)
    },
    **{
        f"{name} repeated id": (
            make(teacher=sparse(ids=torch.zeros(2, 3, 3, dtype=torch.int64))),
            ["ids"],
        )
        for name, make in WITH_TOPK.items()
    },
    **{
        f"{name} support beyond valid_vocab": (make(teacher=sparse(), valid_vocab=6), ["ids", "6"])
        for name, make in WITH_TOPK.items()
    },
    **{
        f"{name} teacher of mass 3": (
            make(teacher=sparse(logprobs=torch.zeros(2, 3, 3))),
            ["logprobs"],
        )
        for name, make in WITH_TOPK.items()
    },
    # Shapes.
    **{
        f"{name} tokens": (make(tokens=TOKENS[:, :2]), ["tokens", "(2, 2)", "(2, 3)"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} token out of range": (make(tokens=TOKENS + 2), ["tokens", "7"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} vocabulary": (make(teacher=TEACHER[..., :5]), ["teacher", "5", "7", "valid_vocab"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} teacher of other positions": (make(teacher=TEACHER[:1]), ["teacher"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} mask": (make(mask=torch.ones(2, dtype=torch.bool)), ["mask", "(2,)", "(2, 3)"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} weights": (make(weights=torch.ones(3, 2)), ["weights", "(3, 2)", "(2, 3)"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} old_logprobs": (make(old_logprobs=LOGPROBS[0]), ["old_logprobs", "(3,)"])
        for name, make in OLD.items()
    },
    "uniforms of another shape": (tropd(uniforms=UNIFORMS[0]), ["uniforms", "(3,)", "(2, 3)"]),
    "prefix_mask of another shape": (
        tropd(prefix_mask=PREFIX[:, :2]),
        ["prefix_mask", "(2, 2)", "(2, 3)"],
    ),
    **{
        f"{name} {field} of another shape": (
            make(teacher=sparse(**{field: getattr(sparse(), field)[:, :2]})),
            [field, "(2, 2"],
        )
        for name, make in WITH_TOPK.items()
        for field in ("ids", "logprobs", "token_logprobs")
    },
    "entropy of another shape": (
        eopd(teacher=sparse(entropy=LOGPROBS[0])),
        ["entropy", "(3,)", "(2, 3)"],
    ),
    "ids and logprobs of different K": (
        eopd(k=None, teacher=sparse(ids=sparse().ids[..., :2])),
        ["ids", "logprobs"],
    ),
    "teacher log-probs of other positions": (
        reopold(teacher=LOGPROBS[:, :2]),
        ["teacher", "(2, 2)", "(2, 3)"],
    ),
    # The common arguments.
    **{
        f"{name} temperature": (make(temperature=0.0), ["temperature"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} reduction": (make(reduction="avg"), ["reduction", "avg", "seq_mean"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} num_items without a mean": (make(reduction="sum", num_items=3), ["num_items"])
        for name, make in FAMILY.items()
    },
}

TYPES = {
    **{
        f"{name} without token_logprobs": (
            make(teacher=sparse(token_logprobs=None)),
            ["token_logprobs", "None"],
        )
        for name, make in FAMILY.items()
    },
    "eopd without the entropy": (eopd(teacher=sparse(entropy=None)), ["entropy", "None"]),
    **{
        f"{name} tokens": (make(tokens=None), ["tokens", "NoneType"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} floating tokens": (make(tokens=TOKENS.float()), ["tokens", "float32"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} teacher": (make(teacher=None), ["teacher", "NoneType"])
        for name, make in FAMILY.items()
    },
    **{
        f"{name} {keyword} as {type(value).__name__}": (make(**{keyword: value}), [keyword])
        for name, make, keyword in (
            ("tropd", tropd, "threshold"),
            ("tropd", tropd, "prefix_weight"),
            ("eopd", eopd, "entropy_threshold"),
            ("eopd", eopd, "forward_weight"),
            ("aopd", aopd, "threshold"),
            ("reopold", reopold, "mixture"),
            ("reopold", reopold, "keep"),
            ("reopold", reopold, "entropy_threshold"),
        )
        for value in ("1", True, [0.5], 1j)
    },
    **{
        f"{name} k as {value!r}": (make(k=value), ["k"])
        for name, make in WITH_TOPK.items()
        for value in (2.0, "3", True)
    },
    "prefix_weight None": (tropd(prefix_weight=None), ["prefix_weight", "NoneType"]),
    "clip_range as text": (tropd(old_logprobs=LOGPROBS, clip_range="01"), ["clip_range", "str"]),
    "uniforms as a number": (tropd(uniforms=0.5), ["uniforms", "float"]),
    "integer uniforms": (tropd(uniforms=TOKENS), ["uniforms", "int64"]),
    "prefix_mask as a list": (tropd(prefix_mask=[True]), ["prefix_mask", "list"]),
    "integer old_logprobs": (reopold(old_logprobs=TOKENS), ["old_logprobs", "int64"]),
    "floating ids": (eopd(teacher=sparse(ids=sparse().ids.float())), ["ids", "float32"]),
    "integer logprobs": (aopd(teacher=sparse(logprobs=sparse().ids)), ["logprobs", "int64"]),
    "ids on another device": (
        eopd(teacher=sparse(ids=sparse().ids.to("meta"))),
        ["ids", "meta", "cpu"],
    ),
    "uniforms on another device": (
        tropd(uniforms=UNIFORMS.to("meta")),
        ["uniforms", "meta", "cpu"],
    ),
    "an unknown keyword": (tropd(kind="sampled"), ["kind"]),
    "aopd has no old_logprobs": (aopd(old_logprobs=LOGPROBS), ["old_logprobs"]),
    "reopold has no clip_range": (
        reopold(old_logprobs=LOGPROBS, clip_range=0.2),
        ["clip_range"],
    ),
}


def refuses(error, make, words):
    """The plain call and the call in place, whose logits are as before."""
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    logits = STUDENT.clone().requires_grad_() * 1.0
    with pytest.raises(error):
        make(logits, inplace=True)
    assert torch.equal(logits, STUDENT)
    assert logits._version == 0


@pytest.mark.parametrize("name", VALUES)
def test_wrong_value(name):
    refuses(ValueError, *VALUES[name])


@pytest.mark.parametrize("name", TYPES)
def test_wrong_type(name):
    refuses(TypeError, *TYPES[name])


def test_these_calls_are_right_before_they_are_spoiled():
    for make in FAMILY.values():
        assert make()().isfinite()
        assert make(mask=PREFIX, weights=LOGPROBS, temperature=2.0)().isfinite()
    for make in WITH_TOPK.values():
        assert make(teacher=sparse())().isfinite()
    for make in OLD.values():
        assert make(old_logprobs=LOGPROBS)().isfinite()
    assert reopold(teacher=LOGPROBS)().isfinite()
    assert reopold(teacher=sparse())().isfinite()
    assert tropd(prefix_mask=PREFIX, prefix_weight=0)().isfinite()
    assert tropd(region="threshold", threshold=-2, uniforms=None)().isfinite()


def test_what_inactive_positions_hold_is_no_error():
    mask = ~PREFIX
    out_of_range = TOKENS.masked_fill(PREFIX, -100)
    teacher = sparse(ids=sparse().ids.masked_fill(PREFIX[..., None], 10**6))
    uniforms = UNIFORMS.masked_fill(PREFIX, 7.0)
    assert tropd(mask=mask, uniforms=uniforms, tokens=out_of_range)().isfinite()
    for make in WITH_TOPK.values():
        assert make(teacher=teacher, mask=mask, tokens=out_of_range)().isfinite()
    # The teacher's row of a prefix position is not read either; its token is.
    assert tropd(prefix_mask=PREFIX, uniforms=uniforms, teacher=teacher)().isfinite()
    with pytest.raises(ValueError, match="tokens"):
        tropd(prefix_mask=PREFIX, tokens=out_of_range)()


# ----------------------------------------------------------------- gates, masks, schedules

HELPERS = {
    "drift_gate block 0": (lambda: opdc.drift_gate(LOGPROBS, LOGPROBS, block=0), ["block"]),
    "drift_gate block -3": (lambda: opdc.drift_gate(LOGPROBS, LOGPROBS, block=-3), ["block"]),
    **{
        f"drift_gate kappa {value}": (
            lambda value=value: opdc.drift_gate(LOGPROBS, LOGPROBS, kappa=value),
            ["kappa"],
        )
        for value in (-1.0, math.nan, INFINITY)
    },
    "drift_gate old_logprobs": (
        lambda: opdc.drift_gate(LOGPROBS, LOGPROBS[0]),
        ["old_logprobs", "(3,)", "(2, 3)"],
    ),
    "drift_gate mask": (
        lambda: opdc.drift_gate(LOGPROBS, LOGPROBS, PREFIX[0]),
        ["mask", "(3,)", "(2, 3)"],
    ),
    "special_token_mask mask": (
        lambda: opdc.special_token_mask(TOKENS, [1], PREFIX[:, :2]),
        ["mask", "(2, 2)", "(2, 3)"],
    ),
    **{
        f"PrefixLength steps {steps}": (
            lambda steps=steps: opdc.PrefixLength(steps=steps)(1, 10),
            ["steps"],
        )
        for steps in (0, -5)
    },
    **{
        f"BlendBudget steps {steps}": (
            lambda steps=steps: opdc.BlendBudget(steps=steps)(1),
            ["steps"],
        )
        for steps in (0, -5)
    },
    **{
        f"BlendBudget epsilon {value}": (
            lambda value=value: opdc.BlendBudget(epsilon=value)(1),
            ["epsilon"],
        )
        for value in (-0.1, math.nan)
    },
    "PrefixLength step": (lambda: opdc.PrefixLength()(-1, 10), ["step"]),
    "PrefixLength length": (lambda: opdc.PrefixLength()(1, -10), ["length"]),
    "BlendBudget step": (lambda: opdc.BlendBudget()(-1), ["step"]),
}
HELPER_TYPES = {
    **{
        f"{name} without token_logprobs": (
            make(teacher=sparse(token_logprobs=None)),
            ["token_logprobs", "None"],
        )
        for name, make in FAMILY.items()
    },
    "eopd without the entropy": (eopd(teacher=sparse(entropy=None)), ["entropy", "None"]),
    "drift_gate block as a float": (
        lambda: opdc.drift_gate(LOGPROBS, LOGPROBS, block=2.0),
        ["block"],
    ),
    "drift_gate kappa as text": (
        lambda: opdc.drift_gate(LOGPROBS, LOGPROBS, kappa="1"),
        ["kappa"],
    ),
    "drift_gate of a list": (lambda: opdc.drift_gate([1.0], LOGPROBS), ["logprobs", "list"]),
    "drift_gate of integers": (lambda: opdc.drift_gate(TOKENS, LOGPROBS), ["logprobs", "int64"]),
    "drift_gate without old_logprobs": (
        lambda: opdc.drift_gate(LOGPROBS, None),
        ["old_logprobs", "NoneType"],
    ),
    "special_token_mask of floats": (
        lambda: opdc.special_token_mask(LOGPROBS, [1]),
        ["tokens", "float32"],
    ),
    "special_token_mask with a fraction": (
        lambda: opdc.special_token_mask(TOKENS, [1.5]),
        ["ids"],
    ),
    "special_token_mask with a text": (lambda: opdc.special_token_mask(TOKENS, ["a"]), ["ids"]),
}


@pytest.mark.parametrize("name", HELPERS)
def test_helpers_refuse_wrong_values(name):
    make, words = HELPERS[name]
    with pytest.raises(ValueError) as caught:
        make()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", HELPER_TYPES)
def test_helpers_refuse_wrong_types(name):
    make, words = HELPER_TYPES[name]
    with pytest.raises(TypeError) as caught:
        make()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_modules_refuse_like_functions():
    for loss, words in (
        (opdc.nn.TrOPDLoss(region="all"), "region"),
        (opdc.nn.TrOPDLoss(clip_range=0.2), "old_logprobs"),
        (opdc.nn.EOPDLoss(k=0), "k"),
        (opdc.nn.REOPOLDLoss(keep=0.0, phase="refinement"), "keep"),
        (opdc.nn.AOPDLoss(threshold=math.nan), "threshold"),
    ):
        with pytest.raises(ValueError, match=words):
            loss(STUDENT, TEACHER, tokens=TOKENS)
    for loss in (
        opdc.nn.TrOPDLoss(),
        opdc.nn.EOPDLoss(),
        opdc.nn.REOPOLDLoss(),
        opdc.nn.AOPDLoss(),
    ):
        with pytest.raises(TypeError, match="tokens"):
            loss(STUDENT, TEACHER)
    with pytest.raises(TypeError, match="speed"):
        opdc.nn.TrOPDLoss(speed=2)


# ----------------------------------------------------------------- random calls

WORDS = ("sampled", "expected", "threshold", "forward_kl", "mask", "clip", "old", "current")
WORDS = (*WORDS, "exploration", "refinement", "", None, 3)
OPTIONS = {
    "tropd": {
        "region": (WORDS, lambda r: r.choice(["sampled", "expected", "threshold"])),
        "outlier": (WORDS, lambda r: r.choice(["forward_kl", "mask", "clip"])),
        "threshold": (WRONG_NUMBERS, lambda _: -0.5),
        "prefix_mask": (WRONG_TENSORS, lambda _: PREFIX),
        "prefix_weight": (WRONG_NUMBERS, lambda _: 0.3),
        "old_logprobs": (WRONG_TENSORS, lambda _: torch.randn(POSITIONS) - 2),
        "advantage": (WORDS, lambda r: r.choice(["old", "current"])),
        "uniforms": (WRONG_TENSORS, lambda _: torch.rand(POSITIONS)),
        "k": (WRONG_NUMBERS, lambda _: 3),
    },
    "eopd": {
        "entropy_threshold": (WRONG_NUMBERS, lambda _: 1.0),
        "forward_weight": (WRONG_NUMBERS, lambda _: 0.5),
        "old_logprobs": (WRONG_TENSORS, lambda _: torch.randn(POSITIONS) - 2),
        "clip_range": (WRONG_NUMBERS, lambda _: 0.3),
        "k": (WRONG_NUMBERS, lambda _: 3),
    },
    "aopd": {
        "threshold": (WRONG_NUMBERS, lambda _: 0.05),
        "k": (WRONG_NUMBERS, lambda _: 3),
    },
    "reopold": {
        "phase": (WORDS, lambda r: r.choice(["exploration", "refinement"])),
        "mixture": (WRONG_NUMBERS, lambda _: 0.4),
        "keep": (WRONG_NUMBERS, lambda _: 0.5),
        "entropy_threshold": (WRONG_NUMBERS, lambda _: 1.0),
        "old_logprobs": (WRONG_TENSORS, lambda _: torch.randn(POSITIONS) - 2),
    },
}
FIELDS = ("ids", "logprobs", "token_logprobs", "entropy")


def random_teacher(r):
    if r.random() < 0.5:
        return torch.randn(*POSITIONS, V)
    teacher = sparse()
    if r.random() < 0.5:
        teacher = teacher._replace(**{r.choice(FIELDS): r.choice(WRONG_TENSORS)()})
    return teacher


def random_call(r):
    name = r.choice(list(OPTIONS))
    keywords = COMMON | OPTIONS[name]
    arguments = [torch.randn(*POSITIONS, V), random_teacher(r), make_tokens()]
    given = {key: right(r) for key, (_, right) in keywords.items() if r.random() < 0.15}
    if name == "tropd":
        given.setdefault("uniforms", torch.rand(POSITIONS))
    for _ in range(r.choice([0, 0, 1, 1, 2])):
        if r.random() < 0.3:
            arguments[r.randrange(3)] = r.choice(WRONG_TENSORS)()
        else:
            key = r.choice(list(keywords))
            wrong = r.choice(keywords[key][0])
            given[key] = wrong() if callable(wrong) else wrong
    return name, arguments, given


def check_against_the_oracle(name, arguments, given, result):
    metrics, inplace = given.pop("return_metrics", False), given.pop("inplace", False)
    value = result[0] if metrics else result
    student, teacher, tokens = arguments
    if not isinstance(teacher, torch.Tensor):
        given.pop("k", None)
        if name == "reopold":  # reads nothing else
            teacher = teacher.token_logprobs
        elif name != "eopd":
            teacher = teacher._replace(entropy=None)
    if given.get("region", "sampled") != "sampled":
        given.pop("uniforms", None)
    fields = [teacher] if isinstance(teacher, torch.Tensor) else list(teacher)
    tensors = [student, tokens, *fields, *given.values()]
    tensors = [x for x in tensors if isinstance(x, torch.Tensor) and x.numel()]
    if inplace or value.device.type == "meta" or not all(is_ordinary(x) for x in tensors):
        return
    sizes = (given.get(key, 1.0) for key in ("temperature", "forward_weight", "prefix_weight"))
    if not all(1e-3 < abs(size) < 1e3 for size in sizes):
        return  # what remains is rounding
    expected = getattr(oracle_published, name)(student, teacher, tokens, **given)
    torch.testing.assert_close(
        value, expected.to(value.dtype), rtol=2e-5, atol=2e-5, equal_nan=True
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_end_in_an_error_or_a_right_answer(seed):
    r = random.Random(seed)
    torch.manual_seed(seed)
    answered = answered_calls(400, lambda: random_call(r), check_against_the_oracle)
    assert 50 < answered < 350
