"""Losses from hidden states: the numbers are those of the logits that are never stored."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.func import functional_call, grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import opdc
import oracle
from projections import (
    PARTS,
    Answer,
    bytes_of_a_position,
    call,
    close,
    expected,
    is_statistic,
    judge,
    leaves,
    logits,
    make_projections,
    measured,
    parts,
    pull,
    same_bits,
    served,
    with_budget,
    with_parts,
)
from regimes import DIVERGENCES, POLICY, STATISTICS, Case
from test_published import LOSSES as PUBLISHED
from test_support import FEW as CELLS
from test_support import SUPPORTS

REDUCTIONS = ("none", "sum", "mean", "seq_mean")
ON_SUPPORT = [
    Case(
        f"{cell}-{support}",
        cell.function,
        {"support": support, "k": 5, "normalize": cell.normalize, **cell.options},
        ("tokens",) if support == "teacher+token" else (),
    )
    for cell in CELLS
    for support in SUPPORTS
]
LSM = [
    Case("lsm", "lsm", {"k": 5}),
    Case("lsm-teacher+token", "lsm", {"k": 5, "support": "teacher+token"}, ("tokens",)),
]
CASES = [*DIVERGENCES, *POLICY, *STATISTICS, *ON_SUPPORT, *LSM, *PUBLISHED]
NAMED = {case.name: case for case in CASES}
SAMPLE = [
    NAMED[name]
    for name in (
        "reverse_kl",
        "jsd",
        "skew_reverse",
        "k1_clip",
        "k1_discount",
        "k3",
        "entropy",
        "forward_kl-tail-teacher",
        "reverse_kl-none-student",
        "lsm",
        "tropd_sampled_forward_kl",
        "eopd_old",
        "aopd",
        "reopold_old",
        "reopold_refinement",
    )
]
LOSSES = [case for case in SAMPLE if not is_statistic(case)]
FEW = [*LOSSES[::3], NAMED["entropy"]]
DIVERGENCE = NAMED["reverse_kl"]
# Everything between hidden states and logits at once.
EVERYTHING = {"scale": 0.7, "softcap": 6.0}


def double(regime="mixed", positions=(2, 4), vocabulary=60, **options):
    return make_projections(regime, positions, vocabulary, torch.float64, **options)


# ----------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_loss_from_two_projections(case):
    models = double(**EVERYTHING)
    close(measured(case, models, temperature=1.3), expected(case, models, temperature=1.3))


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_float32(case):
    result = judge(case, make_projections(**EVERYTHING))
    assert result.value.dtype == torch.float32
    assert result.value.shape == (2, 4)


@pytest.mark.parametrize("regime", ["far", "peaked", "near_1e-02", "near_1e-04"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_regime(case, regime):
    result = judge(case, make_projections(regime, bias=False, rank=0))
    if case.name in ("reverse_kl", "jsd", "skew_reverse", "lsm"):
        assert (result.value >= 0).all()


@pytest.mark.parametrize("pair", ["bf16 bf16", "f16 f16", "bf16 f32", "f32 bf16", "f16 bf16"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_hazard_10_and_22_low_precision_enters_and_leaves_only(case, pair):
    """The logits of a bf16 head are not rounded to bf16, and every gradient is rounded once."""
    dtypes = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    hidden, weight = (dtypes[name] for name in pair.split())
    result = judge(case, make_projections("near_1e-02", dtype=hidden, weight_dtype=weight))
    assert result.value.dtype == torch.float32


def test_a_wide_head_in_low_precision():
    """Its rows, more than 8 MiB in float32, are not converted all at once."""
    models = make_projections("far", (3,), 4000, torch.bfloat16, sizes=(600, 300))
    judge(DIVERGENCE, models, valid_vocab=3600)


@pytest.mark.parametrize("pair", [("hidden", "weight"), ("weight", "hidden")], ids="-".join)
def test_hazard_22_one_tensor_in_float64_is_enough(pair):
    wide, narrow = pair
    models = double()
    narrowed = {name: x.float() for name, x in parts(models.student).items() if name != wide}
    assert narrow in narrowed
    student = with_parts(models.student, narrowed)
    result = measured(DIVERGENCE, models, student=student)
    truth = expected(DIVERGENCE, models, student=student)
    assert result.value.dtype == torch.float64
    for name, gradient in result.gradients.items():
        assert gradient.dtype == parts(student)[name].dtype
        truth.gradients[name] = truth.gradients[name].to(gradient.dtype)
    close(result, truth, 1e-7)  # one rounding to float32
    torch.testing.assert_close(result.value, truth.value, rtol=1e-11, atol=0)


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_a_projection_on_one_side_only(case, which):
    models = double(**EVERYTHING)
    place = {which: logits(getattr(models, which)).detach()}
    close(measured(case, models, **place), expected(case, models, **place))


@pytest.mark.parametrize(
    "case",
    [
        *(case for case in ON_SUPPORT if case.options["support"] != "student"),
        *LSM,
        *(NAMED[name] for name in ("tropd_sampled_forward_kl", "eopd_old", "aopd", "reopold_old")),
    ],
    ids=str,
)
def test_teacher_of_a_server(case):
    models = double(**EVERYTHING)
    teacher = served(models.inputs)
    close(measured(case, models, teacher=teacher), expected(case, models, teacher=teacher))


@pytest.mark.parametrize(
    "name", ["k1_clip", "k1_discount", "k2", "k3", "reopold_old", "reopold_refinement"]
)
def test_teacher_as_logprobs_of_the_tokens(name):
    models = double(**EVERYTHING)
    server = served(models.inputs)
    truth = expected(NAMED[name], models, teacher=server.token_logprobs)
    for teacher in (server, server.token_logprobs):
        close(measured(NAMED[name], models, teacher=teacher), truth)


@pytest.mark.parametrize("sizes", [(4, 4), (24, 5)])
@pytest.mark.parametrize("vocabulary", [40, 300])
def test_hidden_sizes_and_vocabularies(sizes, vocabulary):
    models = double("far", (5,), vocabulary, sizes=sizes)
    close(measured(DIVERGENCE, models), expected(DIVERGENCE, models))


@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("scale", [-1.5, 0.0, 1.0, 0.125])
@pytest.mark.parametrize("extra", ["", "bias", "adapter", "bias adapter"])
def test_scale_softcap_bias_and_adapter(extra, scale, softcap):
    models = double(
        "far", (3,), 40, bias="bias" in extra, rank=3 * ("adapter" in extra),
        scale=scale, softcap=softcap,
    )  # fmt: skip
    result, truth = measured(DIVERGENCE, models), expected(DIVERGENCE, models)
    assert set(result.gradients) == {"hidden", "weight"} | {
        name for name in PARTS if name.split("_")[0] in extra.split()
    }
    close(result, truth)


def test_a_softcap_that_saturates():
    """tanh = ±1: no gradient passes, and nothing becomes NaN."""
    models = double("far", (4,), 40, softcap=1.0)
    saturated = models.student._replace(hidden=1e4 * models.student.hidden)
    for dtype in (torch.float64, torch.float32):
        student = with_parts(saturated, {n: x.to(dtype) for n, x in parts(saturated).items()})
        result = measured(DIVERGENCE, models, student=student)
        assert result.value.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in result.gradients.values())
    close(measured(DIVERGENCE, models, student=saturated),
          expected(DIVERGENCE, models, student=saturated))  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_hazard_16_valid_vocabulary_is_the_first_rows_of_both_heads(case):
    models = double()
    models.inputs.tokens %= 45
    of_ids = ("weight", "bias", "adapter_weight")
    shorter = {name: parts(models.teacher)[name][:50].clone() for name in of_ids}
    teacher = with_parts(models.teacher, shorter)
    result = measured(case, models, teacher=teacher, valid_vocab=45)
    close(result, expected(case, models, teacher=teacher, valid_vocab=45))
    for projection in (models.student, teacher):  # rows beyond are not read
        for name in of_ids:
            parts(projection)[name][45:] = math.nan
    again = measured(case, models, teacher=teacher, valid_vocab=45)
    assert same_bits(result, again)
    for name in of_ids:
        assert (result.gradients[name][45:] == 0).all()


# ----------------------------------------------------------------- reductions, masks, weights


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_reduction_mask_weights(case, reduction):
    models = double(positions=(3, 4))
    models.inputs.mask[1] = False  # a sequence with nothing in it
    common = {name: getattr(models.inputs, name) for name in ("mask", "weights")}
    common["reduction"] = reduction
    result = measured(case, models, **common)
    close(result, expected(case, models, **common))
    assert result.value.shape == ((3, 4) if reduction == "none" else ())
    assert (result.gradients["hidden"][~models.inputs.mask] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "seq_mean"])
@pytest.mark.parametrize("items", [37, 2.5, torch.tensor(11), 0])
@pytest.mark.parametrize("name", ["jsd", "k1_clip", "reopold_refinement", "lsm"])
def test_num_items_replaces_the_count(name, items, reduction):
    models = double(positions=(3, 4))
    common = {"reduction": reduction, "mask": models.inputs.mask, "num_items": items}
    result = measured(NAMED[name], models, **common)
    close(result, expected(NAMED[name], models, **common))
    if items == 0:
        assert result.value == 0
        assert all((gradient == 0).all() for gradient in result.gradients.values())


def test_hazard_07_micro_batches_with_num_items_are_one_batch():
    models = double(positions=(6, 2))
    whole = measured(DIVERGENCE, models, reduction="mean")
    student = leaves(models.student)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        of_positions = [
            {name: parts(p)[name][rows] for name in ("hidden", "adapter_inputs")}
            for p in (student, models.teacher)
        ]
        some, other = (
            with_parts(p, tensors)
            for p, tensors in zip((student, models.teacher), of_positions, strict=True)
        )
        (-1.7 * opdc.reverse_kl(some, other, num_items=12)).backward()
    added = Answer(whole.value, {name: x.grad for name, x in parts(student).items()})
    close(added, whole)


@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_hazard_06_nothing_to_average(case, with_mask):
    """No position, or none that is active: 0, connected, and gradients of zeros."""
    shapes = [(2, 3)] if with_mask else [(0,), (2, 0), (0, 3)]
    for shape in shapes:
        models = double(positions=shape)
        common = {"mask": torch.zeros(shape, dtype=torch.bool)} if with_mask else {}
        for reduction in ("none",) if is_statistic(case) else REDUCTIONS:
            keywords = common if is_statistic(case) else common | {"reduction": reduction}
            upstream = torch.full(shape if reduction == "none" else (), 2.0)
            result = measured(case, models, upstream=upstream, **keywords)
            assert result.value.shape == upstream.shape
            assert (result.value == 0).all()
            for name, gradient in result.gradients.items():
                assert gradient.shape == parts(models.student)[name].shape
                assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 1, 3)])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_positions_of_any_shape(case, shape):
    models = double(positions=shape)
    close(measured(case, models), expected(case, models))


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_hazard_05_inactive_positions_are_never_projected(case):
    models = double(positions=(3, 4))
    mask = models.inputs.mask
    mask[0], mask[1] = True, False
    assert 2 < int(mask.sum()) < 10
    usual = measured(case, models, mask=mask)
    spoiled = copy.deepcopy(models)
    for projection in (spoiled.student, spoiled.teacher):
        projection.hidden[~mask] = math.nan
        projection.adapter[0][~mask] = math.inf
    spoiled.inputs.tokens[~mask] = -100
    for name in ("old_logprobs", "reference_logprobs", "uniforms"):
        getattr(spoiled.inputs, name)[~mask] = math.nan
    result = measured(case, spoiled, mask=mask)
    assert same_bits(usual, result)
    assert result.gradients["weight"].isfinite().all()
    for name in ("hidden", "adapter_inputs"):
        assert (result.gradients[name][~mask] == 0).all()


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_hazard_04_an_undefined_row_stays_alone(case, where):
    """Its loss and its row of dh are NaN; so is all that is shared, dW and a mean."""
    models = double(positions=(6,))
    usual = measured(case, models)
    getattr(models, where).hidden[2, 1] = math.nan
    result = measured(case, models)
    others = torch.arange(6) != 2
    if case.name == "k1_discount":  # whose sums hold the undefined advantage
        others[:2] = False
    assert result.value[2].isnan()
    assert result.gradients["hidden"][2].isnan().all()
    assert result.gradients["weight"].isnan().any()
    if case.name == "reopold_refinement":  # one entropy fewer to choose from
        assert result.value[others].isfinite().all()
        assert result.gradients["hidden"][others].isfinite().all()
    else:
        assert torch.equal(result.value[others], usual.value[others])
        close_rows = result.gradients["hidden"][others], usual.gradients["hidden"][others]
        torch.testing.assert_close(*close_rows, rtol=1e-12, atol=1e-14)
    mean = measured(case, models, reduction="mean")
    assert mean.value.isnan()


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_hazard_02_and_03_ids_that_a_bias_excludes(case):
    """A bias of −inf in both heads: the id does not exist, and its row of dW is 0."""
    models = double(positions=(5,))
    absent = torch.zeros(60, dtype=torch.bool)
    absent[torch.arange(0, 60, 7)] = True
    models.inputs.tokens[absent[models.inputs.tokens]] += 1
    for projection in (models.student, models.teacher):
        projection.bias[absent] = -math.inf
    result = measured(case, models)
    close(result, expected(case, models))
    for name in ("weight", "bias", "adapter_weight"):
        assert (result.gradients[name][absent] == 0).all()


def test_hazard_22_logits_beyond_float16():
    """The products of float16 tensors are float32: neither infinite nor NaN."""
    hidden = torch.full((3, 4), 300.0, dtype=torch.float16)
    weight = (300 * torch.randn(40, 4)).half()
    models = make_projections(positions=(3,), vocabulary=40, dtype=torch.float16)
    student = opdc.Projection(hidden, weight)
    assert logits(student).abs().max() > 65504
    result = measured(NAMED["entropy"], models, student=student)
    assert result.value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())


def test_weights_may_be_zero_or_negative():
    models = double(positions=(4,))
    weights = torch.tensor([0.0, -1.0, 2.0, 1.0], dtype=torch.float64)
    close(measured(DIVERGENCE, models, weights=weights),
          expected(DIVERGENCE, models, weights=weights))  # fmt: skip


# ----------------------------------------------------------------- chunks


def budgets(case, models, **changes):
    """At most one, three, five positions of eight at a time, and all."""
    one = bytes_of_a_position(case, models, **changes)
    yield from (one, 4 * one - 1, 5 * one)
    yield None


def at_each_budget(case, models, **changes):
    for budget in budgets(case, models, **changes):
        student = with_budget(changes.get("student", models.student), budget)
        teacher = with_budget(changes.get("teacher", models.teacher), budget)
        yield measured(case, models, **changes | {"student": student, "teacher": teacher})


@pytest.mark.parametrize(
    ("case", "reduction"),
    [(case, "none") for case in CASES] + [(case, "mean") for case in LOSSES],
    ids=str,
)
def test_chunks_do_not_change_the_numbers(case, reduction):
    """Positions that stay in one chunk, that straddle two, and a last chunk that is not full."""
    models = double(**EVERYTHING)
    keywords = {} if is_statistic(case) else {"reduction": reduction}
    results = list(at_each_budget(case, models, **keywords))
    for result in results:
        close(result, results[-1], 1e-12)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_chunks_of_active_positions(case):
    """The mask leaves exactly one chunk, one position more, or a single one."""
    models = double(positions=(10,))
    one = bytes_of_a_position(case, models)
    student, teacher = (with_budget(x, 3 * one) for x in (models.student, models.teacher))
    for active in ([1, 4, 9], [0, 2, 3, 8], [5], [0, 1, 2, 3, 4, 5]):
        mask = torch.zeros(10, dtype=torch.bool)
        mask[active] = True
        chunked = measured(case, models, student=student, teacher=teacher, mask=mask)
        close(chunked, measured(case, models, mask=mask), 1e-12)
        close(chunked, expected(case, models, mask=mask))


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_chunks_beside_logits(case):
    models = double()
    for place in ({"teacher": logits(models.teacher).detach()},
                  {"student": logits(models.student).detach()}):  # fmt: skip
        results = list(at_each_budget(case, models, **place))
        for result in results:
            close(result, results[-1], 1e-12)


def test_chunks_in_low_precision_accumulate_in_float32():
    """dW of 40 chunks in bf16 is rounded once, not 40 times."""
    models = make_projections(positions=(40,), dtype=torch.bfloat16)
    one = bytes_of_a_position(DIVERGENCE, models)
    student, teacher = (with_budget(x, one) for x in (models.student, models.teacher))
    judge(DIVERGENCE, models, student=student, teacher=teacher)


def test_student_and_teacher_may_have_budgets_of_their_own():
    models = double()
    one = bytes_of_a_position(DIVERGENCE, models)
    usual = measured(DIVERGENCE, models)
    for first, second in ((one, None), (None, one), (3 * one, one), (one, 2 * one)):
        student = with_budget(models.student, first)
        teacher = with_budget(models.teacher, second)
        close(measured(DIVERGENCE, models, student=student, teacher=teacher), usual, 1e-12)


def test_a_budget_of_one_position_is_enough_and_one_byte_less_is_not():
    models = double()
    one = bytes_of_a_position(DIVERGENCE, models)
    assert one >= 60 * 8  # at least the logits of one position
    enough = with_budget(models.student, one)
    teacher = with_budget(models.teacher, one)
    measured(DIVERGENCE, models, student=enough, teacher=teacher)
    with pytest.raises(ValueError, match=f"max_bytes.*{one}"):
        measured(DIVERGENCE, models, student=with_budget(models.student, one - 1), teacher=teacher)


# ----------------------------------------------------------------- layouts


def layouts_of_hidden(hidden):
    """The same numbers as a view of something larger, whose gradient is then judged."""
    shape = hidden.shape
    longer = torch.randn(shape[0], shape[1] + 1, shape[2], dtype=hidden.dtype)
    longer[:, :-1] = hidden
    yield "without the last position", longer, lambda x: x[:, :-1]
    wide = torch.randn(*shape[:-1], 2 * shape[-1] + 1, dtype=hidden.dtype)
    wide[..., 1::2] = hidden
    yield "every second entry", wide, lambda x: x[..., 1::2]
    yield "sequence first", hidden.transpose(0, 1).contiguous(), lambda x: x.transpose(0, 1)
    yield "size first", hidden.permute(2, 0, 1).contiguous(), lambda x: x.permute(1, 2, 0)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_hazard_17_layouts_of_the_hidden_states(case):
    models = double(positions=(3, 4))
    usual = measured(case, models, mask=models.inputs.mask)
    for name, base, view in layouts_of_hidden(models.student.hidden):
        base.requires_grad_()
        value = call(
            getattr(opdc, case.function), case, models.student._replace(hidden=view(base)),
            models.teacher, models.inputs, mask=models.inputs.mask,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(value, base, models.inputs.upstream)
        torch.testing.assert_close(value, usual.value, rtol=1e-12, atol=1e-14, msg=name)
        torch.testing.assert_close(
            view(gradient), usual.gradients["hidden"], rtol=1e-11, atol=1e-13, msg=name
        )
    for name, base, view in layouts_of_hidden(models.teacher.hidden):
        result = measured(case, models, teacher=models.teacher._replace(hidden=view(base)),
                          mask=models.inputs.mask)  # fmt: skip
        torch.testing.assert_close(result.value, usual.value, rtol=1e-12, atol=1e-14, msg=name)


def test_hazard_17_one_hidden_state_for_all_positions():
    models = double(positions=(5,))
    row = models.student.hidden[:1].clone().requires_grad_()
    shared = models.student._replace(hidden=row.expand(5, -1))
    copied = models.student._replace(hidden=row.detach().repeat(5, 1))
    value = opdc.reverse_kl(shared, models.teacher, reduction="none")
    (gradient,) = torch.autograd.grad(value, row, models.inputs.upstream)
    usual = measured(DIVERGENCE, models, student=copied)
    torch.testing.assert_close(value, usual.value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[0], usual.gradients["hidden"].sum(0), rtol=1e-11, atol=0)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_hazard_17_heads_with_rows_of_any_stride(which):
    models = double()
    usual = measured(DIVERGENCE, models)
    projection = getattr(models, which)
    wide = torch.full((60, projection.weight.shape[1] + 7), math.nan, dtype=torch.float64)
    inner = wide[:, 3 : 3 + projection.weight.shape[1]].copy_(projection.weight)
    sparse_rows = torch.full((120, projection.weight.shape[1]), math.nan, dtype=torch.float64)
    every_second = sparse_rows[::2].copy_(projection.weight)
    bias = torch.zeros(60, 2, dtype=torch.float64)
    bias[:, 1] = projection.bias
    for view in (inner, every_second):
        weight = view.detach().requires_grad_()
        strided = projection._replace(weight=weight, bias=bias[:, 1])
        if which == "teacher":
            close(measured(DIVERGENCE, models, teacher=strided), usual, 1e-12)
            continue
        value = opdc.reverse_kl(strided, models.teacher, reduction="none")
        (gradient,) = torch.autograd.grad(value, weight, models.inputs.upstream)
        close(Answer(value, {"weight": gradient}),
              Answer(usual.value, {"weight": usual.gradients["weight"]}), 1e-12)  # fmt: skip


@pytest.mark.parametrize("case", LOSSES[::2], ids=str)
def test_hazard_17_and_18_every_layout_of_the_upstream(case):
    models = double()
    wide = torch.randn(2, 9, dtype=torch.float64)
    layouts = (
        wide[:, 1::2],
        torch.randn(4, 2, dtype=torch.float64).t(),
        torch.tensor(-1.7, dtype=torch.float64).expand(2, 4),
        torch.randn(1, 4, dtype=torch.float64).expand(2, 4),
    )
    for upstream in layouts:
        close(measured(case, models, upstream=upstream), expected(case, models, upstream=upstream))


# ----------------------------------------------------------------- who receives a gradient


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    "needed",
    [*((name,) for name in PARTS), ("hidden", "adapter_inputs", "adapter_weight"),
     ("weight", "bias")],
    ids="+".join,
)  # fmt: skip
def test_what_is_frozen_gets_no_gradient(needed, reduction):
    models = double(**EVERYTHING)
    for case in LOSSES[:4]:
        usual = measured(case, models, reduction=reduction)
        result = measured(case, models, reduction=reduction, needed=needed)
        assert {name for name, x in result.gradients.items() if x is not None} == set(needed)
        usual.gradients = {
            name: x if name in needed else None for name, x in usual.gradients.items()
        }
        close(result, usual, 1e-12)


def test_nothing_needs_a_gradient():
    models = double()
    for case in SAMPLE:
        function = getattr(opdc, case.function)
        value = call(function, case, models.student, models.teacher, models.inputs)
        assert not value.requires_grad
        with torch.no_grad():
            same = call(function, case, leaves(models.student), models.teacher, models.inputs)
        with torch.inference_mode():
            again = call(function, case, leaves(models.student), models.teacher, models.inputs)
        assert not same.requires_grad
        assert torch.equal(value, same)
        assert torch.equal(value, again)
        torch.testing.assert_close(value, measured(case, models).value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_the_teacher_never_receives_a_gradient(case):
    models = double(**EVERYTHING)
    teacher = leaves(models.teacher)
    result = measured(case, models, teacher=teacher, reduction="mean")
    assert all(x.grad is None for x in parts(teacher).values())
    assert result.gradients["weight"].abs().sum() > 0
    alone = call(getattr(opdc, case.function), case, models.student, teacher, models.inputs)
    assert not alone.requires_grad


def test_one_head_for_student_and_teacher():
    """The gradient of a shared head is the student's share of it."""
    models = double(sizes=(12, 12))
    separate = models.teacher._replace(weight=models.student.weight.clone())
    usual = measured(DIVERGENCE, models, teacher=separate)
    student = leaves(models.student)
    shared = models.teacher._replace(weight=student.weight)
    value = opdc.reverse_kl(student, shared, reduction="none")
    close(pull(value, student, models.inputs), usual, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", DIVERGENCES, ids=str)
def test_identical_projections_have_divergence_zero_and_no_gradient(case, dtype):
    models = make_projections(positions=(9,), dtype=dtype, **EVERYTHING)
    one = bytes_of_a_position(case, models)
    for budget in (None, 2 * one):
        student = with_budget(models.student, budget)
        result = measured(case, models, student=student, teacher=student)
        assert (result.value == 0).all()
        assert all((gradient == 0).all() for gradient in result.gradients.values())


@pytest.mark.parametrize("case", LOSSES[1::3], ids=str)
def test_tied_weights(case):
    """The head is also the embedding that made the hidden states: both gradients add up."""
    models = double(positions=(2, 4), sizes=(12, 12))
    prompt = torch.randint(0, 60, (2, 4))
    mixing = torch.randn(12, 12, dtype=torch.float64)

    def gradient(function, project, dtype):
        weight = models.student.weight.to(dtype, copy=True).requires_grad_()
        hidden = torch.tanh(weight[prompt] @ mixing)
        student = models.student._replace(hidden=hidden, weight=weight)
        teacher = project(models.teacher)
        teacher = teacher.detach() if isinstance(teacher, torch.Tensor) else teacher
        value = call(function, case, project(student), teacher, models.inputs)
        return torch.autograd.grad(value, weight, models.inputs.upstream)[0]

    mine = gradient(getattr(opdc, case.function), lambda x: x, torch.float64)
    # The losses of logits are judged elsewhere: here it is the sum that counts.
    right = gradient(getattr(opdc, case.function), logits, torch.float64)
    torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


def test_gradients_of_several_losses_add_up():
    models = double(positions=(2, 4))
    student = leaves(models.student)
    names = ("reverse_kl", "k1_clip", "lsm")
    singles = [measured(NAMED[name], models, reduction="mean") for name in names]
    sum(
        call(getattr(opdc, NAMED[name].function), NAMED[name], student, models.teacher,
             models.inputs, reduction="mean")
        for name in names
    ).backward(models.inputs.upstream.new_tensor(-1.7))  # fmt: skip
    for name, x in parts(student).items():
        total = sum(single.gradients[name] for single in singles)
        torch.testing.assert_close(x.grad, total, rtol=1e-11, atol=1e-14)


# ----------------------------------------------------------------- finite differences


GRADCHECKED = [
    NAMED[name]
    for name in (
        "reverse_kl",
        "forward_kl",
        "jsd",
        "skew_forward",
        "k1_clip",
        "k2",
        "k3",
        "token_logprobs",
        "entropy",
        "forward_kl-teacher-teacher",
        "reverse_kl-tail-student",
        "reverse_kl-generalized-teacher+token",
        "lsm",
        "tropd_old",
        "eopd_old",
    )
]


@pytest.mark.parametrize(
    ("case", "budget"),
    [(case, "one position") for case in GRADCHECKED]
    + [(case, "default") for case in GRADCHECKED[::5]],
    ids=str,
)
def test_gradcheck(case, budget):
    models = double("far", (2, 2), 9, sizes=(4, 3), rank=1, **EVERYTHING)
    models.inputs.tokens %= 8
    case = Case(case.name, case.function, dict(case.options), case.extra)
    if "k" in case.options:
        case.options["k"] = 3
    mask = torch.tensor([[True, True], [False, True]])
    common = {"temperature": 1.3, "valid_vocab": 8, "mask": mask}
    if not is_statistic(case):
        common |= {"weights": models.inputs.weights}
    one = bytes_of_a_position(case, models, **common) if budget == "one position" else None
    student, teacher = (with_budget(x, one) for x in (models.student, models.teacher))

    def loss(*tensors):
        replaced = with_parts(student, dict(zip(PARTS, tensors, strict=True)))
        return call(getattr(opdc, case.function), case, replaced, teacher, models.inputs, **common)

    inputs = [x.detach().clone().requires_grad_() for x in parts(student).values()]
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-7, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("reduction", ["sum", "mean", "seq_mean"])
def test_gradcheck_of_reductions(reduction):
    models = double("far", (2, 2), 7, sizes=(3, 3), bias=False, rank=0)
    hidden, weight = (x.requires_grad_() for x in (models.student.hidden, models.student.weight))
    one = bytes_of_a_position(DIVERGENCE, models)
    assert torch.autograd.gradcheck(
        lambda h, w: opdc.reverse_kl(
            opdc.Projection(h, w, max_bytes=2 * one), models.teacher, reduction=reduction
        ),
        (hidden, weight),
    )


# ----------------------------------------------------------------- the sparse head


BOTH = [
    *(Case(f"{function}-{support}", function, {"normalize": "both", "support": support, **more},
           ("tokens",) if "token" in support else ())
      for function, more in (("reverse_kl", {}), ("forward_kl", {}), ("jsd", {}),
                             ("jsd", {"beta": 0.1}))
      for support in ("teacher", "teacher+token")),
    Case("lsm-default", "lsm"),
]  # fmt: skip


def sparse_models(regime="mixed", dtype=torch.float64, **options):
    """Rows with a missing slot, and some whose token is among the ids already."""
    models = make_projections(regime, (2, 4), 60, dtype, **EVERYTHING | options)
    teacher = served(models.inputs, 6)
    teacher.ids[0, :, 2], teacher.ids[1, 1, 0] = -1, -7
    teacher.logprobs[0, :, 2] = math.nan
    models.inputs.tokens[1, 2:] = teacher.ids[1, 2:, 1]
    token_logprobs = oracle.token_logprobs(models.inputs.teacher, models.inputs.tokens)
    teacher.token_logprobs.copy_(token_logprobs)
    return models, teacher


def named_rows(case, teacher, tokens, active=None):
    """The ids that a call names, of the positions that are active."""
    ids = teacher.ids
    if case.extra:
        ids = torch.cat([ids, tokens[..., None]], -1)
    ids = ids if active is None else ids[active]
    return ids[ids >= 0].unique()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_sparse_head(case, reduction):
    models, teacher = sparse_models()
    common = {"reduction": reduction, "weights": models.inputs.weights, "temperature": 0.8}
    result = measured(case, models, teacher=teacher, **common)
    close(result, expected(case, models, teacher=teacher, **common))
    off = torch.ones(60, dtype=torch.bool)
    off[named_rows(case, teacher, models.inputs.tokens)] = False
    assert off.sum() > 10
    for name in ("weight", "bias", "adapter_weight"):
        assert (result.gradients[name][off] == 0).all()


@pytest.mark.parametrize("regime", ["far", "peaked", "near_1e-02", "near_1e-04"])
@pytest.mark.parametrize("case", BOTH[::3], ids=str)
def test_sparse_head_in_float32(case, regime):
    models, teacher = sparse_models(regime, torch.float32)
    judge(case, models, teacher=teacher)


@pytest.mark.parametrize("pair", ["bf16 bf16", "f16 f16", "bf16 f32", "f32 bf16"])
@pytest.mark.parametrize("case", BOTH[::4], ids=str)
def test_sparse_head_in_low_precision(case, pair):
    dtypes = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    hidden, weight = (dtypes[name] for name in pair.split())
    models, teacher = sparse_models(dtype=hidden, weight_dtype=weight)
    judge(case, models, teacher=teacher)


@pytest.mark.parametrize("mask", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_sparse_head_reads_the_named_rows_only(case, mask):
    models, teacher = sparse_models()
    active = torch.ones(2, 4, dtype=torch.bool)
    if mask:
        active[0, :2], active[1, 3] = False, False
    usual = measured(case, models, teacher=teacher, mask=active)
    off = torch.ones(60, dtype=torch.bool)
    off[named_rows(case, teacher, models.inputs.tokens, active)] = False
    for name in ("weight", "bias", "adapter_weight"):
        parts(models.student)[name][off] = math.nan
    models.student.hidden[~active] = math.nan
    models.student.adapter[0][~active] = math.nan
    teacher.ids[~active] = 10**6
    teacher.logprobs[~active] = math.nan
    models.inputs.tokens[~active] = -100
    result = measured(case, models, teacher=teacher, mask=active)
    assert same_bits(usual, result)
    for name in ("weight", "bias", "adapter_weight"):
        assert (result.gradients[name][off] == 0).all()
    assert (result.gradients["hidden"][~active] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BOTH, ids=str)
def test_sparse_gradient(case, dtype):
    models, teacher = sparse_models(dtype=dtype)
    dense = measured(case, models, teacher=teacher, mask=models.inputs.mask)
    student = models.student._replace(sparse_gradient=True)
    result = measured(case, models, student=student, teacher=teacher, mask=models.inputs.mask)
    assert torch.equal(result.value, dense.value)
    wanted = set(named_rows(case, teacher, models.inputs.tokens, models.inputs.mask).tolist())
    for name in ("weight", "bias"):
        gradient = result.gradients[name]
        assert gradient.layout == torch.sparse_coo
        assert gradient.dtype == dtype
        assert gradient.shape == parts(student)[name].shape
        assert set(gradient.coalesce().indices()[0].tolist()) <= wanted
    if dtype == torch.bfloat16:  # rows that come twice are added, and rounded, by whom it is given
        for name, gradient in result.gradients.items():
            torch.testing.assert_close(
                gradient.to_dense(), dense.gradients[name], rtol=2**-6, atol=1e-3
            )
    else:
        close(result, dense, 1e-13 if dtype == torch.float64 else 2e-6)


def test_sparse_gradient_with_everything_else_frozen():
    models, teacher = sparse_models()
    for needed in (("weight",), ("bias",), ("hidden",), ("weight", "hidden")):
        student = models.student._replace(sparse_gradient=True)
        result = measured(BOTH[0], models, student=student, teacher=teacher, needed=needed)
        assert {name for name, x in result.gradients.items() if x is not None} == set(needed)
        usual = measured(BOTH[0], models, teacher=teacher, needed=needed)
        close(result, usual, 1e-13)


@pytest.mark.parametrize("second", [False, True], ids=["dense", "sparse"])
def test_sparse_gradient_adds_to_what_is_there(second):
    models, teacher = sparse_models()
    single = measured(BOTH[0], models, teacher=teacher)
    student = leaves(models.student)
    for sparse in (True, second):
        projection = student._replace(sparse_gradient=sparse)
        value = opdc.reverse_kl(projection, teacher, normalize="both", reduction="none")
        value.backward(models.inputs.upstream)
    assert student.weight.grad.is_sparse == second
    torch.testing.assert_close(
        student.weight.grad.to_dense(), 2 * single.gradients["weight"], rtol=1e-12, atol=1e-14
    )


def test_sparse_gradient_takes_a_step_of_sparse_adam():
    """The named rows move as with a dense gradient; the others, and their moments, stay."""
    models, teacher = sparse_models()
    heads = [models.student.weight.clone().requires_grad_() for _ in range(2)]
    options = {"lr": 0.1, "eps": 1e-30}  # the two divide by different sums with eps
    optimizers = [torch.optim.SparseAdam([heads[0]], **options),
                  torch.optim.Adam([heads[1]], **options)]  # fmt: skip
    for _ in range(2):
        for head, optimizer in zip(heads, optimizers, strict=True):
            student = models.student._replace(weight=head, sparse_gradient=head is heads[0])
            optimizer.zero_grad()
            opdc.lsm(student, teacher).backward()
            optimizer.step()
        named = named_rows(BOTH[0], teacher, None)
        torch.testing.assert_close(heads[0][named], heads[1][named], rtol=1e-6, atol=1e-6)
    off = torch.ones(60, dtype=torch.bool)
    off[named] = False
    assert torch.equal(heads[0][off], models.student.weight[off])
    assert not torch.equal(heads[0][named], models.student.weight[named])


def test_sparse_head_of_ids_of_any_integer_type_and_stride():
    models, teacher = sparse_models()
    usual = measured(BOTH[0], models, teacher=teacher)
    wide = torch.zeros(4, 6, 2, dtype=torch.long)
    strided = wide.new_zeros(6, 4, 2).permute(2, 1, 0).copy_(teacher.ids)
    for ids in (teacher.ids.int(), teacher.ids.to(torch.int16), strided):
        result = measured(BOTH[0], models, teacher=teacher._replace(ids=ids))
        assert same_bits(usual, result)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("sparse", [False, True])
def test_hazard_06_sparse_head_of_nothing(shape, sparse):
    models = double(positions=shape)
    teacher = opdc.TopK(torch.zeros(*shape, 3, dtype=torch.long), torch.zeros(*shape, 3))
    student = models.student._replace(sparse_gradient=sparse)
    for reduction in REDUCTIONS:
        upstream = torch.ones(shape if reduction == "none" else ())
        result = measured(
            BOTH[-1], models, student=student, teacher=teacher,
            reduction=reduction, upstream=upstream,
        )  # fmt: skip
        assert (result.value == 0).all()
        for name, gradient in result.gradients.items():
            assert gradient.shape == parts(student)[name].shape
            assert (gradient.to_dense() == 0).all()


def test_sparse_head_rows_without_a_slot_and_with_one():
    """NaN where S is empty, 0 where one id is left; the others are untouched."""
    models, teacher = sparse_models()
    usual = measured(BOTH[0], models, teacher=teacher)
    teacher.ids[0, 1] = -1
    teacher.ids[1, 0, 1:] = -1
    result = measured(BOTH[0], models, teacher=teacher)
    truth = expected(BOTH[0], models, teacher=teacher)
    assert result.value[0, 1].isnan()
    assert result.gradients["hidden"][0, 1].isnan().all()
    assert result.value[1, 0] == 0
    assert truth.value.isnan().equal(result.value.isnan())
    others = torch.ones(2, 4, dtype=torch.bool)
    others[0, 1] = others[1, 0] = False
    assert torch.equal(result.value[others], usual.value[others])
    assert torch.equal(result.gradients["hidden"][others], usual.gradients["hidden"][others])


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_hazard_04_sparse_head_with_an_undefined_row(case):
    models, teacher = sparse_models()
    usual = measured(case, models, teacher=teacher)
    models.student.hidden[1, 2, 0] = math.nan
    result = measured(case, models, teacher=teacher)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2] = False
    assert result.value[1, 2].isnan()
    assert result.gradients["hidden"][1, 2].isnan().all()
    assert torch.equal(result.value[others], usual.value[others])
    assert torch.equal(result.gradients["hidden"][others], usual.gradients["hidden"][others])
    poisoned = named_rows(case, teacher, models.inputs.tokens, ~others)
    assert result.gradients["weight"][poisoned].isnan().any()


@pytest.mark.parametrize("case", BOTH[::2], ids=str)
def test_gradcheck_of_the_sparse_head(case):
    models, teacher = sparse_models("far", sizes=(4, 3), rank=1)

    def loss(*tensors):
        student = with_parts(models.student, dict(zip(PARTS, tensors, strict=True)))
        return call(getattr(opdc, case.function), case, student, teacher, models.inputs)

    inputs = [x.clone().requires_grad_() for x in parts(models.student).values()]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_directional_derivative_of_a_sparse_gradient(name):
    models, teacher = sparse_models("far")
    student = models.student._replace(sparse_gradient=True)
    gradient = measured(BOTH[0], models, student=student, teacher=teacher).gradients[name]
    tensor, step = parts(student)[name], 1e-6
    direction = torch.randn_like(tensor)
    sides = []
    for distance in (step, -step):
        moved = with_parts(student, {name: tensor + distance * direction})
        value = opdc.reverse_kl(moved, teacher, normalize="both", reduction="none")
        sides.append((value * models.inputs.upstream).sum())
    difference = (sides[0] - sides[1]) / (2 * step)
    slope = (gradient.to_dense() * direction).sum()
    torch.testing.assert_close(difference, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("slots", [1, 2, 17, 60])
def test_sparse_head_of_any_number_of_slots(slots):
    models = double(positions=(5,))
    teacher = served(models.inputs, slots)
    if slots == 1:
        with pytest.raises(ValueError, match="0"):
            opdc.lsm(models.student, teacher)
        return
    close(measured(BOTH[-1], models, teacher=teacher), expected(BOTH[-1], models, teacher=teacher))
    if slots == 60:  # S is the vocabulary
        close(measured(BOTH[-1], models, teacher=teacher), measured(DIVERGENCE, models), 1e-10)


def test_sparse_head_with_valid_vocabulary():
    models, _ = sparse_models()
    models.inputs.tokens %= 45
    teacher = served(models.inputs, 6, 45)
    models.student.weight[45:] = math.nan
    result = measured(BOTH[0], models, teacher=teacher, valid_vocab=45)
    assert (result.gradients["weight"][45:] == 0).all()
    assert same_bits(result, measured(BOTH[0], models, teacher=teacher))


# ----------------------------------------------------------------- metrics


@pytest.mark.parametrize("case", [*LOSSES, *ON_SUPPORT[::4], *PUBLISHED[::4]], ids=str)
def test_metrics_are_those_of_the_logits(case):
    models = double(positions=(3, 4))
    common = {"mask": models.inputs.mask, "reduction": "mean", "return_metrics": True}
    function = getattr(opdc, case.function)
    whole = (logits(models.student), logits(models.teacher))
    _, wanted = call(function, case, *whole, models.inputs, **common)
    one = bytes_of_a_position(case, models)
    for budget in (None, 3 * one):
        pair = (with_budget(x, budget) for x in (models.student, models.teacher))
        _, metrics = call(function, case, *pair, models.inputs, **common)
        assert list(metrics) == list(wanted)
        for name, metric in metrics.items():
            assert metric.dtype == torch.float64
            assert metric.shape == ()
            assert not metric.requires_grad
            torch.testing.assert_close(
                metric, wanted[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_metrics_of_the_sparse_head(case):
    models, teacher = sparse_models()
    models.student.hidden[1, 2, 0] = math.nan
    models.inputs.mask[1, 2] = models.inputs.mask[0, 0] = True
    common = {"mask": models.inputs.mask, "reduction": "mean", "return_metrics": True}
    function = getattr(opdc, case.function)
    _, metrics = call(function, case, models.student, teacher, models.inputs, **common)
    _, wanted = call(function, case, logits(models.student), teacher, models.inputs, **common)
    assert set(metrics) == {"positions", "nonfinite_rows", "teacher_mass", "slots"}
    assert metrics["nonfinite_rows"] == 1
    for name, metric in metrics.items():
        torch.testing.assert_close(metric, wanted[name], rtol=1e-12, atol=1e-13)


# ----------------------------------------------------------------- what PyTorch does with it


MODULES = {
    "reverse_kl": opdc.nn.ReverseKLLoss(temperature=0.7),
    "forward_kl": opdc.nn.ForwardKLLoss(support="teacher", k=4, normalize="tail"),
    "jsd": opdc.nn.JSDLoss(beta=0.3),
    "skew_kl": opdc.nn.SkewKLLoss(alpha=0.2),
    "lsm": opdc.nn.LSMLoss(k=4),
    "k1": opdc.nn.K1Loss(clip_range=0.2),
    "k2": opdc.nn.K2Loss(),
    "k3": opdc.nn.K3Loss(reduction="seq_mean"),
    "tropd": opdc.nn.TrOPDLoss(k=4, region="expected"),
    "eopd": opdc.nn.EOPDLoss(k=4),
    "reopold": opdc.nn.REOPOLDLoss(),
    "aopd": opdc.nn.AOPDLoss(k=4),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    models, module = double(), MODULES[name]
    inputs = models.inputs
    sampled = {"tokens": inputs.tokens, "mask": inputs.mask, "old_logprobs": inputs.old_logprobs}
    answers = []
    for project in (lambda x: x, logits):
        student = leaves(models.student)
        value = module(project(student), project(models.teacher), **sampled)
        answers.append(pull(value, student, inputs))
    close(*answers, 1e-10)


def test_compile():
    torch._dynamo.reset()
    case, models = NAMED["reopold_refinement"], double()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(student):
        function = getattr(opdc, case.function)
        return call(function, case, student, models.teacher, models.inputs)

    student = leaves(models.student)
    close(pull(loss(student), student, models.inputs), measured(case, models), 1e-12)


def test_compile_for_any_number_of_positions():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(hidden, weight, teacher):
        return opdc.reverse_kl(opdc.Projection(hidden, weight), teacher)

    weight = torch.randn(60, 5, dtype=torch.float64, requires_grad=True)
    for positions in (3, 7):
        hidden = torch.randn(positions, 5, dtype=torch.float64, requires_grad=True)
        teacher = torch.randn(positions, 60, dtype=torch.float64)
        compiled = torch.autograd.grad(loss(hidden, weight, teacher), (hidden, weight))
        usual = opdc.reverse_kl(opdc.Projection(hidden, weight), teacher)
        for result, truth in zip(
            compiled, torch.autograd.grad(usual, (hidden, weight)), strict=True
        ):
            torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-15)


def test_compile_the_sparse_head():
    torch._dynamo.reset()
    models, teacher = sparse_models()
    compiled = torch.compile(
        lambda hidden, weight: opdc.lsm(opdc.Projection(hidden, weight), teacher),
        fullgraph=True,
        backend="aot_eager",
    )
    bare = opdc.Projection(models.student.hidden, models.student.weight)
    student = leaves(bare)
    value = compiled(student.hidden, student.weight)
    usual = measured(BOTH[-1], models, student=bare, teacher=teacher, reduction="mean")
    close(pull(value, student, models.inputs), usual, 1e-12)


@pytest.mark.parametrize("case", LOSSES[::2], ids=str)
def test_functional_gradient(case):
    models = double()
    usual = measured(case, models, reduction="mean")

    def loss(tensors):
        student = with_parts(models.student, tensors)
        function = getattr(opdc, case.function)
        return call(function, case, student, models.teacher, models.inputs, reduction="mean")

    gradients = grad(loss)(parts(models.student))
    scaled = {name: -1.7 * gradient for name, gradient in gradients.items()}
    close(Answer(usual.value, scaled), usual, 1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense head", "sparse head"])
def test_hazard_20_second_derivatives_are_refused(sparse, reduction):
    models, teacher = sparse_models()
    student = leaves(models.student)
    loss = opdc.lsm(student, teacher if sparse else models.teacher, k=None, reduction=reduction)
    first = torch.autograd.grad(loss.sum(), (student.hidden, student.weight), create_graph=True)
    for gradient in first:
        with pytest.raises(RuntimeError, match="second derivatives"):
            gradient.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense head", "sparse head"])
def test_backward_twice_with_a_kept_graph(sparse, reduction):
    models, teacher = sparse_models()
    student = leaves(models.student)
    loss = opdc.lsm(student, teacher if sparse else models.teacher, reduction=reduction)
    tensors = tuple(parts(student).values())
    upstream = torch.ones_like(loss)
    first, second = (
        torch.autograd.grad(loss, tensors, factor * upstream, retain_graph=factor == 1)
        for factor in (1, 4)
    )
    for once, fourfold in zip(first, second, strict=True):
        assert torch.equal(4 * once, fourfold)
        assert once.abs().sum() > 0
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_hazard_22_autocast_changes_no_bit(case, dtype):
    models = make_projections(dtype=dtype, **EVERYTHING)
    usual = measured(case, models)
    with torch.autocast("cpu", torch.bfloat16):
        within = measured(case, models)
    assert same_bits(usual, within)


def test_hazard_22_autocast_of_the_sparse_head():
    models, teacher = sparse_models(dtype=torch.float32)
    usual = measured(BOTH[0], models, teacher=teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(usual, measured(BOTH[0], models, teacher=teacher))


@pytest.mark.parametrize("case", LOSSES[::2], ids=str)
def test_checkpoint(case):
    """The head and the loss are computed again in the backward pass."""
    models = double()
    usual = measured(case, models, reduction="mean")
    student = leaves(models.student)

    def loss(*tensors):
        again = with_parts(student, dict(zip(PARTS, tensors, strict=True)))
        function = getattr(opdc, case.function)
        return call(function, case, again, models.teacher, models.inputs, reduction="mean")

    value = checkpoint(loss, *parts(student).values(), use_reentrant=False)
    close(pull(value, student, models.inputs), usual, 1e-13)


def test_hazard_19_tensors_that_are_overwritten_before_they_are_used_again():
    """ "none" computes again in the backward pass: of a head that has moved, autograd must know."""
    models, teacher = sparse_models()
    for other in (models.teacher, teacher):
        for name in ("weight", "hidden"):
            student = leaves(models.student)
            loss = opdc.lsm(student, other, reduction="none")
            with torch.no_grad():
                parts(student)[name].mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.sum().backward()


class Recorder(TorchDispatchMode):
    """Remembers the calls of opdc's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "opdc":
            self.calls.append((operator, args, kwargs or {}))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense head", "sparse head"])
def test_opcheck(sparse, reduction):
    models, teacher = sparse_models()
    student, recorder = leaves(models.student), Recorder()
    with recorder:
        loss = opdc.lsm(student, teacher if sparse else models.teacher, reduction=reduction)
        loss.sum().backward()
    assert recorder.calls
    for operator, args, kwargs in recorder.calls:
        torch.library.opcheck(
            operator, args, kwargs,
            test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
        )  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_in_a_model_that_is_trained(reduction):
    """Hidden states that are the result of a computation, in a step of an optimizer."""
    models = double(positions=(2, 4))
    body, head = torch.nn.Linear(5, 17).double(), torch.nn.Linear(17, 60).double()
    data = torch.randn(2, 4, 5, dtype=torch.float64)
    parameters = [*body.parameters(), *head.parameters()]

    def gradients(student):
        loss = opdc.reverse_kl(student, models.teacher, reduction=reduction).sum()
        return torch.autograd.grad(loss, parameters)

    hidden = body(data).tanh()
    mine = gradients(opdc.Projection(hidden, head.weight, head.bias))
    right = gradients(head(body(data).tanh()))
    for result, truth in zip(mine, right, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-13)


def test_lora_of_the_head():
    """A frozen head W with the adapter B A: the gradients of A and B by autograd."""
    models = double(positions=(2, 4))
    down = torch.randn(3, 17, dtype=torch.float64, requires_grad=True)
    up = torch.randn(60, 3, dtype=torch.float64, requires_grad=True)
    hidden = models.student.hidden.requires_grad_()
    head = models.student.weight

    def gradients(student):
        loss = opdc.jsd(student, models.teacher)
        return torch.autograd.grad(loss, (down, up, hidden))

    mine = gradients(opdc.Projection(hidden, head, adapter=(0.5 * hidden @ down.T, up)))
    right = gradients(hidden @ (head + 0.5 * up @ down).T)
    for result, truth in zip(mine, right, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-13)


def test_functional_call_of_a_module_with_a_head():
    models = double(positions=(2, 4))
    head = torch.nn.Linear(17, 60, bias=False).double()

    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.loss = head, opdc.nn.ReverseKLLoss()

        def forward(self, hidden):
            return self.loss(opdc.Projection(hidden, self.head.weight), models.teacher)

    parameters = dict(Student().named_parameters())
    gradient = grad(lambda weights: functional_call(Student(), weights, (models.student.hidden,)))(
        {name: x.detach() for name, x in parameters.items()}
    )["head.weight"]
    Student()(models.student.hidden).backward()
    torch.testing.assert_close(gradient, head.weight.grad, rtol=1e-12, atol=1e-15)


# ----------------------------------------------------------------- top-K


@pytest.mark.parametrize("valid_vocab", [None, 45])
@pytest.mark.parametrize("k", [1, 7, 45])
def test_topk(k, valid_vocab):
    models = double(**EVERYTHING)
    keywords = {"temperature": 0.7, "valid_vocab": valid_vocab}
    wanted = opdc.topk(logits(models.student), k, **keywords)
    result = opdc.topk(models.student, k, **keywords)
    assert torch.equal(result.ids, wanted.ids)
    torch.testing.assert_close(result.logprobs, wanted.logprobs, rtol=1e-12, atol=1e-13)
    assert not opdc.topk(leaves(models.student), k).logprobs.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_topk_of_any_shape_and_dtype(shape, dtype):
    models = make_projections("far", shape, dtype=dtype)
    result = opdc.topk(models.student, 4)
    assert result.ids.shape == result.logprobs.shape == (*shape, 4)
    assert result.logprobs.dtype == torch.float32
    wanted = opdc.topk(logits(models.student), 4)
    assert torch.equal(result.ids, wanted.ids)
    torch.testing.assert_close(result.logprobs.double(), wanted.logprobs, rtol=1e-5, atol=1e-5)


def test_topk_in_chunks_and_with_ties():
    models = double(positions=(7,))
    weight = models.student.weight.clone()
    weight[30:] = weight[:30]  # every logit twice: the lower id comes first
    student = opdc.Projection(models.student.hidden, weight)
    wanted = opdc.topk(student, 6)
    assert torch.equal(wanted.ids[:, 1::2], wanted.ids[:, ::2] + 30)
    with pytest.raises(ValueError, match="max_bytes"):
        opdc.topk(with_budget(student, 1), 6)
    for budget in (8 * 60 * 4, 8 * 60 * 12):
        result = opdc.topk(with_budget(student, budget), 6)
        assert torch.equal(result.ids, wanted.ids)
        torch.testing.assert_close(result.logprobs, wanted.logprobs, rtol=1e-13, atol=0)


def test_topk_of_an_undefined_row():
    models = double(positions=(3,))
    models.student.hidden[1, 0] = math.nan
    result, wanted = opdc.topk(models.student, 4), opdc.topk(logits(models.student), 4)
    assert torch.equal(result.ids, wanted.ids)
    torch.testing.assert_close(result.logprobs, wanted.logprobs, equal_nan=True)


def test_every_loss_is_among_the_cases():
    assert {case.function for case in CASES} == {
        "aopd", "entropy", "eopd", "forward_kl", "jsd", "k1", "k2", "k3", "lsm", "reopold",
        "reverse_kl", "skew_kl", "token_logprobs", "tropd",
    }  # fmt: skip
