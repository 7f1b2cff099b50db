"""What the Python of opdc does with tensors on a GPU, without one.

Tensors without data can be on a GPU that is not there. Whoever reads one of their numbers on the
host, or asks for a shape that depends on one, gets an exception: that is where a real GPU would be
waited for. In place of the C core stands a function that looks at its arguments. And what is done
for GPUs alone, by operations of torch, is done to tensors with data, which are told to be on one.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import traceback
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import opdc
import opdc.info
from opdc import _C, _arguments, _gathered, _groups, _ops, _projected

GPU = torch.device("cuda", 0)
B, T, V, H, K = 2, 3, 11, 5, 4
POSITIONS = (B, T)

# ----------------------------------------------------------------- tensors, and what is called


def numbers(*shape, device="cpu", dtype=torch.float32):
    return torch.rand(shape, dtype=dtype, device="cpu").to(device)


def tokens_on(device):
    return torch.randint(0, V, POSITIONS).to(device)


def logits_on(device, dtype=torch.float32):
    return numbers(*POSITIONS, V, device=device, dtype=dtype)


def topk_on(device):
    ids = torch.arange(K).expand(*POSITIONS, K).contiguous().to(device)
    of_token, entropy = numbers(*POSITIONS, device=device), numbers(*POSITIONS, device=device)
    return opdc.TopK(ids, numbers(*POSITIONS, K, device=device) - 9, of_token - 2, entropy)


def projection_on(device, **options):
    hidden, weight = numbers(*POSITIONS, H, device=device), numbers(V, H, device=device)
    return opdc.Projection(hidden, weight.bfloat16(), numbers(V, device=device), **options)


def adapted_on(device):
    adapter = numbers(*POSITIONS, 2, device=device), numbers(V, 2, device=device)
    return projection_on(device, scale=0.5, softcap=20.0, adapter=adapter)


def masks_on(device):
    return torch.tensor([[1, 1, 0], [0, 1, 1]]).bool().to(device)


def common_on(device, **others):
    items = torch.tensor(3).to(device)
    given = {"mask": masks_on(device), "weights": numbers(*POSITIONS, device=device)}
    return {**given, "num_items": items, "return_metrics": True, **others}


MODELS = {
    "logits": logits_on,
    "hidden states": projection_on,
    "hidden states and all": adapted_on,
}
LOSSES = {
    "reverse_kl": lambda at: (opdc.reverse_kl, {"teacher": logits_on(at)}),
    "forward_kl of a projection": lambda at: (opdc.forward_kl, {"teacher": projection_on(at)}),
    "jsd": lambda at: (opdc.jsd, {"teacher": logits_on(at), "beta": 0.3}),
    "skew_kl": lambda at: (opdc.skew_kl, {"teacher": logits_on(at)}),
    "a support": lambda at: (
        opdc.forward_kl,
        {"teacher": logits_on(at), "support": "student", "k": K, "normalize": "tail"},
    ),
    "a sparse teacher": lambda at: (
        opdc.reverse_kl,
        {"teacher": topk_on(at), "normalize": "tail"},
    ),
    "lsm": lambda at: (opdc.lsm, {"teacher": topk_on(at)}),
    "lsm with tokens": lambda at: (
        opdc.lsm,
        {"teacher": topk_on(at), "support": "teacher+token", "tokens": tokens_on(at)},
    ),
    "k1": lambda at: (
        opdc.k1,
        {"teacher": logits_on(at), "tokens": tokens_on(at), "old_logprobs": numbers(B, T).to(at)},
    ),
    "k1 with a discount": lambda at: (
        opdc.k1,
        {"teacher": logits_on(at), "tokens": tokens_on(at).int(), "discount": 0.5},
    ),
    "k2": lambda at: (opdc.k2, {"teacher": numbers(B, T).to(at), "tokens": tokens_on(at)}),
    "k3": lambda at: (opdc.k3, {"teacher": logits_on(at), "tokens": tokens_on(at).short()}),
    "tropd": lambda at: (
        opdc.tropd,
        {
            "teacher": logits_on(at),
            "tokens": tokens_on(at),
            "prefix_mask": masks_on(at).float(),
            "generator": torch.Generator(),
        },
    ),
    "eopd": lambda at: (opdc.eopd, {"teacher": topk_on(at), "tokens": tokens_on(at)}),
    "reopold": lambda at: (opdc.reopold, {"teacher": logits_on(at), "tokens": tokens_on(at)}),
    "refinement": lambda at: (
        opdc.reopold,
        {"teacher": logits_on(at), "tokens": tokens_on(at), "phase": "refinement"},
    ),
    "aopd": lambda at: (opdc.aopd, {"teacher": logits_on(at), "tokens": tokens_on(at)}),
}
SAMPLERS = {
    "sample": lambda at: opdc.sample(logits_on(at), top_p=0.9, generator=torch.Generator()),
    "blend": lambda at: opdc.blend(logits_on(at), logits_on(at), torch.tensor(0.02)),
    "blend_sample": lambda at: opdc.blend_sample(
        logits_on(at), logits_on(at), numbers(B, 1, device=at), top_k=3, eos_map=(1, 2)
    ),
    "blend_verify": lambda at: opdc.blend_verify(
        tokens_on(at), logits_on(at), logits_on(at), 0.02, uniforms=numbers(B, T, 2, device=at)
    ),
    "topk": lambda at: opdc.topk(logits_on(at), K, temperature=2.0),
    "topk of a projection": lambda at: opdc.topk(projection_on(at), K),
    "drift_gate": lambda at: (
        opdc.drift_gate(numbers(B, T, device=at), numbers(B, T, device=at), masks_on(at)),
    ),
    "special_token_mask": lambda at: (opdc.special_token_mask(tokens_on(at), [3, 4]),),
    "token_logprobs": lambda at: (opdc.token_logprobs(adapted_on(at), tokens_on(at)),),
    "entropy": lambda at: (opdc.entropy(logits_on(at), mask=masks_on(at)),),
}


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


# ----------------------------------------------------------------- without data


@pytest.fixture
def a_gpu():
    """Tensors on a GPU that is not there. (Slices of them ask for it, so kernels do not run.)"""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield GPU


@pytest.fixture
def core(monkeypatch):
    """In the place of a GPU tensors without data, on which kernels run around a C core that only
    looks where its tensors are. What it was asked for, in order."""
    calls = []

    def looking(name, settings=1):
        def look(*arguments):
            calls.append(name)
            places = [tensor.device.type for tensor in tensors_in(arguments)]
            assert places.count("cpu") == settings and set(places) <= {"cpu", "meta"}
            return (20, True, True) if name == "slice_needs" else None

        return look

    for name in ("scale", "topk", "drift_gate"):
        monkeypatch.setattr(_C, name, looking(name, 0))
    for name in ("slice_needs", "measure", "combine", "measure_again", "combine_again", "settle"):
        monkeypatch.setattr(_C, name, looking(name))
    for name in ("slice_gradient", "finish_gradient"):
        monkeypatch.setattr(_C, name, looking(name))
    for name in ("loss", "gradient", "sample", "blend"):
        monkeypatch.setattr(_ops, f"_core_{name}", looking(name, name in ("loss", "gradient")))
    for module in (_ops, _projected, _gathered):
        for operator in [name for name in vars(module) if name.endswith("_operator")]:
            kernel = vars(module).get(operator.replace("_operator", "_kernel"))
            if kernel is not None:
                monkeypatch.setattr(module, operator, kernel)
    monkeypatch.setattr(_ops, "is_on_gpu", lambda tensor: tensor.is_meta)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return calls


def evaluate(student, loss, device, reduction="mean", **others):
    function, arguments = LOSSES[loss](device)
    common = common_on(device, reduction=reduction, **others)
    if reduction in ("none", "sum"):
        del common["num_items"]
    return function(student, **arguments, **common)


@pytest.mark.parametrize("loss", LOSSES)
def test_results_are_on_the_gpu(a_gpu, loss):
    for student, reduction in (("logits", "mean"), ("hidden states and all", "none")):
        value, metrics = evaluate(MODELS[student](a_gpu), loss, a_gpu, reduction)
        assert value.shape == (POSITIONS if reduction == "none" else ())
        assert value.dtype is torch.float32
        assert {x.device for x in (value, *metrics.values())} == {a_gpu}


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "special_token_mask"])
def test_what_is_drawn_is_on_the_gpu(a_gpu, name):
    assert {x.device for x in tensors_in(SAMPLERS[name](a_gpu))} == {a_gpu}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("student", ["logits", "hidden states and all"])
def test_losses_and_derivatives_do_not_wait(core, student, loss):
    for reduction in ("mean", "seq_mean", "sum", "none"):
        model = MODELS[student]("meta")
        leaves = [x.requires_grad_() for x in tensors_in(model)]
        value, metrics = evaluate(model, loss, "meta", reduction)
        gradients = torch.autograd.grad(value.sum(), leaves)
        assert {x.device.type for x in (value, *metrics.values(), *gradients)} == {"meta"}
        for gradient, leaf in zip(gradients, leaves, strict=True):
            assert gradient.shape == leaf.shape and gradient.dtype is leaf.dtype
        with torch.no_grad():
            assert evaluate(model, loss, "meta", num_items=5, mask=None)[0].is_meta
    assert core


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_do_not_wait(core, name):
    assert all(x.is_meta for x in tensors_in(SAMPLERS[name]("meta")))
    assert core or name == "special_token_mask"


def test_inplace_does_not_wait(core, monkeypatch):
    monkeypatch.setattr(_ops, "require_apart", lambda *_: None)  # both have the address 0
    student = logits_on("meta").requires_grad_() * 1
    value = opdc.reverse_kl(student, logits_on("meta"), inplace=True)
    assert torch.autograd.grad(value, student)[0].is_meta
    assert core == ["loss", "scale"]


def test_a_sparse_gradient_has_to_wait(core):
    """Nobody else knows how many rows it has: the one exception."""
    student = projection_on("meta", sparse_gradient=True)
    value = opdc.lsm(student._replace(weight=student.weight.requires_grad_()), topk_on("meta"))
    with pytest.raises(NotImplementedError, match="nonzero"):
        value.backward()


def test_what_waits_is_seen():
    """The same exceptions that nothing above raised."""
    mask = masks_on("meta")
    for wait in (mask.any().item, mask.tolist, mask.cpu, mask.nonzero, lambda: bool(mask.all())):
        with pytest.raises((NotImplementedError, RuntimeError)):
            wait()


# ----------------------------------------------------------------- another device


STRAYS = {
    "teacher": lambda: opdc.reverse_kl(logits_on(GPU), logits_on("cpu")),
    "mask": lambda: opdc.k1(
        logits_on(GPU), logits_on(GPU), tokens_on(GPU), mask=masks_on("cpu"), num_items=4
    ),
    "weights": lambda: opdc.jsd(
        logits_on(GPU), logits_on(GPU), weights=numbers(B, T), num_items=torch.tensor(4).to(GPU)
    ),
    "tokens": lambda: opdc.k3(logits_on(GPU), logits_on(GPU), tokens_on("cpu")),
    "slot_ids": lambda: opdc.lsm(logits_on(GPU), topk_on("cpu")),
    "student.weight": lambda: opdc.entropy(
        opdc.Projection(numbers(B, T, H, device=GPU), numbers(V, H))
    ),
    "uniforms": lambda: opdc.sample(logits_on(GPU), uniforms=numbers(B, T)),
    "epsilon": lambda: opdc.blend(logits_on(GPU), logits_on(GPU), numbers(B, 1)),
    "draft_tokens": lambda: opdc.blend_verify(
        tokens_on("cpu"), logits_on(GPU), logits_on(GPU), 0.1
    ),
    "old_logprobs": lambda: opdc.drift_gate(numbers(B, T, device=GPU), numbers(B, T)),
}


@pytest.mark.parametrize("name", STRAYS)
def test_one_tensor_elsewhere(a_gpu, name):
    match = name.replace("student.weight", "weight")
    with pytest.raises(TypeError, match=rf"{match} is on cpu but .* on cuda:0"):
        STRAYS[name]()


def test_one_tensor_on_another_gpu(a_gpu):
    other = torch.device("cuda", 1)
    with pytest.raises(TypeError, match="teacher is on cuda:1 but student is on cuda:0"):
        opdc.reverse_kl(logits_on(GPU), logits_on(other))
    with pytest.raises(TypeError, match="mask is on cuda:1 but student is on cuda:0"):
        opdc.entropy(logits_on(GPU), mask=masks_on(other))
    value = opdc.reverse_kl(logits_on(GPU), logits_on(GPU), num_items=torch.ones(()).to(other))
    assert value.device == GPU


def test_other_devices_are_refused():
    for name in ("loss", "topk", "projected_loss", "gathered_logits"):
        for key in ("CPU", "CUDA", "MPS", "XPU"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"opdc::{name}", key)
    with pytest.raises(TypeError, match=r"tensors on meta.*CPUs and on CUDA GPUs.*\.cpu\(\)"):
        _ops._refuse_device(torch.empty(1, device="meta"), 3, torch.empty(1))


def test_a_generator_draws_where_it_is(a_gpu):
    assert opdc.sample(logits_on(a_gpu), generator=torch.Generator()).tokens.device == a_gpu
    student, teacher, tokens = logits_on(a_gpu), logits_on(a_gpu), tokens_on(a_gpu)
    assert opdc.tropd(student, teacher, tokens, generator=torch.Generator()).device == a_gpu


def test_uniforms_are_those_of_the_generator():
    for shape, generator in (((2, 3), torch.Generator().manual_seed(3)), ((4,), None)):
        torch.manual_seed(3)
        drawn = _arguments.uniforms(shape, torch.float64, torch.device("cpu"), generator)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(shape, dtype=torch.float64))
        assert _arguments.uniforms(shape, torch.float32, torch.device("meta"), generator).is_meta


# ----------------------------------------------------------------- with data, told to be on a GPU


@pytest.fixture
def told(monkeypatch):
    """Within this context tensors with data are taken for some on a GPU."""

    @contextlib.contextmanager
    def told_to_be_on_a_gpu():
        with monkeypatch.context() as patched:
            patched.setattr(_ops, "is_on_gpu", lambda _: True)
            yield

    return told_to_be_on_a_gpu


def answers(function, student, upstream=None, **arguments):
    """Value, metrics and gradients."""
    tensors = [x for x in tensors_in(student) if x.is_floating_point()]
    for tensor in tensors:
        tensor.grad = None
        tensor.requires_grad_()
    value = function(student, **arguments)
    value, metrics = value if isinstance(value, tuple) else (value, {})
    value.backward(torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), metrics, [x.grad for x in tensors]


def assert_same(one, other, **tolerances):
    torch.testing.assert_close(one, other, equal_nan=True, **(tolerances or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("items", [torch.tensor(3), torch.tensor(0.7), torch.tensor(1e30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("student", MODELS)
def test_num_items_on_a_gpu_gives_the_same_numbers(told, student, dtype, items):
    student, teacher = MODELS[student]("cpu"), logits_on("cpu")
    for weights, mask in itertools.product(
        (None, numbers(B, T, dtype=dtype)), (None, masks_on("cpu"))
    ):
        common = {"weights": weights, "mask": mask, "return_metrics": True}
        arguments = {"teacher": teacher, "num_items": items, **common}
        expected = answers(opdc.reverse_kl, student, **arguments)
        with told():
            found = answers(opdc.reverse_kl, student, **arguments)
        # Logits: the same division in the same order. Heads: other positions are projected.
        assert_same(found, expected, **({} if isinstance(student, torch.Tensor) else CLOSE))
        arguments["reduction"] = "seq_mean"
        expected = answers(opdc.reverse_kl, student, **arguments)
        with told():
            assert_same(answers(opdc.reverse_kl, student, **arguments), expected, **CLOSE)


CLOSE = {"rtol": 2e-5, "atol": 1e-6}


@pytest.mark.parametrize("reduction", ["mean", "seq_mean"])
@pytest.mark.parametrize("student", MODELS)
def test_a_share_of_nothing_on_a_gpu_is_nothing(told, student, reduction):
    student, teacher = MODELS[student]("cpu"), logits_on("cpu")
    for mask in (None, masks_on("cpu")):
        common = {"num_items": torch.tensor(0), "mask": mask, "return_metrics": True}
        with told():
            value, metrics, gradients = answers(
                opdc.reverse_kl, student, teacher=teacher, reduction=reduction, **common
            )
        assert value == 0 and all(metric == 0 for metric in metrics.values())
        assert all(torch.equal(x, torch.zeros_like(x)) for x in gradients)


@pytest.mark.parametrize("items", [-1.0, math.nan, math.inf, 2e300])
def test_what_is_no_count_gives_nan(told, items):
    items = torch.tensor(items, dtype=torch.float64)
    with told():
        value, metrics = opdc.jsd(
            logits_on("cpu"), logits_on("cpu"), num_items=items, return_metrics=True
        )
    assert value.isnan() and metrics["positions"] == B * T


def test_reopold_counts_what_it_is_told(told):
    arguments = {
        "teacher": logits_on("cpu"),
        "tokens": tokens_on("cpu"),
        "num_items": torch.tensor(2),
    }
    student = logits_on("cpu")
    expected = answers(opdc.reopold, student, **arguments)
    with told():
        assert_same(answers(opdc.reopold, student, **arguments), expected)


@pytest.mark.parametrize("reduction", ["mean", "seq_mean", "sum", "none"])
@pytest.mark.parametrize("student", ["hidden states", "hidden states and all"])
@pytest.mark.parametrize(
    "loss", ["jsd", "a support", "lsm with tokens", "k1 with a discount", "refinement"]
)
def test_all_positions_are_projected_and_idle_ones_count_for_nothing(
    told, loss, student, reduction
):
    function, arguments = LOSSES[loss]("cpu")
    if isinstance(arguments["teacher"], torch.Tensor):
        arguments["teacher"] = projection_on("cpu")
    student = MODELS[student]("cpu")
    mask = masks_on("cpu")
    weights, upstream = numbers(B, T), numbers(B, T) if reduction == "none" else numbers()
    common = {"mask": mask, "weights": weights, "reduction": reduction, "return_metrics": True}
    expected = answers(function, student, upstream, **arguments, **common)
    with torch.no_grad():  # idle positions are never looked at
        for tensor in (student.hidden, *(student.adapter or ())[:1]):
            tensor[~mask] = math.nan
    student = student._replace(max_bytes=2000)  # a few chunks
    with told():
        assert_same(answers(function, student, upstream, **arguments, **common), expected, **CLOSE)
        nothing = {**common, "mask": torch.zeros_like(mask)}
        value, _, gradients = answers(function, student, upstream, **arguments, **nothing)
        assert not value.any() and not any(x.any() for x in gradients)


def test_positions_in_any_strides(told):
    hidden = numbers(T, B, H).transpose(0, 1)
    student = opdc.Projection(hidden, numbers(V, H), max_bytes=500)
    teacher = numbers(V, T, B).permute(2, 1, 0)
    expected = opdc.jsd(student, teacher, mask=masks_on("cpu"))
    with told():
        assert_same(opdc.jsd(student, teacher, mask=masks_on("cpu")), expected, **CLOSE)


# ----------------------------------------------------------------- the sparse head by torch

SPARSE = [(5, 7, 16, 30), (40, 9, 33, 50), (0, 3, 4, 5), (4, 0, 4, 5), (4, 3, 0, 5), (4, 3, 4, 0)]


@pytest.mark.parametrize("limit", [1 << 28, 700])
@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("bfloat16", "float16"), ("float64",) * 2]
)
@pytest.mark.parametrize("sizes", SPARSE, ids=str)
def test_the_sparse_head_is_that_of_the_core(told, monkeypatch, sizes, dtypes, limit):
    monkeypatch.setattr(_gathered, "_BYTES", limit)
    count, slots, width, vocabulary = sizes
    hidden, weight = (getattr(torch, dtype) for dtype in dtypes)
    hidden = torch.randn(count, width).to(hidden)
    weight, bias = torch.randn(vocabulary, width).to(weight), torch.randn(vocabulary)
    ids = (
        torch.randint(-2, vocabulary, (count, slots))
        if vocabulary
        else torch.full((count, slots), -1)
    )
    ids = ids.int() if limit == 700 else ids
    for given in (None, bias):
        expected = _gathered._logits_kernel(hidden, weight, given, ids)
        with told():
            found = _gathered._logits_kernel(hidden, weight, given, ids)
        assert_same(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(count, slots).to(expected.dtype)
    if count > 1 and slots > 1:
        upstream[1, 1] = math.nan
        upstream[0, 0] = math.inf
    for wanted, sparse in itertools.product((1, 2, 4, 7), (False, True)):
        call = (hidden, weight, ids, upstream, wanted, sparse)
        expected = _gathered._gradient_kernel(*call)
        with told():
            found = _gathered._gradient_kernel(*call)
        assert_same(found, expected, rtol=2e-2 if dtypes[1][-2:] == "16" else 1e-5, atol=1e-4)


def test_ids_that_no_head_has_give_nan(told):
    """Where nobody looks: their positions alone, and nothing outside of the head is read."""
    student = projection_on("cpu")
    ids = topk_on("cpu").ids.clone()
    ids[0, 1, 2] = V
    ids[1, 0, 0] = 2**40
    named = torch.tensor([[1, 5, -3], [2**40, 4, V]])
    with told():
        logits = _gathered._logits_kernel(student.hidden, student.weight, student.bias, ids)
        assert torch.equal(logits.isnan(), (ids < 0) | (ids >= V))
        upstream = torch.zeros_like(logits).where(ids < V, math.nan)
        gradients = _gathered._gradient_kernel(
            student.hidden, student.weight, ids, upstream, 7, False
        )
        assert torch.equal(gradients[0].isnan().all(-1), (ids >= V).any(-1))
        assert all(gradient.isfinite().all() for gradient in gradients[2:])
    slot_ids, columns, places = support_of(student, named)
    assert torch.equal(slot_ids[..., -1] == V, (named < 0) | (named >= V))
    assert torch.equal(columns, torch.arange(K).expand_as(columns))
    assert places[0, 0] == 1  # token 1 is in slot 1; the others stand after the slots
    assert places.flatten().tolist().count(K) == 5


def support_of(student, tokens):
    """What the kernel makes of tokens that nothing has checked."""
    teacher = topk_on("cpu")
    given = {
        "slot_ids": teacher.ids,
        "slot_logprobs": teacher.logprobs,
        "teacher_logprobs": teacher.token_logprobs,
        "tokens": tokens,
    }
    integers = {"support": _ops.SUPPORTS.index("teacher+token"), "k": K}
    with mock.patch.object(_projected.Call, "check"):
        return _gathered._support_kernel(
            student.hidden,
            student.weight,
            *(given.get(name) for name in _ops.TENSORS),
            *(_ops.settings({}, None), "reverse_kl"),
            *(integers.get(name, 0) for name in _ops.INTEGERS),
            0,
        )


# ----------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("backends", "wanted", "device"),
    [
        ("cpu:gloo,cuda:gloo", ("cpu",), "cpu"),
        ("cpu:gloo,cuda:nccl", ("cuda:1",), "cuda:1"),
        ("cuda:nccl", ("cpu", "cuda:1"), "cuda:1"),
        ("cuda:nccl", ("cpu",), "cuda:0"),
        ("cpu:gloo", ("cuda:1",), "cpu"),
    ],
)
def test_what_is_exchanged_is_where_the_backend_takes_it(monkeypatch, backends, wanted, device):
    current = SimpleNamespace(current_device=lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda _: backends)
    monkeypatch.setattr(torch, "get_device_module", lambda _: current)
    found = _groups.exchangeable(None, *map(torch.device, wanted))
    assert found == torch.device(device)


def test_metrics_of_the_cpu_travel_by_gpu(monkeypatch):
    """With a group for GPUs alone; and back."""
    sent = []
    monkeypatch.setattr(opdc.metrics, "exchangeable", lambda *_: torch.device("meta"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, *_: sent.append(x.device.type))
    with pytest.raises(NotImplementedError, match="meta tensor"):  # no data to bring back
        opdc.metrics.all_reduce({"positions": torch.ones((), dtype=torch.float64)})
    assert sent == ["meta"]


# ----------------------------------------------------------------- rollouts and trainers


class Waits(TorchDispatchMode):
    """Counts what opdc would wait for on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*function.tags}:
            files = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
            source = next(name for name in files if "transformers" in name or "opdc" in name)
            self.count += "transformers" not in source
        return function(*arguments, **(keywords or {}))


