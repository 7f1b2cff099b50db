"""The emulated GPU of tests/cuda: builds its library, and makes opdc take the tensors of the
processor for its own."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opdc import _C, _ops

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"
EMULATION = ROOT / "tests" / "cuda"
PARTS = ("emulation", "races", "driver", "exchange")
FLAGS = (
    *("-std=c11", "-O1", "-g1", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    f"-I{ROOT / 'csrc'}",
)


def _commands(compiler: str, folder: Path) -> list[list[str]]:
    """How each object of the library is made; the last argument is the object."""
    commands = []
    for source in (EMULATION / f"{part}.c" for part in PARTS):
        includes = (f"-I{folder}", "-c", str(source))
        commands.append([compiler, *FLAGS, *includes, "-o", str(folder / f"{source.stem}.o")])
    for text in sorted(KERNELS.glob("*.cu")):
        for double in (0, 1):
            program = (
                *("-DOPDC_ON_DEVICE=1", f"-DOPDC_PROGRAM={text.stem}", f"-DOPDC_F64={double}"),
                *("-DOPDC_RACES=1", "-fsanitize=thread"),  # tests/cuda/races.c
                f"-DOPDC_ISA={text.stem}",  # no two programs define the same scalar functions
            )
            source = ("-include", str(EMULATION / "device.h"), "-x", "c", "-c", str(text))
            target = str(folder / f"{text.stem}_{double}.o")
            commands.append([compiler, *FLAGS, *program, f"-I{folder}", *source, "-o", target])
    return commands


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


@cache
def library_path() -> Path:
    """The library, built once for all processes of a run and kept for the next one."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or not compiler:
        pytest.skip("the emulated GPU needs Linux and a C compiler")
    digest = hashlib.sha256(repr((compiler, FLAGS, torch.__version__)).encode())
    texts = (*ROOT.glob("csrc/**/*.h"), *KERNELS.glob("*.cu"), *EMULATION.glob("*.[ch]"))
    for path in sorted(texts):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"opdc-emulation-{os.getuid()}-{digest.hexdigest()[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / "libopdc_emulation.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        (folder / "dlpack").mkdir(exist_ok=True)
        shutil.copy(Path(torch.__file__).parent / "include/ATen/dlpack.h", folder / "dlpack")
        commands = _commands(compiler, folder)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_run, commands))
        objects = [command[-1] for command in commands]
        unfinished = folder / "unfinished.so"
        _run([compiler, "-shared", *objects, "-o", str(unfinished), "-lm", "-pthread"])
        unfinished.rename(library)
    return library


@cache
def library() -> ctypes.CDLL:
    """The library, in place of the driver and the compiler of this process from now on."""
    path = library_path()
    os.environ["OPDC_CUDA_DRIVER"] = os.environ["OPDC_NVRTC"] = str(path)
    os.environ["OPDC_CACHE"] = str(path.parent / "cache")
    loaded = ctypes.CDLL(str(path))
    loaded.emulation_exchange_api.restype = ctypes.c_void_p
    loaded.emulation_exchange_api.argtypes = (ctypes.c_void_p, ctypes.c_int)
    loaded.emulation_calls.argtypes = (ctypes.c_char_p,)
    loaded.emulation_settings_at.argtypes = (ctypes.c_void_p,)
    loaded.emulation_problem.restype = ctypes.c_char_p
    return loaded


_address_of = ctypes.pythonapi.PyCapsule_GetPointer
_address_of.restype = ctypes.c_void_p
_address_of.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype = ctypes.py_object
_capsule_of.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_API = b"dlpack_exchange_api"  # here, for a capsule does not copy its name
_REAL = torch.Tensor.__dlpack_c_exchange_api__


def _problem() -> str:
    """What the emulation found, with the lines of the code."""
    text, _, places = library().emulation_problem().decode().partition("; see ")
    if places and shutil.which("addr2line"):
        text += "\n" + subprocess.run(places.split(), capture_output=True, text=True).stdout
    return text


@contextmanager
def emulated_gpu(
    device: int = 0, *, order: str = "ascending", races: bool = False
) -> Iterator[ctypes.CDLL]:
    """In here opdc takes the tensors of the processor for tensors on an emulated GPU, of which the
    second one is small. For the rest see tests/cuda/emulation.h."""
    changed = library().emulation_exchange_api(_address_of(_REAL, _API), device)
    settings = {"OPDC_EMULATION_ORDER": order, "OPDC_EMULATION_RACES": str(int(races))}
    outside = torch.Tensor.__dlpack_c_exchange_api__
    torch.Tensor.__dlpack_c_exchange_api__ = _capsule_of(changed, _API, None)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            patch.setattr(_ops, "is_on_gpu", lambda _: True)
            _around_the_core(patch, _told_of_settings)
            yield library()
    except RuntimeError as error:
        if "CUDA_ERROR_LAUNCH_FAILED" in str(error):
            raise AssertionError(_problem()) from error
        raise
    finally:
        torch.Tensor.__dlpack_c_exchange_api__ = outside


# ----------------------------------------------------------------- for whole test runs


@contextmanager
def device(where: str) -> Iterator[None]:
    """In here the C core works on the tensors of the processor "cpu", "emulated" or on "cuda"."""
    if where == "emulated":
        with emulated_gpu():
            yield
    elif where == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        with pytest.MonkeyPatch.context() as patch:
            _around_the_core(patch, _on_gpu)
            yield
    else:
        yield


def _around_the_core(patch: pytest.MonkeyPatch, wrap: Callable[..., Any]) -> None:
    """Every function of the C core, wherever it is called from, as `wrap` makes it."""
    wrapped: dict[Any, Any] = {}
    for module in (_C, _ops):
        for name, function in list(vars(module).items()):
            if callable(function) and getattr(function, "__module__", "") == _C.__name__:
                wrapped.setdefault(function, wrap(function))
                patch.setattr(module, name, wrapped[function])


def _settings_of(arguments: Sequence[Any]) -> Tensor | None:
    """Which of the arguments is the settings, that stay on the CPU; as `core.py` has them."""
    place = 2 + len(_ops.TENSORS)  # after the method and all other tensors
    has_settings = len(arguments) > place and isinstance(arguments[0], str)
    return arguments[place] if has_settings else None


def _is_of_processors(function: Callable[..., Any]) -> bool:
    """The sparse head, for which operations of torch stand on a GPU."""
    return function.__name__.startswith("gathered")


def _told_of_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        settings = _settings_of(arguments)
        library().emulation_settings_at(settings.data_ptr() if settings is not None else None)
        with pytest.MonkeyPatch.context() as patch:
            if _is_of_processors(function):
                patch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", _REAL)
            return function(*arguments)

    return call


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """With copies of the tensors on a GPU; what it writes is copied back."""
    if _is_of_processors(function):
        return function

    def call(*arguments: Any) -> Any:
        settings = _settings_of(arguments)
        copies: dict[Any, tuple[Tensor, Tensor]] = {}

        def copied(argument: Any) -> Any:
            if not isinstance(argument, Tensor) or argument is settings:
                return argument
            key = (argument.data_ptr(), argument.shape, argument.stride(), argument.dtype)
            if key not in copies:
                copies[key] = argument, argument.detach().cuda()
            return copies[key][1]

        result = function(*map(copied, arguments))
        for here, there in copies.values():
            back = there.cpu()
            if not torch.equal(_bytes_of(back), _bytes_of(here)):
                here.detach().copy_(back)
        return result

    return call
