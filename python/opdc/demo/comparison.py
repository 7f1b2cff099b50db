"""What `demo --compare` shows at the end: a table, a plot, or the same as one JSON object."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console

from .evaluate import Score
from .methods import METHODS
from .report import Result, plain_table, print_remarks, written_by

DIVERGENCE = "reverse KL on policy"


@dataclass
class Comparison:
    """Runs of several methods and seeds from the same student, scored on the same problems."""

    methods: list[str]
    before: Score
    teacher: Score
    interrupted: bool = False
    runs: list[Result] = dataclasses.field(default_factory=list)
    plot: str | None = None

    def finished(self) -> dict[str, list[Result]]:
        """The complete runs of each method that has any, in the order of their seeds."""
        runs = sorted((run for run in self.runs if not run.failure), key=lambda run: run.seed)
        found = {method: [run for run in runs if run.method == method] for method in self.methods}
        return {method: runs for method, runs in found.items() if runs}

    def as_json(self) -> dict[str, Any]:
        final = {
            method: {
                name: {"mean": statistics.fmean(values), "spread": _spread(values)}
                for name, values in _over_runs(runs, -1).items()
            }
            for method, runs in self.finished().items()
        }
        return {"final": final, **dataclasses.asdict(self)}


def _numbers(score: Score) -> dict[str, float]:
    return {**score.exact_match, DIVERGENCE: score.reverse_kl}


def _over_runs(runs: list[Result], index: int) -> dict[str, list[float]]:
    """The numbers of one of the scores, each with its values in all runs."""
    scores = [_numbers(run.scores[index]) for run in runs]
    return {name: [score[name] for score in scores] for name in scores[0]}


def _spread(values: list[float]) -> float:
    """The standard deviation over the seeds; 0 if there is but one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def print_comparison(console: Console, comparison: Comparison) -> None:
    finished = comparison.finished()
    first = next(iter(finished.values()))[0]
    most = max(len(runs) for runs in finished.values())
    table = plain_table(
        f"On-policy distillation, {first.steps} updates of {first.batch} rollouts, "
        + (f"mean ± standard deviation of {most} seeds" if most > 1 else f"seed {first.seed}"),
        tuple(_numbers(comparison.before)),
        label_width=12,
    )
    captions = [written_by(first).capitalize()]
    if first.scores[0].exact_match:
        captions.append(
            "Exact match of the answers, by way of decoding; reverse KL in nats per token"
        )
    table.caption = "\n".join(filter(None, captions))
    table.add_row("before", *_cells({k: [x] for k, x in _numbers(comparison.before).items()}))
    table.add_section()
    for method, runs in finished.items():
        table.add_row(f"[bold]{method}[/]", *_cells(_over_runs(runs, -1)))
    table.add_section()
    table.add_row("teacher", *_cells({k: [x] for k, x in _numbers(comparison.teacher).items()}))
    console.print()
    console.print(table)
    console.print()
    for run in comparison.runs:
        if run.failure:
            console.print(f"Left out: {run.method}, seed {run.seed}: {run.failure}")
    text = "The spread is that of prompts and sampling; other students can differ by more."
    if first.scores[0].exact_match:
        # Of a share near one half, where it is largest.
        error = 50 / first.evaluation_problems**0.5
        text += (
            f" {first.evaluation_problems} problems tell a share to within ± {error:.0f} points."
        )
    console.print(text + "\n")
    print_remarks(console, list(finished), first)


def _cells(values: dict[str, list[float]]) -> list[str]:
    cells = []
    for name, found in values.items():
        mean, spread = statistics.fmean(found), _spread(found)
        if name == DIVERGENCE:
            cells.append(f"{mean:.3f}" + (f" ± {spread:.3f}" if len(found) > 1 else ""))
        else:
            cells.append(f"{mean:.1%}" + (f" ± {100 * spread:4.1f}" if len(found) > 1 else ""))
    return cells


def save_comparison_plot(comparison: Comparison, path: Path) -> None:
    """Learning curves: the mean of each method over its seeds, and a band of one deviation."""
    finished = comparison.finished()
    first = next(iter(finished.values()))[0]
    names = [DIVERGENCE]
    if comparison.before.exact_match:
        # The decoding at which methods differ most; the table has the others.
        names.insert(0, "T = 0.6" if "T = 0.6" in comparison.before.exact_match else "greedy")
    figure = Figure(figsize=(5.2 * len(names) + 1.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"On-policy distillation, {first.batch} rollouts an update, seeds: "
        f"{max(len(runs) for runs in finished.values())}\n{written_by(first)}".rstrip(),
        fontsize=11,
    )
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for method, runs in _best_first(finished, names[0]):
            updates = [score.updates for score in runs[0].scores]
            values = [_over_runs(runs, index)[name] for index in range(len(updates))]
            means = [statistics.fmean(found) for found in values]
            color = METHODS[method].color
            axes.plot(updates, means, color=color, marker="o", markersize=3, label=method)
            if len(runs) > 1:
                low = [mean - _spread(found) for mean, found in zip(means, values, strict=True)]
                high = [mean + _spread(found) for mean, found in zip(means, values, strict=True)]
                axes.fill_between(updates, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_xlabel("updates")
        axes.set_xlim(0, 1.02 * first.steps)
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if name == DIVERGENCE:
            axes.set_title(f"{name}, nats per token", fontsize=10)
            axes.set_ylim(bottom=0)
        else:
            axes.set_title(f"exact match, {name}", fontsize=10)
            teacher = comparison.teacher.exact_match[name]
            axes.axhline(teacher, color="#777777", linestyle=":", linewidth=1.2, label="teacher")
            axes.set_ylim(0, 1.04)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _best_first(finished: dict[str, list[Result]], name: str) -> list[tuple[str, list[Result]]]:
    """The methods in the order of their last points, for the legend to follow the curves."""

    def last(item: tuple[str, list[Result]]) -> float:
        return statistics.fmean(_over_runs(item[1], -1)[name])

    return sorted(finished.items(), key=last, reverse=name != DIVERGENCE)
