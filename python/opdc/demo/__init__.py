"""`python -m opdc demo`: a real on-policy distillation on the CPU, in about a minute, or several
that compare methods.

`loop.py` is the part to copy; the rest feeds it, watches it and reports.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .methods import METHODS
from .rollouts import EPSILON, ROLLOUTS, STUDENT

EXTRA = ("transformers", "matplotlib", "rich", "safetensors")
# One of each kind: the plain policy gradient, two repairs of it, a top-K loss, full divergences.
COMPARED = ("k1", "reopold", "tropd", "lsm", "reverse_kl", "forward_kl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Distil a small teacher into a weaker student, on the student's own rollouts, with "
        "opdc's loss. Offline; without options it uses two models that come with the package."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--method",
        choices=METHODS,
        default="reverse_kl",
        metavar="METHOD",
        help=f"the loss, one of {', '.join(METHODS)} (default: reverse_kl)",
    )
    what.add_argument(
        "--compare",
        choices=METHODS,
        nargs="*",
        metavar="METHOD",
        help=f"several losses side by side (default: {', '.join(COMPARED)})",
    )
    parser.add_argument(
        "--rollout",
        choices=ROLLOUTS,
        default=STUDENT,
        help="who writes the responses: the student, a blend with the teacher within a KL budget "
        "(TRB), the same from the student's drafts, or the student after a beginning by the "
        "teacher (default: student)",
    )
    parser.add_argument(
        "--epsilon",
        type=_number_between(0, 100),
        default=EPSILON,
        metavar="NATS",
        help=f"KL budget of the blend at the first update (default: {EPSILON})",
    )
    parser.add_argument(
        "--seeds",
        type=_positive_int,
        metavar="N",
        help="with --compare: runs of each, with --seed and the numbers after it (default: 3)",
    )
    parser.add_argument(
        "--jobs",
        type=_positive_int,
        metavar="N",
        help="with --compare: runs at a time (default: one for each processor; with models of "
        "your own, 1)",
    )
    parser.add_argument("--steps", type=_positive_int, default=100, help="updates (default: 100)")
    parser.add_argument(
        "--batch", type=_positive_int, default=64, help="rollouts in an update (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and sampling (default: 0)")
    parser.add_argument(
        "--learning-rate", type=_number_between(0, 1), default=1e-3, help="of AdamW (default: 1e-3)"
    )
    parser.add_argument(
        "--temperature",
        type=_number_between(0.01, 100),
        default=1.0,
        help="of the rollouts and of the loss (default: 1)",
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive_int, default=26, help="in a response (default: 26)"
    )
    parser.add_argument(
        "--student", type=Path, metavar="FOLDER", help="a local Hugging Face model to train"
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="FOLDER", help="a local one with the same tokenizer"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSONL: {"prompt": "...", "answer": "..."} a line, the answer optional; prompts '
        "are used as they stand, and a response is right if its last words are the answer",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PNG",
        default=Path("opdc-demo.png"),
        help="the plot (default: ./opdc-demo.png)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object instead of tables"
    )


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0: done, or interrupted after a first evaluation; 2: the input is at fault."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"{', '.join(missing)} not installed: pip install '.[demo]'")
    if fault := _fault(arguments):
        return _fail(fault)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by transformers when it is imported
    try:
        from .command import run_demo
        from .compare import run_compare
        from .loading import DemoError

        try:
            if arguments.compare is None:
                run_demo(arguments)
            else:
                run_compare(arguments)
        except DemoError as error:
            return _fail(str(error))
    except KeyboardInterrupt:
        print("python -m opdc demo: interrupted", file=sys.stderr)
        return 130
    return 0


def _fault(arguments: argparse.Namespace) -> str | None:
    """What can be found wrong before anything is loaded."""
    if arguments.compare is None and (arguments.seeds or arguments.jobs):
        return "--seeds and --jobs are for --compare"
    if not arguments.output.parent.is_dir():
        return f"--output {arguments.output}: no folder {arguments.output.parent}"
    if arguments.output.is_dir():
        return f"--output {arguments.output}: is a folder, wanted a file name"
    return None


def _fail(reason: str) -> int:
    print(f"python -m opdc demo: error: {reason}", file=sys.stderr)
    return 2


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _number_between(low: float, high: float) -> Callable[[str], float]:
    """The type of an argument beyond whose range fp32 models only overflow."""

    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return number
