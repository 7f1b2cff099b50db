"""The published methods: TrOPD, EOPD, REOPOLD, AOPD, the drift gate, special tokens, schedules."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.func import grad, vmap

import opdc
import oracle
import oracle_published as published
from judge import LOW_PRECISION, Result, arithmetic, bound, conditioning, half_spacing
from regimes import BY_NAME, Case, Inputs, Regime, make_inputs

INFINITY = math.inf
FLOATS = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
REDUCTIONS = ("none", "sum", "mean", "seq_mean")
OLD, PREFIX = ("old_logprobs",), ("prefix_mask",)

TROPD = [
    *(
        Case(
            f"tropd_{region}_{outlier}",
            "tropd",
            {"region": region, "outlier": outlier, "k": 5},
            ("uniforms",) if region == "sampled" else (),
        )
        for region in ("sampled", "expected", "threshold")
        for outlier in ("forward_kl", "mask", "clip")
    ),
    Case("tropd_threshold_-0.3", "tropd", {"region": "threshold", "threshold": -0.3, "k": 5}),
    Case("tropd_clip_-0.3", "tropd", {"outlier": "clip", "threshold": -0.3, "k": 5}, ("uniforms",)),
    Case("tropd_prefix", "tropd", {"k": 5, "prefix_weight": 0.3}, ("uniforms", *PREFIX)),
    Case("tropd_old", "tropd", {"k": 5}, ("uniforms", *OLD)),
    Case("tropd_old_expected", "tropd", {"k": 5, "region": "expected"}, (*PREFIX, *OLD)),
    Case("tropd_old_clip", "tropd", {"k": 5, "clip_range": 0.2}, ("uniforms", *OLD)),
    Case(
        "tropd_old_clip_outlier_clip",
        "tropd",
        {
            "k": 5,
            "region": "threshold",
            "outlier": "clip",
            "threshold": -0.2,
            "clip_range": (0.1, 0.3),
        },
        (*PREFIX, *OLD),
    ),
    Case(
        "tropd_old_current",
        "tropd",
        {"k": 5, "region": "threshold", "outlier": "clip", "advantage": "current"},
        OLD,
    ),
]
EOPD = [
    Case("eopd", "eopd", {"k": 5}),
    Case("eopd_old", "eopd", {"k": 5}, OLD),
    Case("eopd_old_clip_pair", "eopd", {"k": 3, "clip_range": (0.1, 0.3)}, OLD),
    Case("eopd_weight", "eopd", {"k": 5, "forward_weight": 0.5, "entropy_threshold": 1.6}),
]
AOPD = [
    Case("aopd", "aopd", {"k": 5}),
    Case("aopd_0.05", "aopd", {"k": 5, "threshold": 0.05}),
    Case("aopd_-0.05", "aopd", {"k": 5, "threshold": -0.05}),
]
REOPOLD = [
    Case("reopold", "reopold"),
    Case("reopold_old", "reopold", {"mixture": 0.7}, OLD),
    Case("reopold_floor_-inf", "reopold", {"mixture": 0.0}, OLD),
    Case("reopold_floor_-1", "reopold", {"mixture": 1.0}),
    Case("reopold_refinement", "reopold", {"phase": "refinement"}),
    Case("reopold_refinement_half", "reopold", {"phase": "refinement", "keep": 0.5}, OLD),
    Case(
        "reopold_refinement_given",
        "reopold",
        {"phase": "refinement", "entropy_threshold": 1.5, "mixture": 0.7},
    ),
]
LOSSES = [*TROPD, *EOPD, *AOPD, *REOPOLD]
GATED = [case for case in LOSSES if case.function != "reopold"]
NAMED = {case.name: case for case in LOSSES}
SAMPLE = [
    NAMED[name]
    for name in (
        "tropd_sampled_forward_kl",
        "tropd_prefix",
        "tropd_old_clip_outlier_clip",
        "eopd_old",
        "aopd",
        "reopold_old",
        "reopold_refinement",
    )
]


def _mixed(rows, vocabulary, generator):
    """Certain and uncertain teachers, a student not far from them: every gate opens and closes."""

    def normal():
        return torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)

    scale = torch.tensor([0.6, 1.5, 3.0, 5.0], dtype=torch.float64)
    teacher = scale[torch.arange(rows) % 4, None] * normal()
    return teacher + 0.8 * normal(), teacher


MIXED = Regime("mixed", _mixed)
# Rounded logits: the teacher's top-K is full of ties.
TIED = Regime("tied", lambda *sizes: tuple(torch.round(x) for x in _mixed(*sizes)))


def prepare(
    regime: Regime = MIXED, positions=(8,), vocabulary=60, dtype=torch.float32, seed=0
) -> Inputs:
    inputs = make_inputs(regime, positions, vocabulary, dtype, seed=seed)
    number = torch.float64 if dtype == torch.float64 else torch.float32
    inputs.uniforms = torch.rand(positions, generator=inputs.generator, dtype=number)
    inputs.prefix_mask = torch.rand(positions, generator=inputs.generator) < 0.3
    return inputs


def topk_of(inputs: Inputs, k: int = 5, temperature: float = 1.0) -> opdc.TopK:
    """What a teacher server sends: a top-K in float32 (float64 for such a student)."""
    tau = torch.log_softmax(inputs.teacher.double() / temperature, -1)
    logprobs, ids = torch.sort(tau, dim=-1, descending=True, stable=True)
    logprobs, ids = logprobs[..., :k], ids[..., :k]
    number = arithmetic(inputs.student)
    return opdc.TopK(
        ids.masked_fill(logprobs == -INFINITY, -1),
        logprobs.to(number),
        token_logprobs=tau.gather(-1, inputs.tokens[..., None])[..., 0].to(number),
        entropy=-torch.where(tau > -INFINITY, tau.exp() * tau, 0.0).sum(-1).to(number),
    )


def answer(function, case, inputs, upstream=None, dtype=None, teacher=None, **common) -> Result:
    """Call with a fresh leaf for the student and pull `upstream` (default: ones) back."""
    leaf = inputs.student.detach().to(dtype, copy=True).requires_grad_()
    teacher = inputs.teacher.to(dtype) if teacher is None else teacher
    common = {"reduction": "none", **common}
    value = function(leaf, teacher, inputs.tokens, **inputs.keywords(case), **common)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value.dtype))
    assert leaf.grad is not None
    return Result(value.detach(), leaf.grad)


def measured(case, inputs, upstream=None, **common) -> Result:
    return answer(getattr(opdc, case.function), case, inputs, upstream, **common)


def expected(case, inputs, upstream=None, **common) -> Result:
    function = getattr(published, case.function)
    return answer(function, case, inputs, upstream, torch.float64, **common)


def gates(case, inputs, teacher=None, **common):
    """The oracle's M or G of each position."""
    function = {"tropd": published.trusted, "reopold": published.selected}.get(case.function)
    arguments = (inputs.student, inputs.teacher if teacher is None else teacher, inputs.tokens)
    keywords = inputs.keywords(case) | common
    if function is None:
        return published.gated(case.function, *arguments, **keywords)
    return function(*arguments, **keywords)


def check(case, inputs, result, truth, upstream, teacher=None, temperature=1.0) -> None:
    """Every position against the truth.

    Beyond the relative bound, arithmetic is granted the errors of s_y and τ_y carried through the
    formula, as for K1, those of the log-probs of the top-K, and of P_trust where it is a factor.
    """
    ulp = torch.finfo(arithmetic(inputs.student)).eps
    tolerance = bound(inputs.student)
    p = torch.softmax(inputs.student.double() / temperature, -1)
    s = torch.log_softmax(inputs.student.double() / temperature, -1)
    tau = torch.log_softmax(inputs.teacher.double() / temperature, -1)
    policy = copy.copy(inputs)
    if teacher is not None:
        policy.teacher = teacher.token_logprobs
    options = {"advantage": case.options.get("advantage", "old")}
    extra = OLD if "old_logprobs" in case.extra else ()
    granted = conditioning(Case("", "k1", options, extra), policy, temperature=temperature)
    top = tau.topk(min(case.options.get("k", 5), tau.shape[-1])).indices
    sizes = (1 + s.abs() + tau.abs()).gather(-1, top)
    terms = 8 * ulp * torch.where(sizes.isfinite(), sizes, 0.0).amax(-1)
    slope = (torch.nn.functional.one_hot(inputs.tokens, p.shape[-1]) - p).norm(dim=-1)
    row = p.norm(dim=-1) + 1
    value_limit = tolerance * truth.value.abs() + granted.value + terms
    gradient_limit = granted.coefficient * slope + tolerance * row
    if case.options.get("region") == "expected":
        trust = 4 * granted.coefficient  # the error of R, with the factor |A|
        value_limit = value_limit + trust + terms * (1 + truth.value.abs())
        gradient_limit = gradient_limit + (trust + terms) * row
    assert torch.isfinite(result.value).all(), result.value
    value_error = (result.value.double() - truth.value).abs()
    assert (value_error <= value_limit).all(), (value_error / value_limit, truth.value)
    limit = (
        tolerance * truth.gradient.norm(dim=-1)
        + upstream.double().abs() * gradient_limit / temperature
    )
    error = result.gradient.double() - truth.gradient
    assert torch.isfinite(result.gradient).all()
    assert result.gradient.dtype == inputs.student.dtype
    if inputs.student.dtype in LOW_PRECISION:
        excess = error.abs() - half_spacing(truth.gradient, inputs.student.dtype)
        assert (excess <= limit[..., None]).all(), excess.amax(-1) / limit
    else:
        assert (error.norm(dim=-1) <= limit).all(), error.norm(dim=-1) / limit


def judge_case(case, inputs, teacher=None, **common) -> Result:
    truth = expected(case, inputs, inputs.upstream, teacher=teacher, **common)
    result = measured(case, inputs, inputs.upstream, teacher=teacher, **common)
    check(case, inputs, result, truth, inputs.upstream, teacher, common.get("temperature", 1.0))
    return result


def close(result: Result, truth: Result, tolerance=1e-11) -> None:
    torch.testing.assert_close(result.value.double(), truth.value.double(), rtol=tolerance,
                               atol=tolerance)  # fmt: skip
    torch.testing.assert_close(result.gradient.double(), truth.gradient.double(), rtol=tolerance,
                               atol=tolerance)  # fmt: skip


def same_bits(first: Result, second: Result) -> bool:
    return torch.equal(first.value, second.value) and torch.equal(first.gradient, second.gradient)


