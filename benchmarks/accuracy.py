"""Accuracy of every loss in every regime, next to PyTorch's own fp32 path.

    python benchmarks/accuracy.py [--json PATH] [--update-readme PATH]

The truth is the float64 oracle of the tests, on the same numbers.

* value and gradient in fp32: the largest error over the rows, relative to the true value and to
  the norm of the true gradient row. Sampled-token losses and statistics, whose truth may cross
  zero, are measured relative to at least 1 nat (gradients: to at least the score 1_y − p).
* gradient in bf16: the largest error of an entry, in units of one correct rounding (half a
  spacing), over the entries above 1/1000 of the sizes just named.
* the smallest divergence over a fuzz of regimes, dtypes and temperatures.
* blends: how far KL(μ‖p), recomputed in float64 at the β that came out, is from a budget that
  binds, and the passes over the rows that the search took.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import opdc
import oracle_sampling
from judge import (
    Result,
    direction_size,
    eager_answer,
    expected,
    half_spacing,
    measured,
    worst,
)
from opdc import _ops
from regimes import CASES, DIVERGENCES, REGIMES, Case, Inputs, Regime, make_inputs

BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
SHOWN = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "jsd": "JSD",
    "skew_forward": "skew forward",
    "skew_reverse": "skew reverse",
    "k1": "K1",
    "k2": "k2",
    "k3": "k3",
    "token_logprobs": "token log-prob",
    "entropy": "entropy",
    "lsm": "LSM, K = 32",
}
IN_README = ("reverse_kl", "forward_kl", "jsd", "skew_forward", "k1", "lsm")
LSM = Case("lsm", "lsm", {"k": 32})
# One line of the printed table: the worst of the regimes whose name begins so.
GROUPS = {
    "uniform": "uniform",
    "far": "far apart",
    "realistic": "heavy tail",
    "near_1e-01": "student = teacher + 1e-1 noise",
    "near_1e-02": "… 1e-2",
    "near_1e-03": "… 1e-3",
    "near_1e-04": "… 1e-4",
    "near_1e-05": "… 1e-5",
    "near_1e-06": "… 1e-6",
    "peaked_0": "both confident, p_y 0.9 … 1 − 1e-7",
    "peaked_against_flat": "confident student, flat teacher",
    "flat_against_peaked": "flat student, confident teacher",
    "offset": "logit offset 1e4",
    "masked": "masked vocabulary",
    "wide": "logit gaps 1e2 … 1e4",
}


BUDGETS = (1e-6, 1e-4, 1e-2, 0.02, 0.1, 1.0, 10.0)
BISECTIONS = 20


@dataclass
class Cell:
    """Largest errors of one loss in one regime."""

    loss: str
    regime: str
    value: float = 0.0
    gradient: float = 0.0
    torch_value: float = 0.0
    torch_gradient: float = 0.0
    bf16_gradient_roundings: float = 0.0

    def join(self, other: Cell) -> None:
        for name, number in asdict(other).items():
            if isinstance(number, float):
                setattr(self, name, max(getattr(self, name), number))


def value_error(case: Case, result: Result, truth: Result) -> float:
    size = truth.value.abs() if case.is_divergence else truth.value.abs().clamp_min(1.0)
    error = (result.value.double() - truth.value).abs()
    return worst(torch.where(error == 0, 0.0, error / size))


def gradient_error(
    case: Case, regime: Regime, inputs: Inputs, result: Result, truth: Result
) -> float:
    size = truth.gradient.norm(dim=-1)
    if not case.is_divergence:
        size = size.maximum(direction_size(case, inputs))
    if regime.saturates:  # the true gradient is 1e-80: errors are absolute
        size = size.clamp_min(1.0)
    error = (result.gradient.double() - truth.gradient).norm(dim=-1)
    return worst(torch.where(error == 0, 0.0, error / size))


def roundings(case: Case, inputs: Inputs) -> float:
    """Error of a bf16 gradient over that of rounding the truth."""
    result, truth = measured(case, inputs), expected(case, inputs)
    size = truth.gradient.abs()
    largest = size.amax(-1)
    if not case.is_divergence:
        largest = largest.maximum(direction_size(case, inputs))
    counted = size >= 1e-3 * largest[:, None]
    error = (result.gradient.double() - truth.gradient).abs()
    units = error / half_spacing(truth.gradient, torch.bfloat16)
    return worst(units[counted & (size > 0)])


def measure(case: Case, regime: Regime, rows: int, vocabulary: int, seeds: int) -> Cell:
    cell = Cell(case.name, regime.name)
    for seed in range(seeds):
        inputs = make_inputs(regime, (rows,), vocabulary, seed=seed)
        ones = torch.ones(rows)
        truth, ours = expected(case, inputs), measured(case, inputs)
        theirs = eager_answer(case, inputs, ones, torch.float32)
        low = make_inputs(regime, (rows,), vocabulary, torch.bfloat16, seed=seed)
        cell.join(
            Cell(
                case.name,
                regime.name,
                value_error(case, ours, truth),
                gradient_error(case, regime, inputs, ours, truth),
                value_error(case, theirs, truth),
                gradient_error(case, regime, inputs, theirs, truth),
                0.0 if regime.saturates else roundings(case, low),
            )
        )
    return cell


def cells(rows: int, vocabulary: int, seeds: int) -> Iterator[Cell]:
    for case in (*CASES, LSM):
        for regime in REGIMES:
            if case.name in SHOWN and case.is_finite_in(regime):
                yield measure(case, regime, rows, vocabulary, seeds)


def smallest_divergence(count: int) -> tuple[float, int]:
    """The smallest value of any divergence over about `count` rows, and the number of rows."""
    smallest, rows, seed = math.inf, 0, 1000
    while rows < count:
        seed += 1
        for regime in REGIMES:
            dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[seed % 4]
            inputs = make_inputs(regime, (8,), 2 + seed % 500, dtype, seed=seed)
            for case in DIVERGENCES:
                if case.is_finite_in(regime):
                    values = getattr(opdc, case.function)(
                        inputs.student,
                        inputs.teacher,
                        temperature=(0.5, 1.0, 2.0)[seed % 3],
                        reduction="none",
                        **case.options,
                    )
                    smallest, rows = min(smallest, float(values.min())), rows + 8
    return smallest, rows


@dataclass
class BlendCell:
    """Blends in the regimes of one group, over the rows whose budget binds."""

    rows: int = 0
    error: float = 0.0
    torch_error: float = 0.0
    evaluations: float = 0.0  # their sum
    most_evaluations: float = 0.0


def bisected(student: torch.Tensor, teacher: torch.Tensor, epsilon: float) -> torch.Tensor:
    """β as one writes it down in PyTorch."""
    s, tau = student.log_softmax(-1), teacher.log_softmax(-1)
    low, high = torch.zeros(s.shape[:-1]), torch.ones(s.shape[:-1])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        log_mu = torch.lerp(s, tau, middle[..., None]).log_softmax(-1)
        is_within = (log_mu.exp() * (log_mu - s)).sum(-1) <= epsilon
        low, high = middle.where(is_within, low), high.where(is_within, middle)
    return low


def excess(student: torch.Tensor, teacher: torch.Tensor, beta: torch.Tensor, epsilon: float):
    """|KL / ε − 1| at β, in float64."""
    s, tau = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    return (
        oracle_sampling.kl(oracle_sampling.blended(s, tau, beta.double()), s) / epsilon - 1
    ).abs()


def blend_cells(rows: int, vocabulary: int, seeds: int) -> dict[str, BlendCell]:
    result: dict[str, BlendCell] = {}
    numbers = torch.ones(2, dtype=torch.float64)
    for regime in REGIMES:
        cell = result.setdefault(group_of(regime.name), BlendCell())
        for seed in range(seeds):
            inputs = make_inputs(regime, (rows,), vocabulary, seed=seed)
            for epsilon in BUDGETS:
                budgets, half = torch.full((rows,), epsilon), torch.full((rows,), 0.5)
                models = inputs.student.detach(), inputs.teacher
                _, columns = _ops.sample(*models, budgets, None, half, numbers, 0, 0, -1, -1)
                beta, evaluations = columns[:, 3], columns[:, -1]
                binds = (beta > 0) & (beta < 1)
                if not binds.any():
                    continue
                theirs = excess(*models, bisected(*models, epsilon), epsilon)[binds]
                cell.rows += int(binds.sum())
                cell.error = max(cell.error, worst(excess(*models, beta, epsilon)[binds]))
                cell.torch_error = max(cell.torch_error, worst(theirs))
                cell.evaluations += float(evaluations[binds].sum())
                cell.most_evaluations = max(cell.most_evaluations, float(evaluations[binds].max()))
    return result


def blend_table(blends: dict[str, BlendCell]) -> list[str]:
    lines = [
        "",
        f"| blend, budgets {BUDGETS[0]:g} … {BUDGETS[-1]:g} | KL off its budget | passes, mean | "
        "most |",
        "|---|---|---:|---:|",
    ]
    for prefix, label in GROUPS.items():
        cell = blends.get(prefix)
        if cell is not None and cell.rows:
            lines.append(
                f"| {label} | **{number(cell.error)}** {number(cell.torch_error)} | "
                f"{cell.evaluations / cell.rows:.1f} | {cell.most_evaluations:.0f} |"
            )
    lines.append("")
    lines.append(
        f"Beside it PyTorch's own float32 with {BISECTIONS} bisections. A budget that binds is to "
        "be met to 1e-4 of itself."
    )
    return lines


def group_of(regime: str) -> str:
    return max((prefix for prefix in GROUPS if regime.startswith(prefix)), key=len)


def grouped(all_cells: list[Cell]) -> dict[tuple[str, str], Cell]:
    """The worst cell per loss and group of regimes."""
    result: dict[tuple[str, str], Cell] = {}
    for cell in all_cells:
        prefix = group_of(cell.regime)
        result.setdefault((cell.loss, prefix), Cell(cell.loss, prefix)).join(cell)
    return result


def number(error: float) -> str:
    return "0" if error == 0 else "NaN" if math.isinf(error) else f"{error:.0e}"


def table(title: str, mine: str, theirs: str, groups: dict, losses: tuple[str, ...]) -> list[str]:
    lines = ["", f"| {title} | " + " | ".join(SHOWN[loss] for loss in losses) + " |"]
    lines.append("|---" * (len(losses) + 1) + "|")
    for prefix, label in GROUPS.items():
        entries = []
        for loss in losses:
            cell = groups.get((loss, prefix))
            if cell is None:
                entries.append("-")
                continue
            entries.append(f"**{number(getattr(cell, mine))}** {number(getattr(cell, theirs))}")
        lines.append(f"| {label} | " + " | ".join(entries) + " |")
    return lines


def report(
    all_cells: list[Cell],
    smallest: tuple[float, int],
    blends: dict[str, BlendCell],
    losses: tuple[str, ...],
) -> list[str]:
    groups = grouped(all_cells)
    in_bf16 = max(cell.bf16_gradient_roundings for cell in all_cells)
    lines = ["Largest error in fp32 against float64: **opdc**, then PyTorch's own fp32 path."]
    lines += table("loss", "value", "torch_value", groups, losses)
    lines += table("gradient", "gradient", "torch_gradient", groups, losses)
    lines += blend_table(blends)
    lines += [
        "",
        f"Largest error of a bf16 gradient over all losses: {in_bf16:.2f} of one rounding. "
        f"Smallest divergence over {smallest[1]:,} rows: {smallest[0]:.3g} (never negative).",
    ]
    return lines


def update(path: Path, lines: list[str]) -> None:
    """Replace what stands between the two markers of a Markdown file."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{path}: expected one {BEGIN} and one {END}")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    path.write_text("\n".join([head + BEGIN, *lines, END + tail]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=5003)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--fuzz", type=int, default=100_000, help="rows of the fuzz")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--update-readme", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    all_cells = list(cells(arguments.rows, arguments.vocabulary, arguments.seeds))
    smallest = smallest_divergence(arguments.fuzz)
    blends = blend_cells(arguments.rows, arguments.vocabulary, arguments.seeds)
    print("\n".join(report(all_cells, smallest, blends, tuple(SHOWN))))
    if arguments.update_readme:
        update(arguments.update_readme, report(all_cells, smallest, blends, IN_README))
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {
                    "opdc": getattr(opdc, "__version__", None),
                    "torch": torch.__version__,
                    "machine": platform.machine(),
                    "rows": arguments.rows * arguments.seeds,
                    "vocabulary": arguments.vocabulary,
                    "smallest_divergence": smallest[0],
                    "fuzzed_rows": smallest[1],
                    "blends": {name: asdict(cell) for name, cell in blends.items()},
                    "cells": [
                        {k: None if v == math.inf else v for k, v in asdict(cell).items()}
                        for cell in all_cells
                    ],
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
