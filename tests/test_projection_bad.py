"""Projections that do not fit: an error that names the tensor, what came and what is wanted, before
anything is written."""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest
import torch

import opdc
from opdc import Projection

POSITIONS, H, V = (2, 3), 4, 7
HIDDEN = torch.linspace(-2, 2, 24).sin().reshape(*POSITIONS, H)
WEIGHT = torch.linspace(-3, 3, 28).cos().reshape(V, H)
OTHER = Projection(
    torch.linspace(-1, 1, 30).sin().reshape(*POSITIONS, 5), torch.ones(V, 5).cumsum(0)
)
TOKENS = torch.arange(6).reshape(POSITIONS)
INPUTS, ADAPTER = torch.ones(*POSITIONS, 2), torch.ones(V, 2)
SERVER = opdc.TopK(torch.arange(3).expand(*POSITIONS, 3), torch.full((*POSITIONS, 3), -2.0))

PLACES = {
    "student": lambda given, **common: opdc.reverse_kl(given, OTHER, **common),
    "teacher": lambda given, **common: opdc.reverse_kl(OTHER, given, **common),
    "logits": lambda given, **common: opdc.entropy(given, **common),
}


def projection(**changes):
    return Projection(HIDDEN, WEIGHT)._replace(**changes)


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to drop these dtypes
        return torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)


# ----------------------------------------------------------------- tensors and numbers


