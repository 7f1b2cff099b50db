"""The kernels for GPUs, on the emulated GPU of tests/cuda: the same bits as on the processor, in
whatever order the threads run, and no two threads that touch the same memory unordered."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import opdc
from emulated import emulated_gpu, library_path

ROOT = Path(__file__).resolve().parent.parent
INFINITY = math.inf
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "f64": (torch.float64, torch.float64),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16),
    "f16 and bf16": (torch.float16, torch.bfloat16),
    "f32 and f64": (torch.float32, torch.float64),
}


@pytest.fixture(scope="module", autouse=True)
def built():
    library_path()


def problem(
    vocabulary: int, shape: tuple[int, ...] = (2, 4), dtypes: str = "f32", odd_rows: bool = True
) -> SimpleNamespace:
    """What goes into a call. Of the rows, which are of all degrees of certainty, some are masked;
    one has the same logits in both models, one is certain, one excludes ids, and one has NaN."""
    generator = torch.Generator().manual_seed(vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    teacher = 3.0 * normal(*shape, vocabulary)
    student = teacher + normal(*shape, vocabulary)
    rows, others = student.view(-1, vocabulary), teacher.view(-1, vocabulary)
    if odd_rows and len(rows) > 4:
        rows[0] = others[0]
        rows[1, vocabulary // 2] += 40.0
        if vocabulary > 3:
            rows[2, 1 : vocabulary // 3 + 1] = others[2, 1 : vocabulary // 2] = -INFINITY
        rows[3, vocabulary // 2] = math.nan
    first, second = DTYPES[dtypes]
    k = min(5, vocabulary)
    found = torch.log_softmax(teacher.nan_to_num(0.0, neginf=-9.0), -1).topk(k)
    mask = uniform(*shape) < 0.8
    mask.view(-1)[: min(4, mask.numel())] = True
    return SimpleNamespace(
        student=student.to(first),
        teacher=teacher.to(second),
        tokens=torch.randint(0, vocabulary, shape, generator=generator),
        mask=mask,
        prefix=uniform(*shape) < 0.3,
        weights=normal(*shape).float(),
        upstream=normal(*shape).float(),
        uniforms=uniform(*shape).float(),
        pairs=uniform(*shape, 2).float(),
        old=-uniform(*shape).float(),
        epsilon=(0.2 * uniform(*shape)).float(),
        k=k,
        served=opdc.TopK(
            found.indices.where(uniform(*shape, k) < (0.9 if odd_rows else 2), -1),
            found.values.float(),
            token_logprobs=-2 * uniform(*shape).float(),
            entropy=uniform(*shape).float(),
        ),
        drafts=student.nan_to_num(0.0, neginf=-9.0).argmax(-1),
    )


def divergence(name: str, **keywords: Any) -> Callable[..., Any]:
    function = getattr(opdc, name)
    return lambda p, **common: function(p.student, p.teacher, **keywords, **common)


def on_support(name: str, support: str, normalize: str | None = None) -> Callable[..., Any]:
    def call(p: SimpleNamespace, **common: Any) -> Any:
        keywords = {"support": support, "k": p.k}
        keywords |= {"tokens": p.tokens} if support == "teacher+token" else {}
        keywords |= {} if normalize is None else {"normalize": normalize}
        return getattr(opdc, name)(p.student, p.teacher, **keywords, **common)

    return call


def served(name: str, *with_tokens: bool, **keywords: Any) -> Callable[..., Any]:
    def call(p: SimpleNamespace, **common: Any) -> Any:
        tokens = (p.tokens,) if with_tokens else ()
        return getattr(opdc, name)(p.student, p.served, *tokens, **keywords, **common)

    return call


def of_tokens(name: str, *also: str, with_k: bool = False, **keywords: Any) -> Callable[..., Any]:
    """`also`: arguments that are tensors of the problem, as "name=name in the problem"."""

    def call(p: SimpleNamespace, **common: Any) -> Any:
        tensors = {key: getattr(p, value) for key, value in (x.split("=") for x in also)}
        size = {"k": p.k} if with_k else {}
        function = getattr(opdc, name)
        return function(p.student, p.teacher, p.tokens, **tensors, **size, **keywords, **common)

    return call


OLD = "old_logprobs=old"
LOSSES: dict[str, Callable[..., Any]] = {
    "reverse_kl": divergence("reverse_kl"),
    "forward_kl": divergence("forward_kl", temperature=0.7),
    "jsd": divergence("jsd", beta=0.3),
    "skew forward": divergence("skew_kl", alpha=0.2),
    "skew reverse": divergence("skew_kl", alpha=0.4, direction="reverse"),
    "reverse_kl teacher none": on_support("reverse_kl", "teacher", "none"),
    "reverse_kl student both": on_support("reverse_kl", "student", "both"),
    "reverse_kl token generalized": on_support("reverse_kl", "teacher+token", "generalized"),
    "forward_kl teacher tail": on_support("forward_kl", "teacher", "tail"),
    "forward_kl student teacher": on_support("forward_kl", "student", "teacher"),
    "jsd teacher tail": on_support("jsd", "teacher", "tail"),
    "jsd token both": on_support("jsd", "teacher+token", "both"),
    "lsm": on_support("lsm", "teacher"),
    "served reverse_kl": served("reverse_kl", normalize="tail"),
    "served forward_kl": served("forward_kl", normalize="none"),
    "served lsm": served("lsm"),
    "served k1": served("k1", True),
    "served eopd": served("eopd", True),
    "served tropd": served("tropd", True, region="threshold"),
    "k1": of_tokens("k1"),
    "k1 clipped": of_tokens("k1", OLD, clip_range=(0.1, 0.2), advantage="current"),
    "k1 discounted": of_tokens("k1", OLD, "reference_logprobs=uniforms", discount=0.9),
    "k2": of_tokens("k2"),
    "k3": of_tokens("k3"),
    "tropd": of_tokens("tropd", "uniforms=uniforms", "prefix_mask=prefix", OLD, with_k=True),
    "tropd clip": of_tokens("tropd", region="expected", outlier="clip", with_k=True),
    "tropd mask": of_tokens("tropd", region="threshold", outlier="mask", with_k=True),
    "eopd": of_tokens("eopd", OLD, with_k=True, entropy_threshold=0.9),
    "reopold": of_tokens("reopold", OLD),
    "reopold refinement": of_tokens("reopold", phase="refinement", keep=0.4),
    "aopd": of_tokens("aopd", with_k=True),
}
STATISTICS: dict[str, Callable[..., Any]] = {
    "token_logprobs": lambda p, **common: opdc.token_logprobs(p.student, p.tokens, **common),
    "entropy": lambda p, **common: opdc.entropy(p.student, **common),
}
# One of each way through the kernels.
KINDS = ("reverse_kl", "jsd", "reverse_kl token generalized", "served lsm", "k1 discounted", "eopd")
CUT = {"top_k": 4, "top_p": 0.8}
SAMPLERS: dict[str, Callable[..., Any]] = {
    "sample": lambda p, **c: opdc.sample(p.student, uniforms=p.uniforms, **c),
    "sample top_k": lambda p, **c: opdc.sample(p.student, uniforms=p.uniforms, top_k=p.k, **c),
    "sample top_p": lambda p, **c: opdc.sample(
        p.student, uniforms=p.uniforms, top_p=0.7, temperature=0.8, **c
    ),
    "sample both": lambda p, **c: opdc.sample(p.student, uniforms=p.uniforms, **CUT, **c),
    "blend": lambda p, **c: opdc.blend(p.student, p.teacher, p.epsilon, **c),
    "blend_sample": lambda p, **c: opdc.blend_sample(
        p.student, p.teacher, p.epsilon, uniforms=p.uniforms, temperature=1.3, **c
    ),
    "blend_sample cut": lambda p, **c: opdc.blend_sample(
        p.student, p.teacher, p.epsilon, uniforms=p.uniforms, **CUT, **c
    ),
    "blend_verify": lambda p, **c: opdc.blend_verify(
        p.drafts, p.student, p.teacher, p.epsilon, uniforms=p.pairs, **c
    ),
    "blend_verify cut": lambda p, **c: opdc.blend_verify(
        p.drafts, p.student, p.teacher, p.epsilon, uniforms=p.pairs, **CUT, **c
    ),
}


def outcome(
    call: Callable[..., Any], p: SimpleNamespace, *, inplace: bool = False, **common: Any
) -> list[Tensor]:
    """Value, gradient and metrics of a loss."""
    leaf = p.student.clone(memory_format=torch.preserve_format).requires_grad_()
    given = SimpleNamespace(**{**vars(p), "student": leaf * 1.0 if inplace else leaf})
    if inplace:
        common["inplace"] = True
    result = call(given, **common)
    value, metrics = result if isinstance(result, tuple) else (result, {})
    if value.dim():
        value.backward(p.upstream.to(value.dtype))
    else:
        value.backward(torch.tensor(0.5, dtype=value.dtype))
    assert leaf.grad is not None
    return [value.detach(), leaf.grad, *metrics.values()]


def drawn(call: Callable[..., Any], p: SimpleNamespace, **common: Any) -> list[Tensor]:
    return [x for x in call(p, **common) if isinstance(x, Tensor)]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN has no bits of its own."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.dtype.is_floating_point:
        return torch.equal(one, other)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    bits = [x.contiguous().view(width).masked_fill(x.isnan(), -1) for x in (one, other)]
    return torch.equal(*bits)


def agree(run: Callable[[], list[Tensor]], *gpus: dict[str, Any]) -> None:
    """The processor and the emulated GPUs that these settings describe have the same bits."""
    there = run()
    for gpu in gpus or ({},):
        with emulated_gpu(**gpu) as library:
            before = library.emulation_calls(b"cuLaunchKernel")
            here = run()
            assert library.emulation_calls(b"cuLaunchKernel") > before
        assert len(here) == len(there)
        for index, (mine, right) in enumerate(zip(here, there, strict=True)):
            assert same_bits(mine, right), (gpu, index, mine, right)


MANY_TEAMS: dict[str, Any] = {}
FEW_TEAMS_BACKWARDS = {"device": 1, "order": "descending"}
WATCHED = {"device": 1, "order": "3", "races": True}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, dtypes):
    p = problem(100, dtypes=dtypes)
    common = {"mask": p.mask, "weights": p.weights, "return_metrics": True}
    agree(lambda: outcome(LOSSES[loss], p, **common), MANY_TEAMS, FEW_TEAMS_BACKWARDS)


@pytest.mark.parametrize("dtypes", ["f32", "f64"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_two_threads_race(loss, dtypes):
    p = problem(2100 if dtypes == "f32" else 1100, (1, 2), dtypes)
    run = lambda: outcome(LOSSES[loss], p, return_metrics=True, inplace=dtypes == "f32")  # noqa: E731
    agree(run, WATCHED, {"races": True})


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "seq_mean"])
@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(loss, reduction):
    p = problem(33, (3, 5))
    p.mask[1] = False  # a sequence with nothing in it
    common = {"mask": p.mask, "weights": p.weights, "reduction": reduction}
    agree(lambda: outcome(LOSSES[loss], p, **common))
    agree(lambda: outcome(LOSSES[loss], p, reduction=reduction, inplace=True))


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 1024, 1025, 5003])
@pytest.mark.parametrize("loss", KINDS)
def test_shapes(loss, vocabulary):
    p = problem(vocabulary, (1, 3))
    if loss == "served lsm" and vocabulary == 1:
        pytest.skip("one id is no support")
    agree(lambda: outcome(LOSSES[loss], p, return_metrics=True), MANY_TEAMS, FEW_TEAMS_BACKWARDS)


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
@pytest.mark.parametrize("loss", ["reverse_kl", "jsd", "lsm"])
def test_more_blocks_than_are_combined_at_a_time(loss, dtypes):
    p = problem(70_001, (1,), dtypes)
    agree(lambda: outcome(LOSSES[loss], p), MANY_TEAMS, FEW_TEAMS_BACKWARDS)


@pytest.mark.parametrize("loss", KINDS)
def test_shapes_without_positions_and_masks_without_any(loss):
    p = problem(20, (0, 3))
    assert [x.shape for x in outcome(LOSSES[loss], p)] == [(), (0, 3, 20)]
    p = problem(20, (2, 3))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    agree(lambda: outcome(LOSSES[loss], p, mask=nothing, reduction="seq_mean"))
    agree(lambda: outcome(LOSSES[loss], p, num_items=0))


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("loss", KINDS)
def test_strides_and_a_part_of_the_vocabulary(loss, dtypes):
    p = problem(90, (3, 4), dtypes)
    p.student = torch.cat([p.student, p.student], -1)[..., 3:80].transpose(0, 1)[:, ::2]
    p.teacher = p.teacher[..., 1:86].transpose(0, 1)[:, ::2]
    for name in ("tokens", "mask", "weights", "uniforms", "old", "prefix"):
        setattr(p, name, getattr(p, name).transpose(0, 1)[:, ::2])
    p.tokens = p.tokens % 50
    p.served = opdc.TopK(*(x.transpose(0, 1)[:, ::2] for x in p.served if x is not None))
    p.served = p.served._replace(ids=p.served.ids.where(p.served.ids < 50, -1))
    common = {"mask": p.mask, "weights": p.weights, "valid_vocab": 50}
    agree(lambda: outcome(LOSSES[loss], p, **common), FEW_TEAMS_BACKWARDS)


@pytest.mark.parametrize("call", STATISTICS)
def test_statistics(call):
    for dtypes in DTYPES:
        p = problem(100, dtypes=dtypes)
        agree(lambda p=p: outcome(STATISTICS[call], p, mask=p.mask, temperature=0.8))


@pytest.mark.parametrize("dtypes", ["f32", "f64", "bf16"])
@pytest.mark.parametrize("k", [1, 7, 300])
def test_topk(k, dtypes):
    p = problem(3000, (5,), dtypes)
    p.student[4, 100:200] = 9.0  # ties
    agree(lambda: drawn(opdc.topk, p.student, k=k), MANY_TEAMS, WATCHED)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(sampler, dtypes):
    p = problem(100, dtypes=dtypes)
    agree(lambda: drawn(SAMPLERS[sampler], p), MANY_TEAMS, FEW_TEAMS_BACKWARDS)


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 1025, 5003])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_of_other_sizes(sampler, vocabulary):
    p = problem(vocabulary, (3,))
    agree(lambda: drawn(SAMPLERS[sampler], p), MANY_TEAMS, FEW_TEAMS_BACKWARDS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_do_not_race(sampler):
    p = problem(1500, (1, 2))
    agree(lambda: drawn(SAMPLERS[sampler], p), WATCHED, {"races": True})


@pytest.mark.parametrize("sampler", ["blend", "blend_sample", "blend_verify"])
def test_rows_that_are_done_again_in_doubles(sampler):
    p = problem(30, (2, 3), odd_rows=False)
    p.student[0, 1:] *= 1e5  # no float32 beta meets the budget
    p.teacher[:, 1] *= 1e6
    agree(lambda: drawn(SAMPLERS[sampler], p), MANY_TEAMS, WATCHED)


@pytest.mark.parametrize("sampler", ["blend", "blend_sample cut", "blend_verify"])
def test_samplers_with_two_ends(sampler):
    p = problem(64)
    agree(lambda: drawn(SAMPLERS[sampler], p, eos_map=(3, 40), valid_vocab=60))


def test_drift_gate():
    p = problem(3, (4, 50))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        old, new = p.old.to(dtype), (p.old + 0.1 * p.weights).to(dtype)
        run = lambda new=new, old=old: [opdc.drift_gate(new, old, p.mask, block=8, kappa=3.0)]  # noqa: E731
        agree(run, MANY_TEAMS, {"order": "5", "races": True})


# ----------------------------------------------------------------- what only a GPU does

WRONG_IDS = (50, -1, 2**62, -(2**63))


def spoil(p: SimpleNamespace, what: str) -> None:
    """Puts what a processor refuses into the rows 1 to 4; so that autograd does not see it."""
    rows = slice(1, 5)
    if what in ("tokens", "drafts"):
        getattr(p, what).view(6, -1).numpy()[rows, 0] = WRONG_IDS
    elif what in ("uniforms", "pairs", "epsilon"):
        wrong = torch.tensor([1.0 if what != "epsilon" else -math.inf, -0.1, math.nan, -1.0])
        getattr(p, what).view(6, -1).numpy()[rows, 0] = wrong.numpy()
    elif what == "slots":
        p.served.ids.numpy()[rows, 0] = [50, 51, 2**62, 2**31]
    elif what == "slots that come twice":
        p.served.ids.numpy()[rows, :2] = 7
    else:
        p.served.logprobs.numpy()[rows] = 0.0  # more than all of the mass


SPOILED = [
    ("k1", "tokens"),
    ("reverse_kl token generalized", "tokens"),
    ("jsd token both", "tokens"),
    ("reopold refinement", "tokens"),
    ("tropd", "uniforms"),
    *(
        (loss, what)
        for loss in ("served lsm", "served reverse_kl", "served eopd", "served tropd")
        for what in ("slots", "slots that come twice", "mass")
    ),
]


@pytest.mark.parametrize("when", ["before the loss", "between the loss and its gradient"])
@pytest.mark.parametrize(("loss", "what"), SPOILED)
def test_values_that_the_host_cannot_check_spoil_their_own_row(loss, what, when):
    p = problem(50, (6,), odd_rows=False)
    p.prefix[:] = False
    right = outcome(LOSSES[loss], p, reduction="none")
    with emulated_gpu(device=1, order="descending", races=True):
        if when == "before the loss":
            spoil(p, what)
        student = p.student.clone().requires_grad_()
        value = LOSSES[loss](SimpleNamespace(**{**vars(p), "student": student}), reduction="none")
        spoil(p, what)
        value.backward(p.upstream)
    of_value = when == "before the loss" and "refinement" not in loss  # which may not select it
    for row in range(6):
        is_spoiled = 1 <= row < 5
        if is_spoiled and of_value:
            assert value[row].isnan()
        if is_spoiled and "refinement" not in loss:
            assert student.grad[row].isnan().all()
        if not is_spoiled and "refinement" not in loss:
            assert same_bits(value[row].detach(), right[0][row])
            assert same_bits(student.grad[row], right[1][row])


@pytest.mark.parametrize(
    ("sampler", "what"),
    [
        ("sample", "uniforms"),
        ("blend_sample", "uniforms"),
        ("blend_sample cut", "epsilon"),
        ("blend_verify", "pairs"),
        ("blend_verify", "drafts"),
    ],
)
def test_values_that_the_host_cannot_check_draw_nothing(sampler, what):
    p = problem(50, (6,), odd_rows=False)
    p.student, p.teacher = p.student[:, None], p.teacher[:, None]  # blocks of one draft
    for name in ("uniforms", "epsilon", "drafts", "pairs"):
        setattr(p, name, getattr(p, name)[:, None].contiguous())
    right = SAMPLERS[sampler](p).tokens
    spoil(p, what)
    with emulated_gpu(device=1, order="descending", races=True):
        tokens = SAMPLERS[sampler](p).tokens
    assert tokens[1:5].eq(-1).all()
    assert tokens[::5].equal(right[::5])


def test_the_first_position_of_many_teams_is_that_of_two():
    """More rows than thread blocks: a block has one row after the other."""
    p = problem(40, (7, 3))
    agree(lambda: outcome(LOSSES["jsd"], p), {"device": 0}, {"device": 1, "races": True})


# ----------------------------------------------------------------- tests that are there already

EXISTING = ("test_phases.py",)


@pytest.mark.parametrize("tests", EXISTING)
def test_the_tests_of_the_processor(tests):
    path, _, chosen = tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "--device=emulated", f"tests/{path}"]
    command += ["-k", chosen] if chosen else []
    run = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
