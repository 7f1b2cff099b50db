"""Where it is measured: on the CPU or on a GPU, each with its own clock and its own memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import info
from .contenders import Contender

AHEAD, TIMES = 2**28, 8  # bytes that a GPU writes before the clock starts, and how often


class Device:
    """The CPU: it is done with a call when the call returns, and its memory is the system's."""

    place = torch.device("cpu")
    rivals: tuple[str, ...] = ("eager", "compile")  # what runs here beside opdc

    def described(self) -> dict[str, Any]:
        """What a result says of it; a processor is told by what else it says of the machine."""
        return {"type": "cpu"}

    def available_memory(self) -> float:
        return available_memory()

    def release(self) -> None:
        """What was freed but is kept by the allocator goes back: else a call that finds it there
        would seem to need no memory."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""

    def timed(self, contender: Contender) -> tuple[float, Any]:
        """Seconds of one call, and its result, which is thus freed after the clock has stopped."""
        contender.prepare()
        start = time.perf_counter()
        result = contender.run()
        return time.perf_counter() - start, result

    def extra_memory(self, contender: Contender) -> int | None:
        """Bytes that a call needs beyond what is there before it; None where nothing tells."""
        contender.prepare()
        self.release()
        try:
            before = _status("VmRSS")
            try:
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to VmRSS
            except OSError:
                return _sampled_peak(contender.run) - before
            result = contender.run()  # noqa: F841, kept: the gradient counts
            return _status("VmHWM") - before
        except OSError:
            return None


class Gpu(Device):
    """A CUDA device, through PyTorch: it works on while the call has long returned."""

    rivals = ("eager", "compile", "liger", "flashinfer")

    def __init__(self) -> None:
        self.place = torch.device("cuda", torch.cuda.current_device())
        self.ahead = torch.empty(AHEAD, dtype=torch.uint8, device=self.place)

    def described(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.place)
        return {
            "type": "cuda",
            "name": torch.cuda.get_device_name(self.place),
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "driver": info.cuda_driver(),
            "cuda": torch.version.cuda,
        }

    def available_memory(self) -> float:
        free: int = torch.cuda.mem_get_info(self.place)[0]
        kept: int = torch.cuda.memory_reserved(self.place)
        return free + kept - torch.cuda.memory_allocated(self.place)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.place)

    def timed(self, contender: Contender) -> tuple[float, Any]:
        """Seconds between two events around the call.

        Before the first one something long is written: it takes the inputs out of the L2, and
        while it lasts the host goes ahead, so that the GPU does not wait for it in the call. What
        a call takes of the host is measured apart, where there is next to nothing to compute.
        """
        contender.prepare()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(TIMES):
            self.ahead.zero_()
        start.record()
        result = contender.run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3, result

    def extra_memory(self, contender: Contender) -> int:
        """Of PyTorch's allocator, which all contenders have their memory from."""
        contender.prepare()
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.place)
        before: int = torch.cuda.memory_allocated(self.place)
        result = contender.run()  # noqa: F841, kept: the gradient counts
        return torch.cuda.max_memory_allocated(self.place) - before


CPU = Device()


def why_no_gpu() -> str | None:
    """What is missing for a GPU to be measured; None where nothing is."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU and driver for it"


# ---- the memory of the system ----------------------------------------------------------------


def available_memory() -> float:
    """Bytes that can still be allocated; infinite where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return float("inf")
    fields = dict(line.split(":") for line in text.splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _sampled_peak(run: Callable[[], Any]) -> int:
    """The peak of the resident memory during a call, by looking as often as possible."""
    peak, done = _status("VmRSS"), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _status("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak
