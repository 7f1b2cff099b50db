"""``python -m opdc bench``: opdc against eager PyTorch, torch.compile and the memory's bandwidth.

All contenders run on the same tensors, in turns, in one process, on the CPU or on a GPU; there
Liger and FlashInfer are measured too, where they are installed and have the function. Losses from
hidden states have others: the bare matrix products, and the chunked losses of TRL and Liger.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import info
from .contenders import DTYPES, FUNCTIONS
from .device import CPU, Gpu, why_no_gpu
from .generation import GENERATE
from .hidden import HIDDEN, SIZES
from .measure import Benchmark, Plan

if TYPE_CHECKING:
    from rich.console import Console

# TRL from hidden states alone, on the CPU FlashInfer nowhere and Liger from hidden states.
CONTENDERS = ("eager", "compile", "opdc", "trl", "liger", "flashinfer")
SAMPLERS = [name for name, function in FUNCTIONS.items() if function.law]
GROUPS = {
    "losses": [name for name in FUNCTIONS if name not in SAMPLERS],
    "samplers": [*SAMPLERS, GENERATE],
}
QUICK: dict[str, Any] = {
    "functions": ["reverse_kl", "forward_kl", "jsd", "k1"],
    "dtypes": ["float32"],
    "rows": [256],
    "threads": [min(2, info.usable_cpus())],
}
FULL: dict[str, Any] = {
    "functions": [*FUNCTIONS, GENERATE],
    "dtypes": list(DTYPES),
    "rows": [256, 1024],
    "threads": sorted({1, min(2, info.usable_cpus())}),
    "repeats": 7,
}
ON_A_GPU: dict[str, Any] = {
    "dtypes": ["bfloat16", "float32"],
    "rows": [8192],
    "threads": [torch.get_num_threads()],
    "repeats": 25,
}


def _choice(*known: str, **groups: list[str]) -> Callable[[str], list[str]]:
    """The type of an argument that lists names from a fixed set, or of groups of them."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known and name not in groups:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is none of {', '.join([*known, *groups])}"
                )
        return list(dict.fromkeys(one for name in names for one in groups.get(name, [name])))

    return parse


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _counts(text: str) -> list[int]:
    return sorted({_count(word) for word in text.split(",")})


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, metavar: str, help: str, **options: Any) -> None:
        parser.add_argument(flag, metavar=metavar, help=help, **options)

    add(
        "--functions",
        "NAMES",
        f"any of {', '.join([*FUNCTIONS, GENERATE, HIDDEN])}, or {' or '.join(GROUPS)} (default: "
        f"all but {HIDDEN}, losses from hidden states, which takes as long as the others together)",
        type=_choice(*FUNCTIONS, GENERATE, HIDDEN, **GROUPS),
    )
    add("--dtypes", "NAMES", "float32, bfloat16 (default: both)", type=_choice(*DTYPES))
    add(
        "--device",
        "NAME",
        "cpu, or cuda for the current GPU of PyTorch (default: %(default)s)",
        choices=("cpu", "cuda"),
        default="cpu",
    )
    add(
        "--rows",
        "COUNTS",
        "numbers of rows (default: 256,1024; on a GPU 8192, or as many as fit)",
        type=_counts,
    )
    add("--threads", "COUNTS", "numbers of threads of the CPU (default: 1,2)", type=_counts)
    add(
        "--contenders",
        "NAMES",
        f"any of {', '.join(CONTENDERS)} (default: all that are installed)",
        type=_choice(*CONTENDERS),
        default=list(CONTENDERS),
    )
    add("--vocabulary", "V", "logits in a row (default: %(default)s)", type=_count, default=151936)
    add(
        "--hidden-sizes",
        "COUNTS",
        f"sizes of hidden states (default: {','.join(map(str, SIZES))})",
        type=_counts,
        default=SIZES,
    )
    add("--repeats", "N", "calls of each, at most (default: 7, on a GPU 25)", type=_count)
    add(
        "--budget",
        "SECONDS",
        "time to fill; once it is spent, only opdc is still measured (default: %(default)s)",
        type=_seconds,
        default=1200.0,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a couple of minutes: four functions in float32, 256 rows; other flags still hold",
    )
    add(
        "--output",
        "FOLDER",
        "where bench.json and bench.png go, or bench-cuda.* (default: %(default)s)",
        type=Path,
        default=Path("opdc-bench"),
    )
    add(
        "--json",
        "PATH",
        "the JSON file instead; without PATH the JSON is printed, and the tables go to stderr",
        nargs="?",
        const="-",
    )
    add("--plot", "PATH", "the plot instead", type=Path)
    add("--report", "RESULT", "measure nothing: show this JSON file of an earlier run", type=Path)
    add("--update-readme", "README", "put the tables between their markers", type=Path)
    parser.set_defaults(fail=parser.error)


