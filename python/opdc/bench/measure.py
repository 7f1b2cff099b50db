"""How it is measured: what, in which order, and how often."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import info
from . import first, generation, hidden
from .contenders import (
    DTYPES,
    FUNCTIONS,
    PACKAGES,
    Contender,
    Function,
    Inputs,
    error,
    exact,
    make_inputs,
    rivals,
    work,
)
from .device import CPU, Device, available_memory

SLOW = 4.0  # seconds; a call as long as this is not worth repeating, its noise averages out in it
PATIENCE = 4.0  # shares of a case that a single call of eager or compile may take, as far as known
GENERATE_CASES = 10  # shares that generate has of the budget
HIDDEN_CASES = 25  # shares that each loss from hidden states has of it
REHEARSALS = 4  # untimed calls before a timed one, at most
REHEARSAL = 1.0  # seconds that they may take together, but one there always is
OVERHEAD_SHAPE = (1, 128)  # so few logits that only the cost of the call is left
OVERHEAD_CALLS = 1000
HIDDEN_SLOW = 20.0  # seconds; of losses from hidden states a call as long as this is not repeated
DOUBLES = 12  # matrices of float64 that a reference of all rows needs at once, at the most
ORDER_ROWS = 64  # of the top-K of rows in adverse orders
ORDER_SECONDS = 2.0  # for each of them


def machine() -> dict[str, Any]:
    """What runs here, to be kept with the results: libraries by name, not by place."""
    facts = info.collect()
    facts["openmp"] = ["/".join(Path(place).parts[-3:]) for place in facts["openmp"]]
    return facts


@dataclass
class Plan:
    """What to measure. Sizes of the loops are in the order in which they run: the first cases
    are the ones that matter most, because the budget may end before the last."""

    functions: Sequence[str]
    dtypes: Sequence[str]
    rows: Sequence[int]
    threads: Sequence[int]
    contenders: Sequence[str]
    vocabulary: int
    repeats: int
    budget: float
    generate: bool = False  # end to end, too
    hidden_sizes: Sequence[int] = ()  # of hidden states: the losses from these, too
    seed: int = 0
    device: Device = CPU
    notes: Sequence[str] = ()  # on what could not be planned as it was wanted

    @property
    def on_gpu(self) -> bool:
        return self.device is not CPU

    def cases(self) -> list[tuple[int, int, str, str]]:
        threads = sorted(self.threads, reverse=True)
        return list(itertools.product(sorted(self.rows), threads, self.dtypes, self.functions))

    def steps(self) -> int:
        """How much `Benchmark.run` reports: the cases, then what is measured once for a dtype."""
        once = len(self.dtypes) * (len(self.functions) + ("topk" in self.functions))
        firsts = len(self.first_calls())
        return len(self.cases()) + once + firsts + self.generate + len(self.hidden_cases())

    def first_calls(self) -> list[tuple[str, str]]:
        """Kernels for a GPU are compiled at their first call, for both dtypes at once."""
        names = first.first_calls(self.functions) if self.on_gpu else []
        return list(itertools.product(self.dtypes[:1], names))

    def hidden_cases(self) -> list[tuple[int, str]]:
        return list(itertools.product(self.hidden_sizes, hidden.LOSSES))

    def sections(self) -> list[str]:
        """The parts of a README that the result has a table for."""
        benchmark = "benchmark-cuda" if self.on_gpu else "benchmark"
        parts = {benchmark: self.functions or self.generate, "hidden": self.hidden_sizes}
        return [name for name, measured in parts.items() if measured]

    def bytes(self) -> int:
        """What the inputs need: student, teacher and scratch in float32 and in each other dtype,
        or on a GPU in one dtype after the other; or the hidden states and heads of both, the
        student's gradients, and its logits."""
        sizes = [DTYPES[name].itemsize for name in self.dtypes]
        element = max(sizes) if self.on_gpu else 4 + sum(size for size in sizes if size != 4)
        logits = max(self.rows) * self.vocabulary
        of_losses = 3 * element * logits if self.functions else 0
        states = max(self.hidden_sizes, default=0) * (max(self.rows) + self.vocabulary)
        return max(of_losses, 4 * (4 * states + logits) if states else 0)


# ---- time ------------------------------------------------------------------------------------


def timed_with_memory(contender: Contender) -> tuple[float, Any, int | None]:
    """Seconds, result and extra memory of one and the same call."""
    calls: list[tuple[float, Any]] = []
    peak = CPU.extra_memory(Contender(lambda: calls.append(CPU.timed(contender))))
    return *calls[0], peak


