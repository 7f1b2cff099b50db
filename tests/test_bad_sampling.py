"""Wrong input of the samplers: an error that names the argument, and nothing drawn or changed."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
import pytest
import torch

import opdc
import oracle_sampling
from fuzz import answered_calls
from test_bad_input import WRONG_NUMBERS, WRONG_TENSORS, is_ordinary
from test_sampling import DTYPES

POSITIONS, V = (2, 3), 7
STUDENT, TEACHER = (torch.linspace(-2, 2, 42).sin().reshape(2, 3, 7) * k for k in (3.0, 5.0))
DRAFTS = torch.arange(6).reshape(POSITIONS)
UNIFORMS = torch.linspace(0, 0.9, 6).reshape(POSITIONS)
PAIRS = torch.linspace(0, 0.9, 12).reshape(2, 3, 2)
BUDGETS = torch.full(POSITIONS, 0.02)
INFINITY = math.inf


def sample(logits=STUDENT, **keywords):
    return functools.partial(opdc.sample, logits, **({"uniforms": UNIFORMS} | keywords))


def blend(student=STUDENT, teacher=TEACHER, epsilon=0.02, **keywords):
    return functools.partial(opdc.blend, student, teacher, epsilon, **keywords)


def blend_sample(student=STUDENT, teacher=TEACHER, epsilon=0.02, **keywords):
    keywords = {"uniforms": UNIFORMS} | keywords
    return functools.partial(opdc.blend_sample, student, teacher, epsilon, **keywords)


def blend_verify(draft_tokens=DRAFTS, student=STUDENT, teacher=TEACHER, epsilon=0.02, **keywords):
    keywords = {"uniforms": PAIRS} | keywords
    return functools.partial(opdc.blend_verify, draft_tokens, student, teacher, epsilon, **keywords)


BLENDS = {"blend": blend, "blend_sample": blend_sample, "blend_verify": blend_verify}
DRAWS = {"sample": sample, "blend_sample": blend_sample, "blend_verify": blend_verify}
ALL = {"sample": sample} | BLENDS
UNIFORMS_OF = {"sample": UNIFORMS, "blend_sample": UNIFORMS, "blend_verify": PAIRS}


def replaced(tensor, value, index=(1, 2)):
    changed = tensor.clone()
    changed[index] = value
    return changed


# Each entry: the call, and what its message must contain.
VALUES = {
    **{
        f"{name} temperature {value}": (make(temperature=value), ["temperature"])
        for name, make in ALL.items()
        for value in (0, 0.0, -1.0, math.nan, INFINITY, 10**400)
    },
    **{
        f"{name} top_p {value}": (make(top_p=value), ["top_p"])
        for name, make in DRAWS.items()
        for value in (0, 0.0, -0.1, 1.0000001, 2, math.nan, INFINITY, -INFINITY, 10**400)
    },
    **{
        f"{name} top_k {value}": (make(top_k=value), ["top_k", str(value)])
        for name, make in DRAWS.items()
        for value in (0, -1, 2**63, -(2**70))
    },
    **{
        f"{name} valid_vocab {value}": (make(valid_vocab=value), ["valid_vocab", str(value)])
        for name, make in ALL.items()
        for value in (0, -1, V + 1, 2**63)
    },
    **{
        f"{name} uniform {value}": (
            make(uniforms=replaced(UNIFORMS_OF[name], value)),
            ["uniforms", "[0, 1)"],
        )
        for name, make in DRAWS.items()
        for value in (1.0, -0.25, -1e-30, 1.5, math.nan, INFINITY, -INFINITY)
    },
    # Also where the draft stands already without it: u₁ of a position.
    "blend_verify second uniform": (
        blend_verify(uniforms=replaced(PAIRS, 1.0, (0, 0, 1))),
        ["uniforms"],
    ),
    **{
        f"{name} epsilon {value}": (make(epsilon=value), ["epsilon"])
        for name, make in BLENDS.items()
        for value in (-0.1, -1e-300, math.nan, -INFINITY, 10**400)
    },
    **{
        f"{name} epsilon of one row {value}": (
            make(epsilon=replaced(BUDGETS, value)),
            ["epsilon", *([str(value)] if value < 0 else ["nan"])],
        )
        for name, make in BLENDS.items()
        for value in (-0.25, math.nan)
    },
    **{
        f"{name} epsilon of the shape {shape}": (
            make(epsilon=torch.zeros(shape)),
            ["epsilon", str(shape), "(2, 3)"],
        )
        for name, make in BLENDS.items()
        for shape in ((2,), (3, 2), (1, 2, 3), (2, 3, 1))
    },
    **{
        f"{name} eos_map {value}": (make(eos_map=value), ["eos_map"])
        for name, make in BLENDS.items()
        for value in ((3, 3), (-1, 2), (2, -1), (V, 0), (0, V), (0, 2**62), (2**63, 0), (1,), ())
    },
    **{
        f"{name} eos_map of three": (make(eos_map=(0, 1, 2)), ["eos_map"])
        for name, make in BLENDS.items()
    },
    **{
        f"{name} eos_map beyond valid_vocab": (
            make(eos_map=(0, 5), valid_vocab=5),
            ["eos_map", "5"],
        )
        for name, make in BLENDS.items()
    },
    **{
        f"draft {value}": (
            blend_verify(replaced(DRAFTS, value)),
            ["draft_tokens", str(value)],
        )
        for value in (-1, V, -100, 2**63 - 1, -(2**63))
    },
    "draft beyond valid_vocab": (blend_verify(valid_vocab=5), ["draft_tokens", "5"]),
    # Shapes.
    "drafts of other positions": (
        blend_verify(DRAFTS[:, :2]),
        ["draft_tokens", "(2, 2)", "(2, 3)"],
    ),
    "drafts with an axis too many": (blend_verify(DRAFTS[..., None]), ["draft_tokens"]),
    **{
        f"{name} uniforms of another shape": (
            make(uniforms=UNIFORMS_OF[name][:, :2]),
            ["uniforms", "(2, 2", "(2, 3"],
        )
        for name, make in DRAWS.items()
    },
    "one uniform for each draft": (
        blend_verify(uniforms=UNIFORMS),
        ["uniforms", "2 numbers", "(2, 3)"],
    ),
    "two uniforms for each draw": (blend_sample(uniforms=PAIRS), ["uniforms", "(2, 3)"]),
    **{
        f"{name} uniforms beside a generator": (
            make(generator=torch.Generator()),
            ["uniforms", "generator"],
        )
        for name, make in DRAWS.items()
    },
    **{
        f"{name} vocabularies": (
            make(teacher=TEACHER[..., :5]),
            ["teacher", "5", "7", "valid_vocab"],
        )
        for name, make in BLENDS.items()
    },
    **{
        f"{name} valid_vocab beyond the teacher": (
            make(teacher=TEACHER[..., :5], valid_vocab=6),
            ["valid_vocab", "6", "5"],
        )
        for name, make in BLENDS.items()
    },
    **{
        f"{name} teacher of other positions": (make(teacher=TEACHER[:1]), ["teacher"])
        for name, make in BLENDS.items()
    },
    **{
        f"{name} teacher with an axis too few": (make(teacher=TEACHER[0]), ["teacher"])
        for name, make in BLENDS.items()
    },
    "sample from a number": (sample(torch.tensor(1.0), uniforms=None), ["logits"]),
    "sample from no vocabulary": (sample(STUDENT[..., :0]), ["logits", "vocabulary"]),
    **{
        f"{name} from a number": (make(student=torch.tensor(1.0)), ["student"])
        for name, make in BLENDS.items()
    },
    **{
        f"{name} from no vocabulary": (
            make(student=STUDENT[..., :0], teacher=TEACHER[..., :0]),
            ["student", "vocabulary"],
        )
        for name, make in BLENDS.items()
    },
}

NOT_TENSORS = (None, 3, [1.0], "text", np.zeros(7, np.float32))
TYPES = {
    **{
        f"{name} {keyword} as {value!r}": (make(**{keyword: value}), [keyword])
        for name, make in ALL.items()
        for keyword in ("temperature", *(["top_p"] if name != "blend" else []))
        for value in ("1", True, [0.5], 1j, None)
    },
    **{
        f"{name} {keyword} as {value!r}": (make(**{keyword: value}), [keyword])
        for name, make in ALL.items()
        for keyword in ("valid_vocab", *(["top_k"] if name != "blend" else []))
        for value in ("3", 2.0, True, [3])
    },
    **{
        f"{name} epsilon as {value!r}": (make(epsilon=value), ["epsilon"])
        for name, make in BLENDS.items()
        for value in ("0.02", None, [0.02], 1j, True)
    },
    **{
        f"{name} epsilon of integers": (make(epsilon=DRAFTS), ["epsilon", "int64"])
        for name, make in BLENDS.items()
    },
    **{
        f"{name} eos_map of {value!r}": (make(eos_map=(0, value)), ["eos_map"])
        for name, make in BLENDS.items()
        for value in ("1", 1.0, None, True)
    },
    **{
        f"{name} uniforms as {type(value).__name__}": (make(uniforms=value), ["uniforms"])
        for name, make in DRAWS.items()
        for value in NOT_TENSORS[1:]
    },
    **{
        f"{name} integer uniforms": (
            make(uniforms=UNIFORMS_OF[name].long()),
            ["uniforms", "int64"],
        )
        for name, make in DRAWS.items()
    },
    **{
        f"{name} uniforms on another device": (
            make(uniforms=UNIFORMS_OF[name].to("meta")),
            ["uniforms", "meta", "cpu"],
        )
        for name, make in DRAWS.items()
    },
    **{
        f"sample from {type(value).__name__}": (sample(value, uniforms=None), ["logits"])
        for value in NOT_TENSORS
    },
    "sample from integers": (sample(STUDENT.long()), ["logits", "int64"]),
    "sample from complex numbers": (sample(STUDENT.cfloat()), ["logits", "complex"]),
    "sample from a sparse tensor": (sample(STUDENT.to_sparse()), ["logits"]),
    **{
        f"{name} {model} as {type(value).__name__}": (make(**{model: value}), [model])
        for name, make in BLENDS.items()
        for model in ("student", "teacher")
        for value in NOT_TENSORS
    },
    **{
        f"{name} {model} of integers": (
            make(**{model: STUDENT.long()}),
            [model, "int64"],
        )
        for name, make in BLENDS.items()
        for model in ("student", "teacher")
    },
    **{
        f"{name} teacher on another device": (
            make(teacher=TEACHER.to("meta")),
            ["teacher", "meta", "cpu"],
        )
        for name, make in BLENDS.items()
    },
    **{
        f"{name} teacher of slots": (
            make(teacher=opdc.topk(TEACHER, 3)),
            ["teacher", "TopK"],
        )
        for name, make in BLENDS.items()
    },
    **{
        f"drafts as {type(value).__name__}": (blend_verify(value), ["draft_tokens"])
        for value in NOT_TENSORS
    },
    "drafts of floats": (blend_verify(DRAFTS.float()), ["draft_tokens", "float32"]),
    "drafts on another device": (
        blend_verify(DRAFTS.to("meta")),
        ["draft_tokens", "meta", "cpu"],
    ),
    **{
        f"{name} generator": (make(uniforms=None, generator=3), ["generator"])
        for name, make in DRAWS.items()
    },
    **{f"{name} unknown keyword": (make(speed=2), ["speed"]) for name, make in ALL.items()},
    "blend cuts nothing off": (blend(top_k=3), ["top_k"]),
    "sample has no budget": (sample(epsilon=0.02), ["epsilon"]),
}
INPUTS = (STUDENT, TEACHER, DRAFTS, UNIFORMS, PAIRS, BUDGETS)


def refuses(error, call, words):
    before = [x.clone() for x in INPUTS]
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(INPUTS, before, strict=True))


@pytest.mark.parametrize("name", VALUES)
def test_wrong_value(name):
    refuses(ValueError, *VALUES[name])


@pytest.mark.parametrize("name", TYPES)
def test_wrong_type(name):
    refuses(TypeError, *TYPES[name])


def test_these_calls_are_right_before_they_are_spoiled():
    for make in ALL.values():
        for options in ({}, {"temperature": 2.0, "valid_vocab": 6}, {"temperature": 1}):
            assert not any(x.isnan().any() for x in make(**options)()[:1])
    for make in DRAWS.values():
        assert make(top_k=3, top_p=0.5)().tokens[:, 0].min() >= 0
        assert make(top_k=np.int64(3), top_p=1)().tokens[:, 0].min() >= 0
        assert make(uniforms=None, generator=torch.Generator())().tokens[:, 0].min() >= 0
    for make in BLENDS.values():
        for epsilon in (0, 1, 0.5, INFINITY, BUDGETS, BUDGETS[:, :1], np.float32(0.5)):
            for eos_map in (None, (0, 6), [0, np.int64(6)]):
                assert make(epsilon=epsilon, eos_map=eos_map)().beta[:, 0].isfinite().all()


@pytest.mark.parametrize("name", DRAWS)
def test_the_place_of_what_is_wrong_is_told(name):
    """Among thousands of numbers, the one to look at."""
    logits = torch.randn(50, 40, 5)
    uniforms = torch.zeros(50, 40, *UNIFORMS_OF[name].shape[2:])
    uniforms[30, 34] = 1.0
    rows = {"sample": (logits,), "blend_sample": (logits, logits, 0.1)}
    rows["blend_verify"] = (torch.zeros(50, 40, dtype=torch.int64), *rows["blend_sample"])
    with pytest.raises(ValueError, match=r"uniforms.*\b1234\b"):
        getattr(opdc, name)(*rows[name], uniforms=uniforms)


def test_a_draft_that_is_void_is_checked_too():
    """Nothing is drawn before every id is known to be one."""
    with pytest.raises(ValueError, match="draft_tokens"):
        blend_verify(replaced(DRAFTS, V, (0, 2)), uniforms=torch.full((2, 3, 2), 0.99))()
    with pytest.raises(ValueError, match="uniforms"):
        blend_verify(uniforms=replaced(torch.full((2, 3, 2), 0.99), 1.0, (0, 2, 1)))()


# ----------------------------------------------------------------- random calls

OPTIONS = {
    "temperature": (WRONG_NUMBERS, lambda r: r.choice([0.5, 1.0, 2.0])),
    "valid_vocab": (WRONG_NUMBERS, lambda r: r.choice([5, 7])),
}
CUTS = {
    "top_k": (WRONG_NUMBERS, lambda r: r.choice([1, 3, 100])),
    "top_p": (WRONG_NUMBERS, lambda r: r.choice([0.3, 0.9, 1.0])),
}
ENDS = {
    "eos_map": (
        (3, "12", (1, 1), (0, 9), (-1, 0), (0, 1, 2), (None, 1), (0.0, 1)),
        lambda r: r.choice([(0, 4), (4, 1)]),
    )
}
KEYWORDS = {
    "sample": OPTIONS | CUTS,
    "blend": OPTIONS | ENDS,
    "blend_sample": OPTIONS | CUTS | ENDS,
    "blend_verify": OPTIONS | CUTS | ENDS,
}
ARGUMENTS = {
    "sample": ("logits",),
    "blend": ("student", "teacher", "epsilon"),
    "blend_sample": ("student", "teacher", "epsilon"),
    "blend_verify": ("draft_tokens", "student", "teacher", "epsilon"),
}


def random_call(r):
    name = r.choice(list(KEYWORDS))
    keywords = KEYWORDS[name]
    right = {
        "draft_tokens": lambda: torch.randint(5, POSITIONS),
        "epsilon": lambda: r.choice([0.0, 0.02, 1.0, INFINITY, torch.rand(POSITIONS)]),
    }
    arguments = [
        right.get(key, lambda: torch.randn(*POSITIONS, V).to(r.choice(DTYPES)))()
        for key in ARGUMENTS[name]
    ]
    given = {key: choice(r) for key, (_, choice) in keywords.items() if r.random() < 0.2}
    if name != "blend":
        shape = (*POSITIONS, 2) if name == "blend_verify" else POSITIONS
        given["uniforms"] = torch.rand(shape, dtype=torch.float64)
    for _ in range(r.choice([0, 0, 1, 1, 2])):
        if r.random() < 0.5:
            arguments[r.randrange(len(arguments))] = r.choice(WRONG_TENSORS)()
        elif r.random() < 0.2 and name != "blend":
            given["uniforms"] = r.choice(WRONG_TENSORS)()
        else:
            key = r.choice(list(keywords))
            given[key] = r.choice(keywords[key][0])
    return name, arguments, given


def check_against_the_oracle(name, arguments, given, result):
    tensors = [x for x in (*arguments, *given.values()) if isinstance(x, torch.Tensor)]
    if any(x.device.type == "meta" or not x.numel() for x in tensors):
        return
    if not all(is_ordinary(x) for x in tensors) or not 1e-3 < given.get("temperature", 1.0) < 1e3:
        return  # what remains is rounding
    expected = getattr(oracle_sampling, name)(*arguments, **given)
    if name == "blend":
        size = expected.logprobs.shape[-1]
        assert (result.logprobs[..., size:] == -INFINITY).all()
        result = result._replace(logprobs=result.logprobs[..., :size])
    elif not torch.equal(result.tokens, expected.tokens):
        return  # u lies at a boundary of the law; where that may be is judged elsewhere
    for value, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(
            value, wanted.to(value.dtype), rtol=2e-3, atol=2e-3, equal_nan=True
        )


@pytest.mark.parametrize("seed", range(3))
def test_random_calls_end_in_an_error_or_a_right_answer(seed):
    r = random.Random(seed)
    torch.manual_seed(seed)
    answered = answered_calls(150, lambda: random_call(r), check_against_the_oracle)
    assert 30 < answered < 130


def test_eos_map_of_one_model_is_refused_by_the_core():
    numbers = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"eos_map.*without a teacher"):
        torch.ops.opdc.sample(
            torch.zeros(1, 4), None, None, None, torch.zeros(1), numbers, 0, 0, 0, 1
        )
