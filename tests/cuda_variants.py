"""The variants of the programs for GPUs that each function asks NVRTC for, by the emulated GPU.

    python tests/cuda_variants.py "float32 reverse_kl" "bfloat16 jsd" ...

prints them as JSON. A process that asks twice compiles once, so this one must be fresh.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import opdc
from emulated import emulated_gpu

Function = Callable[[Tensor, Tensor, Tensor], object]
K = 8


def _on_top(support: str, student: Tensor, teacher: Tensor) -> Tensor:
    return opdc.reverse_kl(student, teacher, support=support, k=K, normalize="none")


FUNCTIONS: dict[str, Function] = {
    "reverse_kl": lambda s, t, y: opdc.reverse_kl(s, t),
    "reverse_kl_metrics": lambda s, t, y: opdc.reverse_kl(s, t, return_metrics=True),
    "reverse_kl_of_teacher_top_k": lambda s, t, y: _on_top("teacher", s, t),
    "reverse_kl_of_student_top_k": lambda s, t, y: _on_top("student", s, t),
    "forward_kl": lambda s, t, y: opdc.forward_kl(s, t),
    "jsd": lambda s, t, y: opdc.jsd(s, t),
    "skew_forward": lambda s, t, y: opdc.skew_kl(s, t),
    "skew_reverse": lambda s, t, y: opdc.skew_kl(s, t, direction="reverse"),
    "lsm": lambda s, t, y: opdc.lsm(s, t, k=K),
    "lsm_of_a_sparse_teacher": lambda s, t, y: opdc.lsm(s, opdc.topk(t, K)),
    "k1": lambda s, t, y: opdc.k1(s, t, y),
    "k2": lambda s, t, y: opdc.k2(s, t, y),
    "k3": lambda s, t, y: opdc.k3(s, t, y),
    "token_logprobs": lambda s, t, y: opdc.token_logprobs(s, y),
    "entropy": lambda s, t, y: opdc.entropy(s),
    "tropd": lambda s, t, y: opdc.tropd(s, t, y, k=K, region="expected"),
    "eopd": lambda s, t, y: opdc.eopd(s, t, y, k=K),
    "aopd": lambda s, t, y: opdc.aopd(s, t, y, k=K),
    "reopold_exploration": lambda s, t, y: opdc.reopold(s, t, y),
    "reopold_refinement": lambda s, t, y: opdc.reopold(s, t, y, phase="refinement"),
    "topk": lambda s, t, y: opdc.topk(s, K),
    "sample": lambda s, t, y: opdc.sample(s, top_p=0.9),
}


def variants(asked: list[str]) -> list[dict[str, object]]:
    """What is new with each of "float32 jsd" and the like."""
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder, emulated_gpu():
        compiled = Path(folder) / "compiled"
        compiled.touch()
        os.environ["OPDC_CACHE"] = folder
        os.environ["OPDC_EMULATION_COMPILED"] = str(compiled)
        for call in asked:
            dtype, name = call.split()
            student, teacher = torch.randn(2, 1, 2, 64).to(getattr(torch, dtype))
            before = len(compiled.read_text())
            FUNCTIONS[name](student.requires_grad_(), teacher, torch.zeros(1, 2, dtype=torch.long))
            for line in compiled.read_text()[before:].splitlines():
                variant = " ".join(re.findall(r"-DOPDC_FIXED_(\S+)", line))
                is_double = "-DOPDC_F64=1" in line
                found.append(
                    {
                        "call": call,
                        "program": line.split()[0],
                        "is_double": is_double,
                        "variant": variant,
                    }
                )
    return found


if __name__ == "__main__":
    print(json.dumps(variants(sys.argv[1:] or [f"float32 {name}" for name in FUNCTIONS])))