def logits_of(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


# ----------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "regime", [MIXED, TIED, BY_NAME["realistic"], BY_NAME["masked_both"]], ids=str
)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_value_and_gradient(case, regime, dtype):
    result = judge_case(case, prepare(regime, (3, 4), 60, FLOATS[dtype]))
    assert result.value.dtype == (torch.float64 if dtype == "f64" else torch.float32)
    assert result.value.shape == (3, 4)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_every_gate_is_both_open_and_closed_in_these_tests(case):
    """Otherwise they would test one branch."""
    inputs = prepare(MIXED, (3, 4))
    opened = gates(case, inputs).double()
    assert opened.max() > 0.5
    if case.name != "reopold_floor_-inf":
        assert opened.min() < 0.95


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_sparse_teacher(case, dtype):
    case = Case(case.name, case.function, case.options | {"k": 5}, case.extra)
    if case.function == "reopold":
        case.options.pop("k")
    inputs = prepare(MIXED, (3, 4), 60, FLOATS[dtype])
    for temperature in (1.0, 0.7):  # it never touches log-probs that come in
        teacher = topk_of(inputs, 5, temperature)
        judge_case(case, inputs, teacher, temperature=temperature)


@pytest.mark.parametrize("case", GATED, ids=str)
def test_sparse_and_dense_teacher_agree(case):
    case = Case(case.name, case.function, case.options | {"k": 5}, case.extra)
    inputs = prepare(MIXED, (3, 4), 60, torch.float64)
    close(measured(case, inputs, teacher=topk_of(inputs)), measured(case, inputs))


@pytest.mark.parametrize("name", ["tropd_sampled_forward_kl", "eopd", "aopd"])
def test_missing_slots_are_not_there(name):
    case = Case(name, NAMED[name].function, {}, NAMED[name].extra)
    inputs = prepare(MIXED, (3, 4), 60, torch.float64)
    given = topk_of(inputs, 4)
    gap = torch.full((3, 4, 2), -1)
    holes = given._replace(
        ids=torch.cat([given.ids[..., :1], gap, given.ids[..., 1:]], -1),
        logprobs=torch.cat([given.logprobs[..., :1], gap * math.nan, given.logprobs[..., 1:]], -1),
    )
    close(measured(case, inputs, teacher=holes), measured(case, inputs, teacher=given), 1e-14)


@pytest.mark.parametrize("name", ["tropd_sampled_forward_kl", "eopd", "aopd"])
def test_layouts_and_id_types_of_a_sparse_teacher(name):
    case = Case(name, NAMED[name].function, {}, NAMED[name].extra)
    inputs = prepare(MIXED, (3, 4))
    teacher = topk_of(inputs, 4)
    usual = measured(case, inputs, teacher=teacher)
    strided = []
    for values in teacher[:4]:
        wide = torch.zeros(*values.shape, 2, dtype=values.dtype)
        wide[..., 1] = values
        strided.append(wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 1])
    assert same_bits(usual, measured(case, inputs, teacher=opdc.TopK(*strided)))
    assert same_bits(usual, measured(case, inputs, teacher=teacher._replace(ids=teacher.ids.int())))


@pytest.mark.parametrize("case", REOPOLD, ids=str)
def test_reopold_takes_logprobs_of_the_tokens(case):
    inputs = prepare(MIXED, (3, 4), 60, torch.float64)
    teacher = oracle.token_logprobs(inputs.teacher, inputs.tokens, temperature=1.3)
    given = measured(case, inputs, teacher=teacher, temperature=1.3)
    close(given, measured(case, inputs, temperature=1.3))
    close(given, expected(case, inputs, teacher=teacher, temperature=1.3))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_temperature(case, temperature):
    judge_case(case, prepare(), temperature=temperature)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_valid_vocabulary(case):
    inputs = prepare(MIXED, (8,), 60, torch.float64)
    inputs.tokens %= 50
    padded = copy.copy(inputs)
    padded.student = torch.cat([inputs.student[:, :50], torch.full((8, 9), math.nan).double()], -1)
    padded.teacher = torch.cat([inputs.teacher[:, :50], torch.full((8, 3), INFINITY).double()], -1)
    result = measured(case, padded, inputs.upstream, valid_vocab=50)
    truth = expected(case, padded, inputs.upstream, valid_vocab=50)
    close(result, truth, 1e-11)
    assert (result.gradient[:, 50:] == 0).all()
    inputs.student, inputs.teacher = inputs.student[:, :50], inputs.teacher[:, :50]
    torch.testing.assert_close(measured(case, inputs).value, result.value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("function", "k"), [("tropd", 64), ("eopd", 16), ("aopd", 16)])
def test_k_of_the_method_and_a_long_vocabulary(function, k):
    inputs = prepare(MIXED, (8,), 3001)
    extra = ("uniforms",) if function == "tropd" else ()
    default, named = Case("", function, {}, extra), Case("", function, {"k": k}, extra)
    assert same_bits(measured(default, inputs), measured(named, inputs))
    judge_case(named, inputs)


@pytest.mark.parametrize("offset", [1e4, -1e5])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_hazard_09_large_common_offset(case, offset):
    inputs = prepare()
    for name in ("student", "teacher"):
        setattr(inputs, name, torch.round(getattr(inputs, name) * 64) / 64 + offset)
    judge_case(case, inputs)


@pytest.mark.parametrize("pair", [("f32", "bf16"), ("bf16", "f32"), ("f32", "f64")], ids="-".join)
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_hazard_22_student_and_teacher_of_different_dtypes(case, pair):
    inputs = prepare(dtype=FLOATS[pair[0]])
    inputs.teacher = inputs.teacher.to(FLOATS[pair[1]])
    judge_case(case, inputs)


# ----------------------------------------------------------------- reductions, masks, weights


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_reduction_mask_weights(case, with_mask, reduction):
    inputs = prepare(MIXED, (4, 5), 40, torch.float64)
    common = {"reduction": reduction, "weights": inputs.weights}
    if with_mask:
        inputs.mask[2] = False  # a sequence with nothing in it
        common["mask"] = inputs.mask
    upstream = inputs.upstream if reduction == "none" else torch.tensor(-2.5)
    result = measured(case, inputs, upstream, **common)
    close(result, expected(case, inputs, upstream, **common))
    assert result.value.shape == ((4, 5) if reduction == "none" else ())
    if with_mask:
        assert (result.gradient[~inputs.mask] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "seq_mean"])
@pytest.mark.parametrize("items", [37, 2.5, torch.tensor(11), 0])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_num_items_replaces_the_count(case, items, reduction):
    inputs = prepare(MIXED, (4, 5), 40, torch.float64)
    common = {"reduction": reduction, "mask": inputs.mask, "num_items": items}
    result = measured(case, inputs, **common)
    close(result, expected(case, inputs, **common))
    if items == 0:
        assert result.value == 0
        assert (result.gradient == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "seq_mean"])
@pytest.mark.parametrize(
    "case", [case for case in SAMPLE if case.name != "reopold_refinement"], ids=str
)
def test_hazard_07_micro_batches_with_num_items_are_one_batch(case, reduction):
    """REOPOLD's count is that of the selected positions, its metric `selected` in all parts."""
    inputs = prepare(MIXED, (6, 5), 40, torch.float64)
    inputs.mask[3] = False
    counted = gates(case, inputs, mask=inputs.mask).bool() & inputs.mask
    counted = counted if case.function == "reopold" else inputs.mask
    count = counted.sum() if reduction == "mean" else counted.any(-1).sum()
    whole = measured(case, inputs, mask=inputs.mask, weights=inputs.weights, reduction=reduction)
    value, gradients = 0.0, []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = subset(inputs, rows)
        result = measured(
            case, part, mask=part.mask, weights=part.weights, num_items=int(count),
            reduction=reduction,
        )  # fmt: skip
        value = value + result.value
        gradients.append(result.gradient)
    close(Result(value, torch.cat(gradients)), whole)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_hazard_06_nothing_active_is_zero_and_stays_connected(case, reduction):
    inputs = prepare(MIXED, (3, 4))
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    result = measured(case, inputs, reduction=reduction, mask=nothing)
    assert (result.value == 0).all()
    assert (result.gradient == 0).all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_hazard_06_an_empty_batch_is_zero(case, shape):
    inputs = prepare(BY_NAME["far"], shape)
    for reduction in REDUCTIONS:
        result = measured(case, inputs, reduction=reduction)
        assert result.value.shape == (shape if reduction == "none" else ())
        assert (result.value == 0).all()


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_hazard_05_inactive_positions_are_never_read(case):
    inputs = prepare(MIXED, (3, 4))
    usual = measured(case, inputs, inputs.upstream, mask=inputs.mask)
    assert (~inputs.mask).sum() > 2
    for name in ("student", "teacher", "old_logprobs", "uniforms", "weights"):
        getattr(inputs, name)[~inputs.mask] = math.nan
    inputs.tokens[~inputs.mask] = -100
    again = measured(case, inputs, inputs.upstream, mask=inputs.mask)
    assert same_bits(usual, again)
    sparse = Case(case.name, case.function, dict(case.options), case.extra)
    sparse.options.pop("k", None)
    inputs.tokens[~inputs.mask] = 0
    teacher = topk_of(inputs)
    usual = measured(sparse, inputs, teacher=teacher, mask=inputs.mask)
    teacher.ids[~inputs.mask] = 10**6
    for values in teacher[1:4]:
        values[~inputs.mask] = math.nan
    assert same_bits(usual, measured(sparse, inputs, teacher=teacher, mask=inputs.mask))


@pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_of_every_kind(mask_dtype):
    inputs = prepare(MIXED, (3, 4))
    inputs.prefix_mask[0, 0] = True
    case = NAMED["tropd_prefix"]
    usual = measured(case, inputs, mask=inputs.mask)
    inputs.prefix_mask = inputs.prefix_mask.to(mask_dtype)
    assert same_bits(usual, measured(case, inputs, mask=inputs.mask.to(mask_dtype)))


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_one_position_without_leading_axes(case):
    inputs = prepare(MIXED, (1,))
    single = subset(inputs, 0)
    for reduction in ("none", "sum", "mean"):
        result = measured(case, single, reduction=reduction)
        usual = measured(case, inputs, reduction=reduction)
        assert result.value.shape == ()
        assert torch.equal(result.value, usual.value.reshape(()))
        assert torch.equal(result.gradient, usual.gradient[0])


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_hazard_17_strided_arguments_of_positions(case):
    inputs = prepare(MIXED, (3, 4))
    usual = measured(case, inputs, mask=inputs.mask, weights=inputs.weights)
    for name in ("old_logprobs", "uniforms", "prefix_mask", "mask", "weights", "tokens"):
        wide = torch.zeros(4, 7, dtype=getattr(inputs, name).dtype)
        wide[:, 1::2] = getattr(inputs, name).t()
        setattr(inputs, name, wide[:, 1::2].t())
    result = measured(case, inputs, mask=inputs.mask, weights=inputs.weights)
    assert same_bits(usual, result)


