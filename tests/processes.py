"""Processes of gloo groups, for the tests of what is spread over processes.

They are started once and kept: four of them, in groups of one to four. A group is not the whole
world, and its first process not process 0, so that ranks in the group and in the world differ. A
function that hangs becomes a failure that shows where every process stood.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD_SIZE = 4
TIME_LIMIT = 60.0  # seconds for one function
_IMPORTED_BEFORE_THE_FORK = ["pytest", "torch.distributed.fsdp", "torch.distributed.tensor", "opdc"]


@dataclass
class Raised:
    """What a function raised in one of the processes."""

    type: type[BaseException]
    text: str
    traceback: str


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(group, *arguments)` in every process of a group of `size`; results by rank.

    The function is found by its name in its module, so it must stand at the top of one.
    """
    results = attempt(size, function, *arguments)
    for rank, result in enumerate(results):
        if isinstance(result, Raised):
            raise AssertionError(f"rank {rank} of {size}:\n{result.traceback}")
    return results


def attempt(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """As `on_ranks`, with a `Raised` in the place of the result of a process that raised."""
    return _pool().run(size, function, arguments)


# ----------------------------------------------------------------- the side of the tests


class _Pool:
    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="opdc-processes-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED_BEFORE_THE_FORK)
        self.connections, self.processes = [], []
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.folder.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        job = _packed((size, function, arguments))
        connections = self.connections[WORLD_SIZE - size :]
        for connection in connections:
            connection.send_bytes(job)
        deadline = time.monotonic() + TIME_LIMIT
        waiting = list(connections)
        while waiting:
            ready = multiprocessing.connection.wait(waiting, deadline - time.monotonic())
            waiting = [connection for connection in waiting if connection not in ready]
            if not ready:
                stacks = self.stacks()
                self.close()
                raise AssertionError(f"no answer within {TIME_LIMIT:g} s:\n{stacks}")
        try:
            return [_unpacked(connection.recv_bytes()) for connection in connections]
        except EOFError:
            codes = [process.exitcode for process in self.processes]
            self.close()
            raise AssertionError(f"a process died; exit codes {codes}") from None

    def stacks(self) -> str:
        """Where every process stands, by the handler of the signal."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return "\n".join(
            f"process {rank}\n{_stack_file(self.folder.name, rank).read_text()}"
            for rank in range(WORLD_SIZE)
        )

    def close(self) -> None:
        global _running
        _running = None
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()
        self.folder.cleanup()


_running: _Pool | None = None


def _pool() -> _Pool:
    global _running
    if _running is None:
        _running = _Pool()
        atexit.register(_running.close)
    return _running


def _packed(value: Any) -> bytes:
    """As torch saves it: pickle by itself takes a hundred times as long for small tensors."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(message: bytes) -> Any:
    return torch.load(io.BytesIO(message), weights_only=False)


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"stack.{rank}"


# ----------------------------------------------------------------- the side of the processes


def _serve(rank: int, folder: str, connection: multiprocessing.connection.Connection) -> None:
    faulthandler.register(signal.SIGUSR1, _stack_file(folder, rank).open("w"))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    groups = {
        size: dist.new_group(list(range(WORLD_SIZE - size, WORLD_SIZE)))
        for size in range(1, WORLD_SIZE + 1)
    }
    while True:
        try:
            job = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            # Not sys.exit: destructors of torch.distributed may wait for one another for ever.
            os._exit(0)
        try:
            size, function, arguments = _unpacked(job)
            answer = _packed(function(groups[size], *arguments))
        except BaseException as error:
            answer = _packed(Raised(type(error), str(error), traceback.format_exc()))
        connection.send_bytes(answer)
