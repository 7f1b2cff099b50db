"""How long NVRTC takes for what each function asks it for, and how large the machine code is.

    python benchmarks/cuda_compile.py [--arithmetic float32 float64] [--capability 80 90 100]
                                      [--function NAME ...]

Needs no GPU: what is asked for is recorded on the emulated one of the tests. Seconds are those of
one processor. Exits with 1 if the compiler fails, or has something to say.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import cuda_variants
from cuda_variants import FUNCTIONS
from opdc import _C


def asked_for(calls: list[str]) -> list[dict]:
    """In another process, which keeps the emulated compiler."""
    return json.loads(subprocess.check_output([sys.executable, cuda_variants.__file__, *calls]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arithmetic", nargs="+", default=["float32", "float64"])
    parser.add_argument("--capability", nargs="+", type=int, default=[80, 90, 100])
    parser.add_argument("--function", nargs="+", default=list(FUNCTIONS))
    options = parser.parse_args()
    warnings.simplefilter("error")
    calls = [f"{type_} {name}" for type_ in options.arithmetic for name in options.function]
    failures, total = 0, 0.0
    print("| call | program | sm | s | KiB |\n|---|---|---|---|---|")
    for one in asked_for(calls):
        for capability in options.capability:
            begin = time.process_time()
            try:
                code = _C.cuda_compile(one["program"], one["is_double"], one["variant"], capability)
                size = f"{len(code) / 1024:.0f}"
            except (RuntimeError, RuntimeWarning) as error:
                failures += 1
                size = str(error)
            seconds = time.process_time() - begin
            total += seconds
            row = (one["call"], one["program"], str(capability), f"{seconds:.1f}", size)
            print(f"| {' | '.join(row)} |", flush=True)
    print(f"\n{total:.0f} s in all, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