def plan_of(arguments: argparse.Namespace) -> Plan:
    on_gpu = arguments.device == "cuda"
    defaults = FULL | (QUICK if arguments.quick else {}) | (ON_A_GPU if on_gpu else {})
    chosen = {name: getattr(arguments, name) or default for name, default in defaults.items()}
    functions = chosen.pop("functions")
    if on_gpu:
        if reason := why_no_gpu():
            arguments.fail(f"argument --device: cuda, but {reason}; give --device cpu")
        if arguments.threads:
            arguments.fail("argument --threads: only with --device cpu; on a GPU leave it out")
        if HIDDEN in functions:
            arguments.fail(f"argument --functions: {HIDDEN} is measured with --device cpu only")
    plan = Plan(
        **chosen,
        functions=[name for name in functions if name not in (GENERATE, HIDDEN)],
        generate=GENERATE in functions,
        hidden_sizes=arguments.hidden_sizes if HIDDEN in functions else (),
        contenders=arguments.contenders,
        vocabulary=arguments.vocabulary,
        budget=arguments.budget,
        device=Gpu() if on_gpu else CPU,
    )
    if max(plan.threads) > info.usable_cpus():
        arguments.fail(
            f"argument --threads: {max(plan.threads)} threads, but this process may use "
            f"{info.usable_cpus()} CPUs"
        )
    # The gradient is one matrix more, and half as much again is left to whoever else is here.
    available = plan.device.available_memory()
    if on_gpu and not arguments.rows and 1.5 * plan.bytes() > available:
        wanted = max(plan.rows)
        plan.rows = [max(1, int(wanted * available / (1.5 * plan.bytes())))]
        plan.notes = [f"{plan.rows[0]:,} rows: {wanted:,} do not fit into the memory"]
    if 1.5 * plan.bytes() > available:
        smaller = "fewer --rows" + (" or smaller --hidden-sizes" if plan.hidden_sizes else "")
        arguments.fail(
            f"argument --rows: {max(plan.rows):,} x {plan.vocabulary:,} logits need "
            f"{1.5 * plan.bytes() / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB are "
            f"available; give {smaller}"
        )
    return plan


def carry_out(plan: Plan, console: Console) -> dict[str, Any]:
    """Run the plan under a progress bar; Ctrl-C ends it with what was reached."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    benchmark = Benchmark(plan)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("making the inputs", total=plan.steps())
        try:
            for step, description in enumerate(benchmark.run()):
                progress.update(task, completed=step, description=description)
                if not console.is_terminal:
                    console.print(f"[{step + 1}/{plan.steps()}] {description}", markup=False)
        except KeyboardInterrupt:
            console.print("stopped: what follows was measured until then")
        except Exception:
            if not benchmark.result["cases"]:
                raise
            benchmark.result["failed"] = True
            console.print_exception()
            console.print("failed: what follows was measured until then")
    return benchmark.result


def load(path: Path) -> dict[str, Any]:
    """The result of an earlier run."""
    try:
        result = json.loads(path.read_text())
    except ValueError:
        result = None
    if not isinstance(result, dict) or not {"machine", "cases"} <= result.keys():
        raise ValueError(f"{path} was not written by this benchmark")
    return result


def joined(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A result and what an earlier one has beside it.

    Losses from hidden states stand by themselves, with a machine and sizes of their own; all else
    is of one run.
    """
    hidden = {HIDDEN: result.get(HIDDEN) or earlier.get(HIDDEN)}
    return (result if result["cases"] or result.get("generate") else earlier or result) | hidden


def run(arguments: argparse.Namespace) -> int:
    fail = arguments.fail
    try:
        import matplotlib  # noqa: F401
        from rich.console import Console

        from . import report
    except ImportError as error:
        fail(f"{error.name} is not installed: pip install '.[bench]'")

    # Whatever could fail at the end fails now.
    readme: Path | None = arguments.update_readme
    to_stdout = arguments.json == "-"
    name = "bench" if arguments.device == "cpu" else f"bench-{arguments.device}"
    saved = None if to_stdout else Path(arguments.json or arguments.output / f"{name}.json")
    earlier: dict[str, Any] = {}
    try:
        for path in (arguments.plot, arguments.json and saved):
            if path is not None and not path.parent.is_dir():
                raise FileNotFoundError(f"no folder {path.parent}")
        if arguments.report is None:
            plan = plan_of(arguments)
            if readme is not None:
                report.replace_sections(readme.read_text(), dict.fromkeys(plan.sections(), ""))
            if saved is not None and saved.exists():
                earlier = load(saved)
                if report.on_gpu(earlier) != plan.on_gpu:
                    raise ValueError(f"{saved} is of another device; give another --json")
            arguments.output.mkdir(parents=True, exist_ok=True)
            result = carry_out(plan, Console(stderr=True))
        else:
            result = load(arguments.report)
            if readme is not None:
                report.replace_sections(readme.read_text(), report.sections(result))
    except (OSError, ValueError) as error:
        fail(str(error))
    if not any(result.get(part) for part in ("cases", "generate", HIDDEN)):
        fail("stopped before anything was measured")

    written = []
    if arguments.report is None or arguments.json:
        text = json.dumps(joined(earlier, result), indent=2) + "\n"
        if saved is None:
            print(text, end="")
        else:
            saved.write_text(text)
            written.append(saved)
    if result["cases"] and (arguments.report is None or arguments.plot):
        written.append(arguments.plot or arguments.output / f"{name}.png")
        report.save_plot(result, written[-1])
    if readme is not None:
        readme.write_text(report.replace_sections(readme.read_text(), report.sections(result)))
        written.append(readme)
    console = Console(stderr=to_stdout)
    report.print_tables(result, console)
    if written:
        console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    if result.get("failed"):
        return 1
    return 0 if result["complete"] else 130  # as a shell reports Ctrl-C