def interleave(
    contenders: dict[str, Contender],
    repeats: int,
    share: float,
    inspect: Callable[[str, Any], None],
    device: Device = CPU,
) -> dict[str, list[float]]:
    """Seconds of each call. Contenders take turns, so that all meet the same noise.

    Each contender may take ``share`` seconds: slow ones are repeated less, evenly over the rounds.
    Each timed call follows untimed ones, as in a loop that does nothing else: memory that the
    contender before has freed may be back with the system, or with the host of a virtual machine,
    and to get it again would be on the next one's bill. ``inspect`` sees the first result of each.
    """
    samples: dict[str, list[float]] = {}
    rehearsals: dict[str, int] = {}
    turns: dict[int, list[str]] = {}
    for name, contender in contenders.items():
        first, result = device.timed(contender)
        inspect(name, result)
        del result
        samples[name] = [first] if first > SLOW else []  # else the first was only a warm-up
        rehearsals[name] = max(1, min(REHEARSALS, int(REHEARSAL / first)))
        affordable = int(share / first / (rehearsals[name] + 1))
        count = 0 if first > SLOW else min(max(affordable, 2), repeats)
        for turn in range(count):
            turns.setdefault(turn * repeats // count, []).append(name)
    for turn in sorted(turns):
        for name in turns[turn]:
            for _ in range(rehearsals[name]):
                device.timed(contenders[name])
            samples[name].append(device.timed(contenders[name])[0])
    return samples


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "repeats": len(values),
    }


def microseconds(samples: list[float], rows: int) -> dict[str, float]:
    return spread([1e6 * sample / rows for sample in samples])


def call_overhead(
    function: Function, dtype: torch.dtype, textbook: bool, device: Device = CPU
) -> float:
    """Microseconds of loss and gradient where there is next to nothing to compute; on a GPU, which
    works on by itself, those until the call returns."""
    inputs = make_inputs(*OVERHEAD_SHAPE, dtype=dtype, place=device.place)
    contender = work(function.textbook if textbook else function.opdc, function, inputs)
    contender.prepare()
    samples = []
    for _ in range(OVERHEAD_CALLS):
        start = time.perf_counter_ns()
        contender.run()
        samples.append(time.perf_counter_ns() - start)
    device.synchronize()
    return statistics.median(samples) / 1000


# ---- the benchmark ---------------------------------------------------------------------------


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda logits: logits,
    "ascending": lambda logits: logits.sort(-1).values,
    "descending": lambda logits: logits.sort(-1, descending=True).values,
    "constant": lambda logits: logits[:, :1].expand_as(logits).clone(),
}