def models():
    transformers = pytest.importorskip("transformers")
    importlib.import_module("opdc.hf")

    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=None,
    )
    torch.manual_seed(2)
    return [transformers.LlamaForCausalLM(config).eval() for _ in range(2)]


@pytest.mark.parametrize("draft_length", [0, 2])
def test_a_step_of_a_rollout_waits_once(draft_length):
    transformers = pytest.importorskip("transformers")
    student, teacher = models()
    sampler = opdc.hf.BlendSampler(teacher, 1e9, draft_length=draft_length)

    def waits(count):
        with Waits() as seen:
            student.generate(
                torch.tensor([[1, 5, 9], [2, 3, 4]]),
                generation_config=transformers.GenerationConfig(
                    do_sample=True, top_k=0, max_new_tokens=count, pad_token_id=0
                ),
                custom_generate=sampler,
            )
        return seen.count

    assert waits(12) - waits(2) == (0 if draft_length else 10)  # a block asks by `tolist`, once


def test_only_the_first_batch_is_looked_at(told, device):
    pytest.importorskip("transformers")
    from opdc.hf.distill import warn_of_nothing

    some, none = torch.tensor([True]), torch.tensor([False])
    assert warn_of_nothing(some, -100) == (device != "cpu")
    with told():
        assert warn_of_nothing(some, -100)
        with pytest.warns(UserWarning, match="no position to train on"):
            assert warn_of_nothing(none, -100)


# ----------------------------------------------------------------- the command line


def test_info_lists_gpus(monkeypatch):
    def properties(index):
        if index:
            raise RuntimeError("out of memory")
        return SimpleNamespace(name="One", major=9, minor=0, total_memory=80 << 30)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    assert opdc.info.gpus() == [
        "One, capability 9.0, 80 GiB",
        "cuda:1 cannot be used: out of memory",
    ]
    assert opdc.info.cuda_driver() == "12.8"


def test_info_knows_the_compiler(monkeypatch):
    monkeypatch.setattr(_C, "cuda_compiler", lambda: (13, 0, 75))
    assert opdc.info.cuda_compiler() == "NVRTC 13.0 compiles for 7.5 and newer"
    missing = RuntimeError("CUDA: NVRTC, which compiles the kernels, is not found: y")
    monkeypatch.setattr(_C, "cuda_compiler", mock.Mock(side_effect=missing))
    assert opdc.info.cuda_compiler() == "NVRTC, which compiles the kernels, is not found: y"
