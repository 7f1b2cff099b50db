"""``python -m opdc info``: what this installation runs on. Needs nothing but torch."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from opdc import _C


def version(distribution: str) -> str:
    """The version of an installed package."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown (not installed as a package)"


def usable_cpus() -> int:
    """How many CPUs this process may use, which is not always how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The name that the processor gives itself, else its architecture."""
    try:
        if platform.system() == "Linux":
            found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
            if found:
                return found[1].strip()
        elif platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.machine()


def gpus() -> list[str]:
    """The CUDA GPUs that this PyTorch sees."""
    found = []
    for index in range(torch.cuda.device_count() if torch.version.cuda else 0):
        try:
            gpu = torch.cuda.get_device_properties(index)
        except (AssertionError, RuntimeError) as error:  # there, but not to be used
            found.append(f"cuda:{index} cannot be used: {error}")
            continue
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        found.append(f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {memory}")
    return found


def cuda_driver() -> str | None:
    """The newest CUDA that the driver of the GPUs knows."""
    try:
        known: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # a PyTorch without CUDA, or no driver
        return None
    return f"{known // 1000}.{known % 1000 // 10}" if known else None


def cuda_compiler() -> str:
    """What NVRTC, which compiles the kernels for a GPU, says of itself; or why it cannot."""
    try:
        major, minor, lowest = _C.cuda_compiler()
    except RuntimeError as error:
        return str(error).removeprefix("CUDA: ")
    return f"NVRTC {major}.{minor} compiles for {lowest // 10}.{lowest % 10} and newer"


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process; empty where the system does not tell.

    There should be one. Two keep two pools of threads, which spin against each other.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"(/\S*/lib(?:gomp|i?omp)\S*\.so\S*)", maps)))


def collect(trainers: bool = False) -> dict[str, Any]:
    """Everything that ``info`` prints, in a form that JSON can hold."""
    facts = {
        "opdc": version("opdc"),
        "instruction_set": _C.instruction_set(),
        "instruction_sets": list(_C.instruction_sets()),
        "threads": torch.get_num_threads(),
        "openmp": openmp_runtimes(),
        "torch": torch.__version__,
        "dlpack": ".".join(map(str, _C.DLPACK_VERSION)),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "gpus": gpus(),
        "cuda_driver": cuda_driver(),
        "cuda_compiler": cuda_compiler(),
        "system": f"{platform.system()} {platform.machine()}",
        "transformers": version("transformers"),
        "trl": version("trl"),
    }
    if trainers:
        from opdc import trl

        facts["trainers"] = trl.support()
    return facts


def lines(facts: dict[str, Any]) -> list[str]:
    """What ``info`` prints for people."""
    others = [name for name in facts["instruction_sets"] if name != facts["instruction_set"]]
    gpus = facts["gpus"] or ["none that this PyTorch sees"]
    openmp = facts["openmp"] or ["unknown (this system does not list the libraries of a process)"]
    table = [
        ("opdc", facts["opdc"]),
        ("instruction set", f"{facts['instruction_set']} (also here: {', '.join(others) or '-'})"),
        ("CPU", f"{facts['cpu']}, {facts['cpus']} usable, {facts['system']}"),
        *zip(["GPU"] + [""] * len(gpus), gpus, strict=False),
        ("CUDA driver", facts["cuda_driver"] or "none"),
        ("CUDA compiler", facts["cuda_compiler"]),
        ("threads", facts["threads"]),
        *zip(["OpenMP runtime"] + [""] * len(openmp), openmp, strict=False),
        ("torch", facts["torch"]),
        ("DLPack", facts["dlpack"]),
        ("Python", facts["python"]),
        ("transformers", facts["transformers"]),
        ("TRL", facts["trl"]),
    ]
    trainers = facts.get("trainers", {})
    table += [
        (label, f"{name}: {paths}")
        for label, (name, paths) in zip(
            ["opdc.trl.attach"] + [""] * len(trainers), trainers.items(), strict=False
        )
    ]
    if len(openmp) > 1:
        table.append(
            ("warning", "more than one OpenMP runtime: their threads slow each other down")
        )
    return [f"{name:<16} {value}".rstrip() for name, value in table]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--trainers",
        action="store_true",
        help="say which of TRL's trainers a loss can be attached to (imports them: some seconds)",
    )


def run(arguments: argparse.Namespace) -> int:
    facts = collect(arguments.trainers)
    print(json.dumps(facts, indent=2) if arguments.json else "\n".join(lines(facts)))
    return 0
