"""What PyTorch does with the losses: compile, transforms, checkpoints, in place, processes.
The numbers themselves are judged elsewhere; here they must not depend on the way."""

from __future__ import annotations

import copy
import math
import os
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import opdc
from core import core_call
from opdc import _ops

B, C, V = 2, 3, 11

DIVERGENCES = {
    "reverse_kl": opdc.reverse_kl,
    "forward_kl": opdc.forward_kl,
    "jsd": lambda s, t, **common: opdc.jsd(s, t, beta=0.3, **common),
    "skew_forward": lambda s, t, **common: opdc.skew_kl(s, t, alpha=0.2, **common),
    "skew_reverse": lambda s, t, **common: opdc.skew_kl(
        s, t, alpha=0.2, direction="reverse", **common
    ),
}
TOKENS = torch.tensor([[0, 5, 10], [3, 3, 1]])
OLD = torch.linspace(-3, -1, B * C).reshape(B, C)
REFERENCE = torch.linspace(-1, -3, B * C).reshape(B, C)
POLICIES = {
    "k1": lambda s, t, **common: opdc.k1(s, t, TOKENS, discount=0.5, **common),
    "k1_clipped": lambda s, t, **common: opdc.k1(
        s, t, TOKENS, old_logprobs=OLD.to(s), clip_range=(0.1, 0.3), **common
    ),
    "k1_reference": lambda s, t, **common: opdc.k1(
        s, t, TOKENS, reference_logprobs=REFERENCE.to(s), reward_scale=1.25, **common
    ),
    "k2": lambda s, t, **common: opdc.k2(s, t, TOKENS, **common),
    "k3": lambda s, t, **common: opdc.k3(s, t, TOKENS, **common),
}
LOSSES = DIVERGENCES | POLICIES
REDUCTIONS = ("none", "sum", "mean", "seq_mean")
MASK = torch.tensor([[True, False, True], [True, True, True]])


def logits(dtype=torch.float32, shape=(B, C, V)):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def pair(dtype=torch.float32, shape=(B, C, V)):
    return logits(dtype, shape).requires_grad_(), logits(dtype, shape)


def gradient(loss, student):
    """d Σ upstream · loss / d student, with an upstream gradient that is different everywhere."""
    upstream = torch.linspace(-1, 2, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()]
    return torch.autograd.grad(loss, student, upstream.reshape(loss.shape))[0]


# ----------------------------------------------------------------- derivatives


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", [*DIVERGENCES, "k2", "k3"])
def test_gradcheck(name, reduction):
    student, teacher = pair(torch.float64)
    weights = torch.rand(B, C, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda s: LOSSES[name](
            s, teacher, temperature=0.7, mask=MASK, weights=weights, reduction=reduction
        ),
        student,
    )


