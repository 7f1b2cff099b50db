"""What losses from hidden states take from memory: allocations by number and size, no clock."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import opdc
from projections import leaves, parts

N, V, H = 512, 3000, 16
CHUNK = 32  # positions, about
BUDGET = 2 * 4 * V * CHUNK  # logits of student and teacher, float32
SMALL = 1 << 20  # what a loss may take beside its chunk: numbers per position, for 512 positions


def allocations(function) -> list[int]:
    """The sizes of what PyTorch allocates during the call, in order; negative where it is freed."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    in_order = sorted((event.start_ns(), event.nbytes()) for event in events
                      if event.name() == "[memory]")  # fmt: skip
    return [size for _, size in in_order]


def peak(sizes: list[int]) -> int:
    """The most that is alive at once."""
    alive = most = 0
    for size in sizes:
        alive += size
        most = max(most, alive)
    return most


def models(positions: int = N, budget: int | None = BUDGET, dtype: torch.dtype = torch.float32):
    """Student, teacher and tokens: bias and adapter for the student, another size for the other."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    student = opdc.Projection(
        normal(positions, H),
        normal(V, H),
        normal(V),
        adapter=(normal(positions, 2), normal(V, 2)),
        max_bytes=budget,
    )
    teacher = opdc.Projection(normal(positions, H - 4), normal(V, H - 4), max_bytes=budget)
    return leaves(student), teacher, torch.randint(0, V, (positions,))


def server(positions: int, k: int) -> opdc.TopK:
    ids = torch.rand(positions, V).topk(k).indices
    return opdc.TopK(ids, torch.full((positions, k), -4.0))


LOSSES = {
    "reverse_kl": lambda s, t, y: opdc.reverse_kl(s, t),
    "reverse_kl none": lambda s, t, y: opdc.reverse_kl(s, t, reduction="none").sum(),
    "jsd": lambda s, t, y: opdc.jsd(s, t),
    "skew_kl": lambda s, t, y: opdc.skew_kl(s, t, direction="reverse"),
    "forward_kl tail": lambda s, t, y: opdc.forward_kl(
        s, t, support="teacher", k=16, normalize="tail"
    ),
    "k1": lambda s, t, y: opdc.k1(s, t, y),
    "k1 discounted": lambda s, t, y: opdc.k1(s, t, y, discount=0.9),
    "tropd": lambda s, t, y: opdc.tropd(s, t, y),
    "eopd": lambda s, t, y: opdc.eopd(s, t, y),
    "reopold refinement": lambda s, t, y: opdc.reopold(s, t, y, phase="refinement"),
    "aopd": lambda s, t, y: opdc.aopd(s, t, y),
    "token_logprobs": lambda s, t, y: opdc.token_logprobs(s, y).sum(),
    "entropy": lambda s, t, y: opdc.entropy(s).sum(),
}


def of_gradients(student) -> int:
    """float32 sums of every gradient, and the gradients that are handed out."""
    return sum(4 * x.numel() + x.element_size() * x.numel() for x in parts(student).values())


@pytest.mark.parametrize("name", LOSSES)
def test_one_chunk_is_all_that_is_needed(name):
    """At four times the positions: as many buffers of the size of a chunk, and no larger ones."""
    chunks, peaks = [], []
    for positions in (N // 4, N):
        student, teacher, tokens = models(positions)
        sizes = allocations(lambda: LOSSES[name](student, teacher, tokens).backward())
        assert student.weight.grad is not None
        assert max(sizes) <= BUDGET
        assert peak(sizes) <= BUDGET + 2 * of_gradients(student) + SMALL
        chunks.append(sum(size >= 4 * V * CHUNK // 2 for size in sizes))
        peaks.append(peak(sizes))
    assert max(sizes) < N * V, "nothing of positions by vocabulary, not even of bytes"
    assert chunks[0] == chunks[1] <= 12, chunks
    assert peaks[1] - peaks[0] < SMALL, "numbers per position"


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_what_stays_between_forward_and_backward(reduction):
    """The gradients of a scalar; for "none" numbers per position, and never a chunk."""
    student, teacher, _ = models()
    kept = []
    sizes = allocations(lambda: kept.append(opdc.reverse_kl(student, teacher, reduction=reduction)))
    gradients = of_gradients(student) if reduction == "mean" else 0
    assert sum(sizes) <= gradients + SMALL // 4


def test_no_gradient_is_computed_for_a_frozen_head():
    wide = 128
    head = torch.randn(V, wide)
    hidden = torch.randn(N, wide, requires_grad=True)
    teacher = torch.randn(N, V)
    for frozen in (True, False):
        student = opdc.Projection(hidden, head.requires_grad_(not frozen), max_bytes=BUDGET)
        sizes = allocations(lambda s=student: opdc.reverse_kl(s, teacher).backward())
        assert (max(sizes) < 4 * V * wide) == frozen


def test_a_head_in_low_precision_is_not_copied_whole():
    """A bf16 head is widened to float32 block by block."""
    student, teacher, _ = models(dtype=torch.bfloat16)
    sizes = allocations(lambda: opdc.reverse_kl(student, teacher).backward())
    assert max(sizes) <= BUDGET
    assert peak(sizes) <= BUDGET + 2 * of_gradients(student) + 4 * V * 2 * H + SMALL


def test_the_default_budget_is_256_mebibytes_and_everything_fits():
    student, teacher, _ = models(64, None)
    sizes = allocations(lambda: opdc.reverse_kl(student, teacher).backward())
    assert peak(sizes) < 4 * 64 * V * 4 + 2 * of_gradients(student) + SMALL


def test_topk_stores_no_logits():
    student, _, _ = models()
    sizes = allocations(lambda: opdc.topk(student, 8))
    assert max(sizes) <= BUDGET
    assert peak(sizes) <= BUDGET + SMALL


# ----------------------------------------------------------------- the sparse head


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_sparse_head_allocates_nothing_of_the_vocabulary_per_position(reduction, sparse):
    k = 8
    student, _, _ = models(budget=None)
    student = student._replace(sparse_gradient=sparse)
    teacher = server(N, k)
    sizes = allocations(lambda: opdc.lsm(student, teacher, reduction=reduction).sum().backward())
    weights = 4 * V * H
    rows = 4 * N * k * H  # the touched rows, one for each slot
    assert max(sizes) <= max(weights, 2 * rows)
    assert peak(sizes) < 4 * N * V
    assert student.weight.grad.is_sparse == sparse


def test_the_sparse_gradient_never_has_the_size_of_the_head():
    """Few positions, so that the named rows are far fewer than the vocabulary."""
    teacher = server(16, 4)
    for sparse in (True, False):
        student, _, _ = models(16)
        student = student._replace(sparse_gradient=sparse, adapter=None)
        sizes = allocations(lambda s=student: opdc.lsm(s, teacher).backward())
        of_the_head = [size for size in sizes if size >= 4 * V * H // 4]
        assert bool(of_the_head) == (not sparse), of_the_head


def test_the_sparse_head_without_a_gradient():
    student, _, _ = models()
    teacher = server(N, 8)
    with torch.no_grad():
        sizes = allocations(lambda: opdc.lsm(student, teacher))
    assert peak(sizes) < SMALL


# ----------------------------------------------------------------- what the process takes


RESIDENT = """
import resource, torch, opdc
torch.set_num_threads(1)
n, v, h, budget = 2048, 16384, 8, 1 << 22

def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def losses(rows):
    student = opdc.Projection(hidden[:rows], head, max_bytes=budget)
    teacher = opdc.Projection(other[:rows], head, max_bytes=budget)
    server = opdc.TopK(ids[:rows], torch.full((rows, 8), -3.0))
    return opdc.reverse_kl(student, teacher) + opdc.lsm(student, server)

hidden, head = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
other = torch.randn(n, h)
ids = torch.randint(0, 1000, (n, 1)) + 1000 * torch.arange(8)
losses(8).backward()
before = resident()
losses(n).backward()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_resident_memory():
    """The logits of either model would be 134 MB. The C core's own memory counts here, too."""
    output = subprocess.run(
        [sys.executable, "-c", RESIDENT], check=True, capture_output=True
    ).stdout
    assert int(output) < 48 * 1024, f"{int(output)} KiB"
