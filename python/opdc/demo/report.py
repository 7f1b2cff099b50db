"""What the demo shows at the end: tables, a plot, or the same as one JSON object."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from .evaluate import Score
from .methods import METHODS
from .rollouts import ROLLOUTS, STUDENT, Behaviour

BUILT_IN = "built in"
COLORS = ("#1f5fa8", "#d9822b", "#3a8f5c")
BEHAVIOUR_ROWS = 6  # of the updates, in the table of what wrote the rollouts


@dataclass(frozen=True)
class LossTiming:
    """Loss and gradient of the last batch: opdc and eager PyTorch on the same tensors."""

    shape: tuple[int, ...]  # (B, C, V)
    opdc_seconds: float
    eager_seconds: float
    opdc_loss: float
    eager_loss: float


@dataclass
class Result:
    """Everything measured in one run, as far as it got."""

    method: str
    rollout: str
    student: str
    teacher: str
    prompts: str
    steps: int
    batch: int
    seed: int
    learning_rate: float
    temperature: float
    max_new_tokens: int
    evaluation_problems: int
    threads: int
    interrupted: bool = False
    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[Score] = dataclasses.field(default_factory=list)
    behaviour: list[Behaviour] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    rollout_seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # part of them
    loss_timing: LossTiming | None = None
    plot: str | None = None
    failure: str | None = None  # why the run was given up

    @property
    def updates(self) -> int:
        return len(self.losses)

    def as_json(self) -> dict[str, Any]:
        return {"updates": self.updates, **dataclasses.asdict(self)}


def print_tables(console: Console, result: Result) -> None:
    console.print()
    console.print(_quality_table(result))
    console.print()
    if result.behaviour:
        console.print(_behaviour_table(result))
        console.print()
    if result.updates:
        console.print(_time_table(result))
        console.print()
    if result.loss_timing:
        console.print(_timing_text(result.loss_timing))
        console.print()
    print_remarks(console, [result.method], result)


def print_remarks(console: Console, methods: list[str], result: Result) -> None:
    """What not to promise of methods and rollouts, where it is known: on the built-in task."""
    if {result.student, result.teacher, result.prompts} == {BUILT_IN}:
        remarks = {method: METHODS[method].remark for method in methods}
        for name, remark in {**remarks, result.rollout: ROLLOUTS[result.rollout]}.items():
            if remark:
                console.print(f"[bold]{name}[/] {remark}.")
                console.print()


def plain_table(title: str, headings: tuple[str, ...], label_width: int = 37) -> Table:
    """A table of numbers; the widths make those of one report line up."""
    table = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        header_style="",
    )
    table.add_column("", min_width=label_width)
    for heading in headings:
        table.add_column(heading, justify="right", min_width=9)
    return table


def _quality_table(result: Result) -> Table:
    first, last = result.scores[0], result.scores[-1]
    table = plain_table(
        f"On-policy distillation with {result.method}: {last.updates} updates of {result.batch} "
        "rollouts",
        ("before", "after", "change"),
    )
    problems = "problems" if result.prompts == BUILT_IN else "of the training prompts"
    table.caption = (
        f"{result.evaluation_problems} {problems}, the same before and after; seed {result.seed}\n"
        f"{written_by(result)}".rstrip()
    )
    for name, before in first.exact_match.items():
        after = last.exact_match[name]
        change = f"{100 * (after - before):+.1f}"
        table.add_row(f"exact match, {name}", f"{before:.1%}", f"[bold]{after:.1%}[/]", change)
    table.add_row(
        "reverse KL on policy, nats per token",
        f"{first.reverse_kl:.3f}",
        f"[bold]{last.reverse_kl:.3f}[/]",
        f"{last.reverse_kl - first.reverse_kl:+.3f}",
    )
    return table


def written_by(result: Result) -> str:
    """What a caption says where another policy than the student wrote the rollouts."""
    return "" if result.rollout == STUDENT else f"rollouts: {result.rollout}"


def _behaviour_table(result: Result) -> Table:
    """What wrote the rollouts, at updates from the first to the last."""
    seen = result.behaviour
    columns: dict[str, Callable[[Behaviour], str]] = {
        "epsilon": lambda update: f"{update.epsilon:.4f}",
        "mean beta": lambda update: f"{update.beta:.3f}",
        "KL used": lambda update: f"{update.kl:.4f}",
    }
    caption = "Budget and KL from the student in nats; beta: the weight of the teacher"
    if any(update.accepted is not None for update in seen):
        columns["accepted"] = lambda update: (
            "" if update.accepted is None else f"{update.accepted:.1%}"
        )
        caption += ";\naccepted: of the tokens that the student drafted"
    if not any(update.epsilon for update in seen):
        columns = {"teacher's": lambda update: f"{update.prefix:.1%}"}
        caption = "Share of the tokens that the teacher wrote; the student went on from there"
    width = 37 + 12 * (3 - len(columns))  # all tables of a report end in the same place
    table = plain_table(f"What wrote the rollouts: {result.rollout}", tuple(columns), width)
    table.caption = caption
    last = len(seen) - 1
    rows = min(len(seen), BEHAVIOUR_ROWS)
    for index in (round(row * last / max(rows - 1, 1)) for row in range(rows)):
        table.add_row(f"update {index + 1}", *(cell(seen[index]) for cell in columns.values()))
    return table


def _time_table(result: Result) -> Table:
    table = plain_table(
        f"Where the time of an update went (threads: {result.threads})",
        ("seconds", "ms each", "share"),
    )
    parts = {name: spent for name, spent in result.seconds.items() if name != "evaluation"}
    total = sum(parts.values())

    def add(name: str, seconds: float) -> None:
        each = 1e3 * seconds / result.updates
        table.add_row(name, f"{seconds:.2f}", f"{each:.2f}", f"{seconds / total:.1%}")

    for name, seconds in parts.items():
        add(name, seconds)
        if name == "rollout" and result.rollout_seconds:
            for part, spent in result.rollout_seconds.items():
                add(f"  {part}", spent)
            add("  everything else", seconds - sum(result.rollout_seconds.values()))
    table.add_section()
    table.add_row("all updates", f"{total:.2f}", f"{1e3 * total / result.updates:.2f}", "100.0%")
    evaluation = result.seconds["evaluation"]
    table.add_row("evaluations between them", f"{evaluation:.2f}", "", "")
    return table


def _timing_text(timing: LossTiming) -> str:
    responses, tokens, vocabulary = timing.shape
    ratio = timing.eager_seconds / timing.opdc_seconds
    text = (
        f"Loss and gradient of the last batch, {responses} x {tokens} x {vocabulary:,} logits, the "
        f"same tensors:\n  opdc [bold]{1e3 * timing.opdc_seconds:.2f} ms[/], eager PyTorch "
        f"[bold]{1e3 * timing.eager_seconds:.2f} ms[/] ({ratio:.1f}x)"
    )
    if vocabulary < 10_000:
        text += (
            f"\nWith {vocabulary} logits per token the loss is a small part of an update, whoever "
            "computes it.\nIt grows with the vocabulary, 150,000 in today's models: "
            "[bold]python -m opdc bench[/] measures that."
        )
    return text


def save_plot(result: Result, path: Path) -> None:
    """Reverse KL on policy, and exact match where answers are known, over the updates."""
    panels = 2 if result.scores[0].exact_match else 1
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    updates = [score.updates for score in result.scores]
    figure.suptitle(
        f"On-policy distillation with {result.method}, {result.batch} rollouts an update\n"
        f"{written_by(result)}".rstrip(),
        fontsize=11,
    )

    axes[0].set_title("reverse KL on policy, nats per token", fontsize=10)
    divergences = [score.reverse_kl for score in result.scores]
    axes[0].plot(updates, divergences, color=COLORS[0], marker="o", markersize=4)
    axes[0].set_ylim(0, 1.08 * max(divergences) or 1)
    if panels == 2:
        axes[1].set_title("exact match", fontsize=10)
        for name, color in zip(result.scores[0].exact_match, COLORS, strict=False):
            rates = [score.exact_match[name] for score in result.scores]
            axes[1].plot(updates, rates, color=color, marker="o", markersize=4, label=name)
        axes[1].set_ylim(0, 1.02)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[1].legend(frameon=False, loc="lower right")
    for axis in axes:
        axis.set_xlabel("updates")
        axis.set_xlim(0, max(updates[-1], 1) * 1.02)
        axis.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)