def test_gradcheck_of_logprobs_and_entropy():
    student = logits(torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda s: opdc.token_logprobs(s, TOKENS, mask=MASK), student)
    torch.autograd.gradcheck(lambda s: opdc.entropy(s, temperature=2.0), student)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_from_forward_is_the_recomputed_one(name, reduction):
    """Forward computes the gradient for scalars; under grad(vmap) nothing can be saved."""
    student, teacher = pair()
    common = {"reduction": reduction, "mask": MASK}
    direct = gradient(LOSSES[name](student, teacher, **common), student)
    overwritten = student * 1.0
    inplace = gradient(LOSSES[name](overwritten, teacher, inplace=True, **common), overwritten)
    torch.testing.assert_close(inplace, direct, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hazard_20_second_derivatives_are_refused(reduction, inplace):
    student, teacher = pair()
    used = student * 1.0
    loss = opdc.reverse_kl(used, teacher, reduction=reduction, inplace=inplace)
    (first,) = torch.autograd.grad(loss.sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hazard_20_second_derivatives_through_the_upstream_gradient(reduction):
    student, teacher = pair()
    scale = torch.ones((), requires_grad=True)
    loss = (scale * opdc.reverse_kl(student, teacher, reduction=reduction)).sum()
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(first.sum(), scale)


def test_hazard_20_second_derivatives_under_transforms():
    student, teacher = pair()
    student = student.detach()
    with pytest.raises(RuntimeError, match="second derivatives"):
        jacrev(grad(lambda s: opdc.reverse_kl(s, teacher)))(student)
    with pytest.raises(NotImplementedError, match="jvp"):
        hessian(lambda s: opdc.reverse_kl(s, teacher))(student)


def test_only_the_student_gets_a_gradient():
    student, teacher = pair()
    constants = [logits(shape=(B, C)).requires_grad_() for _ in range(3)]
    teacher.requires_grad_()
    loss = opdc.k1(
        student,
        teacher,
        TOKENS,
        weights=constants[0],
        old_logprobs=constants[1],
        reference_logprobs=constants[2],
    )
    loss.backward()
    assert student.grad is not None
    assert all(x.grad is None for x in (teacher, *constants))
    assert not opdc.reverse_kl(student.detach(), teacher).requires_grad


def test_no_gradient_without_a_need():
    student, teacher = pair()
    with torch.no_grad():
        assert not opdc.reverse_kl(student, teacher, inplace=True).requires_grad
    before = student.detach().clone()
    opdc.reverse_kl(student.detach(), teacher, inplace=True)
    with torch.inference_mode():
        opdc.reverse_kl(student, teacher)
        opdc.reverse_kl(logits(), logits(), inplace=True)
    assert torch.equal(student, before)


def test_metrics_are_detached():
    student, teacher = pair()
    _, metrics = opdc.k1(student, teacher, TOKENS, return_metrics=True)
    assert metrics["positions"] == B * C
    for metric in metrics.values():
        assert metric.shape == ()
        assert not metric.requires_grad
        assert torch.isfinite(metric)


# ----------------------------------------------------------------- a gradient that is used again


def test_backward_twice_with_a_kept_graph():
    student, teacher = pair()
    loss = opdc.reverse_kl(student, teacher)
    results = [
        torch.autograd.grad(loss, student, torch.tensor(factor), retain_graph=factor < 8)[0]
        for factor in (1.0, 2.0, 4.0, 8.0)
    ]
    assert len({result.data_ptr() for result in results}) == 4
    for result, factor in zip(results, (1, 2, 4, 8), strict=True):
        assert torch.equal(result, factor * results[0])


def test_backward_twice_without_keeping_the_graph_is_torchs_error():
    student, teacher = pair()
    loss = opdc.reverse_kl(student, teacher)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_hazard_19_inplace_twice_with_a_kept_graph():
    student, teacher = pair()
    expected = gradient(opdc.reverse_kl(student, teacher), student)
    loss = opdc.reverse_kl(student * 1.0, teacher, inplace=True)
    for factor in (3.0, -1.0):
        (result,) = torch.autograd.grad(
            loss, student, torch.tensor(factor), retain_graph=factor == 3.0
        )
        torch.testing.assert_close(result, -factor * expected)


def test_gradients_of_several_losses_add_up():
    student, teacher = pair()
    parts = [LOSSES[name](student, teacher) for name in ("reverse_kl", "k1", "jsd")]
    expected = sum(torch.autograd.grad(part, student, retain_graph=True)[0] for part in parts)
    (parts[0] + parts[1] + parts[2]).backward()
    torch.testing.assert_close(student.grad, expected)
    for part in [LOSSES[name](student, teacher) for name in ("reverse_kl", "k1", "jsd")]:
        part.backward()
    torch.testing.assert_close(student.grad, 2 * expected)


def test_a_gradient_belongs_to_whom_it_was_given():
    """Neither writing to a gradient nor keeping it in a hook changes a later one."""
    student, teacher = pair()
    kept = []
    student.register_hook(kept.append)
    logits_of_model = student * 1.0
    logits_of_model.retain_grad()
    loss = opdc.reverse_kl(logits_of_model, teacher)
    loss.backward(torch.tensor(2.0), retain_graph=True)
    first = kept[0].clone()
    student.grad.zero_()
    loss.backward(torch.tensor(6.0))
    torch.testing.assert_close(kept[1], 3 * first)
    torch.testing.assert_close(kept[0] if kept[0] is not student.grad else first, first)
    torch.testing.assert_close(logits_of_model.grad, 4 * first)
    torch.testing.assert_close(student.grad, 3 * first)


def test_saved_tensor_hooks_see_what_they_stored():
    student, teacher = pair()
    expected = gradient(opdc.reverse_kl(student, teacher), student)
    stored = []

    def pack(tensor):
        stored.append(tensor.clone())
        return len(stored) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: stored[index].clone()):
        loss = opdc.reverse_kl(student, teacher)
    result = gradient(loss, student)
    torch.testing.assert_close(result, expected)
    assert len(stored) == 1  # the gradient and nothing else


def test_a_batch_of_upstream_gradients():
    student, teacher = pair()
    for reduction in ("mean", "none"):
        loss = opdc.reverse_kl(student, teacher, reduction=reduction)
        upstream = torch.randn(4, *loss.shape)
        (batch,) = torch.autograd.grad(
            loss, student, upstream, is_grads_batched=True, retain_graph=True
        )
        for one, result in zip(upstream, batch, strict=True):
            (expected,) = torch.autograd.grad(loss, student, one, retain_graph=True)
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("upstream", ["expanded", "transposed", "zero"])
def test_hazard_17_and_18_upstream_gradients_of_any_strides(upstream):
    student, teacher = pair()
    loss = opdc.jsd(student, teacher, reduction="none")
    given = {
        "expanded": torch.tensor([[2.0], [-1.0]]).expand(B, C),
        "transposed": torch.randn(C, B).t(),
        "zero": torch.zeros(B, C),
    }[upstream]
    (result,) = torch.autograd.grad(loss, student, given, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, student, given.contiguous())
    assert torch.equal(result, expected)
    assert torch.equal(result == 0, (given == 0)[..., None].expand_as(result))


# ----------------------------------------------------------------- in place


def test_hazard_19_inplace_gradient_is_in_the_memory_of_the_logits():
    student, teacher = pair()
    used = student * 1.0
    expected = gradient(opdc.reverse_kl(student, teacher), student)
    loss = opdc.reverse_kl(used, teacher, inplace=True)
    assert used._version == 1
    torch.testing.assert_close(used.detach(), -expected)  # the upstream gradient above is −1
    (result,) = torch.autograd.grad(loss, used)
    assert result.data_ptr() == used.data_ptr()
    assert not result.requires_grad


def test_hazard_19_whoever_saved_the_logits_raises():
    student, teacher = pair()
    used = student * 1.0
    other = used.square().sum()
    loss = opdc.reverse_kl(used, teacher, inplace=True) + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_on_a_view_of_a_result():
    student, teacher = pair()
    whole = torch.cat([student, logits()], 1) * 1.0
    opdc.reverse_kl(whole[:, :C], teacher, inplace=True).backward()
    inplace, student.grad = student.grad, None
    opdc.reverse_kl(student, teacher).backward()
    torch.testing.assert_close(inplace, student.grad)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda s: s, "leaf"),
        (lambda s: s[:, :2], "leaf"),
        (lambda s: s.view(-1, V), "leaf"),
        (lambda s: (s * 1.0).transpose(1, 2), "stride"),
        (lambda s: (s[:1, :1] * 1.0).expand(B, C, V), "overlap"),
        (lambda s: torch._neg_view(s * 1.0), "negated"),
    ],
)
def test_hazard_19_inplace_is_refused(make, word):
    student = logits().requires_grad_()
    before = student.detach().clone()
    used = make(student)
    with pytest.raises(ValueError, match=word):
        opdc.reverse_kl(used, torch.zeros(used.shape), inplace=True)
    assert torch.equal(student, before)


