"""How kernels get to a GPU, without one: NVRTC compiles them for three architectures; and a driver
and a compiler that fail when they are told to (tests/cuda/faulty.c) show that each failure is a
clear error, after which the next call works, and that what was compiled is kept on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emulated import library_path
from opdc import _C

ROOT = Path(__file__).resolve().parent.parent
OK, INVALID_VALUE, INVALID_TYPE, OUT_OF_MEMORY, FAILED = range(5)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA is for Linux here")


# ----------------------------------------------------------------- the real compiler

LOAD_THE_MODULE = f"""
import importlib.util, json, sys, warnings
spec = importlib.util.spec_from_file_location("opdc._C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def run_python(script: str, environment: dict[str, str], *arguments: str) -> str:
    """In a process of its own: a process keeps the compiler that it has opened."""
    run = subprocess.run(
        [sys.executable, "-c", LOAD_THE_MODULE + script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def compile_with_nvrtc(program: str, is_double: bool, variant: str, capability: int) -> bytes:
    """The start of the machine code."""
    packages = Path(torch.__file__).parent.parent
    wheels = [str(path) for path in sorted(packages.glob("nvidia/*/lib/libnvrtc.so.*"))]
    script = """
warnings.simplefilter("error")
try:
    print(module.cuda_compile(*json.loads(sys.argv[1]))[:200].hex())
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""
    arguments = json.dumps((program, is_double, variant, capability))
    output = run_python(script, {"OPDC_NVRTC": wheels[-1] if wheels else ""}, arguments)
    if "NVRTC, which compiles the kernels, is not found" in output:
        pytest.skip("no NVRTC here: pip install nvidia-cuda-nvrtc")
    assert set(output) <= set("0123456789abcdef"), output
    return bytes.fromhex(output)


# A call of each kind, and what it is compiled for; benchmarks/cuda_compile.py has all of them.
CALLS = {
    "float32 reverse_kl": 90,
    "bfloat16 jsd": 100,
    "float64 k1": 80,
    "float64 topk": 80,
    "float32 sample": 90,
}


@pytest.fixture(scope="module")
def asked_for() -> list[dict[str, object]]:
    library_path()
    script = ROOT / "tests" / "cuda_variants.py"
    done = subprocess.run([sys.executable, script, *CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("call", CALLS)
def test_what_a_call_asks_for_compiles_without_a_warning(
    asked_for: list[dict[str, object]], call: str
) -> None:
    (wanted,) = [one for one in asked_for if one["call"] == call]
    code = compile_with_nvrtc(
        str(wanted["program"]), bool(wanted["is_double"]), str(wanted["variant"]), CALLS[call]
    )
    assert code.startswith(b"\x7fELF")


def test_a_loss_in_slices_compiles_without_a_warning(asked_for: list[dict[str, object]]) -> None:
    whole = str(asked_for[0]["variant"])
    sliced = whole.replace("is_slice=0", "is_slice=1")
    assert sliced != whole
    assert compile_with_nvrtc("slice", False, sliced, 80).startswith(b"\x7fELF")


def test_a_gpu_that_is_newer_than_the_compiler_gets_assembly() -> None:
    assert b".version" in compile_with_nvrtc("rows", True, "", 999)


def test_a_gpu_that_is_older_than_the_compiler_is_a_clear_error() -> None:
    message = r"capability 1\.3, and NVRTC \d+\.\d+ compiles for \d+\.\d+ and newer"
    with pytest.raises(AssertionError, match=message):
        compile_with_nvrtc("rows", False, "", 13)


def test_a_program_that_is_none() -> None:
    with pytest.raises(ValueError, match='program is "nothing"'):
        _C.cuda_compile("nothing", False, "", 90)
    assert _C.cuda_programs() == ("loss", "rows", "sample", "slice")


# ----------------------------------------------------------------- a driver that fails


class Machine:
    """Runs tests/cuda/probe.c, in a process of its own each time."""

    def __init__(self, folder: Path, built: Path) -> None:
        self.probe, self.library = built / "probe", built / "libfaulty.so"
        self.folder, self.cache = folder, folder / "cache"
        self.list_of_calls = folder / "calls"
        self.list_of_calls.touch()

    def environment(self, **changes: str | None) -> dict[str, str]:
        """With None a variable is not set."""
        all_of_it = {
            "OPDC_CUDA_DRIVER": str(self.library),
            "OPDC_NVRTC": str(self.library),
            "OPDC_CACHE": str(self.cache),
            "CALLS": str(self.list_of_calls),
            **changes,
        }
        return {name: value for name, value in all_of_it.items() if value is not None}

    def start(self, *steps: str, **changes: str | None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.probe, *steps],
            env=self.environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *steps: str, **changes: str | None) -> list[tuple[int, str]]:
        """The status and the message of each step."""
        process = self.start(*steps, **changes)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        lines = output.removesuffix("\n").split("\n")
        return [(int(line[0]), line[2:]) for line in lines if line[:1].isdigit()]

    def calls(self, name: str) -> list[str]:
        lines = self.list_of_calls.read_text().splitlines()
        return [line for line in lines if line.startswith(f"{name} ")]

    def files(self) -> list[Path]:
        return sorted(self.cache.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "dlpack").mkdir()
    (folder / "dlpack" / "dlpack.h").symlink_to(
        Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h"
    )
    core = [ROOT / "csrc" / "cuda" / name for name in ("driver.c", "compiler.c", "cache.c")]
    commands = [
        [
            *("cc", "-std=c11", "-O1", "-I", ROOT / "csrc", "-I", folder, *core),
            *(ROOT / "tests" / "cuda" / "probe.c", "-o", folder / "probe", "-ldl", "-pthread"),
        ],
        [
            *("cc", "-std=gnu11", "-fPIC", "-shared", ROOT / "tests" / "cuda" / "faulty.c"),
            *("-o", folder / "libfaulty.so"),
        ],
    ]
    for command in commands:
        subprocess.run(command, check=True)
    return folder


@pytest.fixture
def machine(tmp_path: Path, built: Path) -> Machine:
    return Machine(tmp_path, built)


def assert_message(result: tuple[int, str], status: int, *words: str) -> None:
    assert result[0] == status, result
    assert all(word in result[1] for word in words), result


def test_a_launch_is_what_was_asked_for(machine: Machine) -> None:
    assert machine.run("launch") == [(OK, "")]
    assert machine.calls("cuLaunchKernel") == [
        "cuLaunchKernel 7x1x1 of 256x1x1, 100000 bytes, stream 0x10, argument 42 depth=1"
    ]
    # All the shared memory that the kernel's own leaves.
    assert machine.calls("cuFuncSetAttribute") == ["cuFuncSetAttribute 8=231448 depth=1"]


def test_what_was_opened_is_kept(machine: Machine) -> None:
    steps = ["launch", "launch", "second", "double", "other_device", "launch"]
    assert machine.run(*steps) == [(OK, "")] * 6
    assert len(machine.calls("cuLaunchKernel")) == 6
    assert len(machine.calls("cuDevicePrimaryCtxRetain")) == 2
    assert len(machine.calls("nvrtcCompileProgram")) == 2  # both arithmetics, for both devices
    assert len(machine.calls("cuModuleLoadData")) == 3
    assert len(machine.calls("cuModuleGetFunction")) == 4


def test_a_warning_of_the_compiler_is_no_message(machine: Machine) -> None:
    assert machine.run("launch", FAULTY="nvrtc") == [(OK, "")]


def test_a_variant_is_a_program_of_its_own(machine: Machine) -> None:
    results = machine.run("launch", "variant", "launch", "variant", "long")
    assert results[:4] == [(OK, "")] * 4
    assert_message(results[4], INVALID_VALUE, 'variant is "much=1 much=1', "too long")
    plain, variant = machine.calls("nvrtcCompileProgram")
    assert "OPDC_FIXED" not in plain
    assert variant.split()[-3:-1] == ["-DOPDC_FIXED_one=1", "-DOPDC_FIXED_two=-2"]
    assert len(machine.calls("cuModuleLoadData")) == len(machine.files()) == 2


def test_no_thread_blocks_are_no_launch(machine: Machine) -> None:
    results = machine.run("nothing", "many")
    assert results[0] == (OK, "")
    assert_message(results[1], INVALID_VALUE, "2147483648 thread blocks")
    assert not machine.calls("cuLaunchKernel")


def test_threads_at_once_compile_once(machine: Machine) -> None:
    assert machine.run("threads") == [(OK, "")]
    assert len(machine.calls("nvrtcCompileProgram")) == 1
    assert len(machine.calls("cuLaunchKernel")) == 8


CALLS_OF_A_LAUNCH = [
    "cuInit",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "nvrtcCompileProgram",
    "nvrtcGetCUBINSize",
    "cuCtxPushCurrent_v2",
    "cuModuleLoadData",
    "cuCtxPopCurrent_v2",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
]


@pytest.mark.parametrize("name", CALLS_OF_A_LAUNCH)
def test_whatever_fails_is_an_error_and_the_next_call_works(machine: Machine, name: str) -> None:
    failed, again = machine.run("launch", "launch", FAULTY=f"{name}=999*1")
    assert_message(failed, FAILED, "CUDA: ", "NVRTC_ERROR_OF" if "nvrtc" in name else "CUDA_ERROR")
    assert again == (OK, "")
    left = [line for line in machine.calls("cuCtxPopCurrent_v2") if not line.endswith("depth=0")]
    assert not left, "the context of the caller is current again"


@pytest.mark.parametrize("name", CALLS_OF_A_LAUNCH)
def test_out_of_memory_is_told_apart(machine: Machine, name: str) -> None:
    number = 1 if name.startswith("nvrtc") else 2
    failed, again = machine.run("launch", "launch", FAULTY=f"{name}={number}*1")
    assert_message(failed, OUT_OF_MEMORY, "OUT_OF_MEMORY")
    assert again == (OK, "")


@pytest.mark.parametrize("name", ["cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuLaunchKernel"])
def test_an_error_that_an_earlier_kernel_left_behind(machine: Machine, name: str) -> None:
    results = machine.run("launch", "launch", FAULTY=f"{name}=700")
    for result in results:
        assert_message(
            result,
            FAILED,
            "an earlier kernel of this process failed on cuda:0",
            "CUDA_ERROR_ILLEGAL_ADDRESS: as it was told",
            "CUDA_LAUNCH_BLOCKING=1",
        )


@pytest.mark.parametrize(
    ("number", "fix"),
    [(3, "use spawn"), (222, "update the driver"), (900, "before a graph is captured")],
)
def test_errors_that_have_a_known_cause(machine: Machine, number: int, fix: str) -> None:
    (result,) = machine.run("launch", FAULTY=f"cuModuleLoadData={number}")
    assert_message(result, FAILED, "could not load kernels on cuda:0", fix)


def test_an_old_gpu(machine: Machine) -> None:
    results = machine.run("launch", "open", CAPABILITY="61")
    for result in results:
        assert_message(result, INVALID_TYPE, "capability 6.1", "needs 7.0 or newer")


@pytest.mark.parametrize(
    ("capability", "target"),
    [("80", "sm_80"), ("86", "compute_80"), ("90", "sm_90"), ("121", "compute_100")],
)
def test_the_newest_architecture_that_the_compiler_and_the_gpu_know(
    machine: Machine, capability: str, target: str
) -> None:
    assert machine.run("launch", CAPABILITY=capability, ARCHITECTURES="75 80 90 100") == [(OK, "")]
    (call,) = machine.calls("nvrtcCompileProgram")
    assert f"--gpu-architecture={target} " in call


def test_a_gpu_that_the_compiler_has_forgotten(machine: Machine) -> None:
    (result,) = machine.run("launch", CAPABILITY="70")
    assert_message(result, FAILED, "capability 7.0", "NVRTC 13.5 compiles for 7.5 and newer")


def test_a_missing_driver(machine: Machine) -> None:
    results = machine.run("open", "launch", OPDC_CUDA_DRIVER="/nowhere/libcuda.so.1")
    for result in results:
        assert_message(result, FAILED, "the driver cannot be opened (/nowhere", "install")


def test_a_library_that_is_no_driver_and_no_compiler(machine: Machine) -> None:
    (result,) = machine.run("open", OPDC_CUDA_DRIVER="libm.so.6")
    assert_message(result, FAILED, "the driver libm.so.6 has no cuInit")
    (result,) = machine.run("launch", OPDC_NVRTC="libm.so.6")
    assert_message(result, FAILED, "this NVRTC has no nvrtcGetErrorString")


def test_a_missing_compiler(machine: Machine) -> None:
    results = machine.run("open", "launch", OPDC_NVRTC="/nowhere/libnvrtc.so")
    assert results[0] == (OK, "")
    assert_message(results[1], FAILED, 'OPDC_NVRTC is "/nowhere/libnvrtc.so"', "unset it")
    (result,) = machine.run("launch", OPDC_NVRTC=None)
    if result[0] == OK:
        pytest.skip("the loader finds an NVRTC of the system")
    assert_message(result, FAILED, "NVRTC", "pip install nvidia-cuda-nvrtc", "OPDC_NVRTC")


@pytest.mark.parametrize(
    ("loaded", "compiler"),
    [
        ("nvidia/cu13/lib/libcudart.so.13", "nvidia/cu13/lib/libnvrtc.so.13"),
        ("nvidia/cu14/lib/libcudart.so.14", "nvidia/cu14/lib/libnvrtc.so.14"),
        ("nvidia/cuda_runtime/lib/libcudart.so.12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
        ("torch/lib/libtorch_cpu.so", "nvidia/cu13/lib/libnvrtc.so.13"),
        ("torch/lib/libtorch_cuda.so driver/nvidia/libcuda.so", "nvidia/cu13/lib/libnvrtc.so.13"),
        ("toolkit/lib64/libcudart.so.12", "toolkit/lib64/libnvrtc.so.12"),
        ("anywhere/libnvrtc-1234.so.12", "anywhere/libnvrtc-1234.so.12"),
    ],
)
def test_the_compiler_is_found_beside_what_is_loaded(
    machine: Machine, loaded: str, compiler: str
) -> None:
    for name in (*loaded.split(), compiler):
        (machine.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(machine.library, machine.folder / name)
    loads = [f"load={machine.folder / name}" for name in loaded.split()]
    results = machine.run(*loads, "launch", OPDC_NVRTC=None)
    assert set(results) == {(OK, "")}
    assert len(machine.calls("nvrtcCompileProgram")) == 1


def test_a_program_that_does_not_compile(machine: Machine) -> None:
    results = machine.run("launch", "launch", FAULTY="nvrtcCompileProgram=6")
    assert len(results) == 2
    for result in results:
        assert_message(
            result, FAILED, "NVRTC 13.5 could not compile toy.cu (f32, sm_90)", "toy.cu(7): the"
        )
    assert not machine.cache.exists()


# ----------------------------------------------------------------- the cache


def test_another_process_compiles_nothing(machine: Machine) -> None:
    assert machine.run("launch", "double") == [(OK, "")] * 2
    assert machine.run("launch", "double", "second") == [(OK, "")] * 3
    assert len(machine.calls("nvrtcCompileProgram")) == 2
    assert [path.name[:14] for path in machine.files()] == ["toy-f32-sm_90-", "toy-f64-sm_90-"]
    assert {path.suffix for path in machine.files()} == {".cubin"}


def test_each_architecture_has_its_own(machine: Machine) -> None:
    for capability in ("80", "90", "120"):
        assert machine.run("launch", CAPABILITY=capability) == [(OK, "")]
    assert len(machine.calls("nvrtcCompileProgram")) == len(machine.files()) == 3


@pytest.mark.parametrize("damage", ["empty", "short", "one_byte", "longer", "folder"])
def test_a_damaged_file_is_compiled_again(machine: Machine, damage: str) -> None:
    machine.run("launch")
    (path,) = machine.files()
    whole = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "short": whole[:-9],
                "one_byte": whole[:6] + bytes([whole[6] ^ 1]) + whole[7:],
                "longer": whole + b"x",
            }[damage]
        )
    for compiled in (2, 3 if damage == "folder" else 2):
        assert machine.run("launch") == [(OK, "")]
        assert len(machine.calls("nvrtcCompileProgram")) == compiled
    assert machine.files() == [path], "nothing else is left there"
    assert damage == "folder" or path.read_bytes() == whole


def test_a_folder_that_cannot_be_written(machine: Machine) -> None:
    (machine.folder / "file").touch()
    (machine.folder / "folder").mkdir(mode=0o555)
    for place in ("file/cache", "folder/cache"):
        assert machine.run("launch", OPDC_CACHE=str(machine.folder / place)) == [(OK, "")]
    assert len(machine.calls("nvrtcCompileProgram")) == 2


def test_processes_at_once(machine: Machine) -> None:
    processes = [machine.start("launch") for _ in range(4)]
    for process in processes:
        assert process.communicate(timeout=60) == ("0 \n", "")
    assert len(machine.files()) == 1
    compiled = len(machine.calls("nvrtcCompileProgram"))
    assert machine.run("launch") == [(OK, "")]
    assert len(machine.calls("nvrtcCompileProgram")) == compiled


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"XDG_CACHE_HOME": "{}/xdg", "HOME": "{}/home"}, "xdg/opdc"),
        ({"XDG_CACHE_HOME": "not/absolute", "HOME": "{}/home"}, "home/.cache/opdc"),
        ({"OPDC_CACHE": "", "HOME": "{}/home"}, "home/.cache/opdc"),
        ({}, None),
    ],
)
def test_where_the_cache_is(machine: Machine, variables: dict[str, str], place: str | None) -> None:
    named = {name: value.format(machine.folder) for name, value in variables.items()}
    before = set(machine.folder.rglob("*"))
    assert machine.run("launch", **{"OPDC_CACHE": None, **named}) == [(OK, "")]
    made = [path for path in set(machine.folder.rglob("*")) - before if path.is_file()]
    assert [path.parent for path in made] == ([machine.folder / place] if place else [])


# ----------------------------------------------------------------- in Python


def test_the_compiler_says_what_it_is(machine: Machine) -> None:
    environment = machine.environment(ARCHITECTURES="70 80")
    assert run_python("print(module.cuda_compiler())", environment) == "(13, 5, 70)"


COMPILE = """
with warnings.catch_warnings(record=True) as caught:
    try:
        print(module.cuda_compile(module.cuda_programs()[0], False, "", 90)[:5])
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    for warning in caught:
        print(f"{warning.category.__name__}: {warning.message}")
"""


def test_errors_and_warnings_are_pythons(machine: Machine) -> None:
    for changes, output in [
        ({}, "b'code '"),
        ({"FAULTY": "nvrtc"}, "b'code '\nRuntimeWarning: toy.cu(7): the first line"),
        ({"FAULTY": "nvrtcCompileProgram=1"}, "MemoryError: CUDA: NVRTC 13.5 could not compile"),
        ({"OPDC_NVRTC": "/nowhere"}, 'RuntimeError: CUDA: OPDC_NVRTC is "/nowhere", which'),
    ]:
        assert run_python(COMPILE, machine.environment(**changes)).startswith(output)