# What the projection is, and the words of the message behind the name of the tensor.
VALUES = {
    "hidden without axes": (projection(hidden=torch.tensor(1.0)), "hidden", []),
    "sizes that do not fit": (projection(weight=torch.ones(V, 5)), "weight", ["(7, 5)", "4"]),
    "a transposed head": (projection(weight=WEIGHT.t()), "weight", ["(4, 7)", "4"]),
    "a head of one axis": (projection(weight=WEIGHT[0]), "weight", ["(4,)"]),
    "a head of three axes": (projection(weight=WEIGHT[None]), "weight", ["(1, 7, 4)"]),
    "an empty vocabulary": (projection(weight=WEIGHT[:0]), "weight", ["0"]),
    "columns for rows": (projection(weight=WEIGHT.t().contiguous().t()), "weight", ["contiguous"]),
    "every second column": (projection(weight=torch.ones(V, 2 * H)[:, ::2]), "weight", ["stride"]),
    "a short bias": (projection(bias=torch.ones(V - 1)), "bias", ["(6,)", "7"]),
    "a bias of two axes": (projection(bias=torch.ones(1, V)), "bias", ["(1, 7)", "7"]),
    "a bias of one number": (projection(bias=torch.tensor(1.0)), "bias", ["()", "7"]),
    "an adapter of other positions": (
        projection(adapter=(INPUTS[:, :2], ADAPTER)),
        "adapter",
        ["(2, 2, 2)", "(2, 3"],
    ),
    "an adapter of another rank": (
        projection(adapter=(INPUTS, torch.ones(V, 3))),
        "adapter",
        ["(7, 3)", "2"],
    ),
    "an adapter of another vocabulary": (
        projection(adapter=(INPUTS, torch.ones(V + 1, 2))),
        "adapter",
        ["(8, 2)", "7"],
    ),
    **{
        f"softcap {value}": (projection(softcap=value), "softcap", [])
        for value in (0.0, 0, -1.0, math.nan, math.inf)
    },
    **{
        f"scale {value}": (projection(scale=value), "scale", [])
        for value in (math.nan, math.inf, -math.inf)
    },
    **{
        f"max_bytes {value}": (projection(max_bytes=value), "max_bytes", [str(value)])
        for value in (0, -1)
    },
}
TYPES = {
    "hidden of integers": (projection(hidden=HIDDEN.long()), "hidden", ["int64"]),
    "hidden of bools": (projection(hidden=HIDDEN > 0), "hidden", ["bool"]),
    "complex hidden": (projection(hidden=HIDDEN.to(torch.complex64)), "hidden", ["complex64"]),
    "float8 hidden": (projection(hidden=HIDDEN.to(torch.float8_e4m3fn)), "hidden", ["float8"]),
    "hidden as a list": (projection(hidden=[[1.0]]), "hidden", ["list"]),
    "hidden as an array": (projection(hidden=np.ones((2, 3, 4))), "hidden", ["ndarray"]),
    "no hidden": (projection(hidden=None), "hidden", ["None"]),
    "sparse hidden": (projection(hidden=HIDDEN.to_sparse()), "hidden", ["dense"]),
    "a head of integers": (projection(weight=WEIGHT.to(torch.int8)), "weight", ["int8"]),
    "a complex head": (projection(weight=WEIGHT.to(torch.complex64)), "weight", ["complex64"]),
    "a float8 head": (projection(weight=WEIGHT.to(torch.float8_e5m2)), "weight", ["float8"]),
    "a quantised head": (
        projection(weight=quantised()),
        "weight",
        ["qint8"],
    ),
    "a sparse head": (projection(weight=WEIGHT.to_sparse()), "weight", ["dense"]),
    "a layer for its weight": (projection(weight=torch.nn.Linear(H, V)), "weight", ["Linear"]),
    "no head": (projection(weight=None), "weight", ["None"]),
    "a head elsewhere": (projection(weight=WEIGHT.to("meta")), "weight", ["meta", "cpu"]),
    "a bias of integers": (projection(bias=torch.ones(V).long()), "bias", ["int64"]),
    "a bias elsewhere": (projection(bias=torch.ones(V, device="meta")), "bias", ["meta", "cpu"]),
    "a bias as a number": (projection(bias=1.0), "bias", ["float"]),
    "an adapter as a tensor": (projection(adapter=ADAPTER), "adapter", ["Tensor"]),
    "an adapter of one tensor": (projection(adapter=(INPUTS,)), "adapter", []),
    "an adapter of layers": (
        projection(adapter=(INPUTS, torch.nn.Linear(2, V))),
        "adapter",
        ["Linear"],
    ),
    "an adapter of integers": (projection(adapter=(INPUTS, ADAPTER.long())), "adapter", ["int64"]),
    "an adapter elsewhere": (
        projection(adapter=(INPUTS.to("meta"), ADAPTER)),
        "adapter",
        ["meta", "cpu"],
    ),
    **{
        f"{name} as {type(value).__name__}": (
            projection(**{name: value}),
            name,
            [type(value).__name__],
        )
        for name in ("scale", "softcap", "max_bytes")
        for value in ("1", True, torch.ones(()))
    },
    "scale as None": (projection(scale=None), "scale", ["None"]),
    "max_bytes as float": (projection(max_bytes=1e9), "max_bytes", ["float"]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [*VALUES, *TYPES])
def test_a_projection_that_does_not_fit(name, place):
    given, field, words = (VALUES | TYPES)[name]
    with pytest.raises(ValueError if name in VALUES else TypeError) as caught:
        PLACES[place](given)
    message = str(caught.value)
    for word in (f"{place}.{field}", *words):
        assert word in message, message


@pytest.mark.parametrize("place", PLACES)
def test_a_budget_that_is_too_small(place):
    """The message names whose it is and the bytes that are enough: what one byte less is not."""
    with pytest.raises(ValueError, match=rf"{place}.*max_bytes") as caught:
        PLACES[place](projection(max_bytes=3))
    enough = max(int(number) for number in re.findall(r"\d+", str(caught.value)))
    PLACES[place](projection(max_bytes=enough))
    with pytest.raises(ValueError, match=rf"{place}.*max_bytes.*{enough}"):
        PLACES[place](projection(max_bytes=enough - 1))


@pytest.mark.parametrize("name", ["sizes that do not fit", "a short bias", "softcap 0.0"])
def test_every_function_names_the_same_tensor(name):
    given, field, _ = VALUES[name]
    calls = {
        "logits": [
            lambda: opdc.token_logprobs(given, TOKENS),
            lambda: opdc.topk(given, 2),
        ],
        "student": [
            lambda: opdc.lsm(given, SERVER),
            lambda: opdc.k1(given, torch.ones(POSITIONS), TOKENS),
            lambda: opdc.tropd(given, OTHER, TOKENS, k=2),
            lambda: opdc.reopold(given, OTHER, TOKENS, phase="refinement"),
            lambda: opdc.nn.JSDLoss()(given, OTHER),
            lambda: opdc.nn.LSMLoss()(given, SERVER),
        ],
        "teacher": [
            lambda: opdc.lsm(torch.randn(*POSITIONS, V), given, k=3),
            lambda: opdc.k3(OTHER, given, TOKENS),
        ],
    }
    for place, wrong in calls.items():
        for call in wrong:
            with pytest.raises(ValueError, match=rf"{place}\.{field}"):
                call()


# ----------------------------------------------------------------- one beside the other


BESIDE = {
    "other positions": (
        lambda: opdc.reverse_kl(projection(), OTHER._replace(hidden=OTHER.hidden[:1])),
        ["teacher", "1", "2"],
    ),
    "positions of another shape": (
        lambda: opdc.jsd(projection(), OTHER._replace(hidden=OTHER.hidden.reshape(6, 5))),
        ["teacher"],
    ),
    "logits of other positions": (
        lambda: opdc.reverse_kl(projection(), torch.ones(3, 2, V)),
        ["teacher", "3", "2"],
    ),
    "another vocabulary": (
        lambda: opdc.reverse_kl(projection(), OTHER._replace(weight=OTHER.weight[:5])),
        ["teacher", "5", "7", "valid_vocab"],
    ),
    "logits of another vocabulary": (
        lambda: opdc.reverse_kl(torch.ones(*POSITIONS, V + 2), projection()),
        ["teacher", "7", "9", "valid_vocab"],
    ),
    "valid_vocab beyond the heads": (
        lambda: opdc.reverse_kl(projection(), OTHER, valid_vocab=V + 1),
        ["valid_vocab", "8"],
    ),
    "a server's slots of other positions": (
        lambda: opdc.lsm(projection(), SERVER._replace(ids=SERVER.ids[:1])),
        ["teacher.ids"],
    ),
    "log-probs of other positions": (
        lambda: opdc.k2(projection(), torch.ones(2, 2), TOKENS),
        ["teacher", "(2, 2)", "(2, 3)"],
    ),
    "mask": (
        lambda: opdc.reverse_kl(projection(), OTHER, mask=torch.ones(2, 4)),
        ["mask", "(2, 4)", "(2, 3)"],
    ),
    "weights": (
        lambda: opdc.reverse_kl(projection(), OTHER, weights=torch.ones(3, 2)),
        ["weights", "(3, 2)", "(2, 3)"],
    ),
    "tokens": (
        lambda: opdc.token_logprobs(projection(), TOKENS[:, :2]),
        ["tokens", "(2, 2)", "(2, 3)"],
    ),
    "temperature": (lambda: opdc.entropy(projection(), temperature=0.0), ["temperature"]),
    "k beyond the vocabulary": (lambda: opdc.topk(projection(), V + 1), ["k", "8"]),
    "inplace": (
        lambda: opdc.reverse_kl(projection(), OTHER, inplace=True),
        ["inplace", "Projection"],
    ),
    "inplace with a server": (
        lambda: opdc.lsm(projection(), SERVER, inplace=True),
        ["inplace", "Projection"],
    ),
    "inplace of a module": (
        lambda: opdc.nn.ReverseKLLoss(inplace=True)(projection(), OTHER),
        ["inplace", "Projection"],
    ),
    **{
        f"sparse_gradient: {name}": (call, ["sparse_gradient"])
        for name, call in {
            "the whole vocabulary": lambda: opdc.reverse_kl(
                projection(sparse_gradient=True), OTHER
            ),
            "a teacher of logits": lambda: opdc.lsm(projection(sparse_gradient=True), OTHER, k=3),
            "a student that is normalised over everything": lambda: opdc.forward_kl(
                projection(sparse_gradient=True), SERVER, normalize="teacher"
            ),
            "a tail": lambda: opdc.reverse_kl(
                projection(sparse_gradient=True), SERVER, normalize="tail"
            ),
            "tokens": lambda: opdc.k1(
                projection(sparse_gradient=True), torch.ones(POSITIONS), TOKENS
            ),
            "log-probs": lambda: opdc.token_logprobs(projection(sparse_gradient=True), TOKENS),
            "an entropy": lambda: opdc.entropy(projection(sparse_gradient=True)),
        }.items()
    },
    "one slot": (
        lambda: opdc.lsm(projection(), opdc.TopK(SERVER.ids[..., :1], SERVER.logprobs[..., :1])),
        ["0"],
    ),
    "an id of a server that is too large": (
        lambda: opdc.lsm(projection(), SERVER._replace(ids=SERVER.ids + V - 2)),
        ["teacher.ids", "7"],
    ),
    "an id beyond valid_vocab": (
        lambda: opdc.lsm(projection(), SERVER, valid_vocab=2),
        ["teacher.ids", "2"],
    ),
    "an id twice": (
        lambda: opdc.lsm(projection(), SERVER._replace(ids=torch.zeros_like(SERVER.ids))),
        ["teacher.ids"],
    ),
    "more mass than a distribution has": (
        lambda: opdc.lsm(projection(), SERVER._replace(logprobs=torch.zeros(*POSITIONS, 3))),
        ["teacher.logprobs"],
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_does_not_go_together(name):
    call, words = BESIDE[name]
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


NOT_A_PROJECTION = {
    "a tuple for the student": (
        lambda: opdc.reverse_kl((HIDDEN, WEIGHT), OTHER),
        ["student", "tuple"],
    ),
    "a tuple for the teacher": (
        lambda: opdc.reverse_kl(projection(), (HIDDEN, WEIGHT)),
        ["teacher", "tuple"],
    ),
    "a layer for the student": (
        lambda: opdc.reverse_kl(torch.nn.Linear(H, V), OTHER),
        ["student", "Linear"],
    ),
    "a layer for logits": (lambda: opdc.entropy(torch.nn.Linear(H, V)), ["logits", "Linear"]),
    "a server for the student": (lambda: opdc.lsm(SERVER, OTHER, k=3), ["student", "TopK"]),
    "a projection to draw from": (lambda: opdc.sample(projection()), ["logits", "Projection"]),
    "a teacher elsewhere": (
        lambda: opdc.reverse_kl(projection(), Projection(*(x.to("meta") for x in OTHER[:2]))),
        ["teacher", "meta", "cpu"],
    ),
    "logits of the teacher elsewhere": (
        lambda: opdc.reverse_kl(projection(), torch.ones(*POSITIONS, V, device="meta")),
        ["teacher", "meta", "cpu"],
    ),
    "tokens as floats": (
        lambda: opdc.token_logprobs(projection(), TOKENS.float()),
        ["tokens", "float32"],
    ),
    "a mask elsewhere": (
        lambda: opdc.reverse_kl(projection(), OTHER, mask=TOKENS.to("meta") > 0),
        ["mask", "meta", "cpu"],
    ),
    "teacher+token without the token's log-prob": (
        lambda: opdc.lsm(projection(), SERVER, support="teacher+token", tokens=TOKENS),
        ["token_logprobs", "None"],
    ),
}


@pytest.mark.parametrize("name", NOT_A_PROJECTION)
def test_wrong_type(name):
    call, words = NOT_A_PROJECTION[name]
    with pytest.raises(TypeError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


# ----------------------------------------------------------------- nothing has been written


@pytest.mark.parametrize("value", [V, -1, -100, 2**63 - 1])
@pytest.mark.parametrize("budget", [64 * V, None], ids=["small", "default"])
def test_hazard_08_a_token_out_of_range_in_the_last_chunk(budget, value):
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    given = Projection(hidden, weight, max_bytes=budget)
    tokens = TOKENS.clone()
    tokens[1, 2] = value
    before = [(x.detach().clone(), x._version) for x in (hidden, weight, tokens)]
    for call in (
        lambda: opdc.k1(given, OTHER, tokens),
        lambda: opdc.token_logprobs(given, tokens),
        lambda: opdc.tropd(given, OTHER, tokens, k=2, region="expected"),
        lambda: opdc.reopold(given, OTHER, tokens, phase="refinement"),
        lambda: opdc.forward_kl(
            given, OTHER, support="teacher+token", tokens=tokens, k=2, normalize="tail"
        ),
    ):
        with pytest.raises(ValueError, match=rf"tokens.*{value}"):
            call()
    for tensor, (copy, version) in zip((hidden, weight, tokens), before, strict=True):
        assert torch.equal(tensor.detach(), copy)
        assert tensor._version == version
        assert tensor.grad is None
    inactive = TOKENS < 5
    assert opdc.k1(given, OTHER, tokens, mask=inactive).isfinite()


def test_hazard_08_an_id_out_of_range_names_no_row_of_the_head():
    """The sparse head reads where it is told to: never before the ids are checked."""
    for value in (V, 2**62):
        for position in ((0, 0, 0), (1, 2, 2)):
            ids = SERVER.ids.clone()
            ids[position] = value
            with pytest.raises(ValueError, match=rf"teacher\.ids.*{value}"):
                opdc.lsm(projection(), SERVER._replace(ids=ids))
    tokens = TOKENS.clone()
    tokens[1, 2] = V
    server = SERVER._replace(token_logprobs=torch.full(POSITIONS, -3.0))
    with pytest.raises(ValueError, match=r"tokens.*7"):
        opdc.lsm(projection(), server, support="teacher+token", tokens=tokens)


def test_errors_leave_the_inputs_alone():
    tensors = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT, torch.ones(V))]
    before = [x.detach().clone() for x in tensors]
    given = Projection(*tensors)
    for wrong in (
        lambda: opdc.reverse_kl(given, OTHER, inplace=True),
        lambda: opdc.reverse_kl(given, OTHER, temperature=-1.0),
        lambda: opdc.reverse_kl(given._replace(max_bytes=1), OTHER),
        lambda: opdc.reverse_kl(given, OTHER._replace(weight=torch.ones(V, 3))),
        lambda: opdc.lsm(given, SERVER._replace(ids=SERVER.ids + V)),
        lambda: opdc.topk(given, 0),
    ):
        with pytest.raises(ValueError):
            wrong()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), copy)
        assert tensor._version == 0
        assert tensor.grad is None


def test_an_error_says_what_to_do():
    with pytest.raises(ValueError, match=r"student\.weight.*\(V, 4\)"):
        opdc.reverse_kl(projection(weight=WEIGHT.t()), OTHER)
    with pytest.raises(ValueError, match=r"student\.weight.*contiguous\(\)"):
        opdc.reverse_kl(projection(weight=WEIGHT.t().contiguous().t()), OTHER)


def test_freed_storage():
    hidden = HIDDEN.clone()
    hidden.untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match=r"storage|memory"):
        opdc.reverse_kl(projection(hidden=hidden), OTHER)