class Benchmark:
    """Runs a plan. ``result`` is complete after every case, whenever it is stopped."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.started = time.monotonic()
        self.device = plan.device
        self.compile_error: str | None = None
        self.result: dict[str, Any] = {
            "machine": machine(),
            "device": plan.device.described(),
            "notes": list(plan.notes),
            "vocabulary": plan.vocabulary,
            "complete": False,
            "cases": [],
            "orders": [],
            "overhead_shape": OVERHEAD_SHAPE,
            "overhead": [],
            "generate": None,
            "hidden": None,
        }
        if plan.on_gpu:
            self.result["packages"] = {name: info.version(name) for name in PACKAGES.values()}
            self.result["first_calls"] = []
        self.inputs: dict[str, Inputs] = {}
        self.wide: Inputs | None = None
        if plan.functions and not plan.on_gpu:
            # One float32 matrix onto another: the copy that a stream is half of.
            self.wide = wide = make_inputs(max(plan.rows), plan.vocabulary, plan.seed)
            self.inputs = {
                name: wide if name == "float32" else wide.to(DTYPES[name]) for name in plan.dtypes
            }
        self.memory: dict[tuple[str, str, str], float] = {}  # bytes a row, where measured
        self.seconds: dict[tuple[str, str, str], float] = {}  # a row, where measured
        self.laws: dict[tuple[Callable[..., Tensor], str], Tensor] = {}  # of samplers

    def inputs_of(self, dtype: str) -> Inputs:
        """On a GPU, which has less memory and makes them fast, those of one dtype at a time."""
        if dtype not in self.inputs:
            self.inputs.clear()
            self.device.release()
            self.inputs[dtype] = make_inputs(
                max(self.plan.rows),
                self.plan.vocabulary,
                self.plan.seed,
                DTYPES[dtype],
                self.device.place,
            )
        return self.inputs[dtype]

    def run(self) -> Iterator[str]:
        """Measures case by case, yielding what comes next."""
        threads = torch.get_num_threads()
        gc.freeze()  # what is there before is not looked through whenever the memory is measured
        try:
            for rows, count, dtype, function in self.plan.cases():
                where = "GPU" if self.plan.on_gpu else f"threads: {count}"
                yield f"{FUNCTIONS[function].title}, {dtype}, {rows} rows, {where}"
                torch.set_num_threads(count)
                self.result["cases"].append(self.case(function, dtype, rows, count))
            torch.set_num_threads(max(self.plan.threads))
            for dtype in self.plan.dtypes if "topk" in self.plan.functions else ():
                yield f"{FUNCTIONS['topk'].title}, {dtype}, rows in adverse orders"
                self.result["orders"].append(self.orders(dtype))
            for dtype, function in itertools.product(self.plan.dtypes, self.plan.functions):
                yield f"{FUNCTIONS[function].title}, {dtype}, overhead of a call"
                self.result["overhead"].append(self.overhead(function, dtype))
            for dtype, function in self.plan.first_calls():
                yield f"{FUNCTIONS[function].title}, {dtype}, first call"
                self.inputs.clear()
                self.device.release()
                arguments = function, dtype, self.plan.vocabulary, self.device
                self.result["first_calls"].append(first.in_fresh_processes(*arguments))
            if self.plan.generate:
                yield "generate, end to end"
                self.result["generate"] = self.generate()
            if self.plan.hidden_sizes:
                yield from self.from_hidden_states()
            self.result["complete"] = True
        finally:
            gc.unfreeze()
            torch.set_num_threads(threads)
            self.result["seconds"] = time.monotonic() - self.started

    def share(self, cases: int = 1) -> float:
        """The seconds of so many cases."""
        total = len(self.plan.cases()) + GENERATE_CASES * self.plan.generate
        total += HIDDEN_CASES * len(self.plan.hidden_cases())
        return self.plan.budget * cases / total

    def generate(self) -> dict[str, Any]:
        """Time for a token of `generate` with and without a blend, and what the blends did."""
        blends: dict[str, Any] = {}
        try:
            setting = generation.make_setting(self.plan.seed, self.device.place)
            contenders = generation.contenders(setting, blends)
        except ImportError as error:
            return {"left_out": f"{error.name} is not installed: pip install '.[demo]'"}
        share = self.share(GENERATE_CASES) / len(contenders)
        samples = interleave(contenders, self.plan.repeats, share, lambda *_: None, self.device)
        return {
            **setting.described(),
            "threads": torch.get_num_threads(),
            "microseconds": {
                name: microseconds(values, generation.BATCH * generation.NEW_TOKENS)
                for name, values in samples.items()
            },
            "blends": blends,
        }

    def from_hidden_states(self) -> Iterator[str]:
        """Losses from hidden states: in float32, with the most rows and threads."""
        rows, vocabulary = max(self.plan.rows), self.plan.vocabulary
        record: dict[str, Any] = {
            "machine": self.result["machine"],
            "rows": rows,
            "vocabulary": vocabulary,
            "threads": torch.get_num_threads(),
            "packages": {name: info.version(name) for name in hidden.PACKAGES.values()},
            "cases": [],
        }
        inputs: hidden.Inputs | None = None
        for size, name in self.plan.hidden_cases():
            yield f"{FUNCTIONS[name].title}, from hidden states of {size}"
            if inputs is None or inputs.hidden.size(-1) != size:
                inputs = None  # not both sizes at once
                inputs = hidden.make_inputs(rows, vocabulary, size, self.plan.seed)
            case = {"function": name, "size": size, **self.hidden_case(name, inputs)}
            record["cases"].append(case)
            self.result["hidden"] = record

    def hidden_case(self, name: str, inputs: hidden.Inputs) -> dict[str, Any]:
        """Time and memory of each contender.

        The first call of each is for the memory and for the check; it is timed where a call is so
        long that it is the only one. The others take turns until the time of the case is over.
        """
        function, started, notes = FUNCTIONS[name], time.monotonic(), list[str]()
        reference = hidden.exact(function, inputs)
        first: dict[str, float] = {}
        memory, errors, gradients = {}, {}, {}
        contenders = {"products": hidden.bare_products(function, inputs)}
        first["products"], _ = CPU.timed(contenders["products"])
        for key, get in hidden.losses(name).items():
            contender = self.hidden_contender(key, get, function, inputs, notes)
            if contender is None:
                continue
            first[key], result, peak = timed_with_memory(contender)
            contenders[key] = contender
            errors[key] = hidden.errors(result, reference, inputs)
            gradients[key] = hidden.gradient_bytes(result)
            memory[key] = None if peak is None else max(0, peak - gradients[key])
            del result

        samples: dict[str, list[float]] = {key: [] for key in contenders}
        share = self.share(HIDDEN_CASES)
        for _ in range(self.plan.repeats):
            for key, contender in contenders.items():
                once = not samples[key] and first[key] <= HIDDEN_SLOW
                if once or time.monotonic() - started + first[key] <= share:
                    samples[key].append(CPU.timed(contender)[0])
        return {
            "milliseconds": {
                key: spread([1e3 * sample for sample in values or [first[key]]])
                for key, values in samples.items()
            },
            "memory": memory,
            "gradients": gradients,
            "inputs": inputs.bytes(function),
            "gradient_error": errors,
            "notes": notes,
        }

    def hidden_contender(
        self,
        key: str,
        get: Callable[[], Callable[..., Tensor]],
        function: Function,
        inputs: hidden.Inputs,
        notes: list[str],
    ) -> Contender | None:
        """A contender, run once if that compiles it; or None and the reason in ``notes``."""
        wanted = "opdc" if key in ("opdc", "opdc_sparse", "logits") else key
        if wanted not in self.plan.contenders:
            return None
        logits = 4 * len(inputs.hidden) * len(inputs.weight)
        if not key.startswith("opdc") and time.monotonic() - self.started > self.plan.budget:
            reason = f"the budget of {self.plan.budget:.0f} s is spent"
        elif hidden.MATRICES.get(key, 0) * logits > 0.8 * available_memory():
            reason = "it would not fit into memory"
        else:
            try:
                contender = hidden.contender(get(), function, inputs)
                if key in hidden.COMPILED:
                    torch._dynamo.reset()  # an earlier case must not use up the recompilations
                    CPU.timed(contender)
                return contender
            except Exception as error:  # not installed, no compiler, or it fails in its own way
                if wanted in ("opdc", "eager"):
                    raise
                reason = _first_line(error)
        notes.append(f"{hidden.PACKAGES.get(key, key)} left out: {reason}")
        return None

    def orders(self, dtype: str) -> dict[str, Any]:
        """Top-K of the same logits in orders that a selection could dislike."""
        rows = min(ORDER_ROWS, *self.plan.rows)
        inputs = self.inputs_of(dtype).slice(0, rows)
        measured = {
            f"{name} {order}": work(
                getattr(FUNCTIONS["topk"], call),
                FUNCTIONS["topk"],
                replace(inputs, student=arrange(inputs.student)),
            )
            for order, arrange in ORDERS.items()
            for name, call in (("eager", "textbook"), ("opdc", "opdc"))
            if name in self.plan.contenders
        }
        samples = interleave(
            measured, self.plan.repeats, ORDER_SECONDS, lambda *_: None, self.device
        )
        record: dict[str, Any] = {"dtype": dtype, "rows": rows, "threads": max(self.plan.threads)}
        for key, values in samples.items():
            name, order = key.split()
            record.setdefault(name, {})[order] = microseconds(values, rows)["median"]
        return record

    def overhead(self, function: str, dtype: str) -> dict[str, Any]:
        record: dict[str, Any] = {"function": function, "dtype": dtype}
        for name in ("eager", "opdc"):
            if name in self.plan.contenders:
                arguments = FUNCTIONS[function], DTYPES[dtype], name == "eager", self.device
                record[name] = call_overhead(*arguments)
        return record

    def case(self, name: str, dtype: str, rows: int, threads: int) -> dict[str, Any]:
        function = FUNCTIONS[name]
        inputs = self.inputs_of(dtype).slice(0, rows)
        notes: list[str] = []
        contenders = self.contenders(name, dtype, inputs, notes)
        errors: dict[str, float] = {}
        reference = self.reference(function, dtype, inputs)

        def inspect(key: str, result: Any) -> None:
            """All must have done the same work, up to the error against float64."""
            if key in contenders and reference is not None:
                found = error(function, result, reference)
                if found is not None:
                    errors[key] = found

        copied = self.wide or inputs
        source, target = copied.student[:rows], copied.scratch[:rows]
        measured = {
            **{key: value for key, value in contenders.items() if not key.startswith("opdc")},
            "copy": Contender(lambda: target.copy_(source)),
            "fill": Contender(lambda: torch.empty_like(inputs.student).fill_(1.0)),
            **{key: value for key, value in contenders.items() if key.startswith("opdc")},
        }
        share = self.share() / len(measured)
        samples = interleave(measured, self.plan.repeats, share, inspect, self.device)
        times = {key: microseconds(values, rows) for key, values in samples.items()}
        for key in contenders:
            self.seconds.setdefault((name, dtype, key), times[key]["median"] / 1e6)
        stream = times["copy"]["median"] / 2 * (4 / source.itemsize)  # of a float32 row

        memory = {}
        if rows == min(self.plan.rows) and threads == max(self.plan.threads):
            memory = {
                key: self.device.extra_memory(contender) for key, contender in contenders.items()
            }
            for key, size in memory.items():
                if size is not None:
                    self.memory[name, dtype, key] = size / rows
        return {
            "function": name,
            "dtype": dtype,
            "rows": rows,
            "threads": threads,
            "microseconds": times,
            "stream": stream,
            "fill": times["fill"]["median"],
            "streams": {key: times[key]["median"] / stream for key in contenders},
            "least": function.matrices * DTYPES[dtype].itemsize / 4,
            "memory": memory,
            "gradient": inputs.student.nbytes,
            "gradient_error": errors,
            "notes": notes,
        }

    def reference(self, function: Function, dtype: str, inputs: Inputs) -> Tensor | None:
        """What to compare the results with."""
        if function.law is not None:  # of the first rows, whatever their number: made once
            key = function.law, dtype
            if key not in self.laws:
                self.laws[key] = exact(function, inputs)
            return self.laws[key]
        # A reference of all rows in float64 is too large to be made for the larger sizes.
        checked = not function.whole or len(inputs) == min(self.plan.rows)
        need = DOUBLES * 8 * inputs.student.numel() if function.whole else 0
        checked = checked and need < 0.8 * self.device.available_memory()
        return exact(function, inputs) if checked else None

    def contenders(
        self, name: str, dtype: str, inputs: Inputs, notes: list[str]
    ) -> dict[str, Contender]:
        """The contenders of a case; whatever is left out says why in ``notes``."""
        function = FUNCTIONS[name]
        spent = time.monotonic() - self.started
        found: dict[str, Contender] = {}
        for key, get in rivals(name).items():
            if key not in self.plan.contenders or key not in self.device.rivals:
                continue
            if spent > self.plan.budget:
                notes.append(f"{key} left out: the budget of {self.plan.budget:.0f} s is spent")
                continue
            if self.seconds.get((name, dtype, key), 0.0) * len(inputs) > PATIENCE * self.share():
                notes.append(f"{key} left out: a call takes too much of the budget")
                continue
            if key == "compile":
                if self.compile_error is not None:
                    notes.append(f"compile left out: {self.compile_error}")
                    continue
                torch._dynamo.reset()  # an earlier case must not use up the recompilations
            pieces = self.pieces(name, dtype, key, len(inputs))
            if pieces > 1 and function.whole:
                notes.append(f"{key} left out: it would not fit into memory")
                continue
            try:
                found[key], pieces = self.tried(key, get(), function, inputs, pieces)
            except torch.OutOfMemoryError:
                notes.append(f"{key} left out: it would not fit into memory")
                continue
            except Exception as error:  # not installed, no compiler, or it fails in its own way
                reason = _first_line(error)
                notes.append(f"{key} left out: {reason}")
                if key == "compile":
                    self.compile_error = reason
                continue
            if pieces > 1:
                notes.append(f"{key} in {pieces} pieces: the whole would not fit into memory")
        if "opdc" in self.plan.contenders:
            found["opdc"] = work(function.opdc, function, inputs)
            if function.inplace:
                found["opdc_inplace"] = work(function.opdc, function, inputs, inplace=True)
        return found

    def tried(
        self, key: str, call: Callable[..., Any], function: Function, inputs: Inputs, pieces: int
    ) -> tuple[Contender, int]:
        """A contender that has run once if it compiles at its first call, or may not fit; and the
        pieces that it takes."""
        while True:
            contender = work(call, function, inputs, pieces=pieces)
            try:
                if key != "eager" or self.plan.on_gpu:
                    self.device.timed(contender)
                return contender, pieces
            except torch.OutOfMemoryError:
                if function.whole or pieces >= len(inputs):
                    raise
                pieces *= 2

    def pieces(self, name: str, dtype: str, contender: str, rows: int) -> int:
        """Into how many pieces the rows must be cut for the memory to suffice.

        A system may let a process take more than there is, and end it; a GPU refuses, and it can
        be tried.
        """
        if self.plan.on_gpu:
            return 1
        guess = 14 * 4 * self.plan.vocabulary  # of the Jensen-Shannon divergence, the greediest
        need = self.memory.get((name, dtype, contender), guess) * rows
        pieces = 1
        while need / pieces > 0.8 * available_memory() and pieces < rows:
            pieces *= 2
        return pieces
