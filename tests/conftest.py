"""Settings of the whole suite: one thread unless a test is about threads, and property tests that
draw the same examples in every run."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

import emulated

# Inductor keys its cache by the graph, not by the shapes that a fake kernel gives: a graph compiled
# with an older opdc would be run with the outputs of this one. So every run has a cache of its own.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="opdc-inductor-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

settings.register_profile(
    "reproducible",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("reproducible")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "emulated", "cuda"),
        default="cpu",
        help="where the C core works on the tensors of all tests: an emulated GPU (tests/cuda), or "
        "a real one, to and from which they are copied for each call",
    )


def pytest_configure(config):
    # A process keeps the compiler of kernels that it finds first. Most tests use that of the
    # emulated GPU; those of the real one have processes of their own.
    if config.getoption("--device") != "cuda":
        os.environ["OPDC_NVRTC"] = "none-in-the-processes-of-tests"
    config.addinivalue_line("markers", "cpu_only: of what the host sees in tensors on a CPU only")


def pytest_collection_modifyitems(config, items):
    """On a GPU the tests of what is refused for its values are left out, and counted."""
    if config.getoption("--device") == "cpu":
        return
    left_out = [item for item in items if item.get_closest_marker("cpu_only")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def device(request):
    where = request.config.getoption("--device")
    with emulated.device(where):
        yield where


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded():
    """The global generator starts alike in every test."""
    torch.manual_seed(20260)


HAZARDS = {
    1: "32-bit indices",
    2: "0 · (−inf) with a masked vocabulary",
    3: "forward sanitised, backward not",
    4: "undefined rows swallowed, or spreading",
    5: "ignored rows still read",
    6: "means over nothing",
    7: "wrong normaliser under accumulation",
    8: "ids out of range",
    9: "large common offset of the logits",
    10: "cancellation where student ≈ teacher",
    11: "gradient of the true class rounded early",
    12: "confident rows, underflow",
    13: "ties in top-K, order of NaN",
    14: "boundaries of top-p",
    15: "u = 0 or u → 1 draws an impossible id",
    16: "vocabularies of different sizes",
    17: "strides, alignment, non-contiguous upstream",
    18: "non-uniform upstream",
    19: "in-place gradient behind autograd's back",
    20: "second derivatives that are silently 0",
    21: "read-only tensors",
    22: "mixed dtypes and autocast",
    23: "leaks and double frees of exports",
    24: "buffers that vanish while a kernel runs",
    25: "hanging after fork",
    26: "two OpenMP runtimes",
    27: "instructions that the processor lacks",
    28: "sums that depend on the number of threads",
    29: "bits that depend on the instruction set",
    30: "import that changes the floating-point mode",
    31: "failing allocations",
    32: "empty and extreme sizes",
}


def pytest_terminal_summary(terminalreporter):
    """What breaks kernels like these, and how many tests show that it does not break this one."""
    counts = dict.fromkeys(HAZARDS, 0)
    failed = set()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            for number in re.findall(r"(?:hazard_|and_)(\d\d)", report.nodeid.partition("[")[0]):
                counts[int(number)] += outcome == "passed"
                failed |= {int(number)} if outcome == "failed" else set()
    if not any(counts.values()):
        return
    terminalreporter.section("hazards")
    for number, name in HAZARDS.items():
        mark = "FAILED" if number in failed else f"{counts[number]:5d} passed"
        terminalreporter.write_line(f"{number:3d}  {name:50s} {mark}")
