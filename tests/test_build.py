"""What was built: one OpenMP runtime, only instructions the processor has, IEEE arithmetic."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

import opdc
from opdc import _C

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(opdc.__file__).parent
LEVELS = ["generic", "avx2", "avx512", "neon"]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc and ELF files")


def runnable_levels() -> list[str]:
    """The levels that this processor has, from the kernel's list rather than from opdc."""
    needed = {
        "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"},
        "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        "neon": {"asimd"},
    }
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = set(re.findall(r"\w+", "".join(re.findall(r"(?m)^(?:flags|Features)\s*:.*", cpuinfo))))
    return ["generic", *(level for level, wanted in needed.items() if wanted <= flags)]


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def output_of(script: str, **environment: str) -> str:
    run = run_python(script, **environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def tool_output(tool: str, *arguments: str | Path) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


# Loss and gradient of one method of each kind, at sizes that leave a rest in every vector width.
HASH_OF_LOSSES = """
import hashlib
import torch
import opdc

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(20)
digest = hashlib.sha256()

def add(tensor):
    digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for vocabulary in (1, 37, 1000, 5003):
        student, teacher = (
            (4 * torch.randn(5, vocabulary, generator=generator)).to(dtype) for _ in range(2)
        )
        student.requires_grad_()
        tokens = torch.randint(vocabulary, (5,), generator=generator)
        for loss in (
            opdc.reverse_kl(student, teacher, temperature=0.7),
            opdc.forward_kl(student, teacher),
            opdc.jsd(student, teacher, beta=0.3),
            opdc.skew_kl(student, teacher, alpha=0.1),
            opdc.k1(student, teacher, tokens),
            opdc.k3(student, teacher, tokens),
            opdc.entropy(student).mean(),
        ):
            add(loss)
            add(torch.autograd.grad(loss, student)[0])
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def default_hash() -> str:
    return output_of(HASH_OF_LOSSES)


@on_linux
@pytest.mark.parametrize("level", LEVELS)
def test_hazard_27_and_29_every_instruction_set_gives_the_same_bits(
    level: str, default_hash: str
) -> None:
    if level not in runnable_levels():
        pytest.skip(f"this processor has no {level}")
    assert output_of(HASH_OF_LOSSES, OPDC_ISA=level) == default_hash


@on_linux
@pytest.mark.parametrize("level", [*LEVELS, "sse9"])
def test_hazard_27_an_instruction_set_that_is_not_there_is_a_clear_error(level: str) -> None:
    available = runnable_levels()
    if level in available:
        pytest.skip(f"this processor has {level}")
    run = run_python(HASH_OF_LOSSES, OPDC_ISA=level)
    message = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1
    assert message.startswith("ImportError: ")
    assert all(word in message for word in ["OPDC_ISA", level, *available])


def test_hazard_27_only_the_dispatched_objects_hold_wide_instructions() -> None:
    objects = sorted(wheel_build_folder().glob("CMakeFiles/**/*.o"))
    if not any("avx2" in str(path) for path in objects):
        pytest.skip("no objects for x86 in the build folder")
    for path in objects:
        instructions = tool_output("objdump", "--disassemble", "--no-show-raw-insn", path)
        registers = set(re.findall(r"%([yz]mm)\d", instructions))
        if "avx512" in str(path):
            assert "zmm" in registers, path
        elif "avx2" in str(path):
            assert registers == {"ymm"}, path
        else:
            assert not registers, path


@on_linux
@pytest.mark.parametrize(
    "imports",
    [
        "import torch, opdc",
        "import opdc, torch",
        # The module alone, so that the loader meets its OpenMP before torch's.
        f"""
import importlib.util
spec = importlib.util.spec_from_file_location("opdc._C", {_C.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
import opdc, torch""",
    ],
    ids=["torch_first", "opdc_first", "module_first"],
)
def test_hazard_26_one_openmp_runtime(imports: str) -> None:
    mapped = output_of(
        imports
        + """
torch.set_num_threads(2)
torch.ones(1_000_000).exp_()
opdc.reverse_kl(torch.randn(8, 4096), torch.randn(8, 4096))
print(open("/proc/self/maps").read())""",
        OMP_NUM_THREADS="2",
    )
    runtimes = set(re.findall(r"/\S*lib(?:gomp|omp|iomp5)\b\S*", mapped))
    assert len(runtimes) == 1, runtimes


def test_hazard_30_floating_point_mode_is_unchanged() -> None:
    # fegetenv writes MXCSR 28 bytes into its record on x86-64, FPCR first on Arm; the low six bits
    # of MXCSR are the sticky exception flags.
    output_of("""
import ctypes, platform, sys
import torch

def mode():
    environment = (ctypes.c_uint32 * 64)()
    if sys.platform != "linux":
        return None
    ctypes.CDLL("libm.so.6").fegetenv(environment)
    return {"x86_64": environment[7] & ~0x3F, "aarch64": environment[0]}.get(platform.machine())

before = mode()
import opdc
assert mode() == before, "import"
student = torch.randn(8, 4096, requires_grad=True)
opdc.jsd(student, torch.randn(8, 4096)).backward()
assert mode() == before, "call"
denormal = 5e-324
assert denormal * 1.0 > 0
assert (torch.full((64,), 1e-45) * torch.ones(64) > 0).all()
""")


@on_linux
def test_module_exports_its_init_function_only() -> None:
    symbols = tool_output("nm", "--dynamic", "--defined-only", _C.__file__)
    assert {line.split()[-1] for line in symbols.splitlines()} == {"PyInit__C"}


def test_one_version() -> None:
    assert opdc.__version__ == metadata.version("opdc")
    assert f'version = "{opdc.__version__}"' in (ROOT / "pyproject.toml").read_text().splitlines()


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="free-threaded Python has no abi3"
)
def test_one_wheel_for_every_python() -> None:
    assert wheel_tag().startswith("cp311-abi3-")


def test_the_installed_package_is_this_source() -> None:
    for source in sorted((ROOT / "python" / "opdc").rglob("*")):
        if source.is_file() and "__pycache__" not in source.parts:
            installed = PACKAGE / source.relative_to(ROOT / "python" / "opdc")
            assert installed.is_file(), f"{installed} is missing: pip install . again"
            assert installed.read_bytes() == source.read_bytes(), (
                f"{installed} is old: pip install . again"
            )


def wheel_tag() -> str:
    wheel = metadata.distribution("opdc").read_text("WHEEL")
    assert wheel is not None
    return str(re.findall(r"(?m)^Tag: (.*)$", wheel)[0])


def wheel_build_folder() -> Path:
    folder = ROOT / "build" / wheel_tag()
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: opdc was not built in this folder")
    return folder