# ----------------------------------------------------------------- gradients, however computed


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_gradient_of_the_forward_call_is_the_recomputed_one(case):
    """Scalar reductions take their gradient in the forward call, `none` in the backward."""
    inputs = prepare(MIXED, (12,), 300)
    none, total = measured(case, inputs), measured(case, inputs, reduction="sum")
    assert torch.equal(none.gradient, total.gradient)
    torch.testing.assert_close(total.value, none.value.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_backward_twice_with_a_kept_graph(case):
    inputs = prepare()
    for reduction in ("none", "mean"):
        student = inputs.student.clone().requires_grad_()
        loss = getattr(opdc, case.function)(
            student, inputs.teacher, inputs.tokens, **inputs.keywords(case), reduction=reduction
        ).sum()
        first, second = (
            torch.autograd.grad(loss, student, torch.tensor(factor), retain_graph=True)[0]
            for factor in (1.0, 4.0)
        )
        assert torch.equal(4 * first, second)
        assert first.abs().sum() > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_hazard_19_inplace_gives_the_same_bits(case, reduction):
    inputs = prepare(MIXED, (3, 4), 70)
    results = []
    for inplace in (False, True):
        leaf = inputs.student.clone().requires_grad_()
        student = leaf * 1.0
        value = getattr(opdc, case.function)(
            student, inputs.teacher, inputs.tokens, **inputs.keywords(case),
            mask=inputs.mask, weights=inputs.weights, reduction=reduction, inplace=inplace,
        )  # fmt: skip
        value.backward(inputs.upstream if reduction == "none" else torch.tensor(1.0))
        results.append(Result(value.detach(), leaf.grad))
    if reduction == "none":  # kept until the upstream arrives, the gradient is rounded twice
        assert torch.equal(results[0].value, results[1].value)
        close(results[1], results[0], 4e-7)
    else:
        assert same_bits(*results)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_no_gradient_is_needed_for_the_value(case):
    inputs = prepare()
    value = getattr(opdc, case.function)(
        inputs.student, inputs.teacher, inputs.tokens, **inputs.keywords(case), reduction="none"
    )
    assert not value.requires_grad
    assert torch.equal(value, measured(case, inputs).value)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_only_the_student_receives_a_gradient(case):
    inputs = prepare()
    constants = [inputs.teacher.requires_grad_()]
    constants += [getattr(inputs, name).requires_grad_() for name in ("old_logprobs", "uniforms")]
    result = measured(case, inputs, reduction="mean")
    assert result.gradient.abs().sum() > 0
    assert all(constant.grad is None for constant in constants)


SMOOTH = [
    *(case for case in TROPD if "old_logprobs" in case.extra and "current" not in case.name),
    *(case for case in EOPD if "old_logprobs" in case.extra),
    Case("aopd_everywhere_forward_kl", "aopd", {"k": 3, "threshold": 1.0}),
]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_gradcheck_where_the_value_has_this_gradient(case, reduction):
    """With old log-probs gates and advantages are constants; the value is what is descended."""
    case = Case(case.name, case.function, case.options | {"k": 3}, case.extra)
    inputs = prepare(MIXED, (2, 3), 7, torch.float64)
    inputs.mask[:], inputs.mask[1, 1] = True, False
    inputs.tokens %= 6
    common = {"temperature": 1.3, "valid_vocab": 6, "reduction": reduction}
    common |= {"mask": inputs.mask, "weights": inputs.weights}
    if reduction in ("mean", "seq_mean"):
        common["num_items"] = 7
    function = getattr(opdc, case.function)
    assert torch.autograd.gradcheck(
        lambda student: function(
            student, inputs.teacher, inputs.tokens, **inputs.keywords(case), **common
        ),
        inputs.student.clone().requires_grad_(),
        atol=1e-7,
        rtol=1e-5,
    )


def test_hazard_20_second_derivatives_are_refused():
    inputs = prepare()
    student = inputs.student.clone().requires_grad_()
    for case in SAMPLE:
        loss = getattr(opdc, case.function)(
            student, inputs.teacher, inputs.tokens, **inputs.keywords(case)
        )
        (first,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            first.square().sum().backward()


# ----------------------------------------------------------------- by hand


def test_tropd_by_hand():
    """p = (½, ¼, ¼) and q = (¼, ¼, ½) everywhere, K = 1: the top is id 2 with q = ½, its forward KL
    ½ (log ½ − log ¼) = ½ log 2. In units of log 2, with L = log 2:

        y = 0, R = −1·L, P = ½, u = 0.4: trusted;  ℓ = 1,    gradient L (1, ...) = L (½, −¼, −¼)
        y = 0, R = −1·L, P = ½, u = 0.6: outlier;  ℓ = ½,    gradient ½ p − ½ 1₂ = (¼, ⅛, −⅜)
        y = 2, R = +1·L, P = 1, u = .99: trusted;  ℓ = −1,   gradient −L (−½, −¼, ¾)
        y = 1, teacher's prefix, b = 0.001:        ℓ = b·2,  gradient b (½, −¾, ¼)

    Their mean is (1 + ½ − 1 + 0.002) L / 4 = 0.1255 L = 0.0870.
    """
    student = logits_of(*[(0.5, 0.25, 0.25)] * 4).requires_grad_()
    teacher = logits_of(*[(0.25, 0.25, 0.5)] * 4)
    loss, metrics = opdc.tropd(
        student,
        teacher,
        torch.tensor([0, 0, 2, 1]),
        k=1,
        uniforms=torch.tensor([0.4, 0.6, 0.99, 0.1], dtype=torch.float64),
        prefix_mask=torch.tensor([False, False, False, True]),
        return_metrics=True,
    )
    loss.backward()
    unit = math.log(2)
    assert loss.item() == pytest.approx(0.1255 * unit, rel=1e-12)
    assert loss.item() == pytest.approx(0.0870, abs=5e-5)
    rows = [
        [0.5 * unit, -0.25 * unit, -0.25 * unit],
        [0.25, 0.125, -0.375],
        [0.5 * unit, 0.25 * unit, -0.75 * unit],
        [0.0005, -0.00075, 0.00025],
    ]
    for row, wanted in zip(4 * student.grad, rows, strict=True):
        assert row.tolist() == pytest.approx(wanted, rel=1e-12)
    assert metrics["trusted"] == 2
    assert metrics["positions"] == 4


@pytest.mark.parametrize(
    ("region", "outlier", "wanted"),
    [
        ("expected", "forward_kl", 0.5 * 2.0 + 0.5 * 0.25),
        ("expected", "mask", 0.5 * 2.0),
        ("expected", "clip", 0.5 * 2.0 + 0.5 * 1.5),
        ("threshold", "forward_kl", 0.25),
        ("threshold", "mask", 0.0),
        ("threshold", "clip", 1.5),
    ],
)
def test_tropd_regions_and_outliers_by_hand(region, outlier, wanted):
    """R = −2 log 2 would have P = ¼. With old = s_y − log 2, R = −log 2: P = ½ and ρ = 2.

    In units of log 2, A = R = −1 and ρ = 2: the policy term is 2, with A cut off at a threshold of
    −0.75 it is 1.5. q = (⅛, ⅞), p = (½, ½), K = 1: the forward KL is ⅞ (log ⅞ − log ½).
    """
    unit = math.log(2)
    student, teacher = logits_of((0.5, 0.5)), logits_of((0.125, 0.875))
    forward = 0.875 * math.log(1.75)
    value = opdc.tropd(
        student,
        teacher,
        torch.tensor([0]),
        k=1,
        region=region,
        outlier=outlier,
        threshold=-0.75 * unit,
        old_logprobs=torch.tensor([-2 * unit], dtype=torch.float64),
    )
    # q₀ = ⅛ and old = ¼: R = −log 2.
    assert math.log(0.125) + 2 * unit == pytest.approx(-unit)
    exact = wanted * unit
    if outlier == "forward_kl":
        exact = (wanted - 0.25 * (0.5 if region == "expected" else 1.0)) * unit
        exact += forward * (0.5 if region == "expected" else 1.0)
    assert value.item() == pytest.approx(exact, rel=1e-12)


def test_eopd_by_hand():
    """K = 2, λ = 1, h = 0.8, clip 0.2.

    Position 0: p = (¼, ¼, ½), q = (½, ¼, ¼), y = 2, old = s_y. H(q) = 1.5 log 2 = 1.04 > 0.8: open.
    A = −log 2, policy term log 2. The top-2 of q is {0, 1} (the tie goes to the lower id), there
    q̂ = (⅔, ⅓) and s = −log 4: the forward KL is log 4 − H(⅓) = 1.3863 − 0.6365 = 0.7498 and its
    gradient p − q̂ = (−5/12, −1/12, ½).
    Position 1: q = (0.9, 0.05, 0.05): H = 0.394, closed. p = (½, ¼, ¼), y = 0, old = s_y:
    −log 1.8 = −0.5878.
    Position 2: as position 1 with old = log ⅓: ρ = 1.5 and A = log 2.7 > 0, clipped at 1.2:
    −1.2 log 2.7 = −1.1919, no gradient.
    Sum: 0.6931 + 0.7498 − 0.5878 − 1.1919 = −0.3368.
    """
    student = logits_of((0.25, 0.25, 0.5), (0.5, 0.25, 0.25), (0.5, 0.25, 0.25)).requires_grad_()
    teacher = logits_of((0.5, 0.25, 0.25), (0.9, 0.05, 0.05), (0.9, 0.05, 0.05))
    loss, metrics = opdc.eopd(
        student,
        teacher,
        torch.tensor([2, 0, 0]),
        k=2,
        old_logprobs=torch.tensor([0.5, 0.5, 1 / 3], dtype=torch.float64).log(),
        reduction="sum",
        return_metrics=True,
    )
    loss.backward()
    assert loss.item() == pytest.approx(-0.3368, abs=1e-4)
    log2 = math.log(2)
    rows = [
        [-0.25 * log2 - 5 / 12, -0.25 * log2 - 1 / 12, 0.5 * log2 + 0.5],
        [-0.5 * math.log(1.8), 0.25 * math.log(1.8), 0.25 * math.log(1.8)],
        [0.0, 0.0, 0.0],
    ]
    for row, wanted in zip(student.grad, rows, strict=True):
        assert row.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    assert metrics["gated"] == 1
    assert metrics["clipped"] == 1


def test_reopold_exploration_by_hand():
    """p = (½, ½), R = 0.5, −1, −1.7, −2: the floor log(0.3)/0.7 = −1.71996 rejects the last.

    ℓ = (−0.5 + 1 + 1.7)/3 = 0.7333; gradients −R (1_y − p)/3 = −R (½, −½)/3.
    """
    log_ratios = torch.tensor([0.5, -1.0, -1.7, -2.0], dtype=torch.float64)
    student = torch.zeros(4, 2, dtype=torch.float64).requires_grad_()
    loss, metrics = opdc.reopold(
        student,
        log_ratios + math.log(0.5),
        torch.zeros(4, dtype=torch.long),
        return_metrics=True,
    )
    loss.backward()
    assert loss.item() == pytest.approx(2.2 / 3, rel=1e-12)
    first = [-0.5 / 6, 1 / 6, 1.7 / 6, 0.0]
    assert student.grad[:, 0].tolist() == pytest.approx(first, rel=1e-12)
    assert student.grad[:, 1].tolist() == pytest.approx([-x for x in first], rel=1e-12)
    assert metrics["selected"] == 3


def test_reopold_refinement_by_hand():
    """Students (½, ½), (.9, .1), (.8, .2), (.99, .01): entropies 0.693, 0.325, 0.500, 0.056.

    keep = ½ of 4 keeps positions 0 and 2. R = −2 there is lifted to −1.71996, R = 0.1 stays:
    ℓ = (1.71996 − 0.1)/2 = 0.80998; position 0 keeps the gradient 1.71996 (½, −½)/2.
    """
    student = logits_of((0.5, 0.5), (0.9, 0.1), (0.8, 0.2), (0.99, 0.01)).requires_grad_()
    log_ratios = torch.tensor([-2.0, 5.0, 0.1, 5.0], dtype=torch.float64)
    teacher = log_ratios + student.detach()[:, 0]
    tokens = torch.zeros(4, dtype=torch.long)
    loss, metrics = opdc.reopold(
        student, teacher, tokens, phase="refinement", keep=0.5, return_metrics=True
    )
    loss.backward()
    floor = math.log(0.3) / 0.7
    assert loss.item() == pytest.approx((-floor - 0.1) / 2, rel=1e-12)
    assert loss.item() == pytest.approx(0.80998, abs=5e-6)
    assert student.grad[0].tolist() == pytest.approx([-floor / 4, floor / 4], rel=1e-12)
    assert student.grad[2].tolist() == pytest.approx([-0.1 * 0.2 / 2, 0.1 * 0.2 / 2], rel=1e-11)
    assert (student.grad[[1, 3]] == 0).all()
    assert metrics["selected"] == 2


def test_aopd_by_hand():
    """p = (½, ¼, ¼), q = (¼, ½, ¼), K = 2: the top is {1, 0} and its forward KL is
    ½ log 2 − ¼ log 2 = ¼ log 2, its gradient ¾ p − q = (⅛, −5/16, 3/16) there and off it.

        y = 1: q_y − p_y = +¼ > 0: −R = −log 2, gradient −log 2 (−½, ¾, −¼)
        y = 0: q_y − p_y = −¼: the forward KL
        y = 0 once more, at a threshold of −0.3: R = −log 2, ℓ = log 2

    The first two have the mean −⅜ log 2 = −0.2599.
    """
    student = logits_of((0.5, 0.25, 0.25), (0.5, 0.25, 0.25)).requires_grad_()
    teacher = logits_of((0.25, 0.5, 0.25), (0.25, 0.5, 0.25))
    tokens = torch.tensor([1, 0])
    loss, metrics = opdc.aopd(student, teacher, tokens, k=2, return_metrics=True)
    loss.backward()
    log2 = math.log(2)
    assert loss.item() == pytest.approx(-0.375 * log2, rel=1e-12)
    policy = [0.5 * log2, -0.75 * log2, 0.25 * log2]
    assert (2 * student.grad[0]).tolist() == pytest.approx(policy, rel=1e-12)
    assert (2 * student.grad[1]).tolist() == pytest.approx([0.125, -0.3125, 0.1875], rel=1e-12)
    assert metrics["gated"] == 1
    both = opdc.aopd(student, teacher, tokens, k=2, threshold=-0.3, reduction="none")
    assert both.tolist() == pytest.approx([-log2, log2], rel=1e-12)


def test_reward_scale_by_hand():
    """G-OPD, λ = 1.25: s_y = log ½, τ_y = log ¼, r = log ⅛: A = 1.25 log 2 − log 4 = −¾ log 2."""
    student = logits_of((0.5, 0.5)).requires_grad_()
    loss = opdc.k1(
        student,
        logits_of((0.25, 0.75)),
        torch.tensor([0]),
        reference_logprobs=torch.tensor([0.125], dtype=torch.float64).log(),
        reward_scale=1.25,
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * math.log(2), rel=1e-12)
    row = [0.375 * math.log(2), -0.375 * math.log(2)]
    assert student.grad[0].tolist() == pytest.approx(row, rel=1e-12)


# ----------------------------------------------------------------- TrOPD


def test_prefix_positions_read_neither_teacher_nor_old_logprobs_nor_uniforms():
    inputs = prepare(MIXED, (3, 4))
    case = Case("", "tropd", {"k": 5}, ("uniforms", *PREFIX, *OLD))
    assert 2 < inputs.prefix_mask.sum() < 10
    usual = measured(case, inputs, inputs.upstream)
    for name in ("teacher", "old_logprobs"):
        getattr(inputs, name)[inputs.prefix_mask] = math.nan
    for uniform in (math.nan, -3.0, 1.0):
        inputs.uniforms[inputs.prefix_mask] = uniform
        assert same_bits(usual, measured(case, inputs, inputs.upstream))
    _, metrics = opdc.tropd(
        inputs.student, inputs.teacher, inputs.tokens, **inputs.keywords(case), return_metrics=True
    )
    assert all(metrics[name].isfinite() for name in metrics)
    assert metrics["positions"] == 12
    assert metrics["nonfinite_rows"] == 0
    inputs = prepare(MIXED, (3, 4))
    sparse = topk_of(inputs)
    usual = measured(case, inputs, inputs.upstream, teacher=sparse)
    sparse.ids[inputs.prefix_mask] = 10**6
    sparse.logprobs[inputs.prefix_mask] = math.nan
    sparse.token_logprobs[inputs.prefix_mask] = math.nan
    assert same_bits(usual, measured(case, inputs, inputs.upstream, teacher=sparse))


def test_prefix_positions_are_supervised_and_counted():
    inputs = prepare(MIXED, (3, 4), dtype=torch.float64)
    inputs.prefix_mask[:] = True
    case = Case("", "tropd", {"k": 5, "prefix_weight": 0.25}, ("uniforms", *PREFIX))
    result = measured(case, inputs, reduction="mean")
    log_probability = oracle.token_logprobs(inputs.student, inputs.tokens)
    torch.testing.assert_close(result.value, -0.25 * log_probability.mean())
    one = torch.nn.functional.one_hot(inputs.tokens, 60)
    torch.testing.assert_close(result.gradient, 0.25 * (inputs.student.softmax(-1) - one) / 12)


def test_a_prefix_position_must_be_active():
    inputs = prepare(MIXED, (3, 4))
    case = NAMED["tropd_prefix"]
    usual = measured(case, inputs, mask=inputs.mask, reduction="mean")
    inputs.prefix_mask = inputs.prefix_mask | ~inputs.mask
    assert same_bits(usual, measured(case, inputs, mask=inputs.mask, reduction="mean"))


def test_the_same_uniforms_give_the_same_region():
    inputs = prepare(MIXED, (40,))
    case = NAMED["tropd_sampled_mask"]
    first = measured(case, inputs)
    assert same_bits(first, measured(case, inputs))
    trusted = gates(case, inputs).bool()
    assert torch.equal(first.value != 0, trusted)
    part = subset(inputs, slice(7, 19))
    assert torch.equal(measured(case, part).value, first.value[7:19])


def test_uniforms_come_from_the_generator():
    inputs = prepare(MIXED, (30,))

    def loss(**source):
        return opdc.tropd(
            inputs.student, inputs.teacher, inputs.tokens, k=5, reduction="none", **source
        )

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    drawn = loss(generator=seeded(3))
    assert torch.equal(drawn, loss(generator=seeded(3)))
    assert torch.equal(drawn, loss(uniforms=torch.rand(30, generator=seeded(3))))
    assert not torch.equal(drawn, loss(generator=seeded(4)))
    torch.manual_seed(3)
    assert torch.equal(drawn, loss())
    assert not torch.equal(drawn, loss()), "the generator has not advanced"


def test_the_uniform_decides_strictly_below_the_probability():
    """P_trust = 1 trusts every u in [0, 1), P_trust = 0 none, not even u = 0."""
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    student = torch.tensor([[0.0, 1.0, 2.0]])
    for teacher, trusted in ((student, 1), (torch.tensor([[-INFINITY, 1.0, 2.0]]), 0)):
        for uniform in (0.0, 0.5, below_one):
            loss, metrics = opdc.tropd(
                student,
                teacher,
                torch.tensor([0]),
                k=2,
                uniforms=torch.tensor([uniform]),
                return_metrics=True,
            )
            assert metrics["trusted"] == trusted
            assert loss.isfinite()


def test_identity_04_the_untrusted_share_is_the_total_variation():
    inputs = prepare(MIXED, (1,), 20, torch.float64)
    p, q = inputs.student.softmax(-1)[0], inputs.teacher.softmax(-1)[0]
    untrusted = 0.0
    for token in range(20):
        _, metrics = opdc.tropd(
            inputs.student,
            inputs.teacher,
            torch.tensor([token]),
            k=5,
            region="expected",
            return_metrics=True,
        )
        untrusted += float(p[token] * (1 - metrics["trusted"]))
    assert untrusted == pytest.approx(float((p - q).abs().sum() / 2), rel=1e-12)


def test_the_expected_region_is_the_mean_of_the_sampled_one():
    inputs = prepare(MIXED, (6,), 20, torch.float64)
    draws = 4000
    sampled = torch.zeros_like(inputs.student)
    for number in range(draws):
        inputs.uniforms[:] = (number + 0.5) / draws
        sampled += measured(NAMED["tropd_sampled_forward_kl"], inputs).gradient / draws
    truth = measured(NAMED["tropd_expected_forward_kl"], inputs).gradient
    torch.testing.assert_close(sampled, truth, rtol=0, atol=2e-3)


def test_the_default_threshold_is_the_floor_of_reopold():
    inputs = prepare(MIXED, (12,))
    for outlier in ("forward_kl", "clip"):
        options = {"k": 5, "region": "threshold", "outlier": outlier}
        default = Case("", "tropd", options)
        named = Case("", "tropd", options | {"threshold": math.log(0.3) / 0.7})
        assert same_bits(measured(default, inputs), measured(named, inputs))


def test_temperature_does_not_touch_given_logprobs():
    """R = τ_y − old at T, with τ_y from a sparse teacher and old both as they came."""
    inputs = prepare(MIXED, (1,), 20, torch.float64)
    teacher = topk_of(inputs)._replace(token_logprobs=torch.tensor([-1.0]).double())
    loss = opdc.tropd(
        inputs.student,
        teacher,
        inputs.tokens,
        region="expected",
        outlier="mask",
        old_logprobs=torch.tensor([-0.5]).double(),
        temperature=3.0,
    )
    s = oracle.token_logprobs(inputs.student, inputs.tokens, temperature=3.0)
    exact = math.exp(-0.5) * 0.5 * math.exp(s.item() + 0.5)
    assert loss.item() == pytest.approx(exact, rel=1e-12)


# ----------------------------------------------------------------- gates at their very edge


def on_the_edge(function, **options):
    """The loss of one token with s_y = 0, p = (1, 0), and a teacher of τ_y = −1, H(q) = ¾."""
    loss, metrics = function(
        torch.tensor([[0.0, -INFINITY]]),
        opdc.TopK(
            torch.tensor([[0]]),
            torch.tensor([[-1.0]]),
            token_logprobs=torch.tensor([-1.0]),
            entropy=torch.tensor([0.75]),
        ),
        torch.tensor([0]),
        **options,
        return_metrics=True,
    )
    assert loss.isfinite()
    return metrics


def test_gates_at_their_very_edge():
    """R ≥ threshold and H(p) ≥ h are closed conditions, H(q) > h is open."""
    below, above = math.nextafter(-1.0, -2.0), math.nextafter(-1.0, 0.0)
    for threshold, trusted in ((-1.0, 1), (below, 1), (above, 0)):
        options = {"region": "threshold", "threshold": threshold, "outlier": "mask"}
        assert on_the_edge(opdc.tropd, **options)["trusted"] == trusted
        old = torch.tensor([-0.5])
        shifted = on_the_edge(opdc.tropd, old_logprobs=old, **options | {"threshold": -0.5})
        assert shifted["trusted"] == 1
    assert on_the_edge(opdc.reopold, mixture=1.0)["selected"] == 1  # the floor is −1
    assert on_the_edge(opdc.reopold, mixture=1 - 1e-3)["selected"] == 1
    refinement = {"phase": "refinement", "mixture": 0.0}
    for threshold, selected in ((0.0, 1), (-0.1, 1), (5e-324, 0)):
        metrics = on_the_edge(opdc.reopold, entropy_threshold=threshold, **refinement)
        assert metrics["selected"] == selected
    for threshold, gated in ((0.75, 0), (0.7499999, 1)):
        assert on_the_edge(opdc.eopd, entropy_threshold=threshold)["gated"] == gated
    # q_y − p_y = 1/e − 1 = −0.632; 0 of identical models is tested below.
    for threshold, gated in ((-0.63, 1), (-0.64, 0)):
        assert on_the_edge(opdc.aopd, threshold=threshold)["gated"] == gated


# ----------------------------------------------------------------- forms that must coincide


K1 = Case("k1", "k1")


@pytest.mark.parametrize("extra", [(), OLD], ids=["on policy", "old"])
def test_identity_05_without_outliers_it_is_plain_distillation(extra):
    inputs = prepare(MIXED, (12,), dtype=torch.float64)
    plain = measured(Case("", "k1", {}, extra), inputs)
    options = {"region": "threshold", "outlier": "mask", "threshold": -INFINITY, "k": 5}
    close(measured(Case("", "tropd", options, extra), inputs), plain, 1e-13)


def test_identity_05_reopold_without_a_floor_is_plain_distillation():
    inputs = prepare(MIXED, (3, 4), dtype=torch.float64)
    for reduction in REDUCTIONS:
        common = {"reduction": reduction, "mask": inputs.mask, "weights": inputs.weights}
        plain = measured(K1, inputs, **common)
        for options in ({}, {"phase": "refinement", "keep": 1.0}):
            case = Case("", "reopold", {"mixture": 0.0} | options)
            close(measured(case, inputs, **common), plain, 1e-13)


def test_identity_06_eopd_is_clipped_distillation_plus_forward_kl():
    inputs = prepare(MIXED, (12,), dtype=torch.float64)
    for extra, clip in (((), {}), (OLD, {"clip_range": 0.2})):
        policy = measured(Case("", "k1", clip, extra), inputs)
        closed = Case("", "eopd", {"k": 5, "entropy_threshold": INFINITY}, extra)
        close(measured(closed, inputs), policy, 1e-13)
        everywhere = Case("", "eopd", {"k": 60, "entropy_threshold": -1.0}, extra)
        student = inputs.student.clone().requires_grad_()
        forward = opdc.forward_kl(student, inputs.teacher, reduction="none")
        (gradient,) = torch.autograd.grad(forward.sum(), student)
        both = Result(policy.value + forward.detach(), policy.gradient + gradient)
        close(measured(everywhere, inputs), both, 1e-12)


@pytest.mark.parametrize("region", ["sampled", "expected", "threshold"])
def test_identity_01_outliers_over_the_whole_vocabulary_are_the_forward_kl(region):
    inputs = prepare(MIXED, (12,), dtype=torch.float64)
    options = {"k": 60, "region": region, "threshold": 1e9}
    inputs.old_logprobs[:] = 900.0  # R = −900 − …: nothing is trusted
    case = Case("", "tropd", options, ("uniforms", *OLD) if region == "sampled" else OLD)
    student = inputs.student.clone().requires_grad_()
    forward = opdc.forward_kl(student, inputs.teacher, reduction="none")
    (gradient,) = torch.autograd.grad(forward.sum(), student)
    close(measured(case, inputs), Result(forward.detach(), gradient), 1e-12)


def test_identity_02_mean_gradients_over_the_policy():
    """Trusted everywhere, the mean over y ~ p is the reverse KL's gradient, whatever the method."""
    vocabulary = 40
    inputs = prepare(BY_NAME["far"], (1,), vocabulary, torch.float64)
    student = inputs.student.clone().requires_grad_()
    (truth,) = torch.autograd.grad(opdc.reverse_kl(student, inputs.teacher), student)
    law = inputs.student.softmax(-1)[0]
    teacher, tokens = inputs.teacher.expand(vocabulary, -1), torch.arange(vocabulary)
    for function, options in (
        (opdc.tropd, {"k": 5, "region": "threshold", "threshold": -INFINITY, "outlier": "mask"}),
        (opdc.eopd, {"entropy_threshold": INFINITY}),
        (opdc.aopd, {"threshold": -1.0}),
        (opdc.reopold, {"mixture": 0.0}),
    ):
        rows = inputs.student.expand(vocabulary, -1).clone().requires_grad_()
        function(rows, teacher, tokens, weights=law, reduction="sum", **options).backward()
        mean = rows.grad.sum(0)
        torch.testing.assert_close(mean, truth[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", FLOATS)
def test_identity_03_identical_models_have_no_gradient(dtype):
    for regime in (MIXED, BY_NAME["offset_1e4_both"], BY_NAME["wide_1e3"]):
        inputs = prepare(regime, (4,), 300, FLOATS[dtype])
        inputs.teacher = inputs.student.clone()
        for case in [*TROPD, *REOPOLD]:
            if set(case.extra) & {"old_logprobs", "prefix_mask"}:
                continue
            result = measured(case, inputs, inputs.upstream)
            assert (result.value == 0).all(), case
            assert (result.gradient == 0).all(), case
            if case.function == "tropd":
                _, metrics = opdc.tropd(
                    inputs.student,
                    inputs.teacher,
                    inputs.tokens,
                    **inputs.keywords(case),
                    return_metrics=True,
                )
                assert metrics["trusted"] == 4


def test_aopd_of_identical_models_still_feels_the_truncated_forward_kl():
    inputs = prepare(MIXED, (6,), dtype=torch.float64)
    inputs.teacher = inputs.student.clone()
    _, metrics = opdc.aopd(inputs.student, inputs.teacher, inputs.tokens, k=5, return_metrics=True)
    assert metrics["gated"] == 6
    result = measured(NAMED["aopd"], inputs)
    close(result, expected(NAMED["aopd"], inputs))
    assert (result.gradient.abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_identity_08_each_gradient_row_sums_to_zero(case):
    gradient = measured(case, prepare(MIXED, (12,), 1025)).gradient.double()
    assert (gradient.sum(-1).abs() <= 1e-6 * gradient.abs().sum(-1)).all()


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_identity_09_permuting_ids_permutes_gradients(case):
    inputs = prepare(MIXED, (12,), 80, torch.float64)
    before = measured(case, inputs)
    order = torch.randperm(80)
    inputs.student, inputs.teacher = inputs.student[:, order], inputs.teacher[:, order]
    inputs.tokens = order.argsort()[inputs.tokens]
    close(measured(case, inputs), Result(before.value, before.gradient[:, order]))


@pytest.mark.parametrize(
    "case", [case for case in GATED if case.options.get("k", 64) <= 5], ids=str
)
def test_the_teacher_off_its_top_k_counts_by_its_mass_alone(case):
    """Exchanging the teacher's two rarest ids, neither of them the token, moves nothing."""
    inputs = prepare(MIXED, (6,), 30, torch.float64)
    before = measured(case, inputs)
    for row, ranked in enumerate(inputs.teacher.argsort(-1).tolist()):
        low = [j for j in ranked if j != inputs.tokens[row]][:2]
        inputs.teacher[row, low] = inputs.teacher[row, low[::-1]]
    close(measured(case, inputs), before, 1e-12)


# ----------------------------------------------------------------- REOPOLD


def keep_case(keep, **options):
    return Case("", "reopold", {"phase": "refinement", "keep": keep} | options)


def selected_by(case, inputs, **common):
    _, metrics = opdc.reopold(
        inputs.student,
        inputs.teacher,
        inputs.tokens,
        **inputs.keywords(case),
        **common,
        return_metrics=True,
    )
    return metrics["selected"].item()


@pytest.mark.parametrize(
    ("keep", "positions", "count"),
    [(0.2, 10, 2), (0.2, 11, 3), (0.3, 10, 3), (0.7, 10, 7), (0.01, 10, 1), (1.0, 10, 10),
     (0.1, 20, 2), (0.29, 100, 29), (0.07, 100, 7), (0.58, 50, 29)],
)  # fmt: skip
def test_the_kept_fraction_is_rounded_up_but_not_by_rounding_errors(keep, positions, count):
    """0.29 · 100 is 28.999999999999996 in floating point, 0.07 · 100 is 7.000000000000001."""
    inputs = prepare(MIXED, (positions,), 20)
    assert selected_by(keep_case(keep), inputs) == count
    assert gates(keep_case(keep), inputs).sum() == count


def test_ties_in_the_entropy_are_kept():
    inputs = prepare(MIXED, (10,), 20)
    entropies = opdc.entropy(inputs.student)
    order = entropies.argsort(descending=True).tolist()
    inputs.student[order[4]] = inputs.student[order[2]]  # ranks 2 and 4 are now the same
    inputs.student[order[3]] = inputs.student[order[2]]
    for keep, count in ((0.2, 2), (0.3, 5), (0.4, 5), (0.5, 5), (0.6, 6)):
        case = keep_case(keep)
        assert selected_by(case, inputs) == count
        chosen = gates(case, inputs)
        assert chosen.sum() == count
        result = measured(case, inputs)
        assert torch.equal(result.value != 0, chosen)


def test_all_entropies_equal_are_all_kept():
    student = torch.zeros(7, 9)
    teacher = torch.full((7,), -2.0)
    _, metrics = opdc.reopold(
        student,
        teacher,
        torch.arange(7),
        phase="refinement",
        keep=0.1,
        return_metrics=True,
    )
    assert metrics["selected"] == 7


def test_the_entropy_threshold_is_of_the_active_positions_of_the_call():
    inputs = prepare(MIXED, (4, 5), 30, torch.float64)
    case = keep_case(0.3)
    chosen = gates(case, inputs, mask=inputs.mask)
    assert chosen.sum() == math.ceil(0.3 * inputs.mask.sum() - 1e-9)
    assert not (chosen & ~inputs.mask).any()
    result = measured(case, inputs, mask=inputs.mask)
    assert torch.equal(result.value != 0, chosen)
    entropies = opdc.entropy(inputs.student)
    threshold = entropies[chosen].min().item()
    given = keep_case(0.9, entropy_threshold=threshold * (1 - 1e-12))
    for rows in (slice(0, 2), slice(2, 4)):  # a batch that is split
        part = subset(inputs, rows)
        assert torch.equal(measured(given, part, mask=part.mask).value, result.value[rows])


def test_entropy_is_taken_at_the_temperature():
    """At T = 0.2 the order of the entropies of these two rows is reversed."""
    student = torch.tensor([[2.0, 2.0, -9.0, -9.0, -9.0], [1.4, 0.0, 0.0, 0.0, 0.0]]).double()
    case = keep_case(0.5)
    inputs = prepare(MIXED, (2,), 5, torch.float64)
    inputs.student, inputs.tokens = student, torch.tensor([1, 1])
    kept = [
        (measured(case, inputs, temperature=temperature).value != 0).tolist()
        for temperature in (1.0, 0.2)
    ]
    assert kept == [[False, True], [True, False]]


def test_the_floor_of_every_mixture():
    """log(n)/(1 − n), the limit −1 at n = 1, −∞ at n = 0; not log(n/(1 − n))."""
    for mixture, floor in (
        (0.3, -1.7199611490370511),
        (0.5, -1.3862943611198906),
        (0.999999, -1.0000005000003333),
        (1.0, -1.0),
        (1e-30, -69.0775527898213),
        (0.0, -INFINITY),
    ):
        ratio = max(floor, -800.0)
        log_ratios = torch.tensor([ratio + 1e-9, ratio - 1e-9], dtype=torch.float64)
        loss = opdc.reopold(
            torch.zeros(2, 2, dtype=torch.float64),
            log_ratios + math.log(0.5),
            torch.tensor([0, 1]),
            mixture=mixture,
            reduction="none",
        )
        assert loss[0].item() == pytest.approx(-ratio, rel=1e-9)
        below = 0.0 if floor > -INFINITY else -ratio
        assert loss[1].item() == pytest.approx(below, rel=1e-9)


def test_the_reward_has_a_floor_and_no_ceiling():
    student = torch.zeros(2, 2, dtype=torch.float64)
    teacher = torch.tensor([-60.0, 40.0]).double() + math.log(0.5)  # given, whatever they are
    loss = opdc.reopold(
        student, teacher, torch.tensor([0, 0]), phase="refinement", keep=1.0, reduction="none"
    )
    assert loss.tolist() == pytest.approx([-math.log(0.3) / 0.7, -40.0], rel=1e-12)


def test_nothing_selected_is_zero():
    inputs = prepare(MIXED, (3, 4))
    case = keep_case(0.5, entropy_threshold=100.0)
    for reduction in REDUCTIONS:
        result = measured(case, inputs, reduction=reduction)
        assert (result.value == 0).all()
        assert (result.gradient == 0).all()
    assert selected_by(case, inputs) == 0


@pytest.mark.parametrize("phase", ["exploration", "refinement"])
def test_sequences_without_a_selected_position_leave_seq_mean(phase):
    inputs = prepare(MIXED, (4, 5), 40, torch.float64)
    if phase == "exploration":
        inputs.teacher[2].scatter_(-1, inputs.tokens[2][:, None], -60.0)
    else:
        inputs.student[2] *= 100.0
    case = Case("", "reopold", {"phase": phase})
    assert not gates(case, inputs)[2].any()
    kept = subset(inputs, torch.tensor([0, 1, 3]))
    if phase == "refinement":
        case = keep_case(0.5, entropy_threshold=1.0)
    whole = measured(case, inputs, reduction="seq_mean")
    torch.testing.assert_close(whole.value, measured(case, kept, reduction="seq_mean").value)


# ----------------------------------------------------------------- undefined and infinite rows


def gate_metric(case, inputs, **common):
    name = {"tropd": "trusted", "reopold": "selected"}.get(case.function, "gated")
    _, metrics = getattr(opdc, case.function)(
        inputs.student,
        inputs.teacher,
        inputs.tokens,
        **inputs.keywords(case),
        **common,
        return_metrics=True,
    )
    return metrics[name].item()


@pytest.mark.parametrize("value", [math.nan, INFINITY, -INFINITY])
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_hazard_04_an_undefined_row_is_nan_and_no_gate_counts_it(case, who, value):
    inputs = prepare(MIXED, (10,), 40, torch.float64)  # row 4 would be selected
    inputs.prefix_mask[4] = False
    if value == -INFINITY:
        getattr(inputs, who)[4] = value
    else:
        getattr(inputs, who)[4, 17] = value
    result = measured(case, inputs, inputs.upstream)
    wrong = torch.arange(10) == 4
    assert torch.equal(result.value.isnan(), wrong)
    assert result.gradient[4].isnan().all()
    truth = expected(case, inputs, inputs.upstream)
    close(Result(result.value[~wrong], result.gradient[~wrong]),
          Result(truth.value[~wrong], truth.gradient[~wrong]))  # fmt: skip
    assert gate_metric(case, inputs) == pytest.approx(gates(case, inputs).sum().item(), rel=1e-9)
    mean = measured(case, inputs, reduction="mean")
    assert mean.value.isnan()
    assert mean.gradient[4].isnan().all()
    truth = expected(case, inputs, reduction="mean")
    torch.testing.assert_close(
        mean.gradient[~wrong], truth.gradient[~wrong], rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize(
    ("case", "field"),
    [
        *((case, "token_logprobs") for case in LOSSES),
        *((case, "old_logprobs") for case in GATED if "old_logprobs" in case.extra),
    ],
    ids=str,
)
def test_hazard_04_a_log_ratio_that_is_nan(case, field):
    case = Case(case.name, case.function, dict(case.options), case.extra)
    case.options.pop("k", None)
    inputs = prepare(MIXED, (10,), 40, torch.float64)
    inputs.prefix_mask[4] = False
    teacher = topk_of(inputs)
    (inputs.old_logprobs if field == "old_logprobs" else teacher.token_logprobs)[4] = math.nan
    for reduction in ("none", "mean"):
        result = measured(case, inputs, teacher=teacher, reduction=reduction)
        truth = expected(case, inputs, teacher=teacher, reduction=reduction)
        assert torch.equal(result.value.isnan(), truth.value.isnan())
        wrong = torch.arange(10) == 4
        assert torch.equal(result.gradient.isnan().all(-1), wrong)
        torch.testing.assert_close(
            result.gradient[~wrong], truth.gradient[~wrong], rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("field", ["token_logprobs", "entropy", "logprobs"])
def test_hazard_04_a_nan_of_a_sparse_teacher(field):
    inputs = prepare(MIXED, (6,), 40, torch.float64)
    teacher = topk_of(inputs)
    getattr(teacher, field)[2] = math.nan
    case = Case("", "eopd", {"entropy_threshold": -1.0})
    result = measured(case, inputs, teacher=teacher)
    assert result.value.isnan().tolist() == [row == 2 for row in range(6)]
    assert torch.equal(result.gradient.isnan().all(-1), result.value.isnan())


def two_ids(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_hazard_02_an_infinite_forward_kl_spoils_outliers_only():
    """Student −inf at an id of the teacher's top-K, and the token another one."""
    student = two_ids([0.0, -INFINITY, 1.0], [0.0, -INFINITY, 1.0])
    teacher = two_ids([0.0, 2.0, 1.0], [0.0, 2.0, 1.0])
    inputs = prepare(MIXED, (2,), 3, torch.float64)
    inputs.student, inputs.teacher, inputs.tokens = student, teacher, torch.tensor([0, 0])
    probability = math.exp(float((teacher.log_softmax(-1) - student.log_softmax(-1))[0, 0]))
    assert 0.1 < probability < 0.9
    inputs.uniforms = torch.tensor([0.5, 1.5], dtype=torch.float64) * probability
    case = Case("", "tropd", {"k": 2}, ("uniforms",))
    result = measured(case, inputs)
    assert result.value[0].isfinite()
    assert result.gradient[0].isfinite().all()
    assert result.value[1] == INFINITY
    assert result.gradient[1].isnan().all()
    expected_case = Case("", "tropd", {"k": 2, "region": "expected"})
    assert (measured(expected_case, inputs).value == INFINITY).all()
    for outlier in ("mask", "clip"):
        case = Case("", "tropd", {"k": 2, "outlier": outlier}, ("uniforms",))
        result = measured(case, inputs)
        assert result.value.isfinite().all()
        assert result.gradient.isfinite().all()
        close(result, expected(case, inputs))


def test_hazard_02_terms_behind_a_closed_gate_are_not_evaluated():
    student, teacher = two_ids([0.0, -INFINITY, 1.0]), two_ids([0.0, 2.0, 1.0])
    inputs = prepare(MIXED, (1,), 3, torch.float64)
    inputs.student, inputs.teacher, inputs.tokens = student, teacher, torch.tensor([0])
    for function, closed, opened in (
        ("eopd", {"entropy_threshold": 5.0}, {"entropy_threshold": 0.0}),
        ("aopd", {"threshold": -1.0}, {"threshold": 1.0}),
    ):
        case = Case("", function, {"k": 2} | closed)
        close(measured(case, inputs), measured(K1, inputs))
        result = measured(Case("", function, {"k": 2} | opened), inputs)
        assert result.value == INFINITY
        assert result.gradient.isnan().all()


def test_hazard_02_a_token_that_the_teacher_excludes():
    """τ_y = −inf, R = −inf: finite wherever the policy term is not taken."""
    inputs = prepare(MIXED, (1,), 3, torch.float64)
    inputs.student, inputs.teacher = two_ids([0.3, 0.0, 1.0]), two_ids([-INFINITY, 2.0, 1.0])
    inputs.tokens, inputs.uniforms = torch.tensor([0]), torch.zeros(1, dtype=torch.float64)
    threshold = {"region": "threshold", "k": 2}
    finite = [
        Case("", "tropd", {"k": 2}, ("uniforms",)),
        Case("", "tropd", {"k": 2, "region": "expected"}),
        Case("", "tropd", {"k": 2} | threshold),
        Case("", "tropd", {"outlier": "mask"} | threshold),
        Case("", "tropd", {"outlier": "clip"} | threshold),
        Case("", "tropd", {"outlier": "clip", "region": "expected", "k": 2}),
        Case("", "aopd", {"k": 2}),
        Case("", "reopold"),
        Case("", "reopold", {"phase": "refinement"}),
    ]
    infinite = [
        Case("", "tropd", {"threshold": -INFINITY} | threshold),
        Case("", "eopd", {"k": 2}),
        Case("", "aopd", {"k": 2, "threshold": -0.9}),
        Case("", "reopold", {"mixture": 0.0}),
    ]
    for case in finite:
        result = measured(case, inputs)
        assert result.value.isfinite().all(), case
        assert result.gradient.isfinite().all(), case
        close(result, expected(case, inputs))
    for case in infinite:
        result = measured(case, inputs)
        assert (result.value == INFINITY).all(), case
        assert result.gradient.isnan().all(), case


def test_a_row_of_a_sparse_teacher_without_any_slot():
    """Nothing to sum for `normalize="none"` (0); no distribution to match for EOPD's (NaN)."""
    inputs = prepare(MIXED, (2,), 40, torch.float64)
    teacher = topk_of(inputs)
    teacher.ids[1] = -1
    outlier = Case("", "tropd", {"region": "threshold", "threshold": 1e9})
    everywhere = Case("", "aopd", {"threshold": 1.0})
    for case in (outlier, everywhere):
        result = measured(case, inputs, teacher=teacher)
        assert result.value[1] == 0
        assert (result.gradient[1] == 0).all()
        assert result.value[0] != 0
    opened = measured(Case("", "eopd", {"entropy_threshold": -1.0}), inputs, teacher=teacher)
    assert opened.value.isnan().tolist() == [False, True]
    closed = measured(Case("", "eopd", {"entropy_threshold": 99.0}), inputs, teacher=teacher)
    assert closed.value.isfinite().all()


# ----------------------------------------------------------------- metrics


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_metrics_are_unweighted_sums_over_active_positions(case, sparse):
    inputs = prepare(MIXED, (3, 4))
    case = Case(case.name, case.function, case.options | {"k": 5}, case.extra)
    if case.function == "reopold":
        case.options.pop("k")
    teacher = topk_of(inputs) if sparse else inputs.teacher
    _, metrics = getattr(opdc, case.function)(
        inputs.student,
        teacher,
        inputs.tokens,
        **inputs.keywords(case),
        mask=inputs.mask,
        weights=inputs.weights,
        return_metrics=True,
    )
    opened = gates(case, inputs, teacher, mask=inputs.mask).sum().item()
    s = oracle.token_logprobs(inputs.student, inputs.tokens)
    tau = oracle.token_logprobs(inputs.teacher, inputs.tokens)
    read = inputs.mask & ~inputs.prefix_mask if "prefix_mask" in case.extra else inputs.mask
    log_ratio = (tau - s)[read]
    gate = {"tropd": "trusted", "reopold": "selected"}.get(case.function, "gated")
    wanted = {
        "positions": float(inputs.mask.sum()),
        gate: opened,
        "nonfinite_rows": 0.0,
    }
    if "prefix_mask" not in case.extra:
        wanted |= {
            "k1": float(-log_ratio.sum()),
            "k2": float((0.5 * log_ratio**2).sum()),
            "k3": float((torch.expm1(log_ratio) - log_ratio).sum()),
        }
    assert {*wanted} - {"k1", "k2", "k3"} <= metrics.keys()
    wanted["log_ratio_min"] = float(log_ratio.min())
    wanted["log_ratio_max"] = float(log_ratio.max())
    wanted["student_entropy"] = float(oracle.entropy(inputs.student)[inputs.mask].sum())
    wanted["teacher_entropy"] = float(oracle.entropy(inputs.teacher)[read].sum())
    for name in wanted.keys() & metrics.keys():
        assert metrics[name].item() == pytest.approx(wanted[name], rel=4e-6, abs=1e-6), name
        assert metrics[name].dim() == 0
        assert not metrics[name].requires_grad


@pytest.mark.parametrize("name", ["eopd_old", "tropd_old_clip_mask"])
def test_metrics_count_the_clipped_branch(name):
    mask_outliers = {"k": 5, "region": "threshold", "outlier": "mask", "clip_range": 0.2}
    mask_outliers["threshold"] = -0.5
    case = NAMED.get(name, Case(name, "tropd", mask_outliers, OLD))
    inputs = prepare(MIXED, (40,), 30)
    s = oracle.token_logprobs(inputs.student, inputs.tokens)
    tau = oracle.token_logprobs(inputs.teacher, inputs.tokens)
    ratio, advantage = (s - inputs.old_logprobs).exp(), tau - inputs.old_logprobs
    clipped = -ratio.clamp(0.8, 1.2) * advantage > -ratio * advantage
    if case.function == "tropd":  # the policy term of an outlier is not evaluated
        trusted = gates(case, inputs).bool()
        assert (clipped & ~trusted).any()
        clipped &= trusted
    _, metrics = getattr(opdc, case.function)(
        inputs.student, inputs.teacher, inputs.tokens, **inputs.keywords(case), return_metrics=True
    )
    assert metrics["clipped"].item() == clipped.sum() > 0


def test_metrics_do_not_change_the_loss():
    inputs = prepare(MIXED, (3, 4))
    for case in LOSSES:
        arguments = (inputs.student, inputs.teacher, inputs.tokens)
        function = getattr(opdc, case.function)
        loss, _ = function(*arguments, **inputs.keywords(case), return_metrics=True)
        assert torch.equal(loss, function(*arguments, **inputs.keywords(case)))


# ----------------------------------------------------------------- bits do not depend on company


def subset(inputs: Inputs, rows) -> Inputs:
    chosen = copy.copy(inputs)
    for name, value in vars(inputs).items():
        if isinstance(value, torch.Tensor):
            setattr(chosen, name, value[rows])
    return chosen


ROWWISE = [
    case
    for case in LOSSES
    if case.options.get("phase") != "refinement" or "entropy_threshold" in case.options
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", ROWWISE, ids=str)
def test_identity_12_bits_do_not_depend_on_other_rows(case, dtype):
    inputs = prepare(MIXED, (7,), 1025, FLOATS[dtype])
    usual = measured(case, inputs, inputs.upstream)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    shuffled = subset(inputs, order)
    result = measured(case, shuffled, shuffled.upstream)
    assert same_bits(Result(usual.value[order], usual.gradient[order]), result)
    single = subset(inputs, slice(4, 5))
    result = measured(case, single, single.upstream)
    assert same_bits(Result(usual.value[4:5], usual.gradient[4:5]), result)
    mask = torch.tensor([True, False, True, True, False, False, True])
    masked = measured(case, inputs, inputs.upstream, mask=mask)
    assert torch.equal(usual.value[mask], masked.value[mask])
    assert torch.equal(usual.gradient[mask], masked.gradient[mask])


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_identity_12_bits_do_not_depend_on_threads(case):
    inputs = prepare(MIXED, (9,), 5003)  # more than one thread's work
    usual = [measured(case, inputs, reduction=reduction) for reduction in ("none", "mean")]
    for threads in (2, 5):
        torch.set_num_threads(threads)
        again = [measured(case, inputs, reduction=reduction) for reduction in ("none", "mean")]
        assert all(same_bits(*pair) for pair in zip(usual, again, strict=True))


# ----------------------------------------------------------------- the drift gate


def test_drift_gate_by_hand():
    """Block 2, the first position inactive: blocks {1, 2} and {3}.

    d = (·, 0.2, −0.4, 0.3): block means −0.1 and 0.3, g = e^−0.1, e^−0.1, e^−0.3 with the mean
    0.850164: w = 1.064309, 1.064309, 0.871382.
    """
    old = torch.tensor([[math.nan, -1.0, -2.0, -3.0]], dtype=torch.float64)
    new = torch.tensor([[math.nan, -0.8, -2.4, -2.7]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True]])
    weights = opdc.drift_gate(new, old, mask, block=2)
    wanted = [0.0, 1.064309, 1.064309, 0.871382]
    assert weights[0].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("block", "kappa"), [(1, 1.0), (3, 0.5), (4, 2.0), (64, 1.0)])
@pytest.mark.parametrize("shape", [(17,), (3, 17), (2, 2, 9)])
def test_drift_gate(shape, block, kappa, dtype):
    generator = torch.Generator().manual_seed(5)
    new, old = (-torch.rand(2, *shape, generator=generator, dtype=torch.float64) * 4).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.6
    if len(shape) > 1:
        mask[1] = False
    for active in (mask, None):
        weights = opdc.drift_gate(new, old, active, block=block, kappa=kappa)
        truth = published.drift_gate(new, old, active, block=block, kappa=kappa)
        assert weights.shape == shape
        torch.testing.assert_close(weights.double(), truth, rtol=2e-6, atol=0)
        counted = torch.ones(shape, dtype=torch.bool) if active is None else active
        assert weights.double()[counted].mean().item() == pytest.approx(1.0, rel=1e-6)
        assert (weights[~counted] == 0).all()


def test_drift_gate_default_block_and_kappa():
    new, old = -torch.rand(2, 3, 200, dtype=torch.float64)
    torch.testing.assert_close(
        opdc.drift_gate(new, old), published.drift_gate(new, old, block=64, kappa=1.0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_12_drift_gate_at_the_old_policy_is_all_ones(dtype):
    """Exactly, for any number of positions: 1 over a mean of ones."""
    for length in (1, 3, 49, 130):
        logprobs = -torch.rand(3, length, dtype=dtype)
        mask = torch.rand(3, length) < 0.7
        assert torch.equal(
            opdc.drift_gate(logprobs, logprobs).double(), torch.ones(3, length).double()
        )
        weights = opdc.drift_gate(logprobs, logprobs, mask)
        assert torch.equal(weights.double(), mask.double())


def test_drift_gate_with_nothing_active_is_all_zeros():
    logprobs = torch.full((2, 5), math.nan)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    assert torch.equal(opdc.drift_gate(logprobs, logprobs, nothing), torch.zeros(2, 5))
    empty = opdc.drift_gate(torch.zeros(2, 0), torch.zeros(2, 0))
    assert empty.shape == (2, 0)


def test_drift_gate_starts_blocks_at_the_first_active_position_and_counts_holes():
    """Moving a sequence to the right changes nothing; a hole takes its place in a block."""
    generator = torch.Generator().manual_seed(1)
    new, old = -torch.rand(2, 1, 9, generator=generator, dtype=torch.float64)
    active = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 1]]).bool()
    weights = opdc.drift_gate(new, old, active, block=3)
    pad = torch.full((1, 5), math.nan, dtype=torch.float64)
    moved = opdc.drift_gate(
        torch.cat([pad, new], -1),
        torch.cat([pad, old], -1),
        torch.cat([pad > 0, active], -1),
        block=3,
    )
    assert torch.equal(moved[:, 5:], weights)
    blocks = [{0, 1}, {3, 4, 5}, {8}]
    for block in blocks:
        assert len({weights[0, position].item() for position in block}) == 1
    assert len({weights[0, min(block)].item() for block in blocks}) == 3


def test_drift_gate_never_reads_inactive_positions_and_takes_the_signed_mean():
    new = torch.tensor([[0.5, -0.5, math.nan, INFINITY, 0.0, 0.0]])
    old = torch.zeros(1, 6)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    assert torch.equal(opdc.drift_gate(new, old, mask, block=2), mask.float())


def test_drift_gate_is_detached_and_multiplies_any_loss():
    inputs = prepare(MIXED, (2, 6), 30, torch.float64)
    student = inputs.student.clone().requires_grad_()
    logprobs = opdc.token_logprobs(student, inputs.tokens)
    weights = opdc.drift_gate(logprobs, inputs.old_logprobs, inputs.mask, block=2)
    assert not weights.requires_grad
    arguments = (inputs.teacher, inputs.tokens)
    gated = opdc.k1(student, *arguments, weights=weights, mask=inputs.mask, reduction="none")
    plain = opdc.k1(student, *arguments, mask=inputs.mask, reduction="none")
    torch.testing.assert_close(gated, weights * plain)


# ----------------------------------------------------------------- special tokens


def test_special_token_mask_by_hand():
    """The first active 7 and the first active 9 of each sequence leave, and nothing else."""
    tokens = torch.tensor([[7, 1, 7, 9, 9], [1, 7, 2, 7, 9], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 0, 1]]).bool()
    wanted = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 0, 0], [1, 1, 1, 0, 1]]).bool()
    assert torch.equal(opdc.special_token_mask(tokens, [7, 9], mask), wanted)
    assert torch.equal(opdc.special_token_mask(tokens, [], mask), mask)
    without = torch.tensor([[0, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(opdc.special_token_mask(tokens, (7,)), without)


@pytest.mark.parametrize("token_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_special_token_mask(token_dtype, mask_dtype):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 6, (2, 4, 12), generator=generator, dtype=token_dtype)
    mask = torch.rand(2, 4, 12, generator=generator) < 0.6
    before = mask.clone()
    kept = opdc.special_token_mask(tokens, [1, 4, 77], mask.to(mask_dtype))
    assert kept.dtype == torch.bool
    assert torch.equal(kept, published.special_token_mask(tokens, [1, 4, 77], mask))
    assert torch.equal(mask, before)


def test_special_tokens_leave_numerator_and_denominator():
    inputs = prepare(MIXED, (2, 6), 30, torch.float64)
    inputs.tokens[0, 2] = inputs.tokens[1, 4] = 29
    kept = opdc.special_token_mask(inputs.tokens, [29])
    rest = opdc.k1(inputs.student, inputs.teacher, inputs.tokens, mask=kept, reduction="none")
    loss = opdc.k1(inputs.student, inputs.teacher, inputs.tokens, mask=kept)
    assert kept.sum() == 10
    torch.testing.assert_close(loss, rest.sum() / 10)


# ----------------------------------------------------------------- schedules


def test_prefix_length():
    schedule = opdc.PrefixLength(steps=200)
    assert [schedule(step, 100) for step in (0, 100, 200, 201, 10**6)] == [100, 50, 0, 0, 0]
    assert schedule(50, 100) == math.floor(0.5 * (1 + math.cos(math.pi / 4)) * 100) == 85
    assert [opdc.PrefixLength()(step, 37) for step in (1, 150)] == [36, 5]
    assert opdc.PrefixLength(steps=10)(3, 0) == 0
    for step in range(0, 210, 7):
        length = schedule(step, 333)
        assert isinstance(length, int)
        exact = 0.5 * (1 + math.cos(math.pi * step / 200)) * 333 if step < 200 else 0
        assert exact - 1 < length <= exact
    lengths = [schedule(step, 1000) for step in range(201)]
    assert lengths == sorted(lengths, reverse=True)


def test_blend_budget():
    schedule = opdc.BlendBudget(epsilon=0.02, steps=50)
    assert [schedule(step) for step in (0, 25, 50, 51, 1000)] == pytest.approx(
        [0.02, 0.01, 0, 0, 0]
    )
    assert schedule(50) == 0.0
    assert schedule(49) == pytest.approx(0.02 / 50, rel=1e-12)
    assert opdc.BlendBudget()(10) == pytest.approx(0.016, rel=1e-12)
    assert opdc.BlendBudget(epsilon=1.0, steps=4)(3) == pytest.approx(0.25)


@pytest.mark.parametrize("schedule", ["PrefixLength", "BlendBudget"])
def test_schedules_survive_pickle(schedule):
    original = getattr(opdc, schedule)(steps=30)
    copied = pickle.loads(pickle.dumps(original))
    arguments = (11, 400) if schedule == "PrefixLength" else (11,)
    assert copied(*arguments) == original(*arguments)


# ----------------------------------------------------------------- modules and PyTorch


MODULES = {
    "tropd": opdc.nn.TrOPDLoss,
    "eopd": opdc.nn.EOPDLoss,
    "aopd": opdc.nn.AOPDLoss,
    "reopold": opdc.nn.REOPOLDLoss,
}
MODULE_CASES = [case for case in LOSSES if "uniforms" not in case.extra]


def copies(module):
    yield module
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("case", MODULE_CASES, ids=str)
def test_modules_are_the_functions(case):
    inputs = prepare(MIXED, (3, 4))
    common = {"mask": inputs.mask, "weights": inputs.weights}
    usual = answer(
        getattr(opdc, case.function), case, inputs, reduction="seq_mean", temperature=0.8, **common
    )
    for module in copies(MODULES[case.function](**case.options, reduction="seq_mean")):
        student = inputs.student.clone().requires_grad_()
        loss = module(
            student,
            inputs.teacher,
            tokens=inputs.tokens,
            temperature=0.8,
            old_logprobs=inputs.old_logprobs if "old_logprobs" in case.extra else None,
            prefix_mask=inputs.prefix_mask if "prefix_mask" in case.extra else None,
            **common,
        )
        loss.backward()
        assert same_bits(usual, Result(loss.detach(), student.grad))
        text = repr(module)
        assert text.startswith(f"{type(module).__name__}(")
        for name, value in case.options.items():
            assert f"{name}={value!r}" in text


def test_module_of_tropd_draws_its_uniforms():
    inputs = prepare(MIXED, (3, 4))
    arguments = (inputs.student, inputs.teacher)
    module = opdc.nn.TrOPDLoss(k=5, reduction="none")
    torch.manual_seed(9)
    first, second = (module(*arguments, tokens=inputs.tokens) for _ in range(2))
    torch.manual_seed(9)
    function = opdc.tropd(*arguments, inputs.tokens, k=5, reduction="none")
    assert torch.equal(first, function)
    assert not torch.equal(first, second)
    own = opdc.nn.TrOPDLoss(k=5, reduction="none", generator=torch.Generator().manual_seed(9))
    assert torch.equal(own(*arguments, tokens=inputs.tokens), first)


def test_modules_know_whether_num_items_is_theirs():
    """REOPOLD divides by the positions it selects, not by a number of tokens."""
    for module in (opdc.nn.TrOPDLoss, opdc.nn.EOPDLoss, opdc.nn.AOPDLoss):
        assert module().uses_num_items
        assert not module(reduction="seq_mean").uses_num_items
    assert not opdc.nn.REOPOLDLoss().uses_num_items


def test_modules_default_to_the_functions_defaults():
    inputs = prepare(MIXED, (3, 4), 100)
    for function, module in MODULES.items():
        torch.manual_seed(1)
        usual = getattr(opdc, function)(inputs.student, inputs.teacher, inputs.tokens)
        torch.manual_seed(1)
        assert torch.equal(usual, module()(inputs.student, inputs.teacher, tokens=inputs.tokens))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_compile(case):
    function = getattr(opdc, case.function)

    def loss(student, teacher, tokens, mask, keywords):
        return function(student, teacher, tokens, mask=mask, **keywords)

    fast = compiled(loss)
    for vocabulary in (60, 66):  # the second size comes from the same dynamic graph
        inputs = prepare(MIXED, (3, 4), vocabulary)
        results = []
        for version in (loss, fast):
            student = inputs.student.clone().requires_grad_()
            value = version(
                student, inputs.teacher, inputs.tokens, inputs.mask, inputs.keywords(case)
            )
            value.backward()
            results.append(Result(value.detach(), student.grad))
        assert same_bits(*results)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_a_sparse_teacher():
    inputs = prepare(MIXED, (3, 4))
    teacher = topk_of(inputs)

    def loss(student, sparse):
        return opdc.eopd(student, sparse, inputs.tokens)

    results = []
    for version in (loss, compiled(loss)):
        student = inputs.student.clone().requires_grad_()
        value = version(student, teacher)
        value.backward()
        results.append(Result(value.detach(), student.grad))
    assert same_bits(*results)


@pytest.mark.usefixtures("fresh_compiler")
def test_scheduled_numbers_do_not_compile_again():
    inputs = prepare(MIXED, (3, 4))
    arguments = (inputs.student, inputs.teacher, inputs.tokens)
    counter = torch._dynamo.testing.CompileCounter()

    def loss(number):
        trust = opdc.tropd(
            *arguments, k=5, region="threshold", threshold=-number, prefix_weight=number,
            prefix_mask=inputs.prefix_mask,
        )  # fmt: skip
        mixed = opdc.eopd(*arguments, k=5, entropy_threshold=number, forward_weight=number)
        return trust + mixed + opdc.reopold(*arguments, mixture=number / 3)

    function = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(8):
        number = 0.31 + 0.27 * step
        torch.testing.assert_close(function(number), loss(number))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_transforms(case):
    """grad, vmap and vmap(grad) see a sequence at a time, so does the loss over one sequence."""
    inputs = prepare(MIXED, (3, 5), 30, torch.float64)
    function, names = getattr(opdc, case.function), list(case.extra)

    def loss(student, teacher, tokens, *rest):
        keywords = dict(zip(names, rest, strict=True))
        return function(student, teacher, tokens, **case.options, **keywords)

    rest = [getattr(inputs, name) for name in names]
    arguments = (inputs.student, inputs.teacher, inputs.tokens, *rest)
    alone = [subset(inputs, row) for row in range(3)]
    truth = [measured(case, part, reduction="mean") for part in alone]
    values = torch.stack([result.value for result in truth])
    gradients = torch.stack([result.gradient for result in truth])
    torch.testing.assert_close(vmap(loss)(*arguments), values)
    torch.testing.assert_close(vmap(grad(loss))(*arguments), gradients)
    torch.testing.assert_close(grad(lambda s: vmap(loss)(s, *arguments[1:]).sum())(arguments[0]),
                               gradients)  # fmt: skip
    whole = measured(case, inputs, reduction="mean")
    torch.testing.assert_close(grad(loss)(*arguments), whole.gradient)
