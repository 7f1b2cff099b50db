"""The first call on a GPU, in a process of its own: once with nothing compiled, once from disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from .contenders import DTYPES, FUNCTIONS, make_inputs, work
from .device import CPU, Device, Gpu

FUNCTIONS_FIRST = ("reverse_kl", "topk", "sample")  # whose kernels are compiled apart
ROWS = 32
SCRIPT = "from opdc.bench.first import main; main()"


def first_calls(functions: Sequence[str]) -> list[str]:
    """Those of the functions to measure."""
    return [name for name in FUNCTIONS_FIRST if name in functions] or list(functions[:1])


def first_call(name: str, dtype: str, vocabulary: int, device: Device) -> dict[str, float]:
    """Seconds of the first call in this process, and of the one after it."""
    function = FUNCTIONS[name]
    inputs = make_inputs(ROWS, vocabulary, dtype=DTYPES[dtype], place=device.place)

    def seconds(call: Callable[..., Any]) -> float:
        contender = work(call, function, inputs)
        contender.prepare()
        device.synchronize()
        start = time.perf_counter()
        result = contender.run()  # noqa: F841, freed after the clock has stopped
        device.synchronize()
        return time.perf_counter() - start

    seconds(function.textbook)  # what PyTorch loads at its own first call is not on opdc's bill
    return {"first": seconds(function.opdc), "next": seconds(function.opdc)}


def in_fresh_processes(name: str, dtype: str, vocabulary: int, device: Device) -> dict[str, Any]:
    """Seconds of the first call with nothing compiled before, of the first one of another process,
    which finds on disk what that one has left, and of a later one."""
    command = [sys.executable, "-c", SCRIPT, device.place.type, name, dtype, str(vocabulary)]
    with tempfile.TemporaryDirectory() as cache:
        # The driver has a cache of its own, of what it compiles for a GPU newer than the compiler.
        places = {"OPDC_CACHE": cache, "CUDA_CACHE_PATH": cache}
        compiled, cached = (
            json.loads(
                subprocess.run(
                    command, env={**os.environ, **places}, stdout=subprocess.PIPE, check=True
                ).stdout
            )
            for _ in range(2)
        )
    return {
        "function": name,
        "dtype": dtype,
        "compiled": compiled["first"],
        "cached": cached["first"],
        "next": cached["next"],
    }


def main() -> None:
    place, name, dtype, vocabulary = sys.argv[1:]
    device = Gpu() if place == "cuda" else CPU
    print(json.dumps(first_call(name, dtype, int(vocabulary), device)))