def test_hazard_19_inplace_never_overwrites_the_teacher():
    whole = logits(shape=(B, C + 1, V)).requires_grad_() * 1.0
    with pytest.raises(ValueError, match="teacher"):
        opdc.reverse_kl(whole[:, :-1], whole[:, 1:].detach(), inplace=True)
    both = logits(shape=(2 * B, C, V)).requires_grad_() * 1.0
    expected = opdc.reverse_kl(both[:B], both[B:].detach())
    assert torch.equal(opdc.reverse_kl(both[:B], both[B:].detach(), inplace=True), expected)


def test_inplace_is_refused_under_transforms():
    _, teacher = pair()
    with pytest.raises(ValueError, match=r"torch\.func"):
        grad(lambda s: opdc.reverse_kl(s * 1.0, teacher, inplace=True))(logits())


# ----------------------------------------------------------------- layouts and dtypes


def test_logits_without_unit_stride_are_copied():
    student, teacher = logits(shape=(B, V, C)).requires_grad_(), logits(shape=(B, V, C))
    loss = opdc.reverse_kl(student.transpose(1, 2), teacher.transpose(1, 2))
    expected = opdc.reverse_kl(
        student.transpose(1, 2).contiguous(), teacher.transpose(1, 2).contiguous()
    )
    assert torch.equal(loss, expected)
    assert torch.equal(gradient(loss, student), gradient(expected, student))


def test_negated_views_are_read_with_their_sign():
    student, teacher = logits(), logits()
    expected = opdc.reverse_kl(-student, -teacher)
    assert torch.equal(
        opdc.reverse_kl(torch._neg_view(student), torch._neg_view(teacher)), expected
    )


@pytest.mark.parametrize(
    "teacher_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.half]
)
@pytest.mark.parametrize(
    "student_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.half]
)
def test_hazard_22_dtypes_mix(student_dtype, teacher_dtype):
    student, teacher = logits(student_dtype).requires_grad_(), logits(teacher_dtype)
    double = torch.float64 in (student_dtype, teacher_dtype)
    for reduction in ("mean", "none"):
        loss = opdc.reverse_kl(student, teacher, reduction=reduction)
        assert loss.dtype == (torch.float64 if double else torch.float32)
        assert gradient(loss, student).dtype == student_dtype
        expected = opdc.reverse_kl(student.double(), teacher.double(), reduction=reduction)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_token_ids_of_any_integer_dtype(dtype):
    student, teacher = pair()
    expected = opdc.k3(student, teacher, TOKENS)
    assert torch.equal(opdc.k3(student, teacher, TOKENS.to(dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_masks_of_any_dtype(dtype):
    student, teacher = pair()
    expected = opdc.reverse_kl(student, teacher, mask=MASK)
    assert torch.equal(opdc.reverse_kl(student, teacher, mask=MASK.to(dtype)), expected)


@pytest.mark.parametrize("num_items", [5, 5.0, torch.tensor(5), torch.tensor(5.0)])
def test_num_items_is_a_number_or_a_tensor(num_items):
    student, teacher = pair()
    expected = opdc.reverse_kl(student, teacher, reduction="sum") / 5
    torch.testing.assert_close(opdc.reverse_kl(student, teacher, num_items=num_items), expected)


def test_hazard_22_autocast():
    student, teacher = pair()
    weight = torch.randn(V, V, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        used = student @ weight
        loss = opdc.reverse_kl(used, teacher)
    assert used.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.dtype == torch.float32
    expected = opdc.reverse_kl(used.detach(), teacher)
    assert torch.equal(loss, expected)


# ----------------------------------------------------------------- operators


def operator_inputs(name, requires_grad=False):
    student, teacher = logits().requires_grad_(requires_grad), logits()
    numbers = {"temperature": 0.7, "clip_low": 0.2, "clip_high": 0.3, "discount": 0.5}
    method, *inputs = core_call(
        "k1",
        student,
        teacher,
        tokens=TOKENS,
        mask=MASK,
        weights=OLD.abs(),
        old_logprobs=OLD,
        settings=_ops.settings(numbers, None),
        reduction=_ops.REDUCTIONS.index("none"),
        valid_vocab=V,
    ).values()
    place = len(_ops.TENSORS) + 2  # the student, these, and the settings
    tensors, options = tuple(inputs[:place]), (method, *inputs[place:])
    if name == "loss":
        return (*tensors, *options, True, True)
    if name == "loss_":
        return (*tensors, *options, True)
    _, whole, rows, _ = torch.ops.opdc.loss(*tensors, *options, True, True)
    if name == "gradient":
        return (*tensors, *options, rows.detach(), torch.randn(B, C))
    return whole.detach(), torch.randn(B, C)


@pytest.mark.parametrize("name", ["loss", "loss_", "gradient", "scale", "scale_"])
def test_opcheck(name):
    operator = getattr(torch.ops.opdc, name).default
    torch.library.opcheck(operator, operator_inputs(name))


def test_opcheck_of_strided_logits():
    student, teacher = logits(shape=(B, C + 1, V))[:, :-1], logits(shape=(B, C, 2 * V))[..., :V]
    method, *inputs = core_call("reverse_kl", student, teacher).values()
    inputs.insert(len(_ops.TENSORS) + 2, method)  # behind the tensors
    inputs += [True, False]
    torch.library.opcheck(torch.ops.opdc.loss.default, tuple(inputs))


@pytest.mark.parametrize("name", ["sample", "blend"])
def test_opcheck_of_samplers(name):
    budgets, uniforms = torch.full((B, C), 0.02), torch.rand(B, C, 2)
    numbers = torch.tensor([0.7, 0.9], dtype=torch.float64)
    inputs = (logits(), logits(), budgets, TOKENS, uniforms, numbers, V - 3, V - 1, 0, 1)
    # Only the first position of each block: the others may be void, and NaN equals nothing.
    first = (x[:, :1] if torch.is_tensor(x) and x.dim() > 1 else x for x in inputs)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name == "sample":  # a blend has no token, but NaN in its columns
        checks.append("test_aot_dispatch_dynamic")
    operator = getattr(torch.ops.opdc, name).default
    torch.library.opcheck(operator, tuple(first), test_utils=checks)


def test_a_bare_operator_has_no_silent_derivative():
    inputs = operator_inputs("loss", requires_grad=True)
    value, *_ = torch.ops.opdc.loss(*inputs)
    with pytest.raises(RuntimeError, match="call the functions of opdc"):
        value.sum().backward()


def test_meta_and_fake_tensors():
    student, teacher = logits().to("meta").requires_grad_(), logits().to("meta")
    for reduction in ("none", "mean"):
        loss, metrics = opdc.reverse_kl(student, teacher, reduction=reduction, return_metrics=True)
        assert loss.device.type == metrics["positions"].device.type == "meta"
        (result,) = torch.autograd.grad(loss, student, torch.empty_like(loss))
        assert result.shape == student.shape
    with torch._subclasses.FakeTensorMode():
        student, teacher = torch.empty(B, C, V, requires_grad=True), torch.empty(B, C, V)
        opdc.jsd(student, teacher).backward()
        assert student.grad.shape == (B, C, V)


def test_meta_and_fake_tensors_of_samplers():
    def shapes(device):
        student, teacher = logits().to(device), logits().double().to(device)
        drafts = TOKENS.to(device)
        return (
            opdc.sample(student, top_p=0.9),
            opdc.blend(student, teacher, 0.02),
            opdc.blend_sample(student, teacher, 0.02),
            opdc.blend_verify(drafts, student, teacher, 0.02, eos_map=(0, 1)),
        )

    for real, meta in zip(shapes("cpu"), shapes("meta"), strict=True):
        for name, one, other in zip(real._fields, real, meta, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
            assert other.device.type == "meta"
    with pytest.raises(TypeError, match=r"teacher is on cpu but student is on meta"):
        opdc.blend_sample(logits().to("meta"), logits(), 0.02)


# ----------------------------------------------------------------- transforms


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_transforms(name, reduction):
    student, teacher = pair()

    def loss(s, t):
        return LOSSES[name](s, t, reduction=reduction).sum()

    expected = torch.stack(
        [torch.autograd.grad(loss(s, t), s)[0] for s, t in zip(student, teacher, strict=True)]
    )
    plain = student.detach()
    values = torch.stack([loss(s, t) for s, t in zip(plain, teacher, strict=True)])
    close = torch.testing.assert_close
    close(vmap(loss)(plain, teacher), values)
    close(vmap(loss, in_dims=(0, None))(plain, teacher[0])[0], values[0])
    close(vmap(loss, in_dims=(2, 2))(plain.permute(1, 2, 0), teacher.permute(1, 2, 0)), values)
    close(grad(loss)(plain[0], teacher[0]), expected[0])
    close(vmap(grad(loss))(plain, teacher), expected)
    close(grad(lambda s: vmap(loss)(s, teacher).sum())(plain), expected)
    close(jacrev(lambda s: vmap(loss)(s, teacher))(plain).sum(0), expected)


def test_transforms_of_policy_losses_with_metrics():
    student, teacher = logits(), logits()

    def loss(s, t, tokens):
        return opdc.k1(s, t, tokens, discount=0.5, return_metrics=True)

    results, metrics = vmap(grad(loss, has_aux=True))(student, teacher, TOKENS)
    for i in range(B):
        expected, expected_metrics = grad(loss, has_aux=True)(student[i], teacher[i], TOKENS[i])
        torch.testing.assert_close(results[i], expected)
        assert all(torch.equal(metrics[name][i], expected_metrics[name]) for name in metrics)


def test_functional_call_of_a_module():
    model, teacher = torch.nn.Linear(4, V), logits(shape=(B, V))
    inputs = torch.randn(B, 4)

    def loss(parameters):
        return opdc.forward_kl(functional_call(model, parameters, (inputs,)), teacher)

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    result = grad(loss)(parameters)
    opdc.forward_kl(model(inputs), teacher).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result[name], parameter.grad)


# ----------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, reduction):
    student, teacher = pair()
    weight = torch.randn(V, V, requires_grad=True)

    def loss(s):
        return opdc.reverse_kl(s @ weight, teacher, reduction=reduction, inplace=True).sum()

    loss(student).backward()
    expected = student.grad, weight.grad
    student.grad = weight.grad = None
    checkpoint(loss, student, use_reentrant=reentrant).backward()
    torch.testing.assert_close((student.grad, weight.grad), expected)


# ----------------------------------------------------------------- torch.compile


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


@pytest.mark.parametrize("name", LOSSES)
def test_compile(name):
    def loss(s, t, common):
        return LOSSES[name](s, t, **common)

    for reduction in ("mean", "none"):
        function = compiled(loss)
        for columns in (V, V + 6):  # the second size comes from the same dynamic graph
            student, teacher = pair(shape=(B, C, columns))
            common = {"temperature": 0.7, "reduction": reduction, "mask": MASK}
            result, expected = function(student, teacher, common), loss(student, teacher, common)
            assert torch.equal(result, expected)
            assert torch.equal(gradient(result, student), gradient(expected, student))


def test_compile_with_inductor():
    teacher, weight = logits(), torch.randn(V, V, requires_grad=True)

    def loss(s, w):
        used = s @ w
        value, metrics = opdc.jsd(used, teacher, return_metrics=True)
        per_token = opdc.k2(used, teacher, TOKENS, reduction="none")
        return value + per_token.sum() * 0.5, metrics["reverse_kl"]

    student = logits().requires_grad_()
    (result, metric), (expected, _) = (
        compiled(loss, "inductor")(student, weight),
        loss(student, weight),
    )
    torch.testing.assert_close(result, expected)
    assert not metric.requires_grad
    result_gradients = torch.autograd.grad(result, (student, weight))
    torch.testing.assert_close(
        result_gradients, torch.autograd.grad(expected, (student, weight)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_inplace(backend):
    student, teacher = pair()
    weight = torch.randn(V, V)

    def loss(s):
        return opdc.reverse_kl(s @ weight, teacher, inplace=True)

    result = gradient(compiled(loss, backend)(student), student)
    torch.testing.assert_close(result, gradient(loss(student), student))


def test_compile_of_a_module():
    student, teacher = pair()
    module = opdc.nn.K1Loss(discount=0.5, temperature=2.0)
    result = compiled(module)(student, teacher, tokens=TOKENS, mask=MASK)
    expected = module(student, teacher, tokens=TOKENS, mask=MASK)
    assert torch.equal(result, expected)
    assert torch.equal(gradient(result, student), gradient(expected, student))


def test_compile_of_logprobs_and_entropy():
    student = logits().requires_grad_()

    def both(s):
        return opdc.token_logprobs(s, TOKENS) + opdc.entropy(s, mask=MASK)

    result, expected = compiled(both)(student), both(student)
    assert torch.equal(result, expected)
    assert torch.equal(gradient(result, student), gradient(expected, student))


def test_scheduled_numbers_do_not_compile_again():
    student, teacher = pair()
    counter = torch._dynamo.testing.CompileCounter()

    def loss(temperature, beta, scale, items):
        divergence = opdc.jsd(student, teacher, temperature=temperature, beta=beta, num_items=items)
        return divergence + opdc.k1(
            student,
            teacher,
            TOKENS,
            old_logprobs=OLD,
            clip_range=(beta, 2 * beta),
            reference_logprobs=REFERENCE,
            reward_scale=scale,
            discount=beta,
        )

    function = compiled(loss, counter)
    for step in range(12):
        numbers = 0.5 + 0.1 * step, 0.01 + 0.05 * step, 1.1 + 0.1 * step, 10.0 + step
        torch.testing.assert_close(function(*numbers), loss(*numbers))
    assert counter.frame_count <= 2


def test_compile_of_samplers():
    student, teacher = logits(), logits()
    uniforms = torch.rand(B, C, 2)
    counter = torch._dynamo.testing.CompileCounter()

    def draw(epsilon, temperature, top_p):
        common = {"temperature": temperature, "top_p": top_p}
        drafts = opdc.sample(student, uniforms=uniforms[..., 0], **common)
        verified = opdc.blend_verify(
            drafts.tokens, student, teacher, epsilon, uniforms=uniforms, **common
        )
        return *drafts, *verified, *opdc.blend(student, teacher, epsilon)

    function = compiled(draw, counter)
    for step in range(6):  # of schedules: no value is compiled for
        numbers = 0.001 + 0.03 * step, 0.5 + 0.1 * step, 0.4 + 0.1 * step
        for one, other in zip(function(*numbers), draw(*numbers), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_of_a_transform_is_never_a_silent_zero(reduction):
    teacher = logits()

    def loss(s):
        return opdc.reverse_kl(s, teacher, reduction=reduction).sum()

    student = logits()
    for fullgraph in (False, True):
        with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=r"autograd\.Function"):
            torch.compile(grad(loss), backend="aot_eager", fullgraph=fullgraph)(student)


def test_compile_of_vmap():
    student, teacher = logits(), logits()
    function = vmap(opdc.reverse_kl)
    torch.testing.assert_close(compiled(function)(student, teacher), function(student, teacher))


@pytest.mark.cpu_only
def test_errors_under_compile_keep_their_text():
    with pytest.raises(ValueError, match=r"tokens.*99"):
        compiled(lambda s, y: opdc.k2(s, s.detach(), y))(logits(), TOKENS + 99)
    with pytest.raises(Exception, match='reduction must be one of "none"'):
        compiled(lambda s: opdc.reverse_kl(s, s.detach(), reduction="avg"))(logits())


# ----------------------------------------------------------------- modules and metrics

MODULES = {
    "reverse_kl": opdc.nn.ReverseKLLoss,
    "forward_kl": opdc.nn.ForwardKLLoss,
    "jsd": lambda **common: opdc.nn.JSDLoss(beta=0.3, **common),
    "skew_forward": lambda **common: opdc.nn.SkewKLLoss(alpha=0.2, **common),
    "skew_reverse": lambda **common: opdc.nn.SkewKLLoss(alpha=0.2, direction="reverse", **common),
    "k1": lambda **common: opdc.nn.K1Loss(discount=0.5, **common),
    "k2": opdc.nn.K2Loss,
    "k3": opdc.nn.K3Loss,
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_their_functions(name):
    student, teacher = pair()
    module = MODULES[name](valid_vocab=V - 2, reduction="seq_mean")
    call = {"tokens": TOKENS.clamp(max=V - 3), "mask": MASK, "weights": OLD, "prefix_mask": None}
    result, metrics = module(student, teacher, **call, temperature=0.5, return_metrics=True)
    common = {"valid_vocab": V - 2, "reduction": "seq_mean", "mask": MASK, "weights": OLD}
    if name.startswith("k"):
        functions = {"k1": lambda *a, **k: opdc.k1(*a, discount=0.5, **k)}
        function = functions.get(name, getattr(opdc, name))
        expected = function(student, teacher, call["tokens"], temperature=0.5, **common)
    else:
        expected = LOSSES[name](student, teacher, temperature=0.5, **common)
    assert torch.equal(result, expected)
    assert metrics["positions"] == MASK.sum()
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(copied(student, teacher, **call, temperature=0.5), result)
        assert repr(copied) == repr(module)


def test_the_temperature_of_a_module_wins_over_the_callers():
    student, teacher = pair()
    fixed, free = opdc.nn.ReverseKLLoss(temperature=2.0), opdc.nn.ReverseKLLoss()
    assert torch.equal(
        fixed(student, teacher, temperature=0.5), opdc.reverse_kl(student, teacher, temperature=2.0)
    )
    assert torch.equal(free(student, teacher), opdc.reverse_kl(student, teacher))
    assert repr(fixed) == (
        "ReverseKLLoss(temperature=2.0, valid_vocab=None, reduction='mean', inplace=False, "
        "process_group=None, support=None, k=None, normalize=None)"
    )


def test_which_modules_take_the_number_of_tokens():
    for reduction in REDUCTIONS:
        assert opdc.nn.JSDLoss(reduction=reduction).uses_num_items == (reduction == "mean")


def test_reference_logprobs_of_the_k1_module():
    student, teacher = pair()
    module = opdc.nn.K1Loss(reward_scale=1.25, clip_range=0.2, advantage="current")
    keywords = {"old_logprobs": OLD, "reference_logprobs": REFERENCE}
    expected = opdc.k1(
        student, teacher, TOKENS, reward_scale=1.25, clip_range=0.2, advantage="current", **keywords
    )
    assert torch.equal(module(student, teacher, tokens=TOKENS, **keywords), expected)


def test_mean_of_metrics():
    student, teacher = pair()
    _, sums = opdc.k1(student, teacher, TOKENS, mask=MASK, return_metrics=True)
    means = opdc.metrics.mean(sums)
    assert set(means) == set(sums)
    assert means["positions"] == 5
    assert means["k1"] == sums["k1"] / 5
    assert means["log_ratio_max"] == sums["log_ratio_max"]
    _, nothing = opdc.k1(student, teacher, TOKENS, mask=MASK & False, return_metrics=True)
    empty = opdc.metrics.mean(nothing)
    assert empty["k1"] == empty["positions"] == 0
    assert empty["log_ratio_min"] == math.inf == -empty["log_ratio_max"]
    with pytest.raises(ValueError, match="positions"):
        opdc.metrics.mean({"k1": sums["k1"]})


# ----------------------------------------------------------------- processes


def step(model, inputs, teacher, tokens, mask, num_items):
    """A loss of a model, its metrics, and whatever backward leaves in the model."""
    used = model(inputs)
    loss, metrics = opdc.jsd(used, teacher, mask=mask, num_items=num_items, return_metrics=True)
    policy, policy_metrics = opdc.k1(
        used, teacher, tokens, mask=mask, num_items=num_items, return_metrics=True
    )
    (loss + policy).backward()
    return policy_metrics | metrics


def batch():
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(4, C, 5, generator=generator)
    teacher = torch.randn(4, C, V, generator=generator)
    tokens = torch.randint(0, V, (4, C), generator=generator)
    mask = torch.rand(4, C, generator=generator) > 0.3
    return inputs, teacher, tokens, mask


def model():
    torch.manual_seed(3)
    return torch.nn.Linear(5, V)


def one_of_two(rank, store, results):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    distributed = torch.nn.parallel.DistributedDataParallel(model())
    inputs, teacher, tokens, mask = batch()
    mine = slice(2 * rank, 2 * rank + 2)
    # DistributedDataParallel averages over the processes: half of the items each.
    metrics = step(
        distributed, inputs[mine], teacher[mine], tokens[mine], mask[mine], mask.sum() / 2
    )
    reduced = opdc.metrics.all_reduce(metrics)
    gradients = [parameter.grad for parameter in distributed.parameters()]
    torch.save((gradients, reduced), f"{results}.{rank}")
    # DistributedDataParallel's destructor holds the GIL while it waits for a thread of gloo that
    # wants the GIL to free its tensors: one run in twenty never ended. So nothing is destroyed.
    os._exit(0)


def test_two_processes_are_one(tmp_path):
    whole = model()
    inputs, teacher, tokens, mask = batch()
    metrics = step(whole, inputs, teacher, tokens, mask, mask.sum())
    results = tmp_path / "results"
    torch.multiprocessing.spawn(one_of_two, (tmp_path / "store", results), nprocs=2)
    for rank in range(2):
        gradients, reduced = torch.load(f"{results}.{rank}")
        for parameter, result in zip(whole.parameters(), gradients, strict=True):
            torch.testing.assert_close(result, parameter.grad, rtol=1e-5, atol=1e-7)
        assert list(reduced) == list(metrics)
        for name, metric in metrics.items():
            torch.testing.assert_close(reduced[name], metric, rtol=1e-6, atol=1e-7)
