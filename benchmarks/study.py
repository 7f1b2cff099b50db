"""All methods on one task, several seeds each: a table, learning curves, and what differs from
what was published.

    python benchmarks/study.py [--seeds N] [--update PATH]

Every run is one of `python -m opdc demo`: the built-in task, teacher and student, the same loop. A
run that has ended is kept in the JSON file at once, and the same command goes on from there; a file
of other settings is an error unless `--fresh` begins anew. Two runs at a time, a thread each, on
two processors. `--update` puts the report between the markers of a Markdown file.

The statements of the report are made from the numbers. A difference of two methods is that of their
means over the seeds, which share prompts and problems; it counts as one if the 95 % interval of the
paired differences (Student's t, and no narrower than the binomial error of the answers that were
counted) leaves zero out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # the models come with the package

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

import opdc.info
from opdc import demo
from opdc.bench.measure import machine
from opdc.bench.report import machine as machine_in_words
from opdc.bench.report import replace_sections
from opdc.demo.command import progress
from opdc.demo.compare import Task, results_of
from opdc.demo.evaluate import Score
from opdc.demo.methods import METHODS
from opdc.demo.report import Result
from opdc.demo.rollouts import STUDENT
from opdc.demo.training import Run

RESULTS = Path(__file__).resolve().parent / "results"
EPSILON = 0.1  # nats: the budget of TRB here; it lasts for half of the updates
SCORES = 10  # of a run, beside the one before it
MAIN = "T = 0.6"  # the decoding at which methods are set in order
DECODINGS = (MAIN, "T = 1", "greedy")
DIVERGENCE = "reverse KL"
# The 97.5 % points of Student's t for 1, 2, … degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Key(NamedTuple):
    """What is compared: a method of the demo and who writes its rollouts."""

    method: str
    rollout: str = STUDENT


START = Key("before training", "")

K1, CLIP, MASK, GOPD = Key("k1"), Key("k1_clip"), Key("k1_mask"), Key("gopd")
EOPD, REOPOLD, AOPD, LSM = Key("eopd"), Key("reopold"), Key("aopd"), Key("lsm")
TAIL, FORWARD_TOP = Key("reverse_kl_tail"), Key("forward_kl_top")
OUTLIER, TROPD = Key("tropd"), Key("tropd", "teacher-prefix")
REVERSE, REVERSE_TRB = Key("reverse_kl"), Key("reverse_kl", "trb")
FORWARD, JSD = Key("forward_kl"), Key("jsd")


class Row(NamedTuple):
    """A line of the table."""

    title: str
    short: str  # beside its curve
    published: float | None = None  # mean accuracy in per cent, from one table of one paper


ROWS = {
    K1: Row("OPD: `k1`", "k1", 46.79),
    CLIP: Row('clip: `tropd(region="threshold", outlier="clip")`', "clip", 47.86),
    MASK: Row('mask: `tropd(region="threshold", outlier="mask")`', "mask", 47.72),
    LSM: Row("LSM: `lsm`, K = 32", "LSM"),
    TROPD: Row("TrOPD: `tropd` after prefixes of the teacher", "TrOPD + prefix", 49.85),
    OUTLIER: Row("FKL outlier: `tropd` alone", "FKL outlier", 49.00),
    EOPD: Row("EOPD: `eopd`", "EOPD"),
    REOPOLD: Row("REOPOLD: `reopold`", "REOPOLD"),
    AOPD: Row("AOPD's routing: `aopd`", "AOPD"),
    GOPD: Row("G-OPD: `k1(reward_scale=1.25)`", "G-OPD"),
    TAIL: Row('`reverse_kl`, top 32, `normalize="tail"`', "top 32 + tail"),
    REVERSE: Row("`reverse_kl`", "reverse KL"),
    REVERSE_TRB: Row("`reverse_kl`, rollouts of TRB", "reverse KL, TRB"),
    FORWARD_TOP: Row('`forward_kl`, top 64, `normalize="none"`', "forward, top 64"),
    FORWARD: Row("`forward_kl`", "forward KL", 1.40),
    JSD: Row("`jsd(beta=0.5)`", "JSD"),
}
PUBLISHED_START = 41.27
SOURCE = "arXiv 2606.01249"

PANELS = {
    "the sampled token": (K1, CLIP, MASK, GOPD, EOPD, REOPOLD),
    "the sampled token, or the top K": (OUTLIER, TROPD, AOPD),
    "the teacher's top K": (LSM, TAIL, FORWARD_TOP),
    "the whole vocabulary": (REVERSE, REVERSE_TRB, FORWARD, JSD),
}
INKS = ("#1f5fa8", "#d9381e", "#3a8f5c", "#a0522d", "#7a1fa2", "#d9a300")


# ---- the published claims --------------------------------------------------------------------

HOLDS, OPEN, OPPOSITE = "as published", "no difference beyond noise", "the other way round"


class Claim(NamedTuple):
    """`better` was published to end above `worse`. `otherwise` explains a result against it."""

    better: Key
    worse: Key
    text: str
    source: str
    otherwise: str = ""


CLAIMS = (
    Claim(CLIP, K1, "Clipping the advantage from below helps", SOURCE),
    Claim(MASK, K1, "Masking the tokens below the floor helps", SOURCE),
    Claim(
        OUTLIER,
        CLIP,
        "Teaching the outliers by forward KL is better than clipping them",
        SOURCE,
    ),
    Claim(
        TROPD,
        OUTLIER,
        "Prefixes of the teacher help TrOPD",
        SOURCE,
        "The first updates have few of the student's own tokens to learn from, and this student's "
        "rollouts are well formed from the start: presumably there is nothing for a prefix to put "
        "right.",
    ),
    Claim(
        START,
        FORWARD,
        "Forward KL everywhere collapses",
        SOURCE,
        "Presumably because this teacher is nearly deterministic where it matters and the answers "
        "are short, so that covering its modes does no harm.",
    ),
    Claim(LSM, K1, "Matching on the teacher's top K beats the sampled token", "arXiv 2603.25562"),
    Claim(
        EOPD,
        K1,
        "Forward KL where the teacher is unsure helps",
        "arXiv 2603.07079",
        "By construction: the gate opens at a teacher entropy above 0.8 nats, which on this task "
        "only the filler words have. They are drawn at random, and there is nothing to learn.",
    ),
    Claim(
        REOPOLD,
        K1,
        "REOPOLD's two phases help",
        "arXiv 2603.11137",
        "Its second phase trains on the fifth of the tokens of which the student is least sure. "
        "Here these are mostly filler words, and nothing holds the arithmetic.",
    ),
    Claim(AOPD, K1, "Forward KL in the place of negative advantages helps", "arXiv 2605.06387"),
    Claim(
        GOPD,
        K1,
        "Going beyond the teacher, λ = 1.25, helps",
        "G-OPD",
        "The teacher is right in nearly all of its answers: there is nothing beyond it to go to.",
    ),
    Claim(
        REVERSE_TRB,
        REVERSE,
        "Rollouts within a trust region around the student help (TRB)",
        "arXiv 2605.31159",
        "The student's rollouts are well formed and short from the start: presumably the teacher "
        "can score them as they are, and a blend has nothing to put right.",
    ),
)


@dataclass(frozen=True)
class Difference:
    """Paired over the seeds, in shares: the mean and half of its 95 % interval."""

    mean: float
    margin: float  # infinite with one seed

    @property
    def verdict(self) -> str:
        """Of a claim that the difference is above zero."""
        if abs(self.mean) <= self.margin:
            return OPEN
        return HOLDS if self.mean > 0 else OPPOSITE

    def __str__(self) -> str:
        mark = "" if self.verdict == OPEN else "**"
        text = signed(self.mean)
        if math.isfinite(self.margin):
            text += f" ± {100 * self.margin:.1f}"
        return f"{mark}{text}{mark}"


def signed(share: float) -> str:
    """Of a share, in points."""
    return f"{100 * share:+.1f}".replace("-", "−")


# ---- the runs --------------------------------------------------------------------------------


@dataclass
class Study:
    """What has been measured so far; `save` and `load` keep it."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    before: Score
    teacher: Score
    seconds: float = 0.0  # of all sessions
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, result: Result) -> None:
        self.runs.append(
            {
                "method": result.method,
                "rollout": result.rollout,
                "seed": result.seed,
                "failure": result.failure,
                "seconds": {name: round(spent, 3) for name, spent in result.seconds.items()},
                "scores": [dataclasses.asdict(score) for score in result.scores],
            }
        )

    def save(self, path: Path) -> None:
        """Whole or not at all, whenever the process may be stopped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> Study:
        found = json.loads(path.read_text())
        found["before"], found["teacher"] = Score(**found["before"]), Score(**found["teacher"])
        return cls(**found)

    def seeds_of(self, key: Key) -> set[int]:
        return {run["seed"] for run in self.runs if (run["method"], run["rollout"]) == key}

    def finished(self) -> dict[Key, list[dict[str, Any]]]:
        """The complete runs of each row that has any, in the order of their seeds."""
        runs = sorted(
            (run for run in self.runs if run["failure"] is None), key=lambda run: int(run["seed"])
        )
        found = {
            key: [run for run in runs if (run["method"], run["rollout"]) == key] for key in ROWS
        }
        return {key: its_runs for key, its_runs in found.items() if its_runs}

    # What the runs gave, a number for each seed.

    def values(self, key: Key, name: str, index: int = -1) -> dict[int, float]:
        if key == START:
            seeds = {run["seed"] for run in self.runs}
            return dict.fromkeys(seeds, number_of(dataclasses.asdict(self.before), name))
        return {
            run["seed"]: number_of(run["scores"][index], name)
            for run in self.finished().get(key, [])
        }

    def mean(self, key: Key, name: str, index: int = -1) -> float:
        return statistics.fmean(self.values(key, name, index).values())

    def difference(self, better: Key, worse: Key, name: str) -> Difference | None:
        """Of the seeds that both have; None where there are none."""
        one, other = self.values(better, name), self.values(worse, name)
        seeds = one.keys() & other.keys()
        if not seeds:
            return None
        pairs = [one[seed] - other[seed] for seed in seeds]
        # A few seeds may agree by accident: no narrower than the error of counting answers. The
        # start was counted once, whatever the seeds.
        counting = 0.0
        if name != DIVERGENCE:
            variance = 0.0
            for key, values in ((better, one), (worse, other)):
                mean = statistics.fmean(values[seed] for seed in seeds)
                variance += mean * (1 - mean) / (1 if key == START else len(seeds))
            counting = 1.96 * (variance / self.settings["problems"]) ** 0.5
        return Difference(statistics.fmean(pairs), max(margin_of(pairs), counting))


def number_of(score: dict[str, Any], name: str) -> float:
    return float(score["reverse_kl"] if name == DIVERGENCE else score["exact_match"][name])


def spread_of(values: list[float]) -> float:
    """The standard deviation; 0 of one number."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def margin_of(values: list[float]) -> float:
    """Half of the 95 % interval of the mean."""
    if len(values) < 2:
        return math.inf
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def run_arguments(key: Key, settings: dict[str, Any]) -> argparse.Namespace:
    """Those of `python -m opdc demo` for a run."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    arguments = parser.parse_args([])
    names = ("steps", "batch", "learning_rate", "temperature", "max_new_tokens", "epsilon")
    for name in names:
        setattr(arguments, name, settings[name])
    arguments.rollout = key.rollout
    return arguments


def begin(settings: dict[str, Any]) -> Study:
    """Score what all runs begin with, and the teacher."""
    run = Run(run_arguments(K1, settings), K1.method, seed=0)
    before = run.evaluation(run.pair.student, 0)
    teacher = run.evaluation(run.pair.teacher, 0)
    settings = {**settings, "problems": run.result.evaluation_problems}
    return Study(settings, machine(), before, teacher)


def changed(study: Study, settings: dict[str, Any]) -> list[str]:
    """The settings in which what was measured differs from what is wanted."""
    return [
        f"{name} {study.settings[name]}, now {value}"
        for name, value in settings.items()
        if study.settings[name] != value
    ]


def measure(study: Study, path: Path, keys: list[Key], seeds: int, jobs: int) -> None:
    """The runs that are not there yet, seed by seed: all methods have as many as each other."""
    tasks = [
        Task(run_arguments(key, study.settings), key.method, seed, study.before, SCORES)
        for seed in range(seeds)
        for key in keys
        if seed not in study.seeds_of(key)
    ]
    if not tasks:
        return
    started, earlier = time.monotonic(), study.seconds
    done = 0
    bar = progress(f"{len(tasks)} runs")
    with bar:
        task = bar.add_task("starting", total=len(tasks) * study.settings["steps"])
        results = results_of(
            tasks, min(jobs, len(tasks)), lambda updates: bar.update(task, completed=updates)
        )
        for result in results:
            study.add(result)
            study.seconds = round(earlier + time.monotonic() - started, 1)
            study.save(path)
            done += 1
            row = ROWS[Key(result.method, result.rollout)]
            text = f"{row.short}, seed {result.seed} done; {len(tasks) - done} left"
            bar.update(task, description=text)


# ---- the report ------------------------------------------------------------------------------


def report(study: Study) -> str:
    """What stands between the markers: Markdown."""
    parts = [*table(study), "", *remarks(study), "", *claims_table(study)]
    differing = list(differences(study))
    if differing:
        parts += ["", "Where the run differs from what was published:", ""]
        parts += [f"* {text}" for text in differing]
    parts += ["", "More of what the run shows:", ""]
    parts += [f"* {text}" for text in observations(study)]
    return "\n".join(["", *parts, ""])


def by_accuracy(study: Study) -> list[Key]:
    """The rows, the best first."""
    return sorted(study.finished(), key=lambda key: -study.mean(key, MAIN))


def table(study: Study) -> list[str]:
    order = by_accuracy(study)
    published = sorted(
        (key for key in order if ROWS[key].published), key=lambda key: -(ROWS[key].published or 0)
    )
    lines = [
        f"| method | published | here, {MAIN} | T = 1 | greedy | reverse KL | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    place = 0
    for key in order:
        row = ROWS[key]
        theirs = ours = ""
        if row.published:
            place += 1
            theirs = f"{row.published:.2f} ({published.index(key) + 1})"
            ours = f" ({place})"
        cells = [cell(study, key, name) for name in DECODINGS]
        cells[0] += ours
        lines.append(
            f"| {row.title} | {theirs} | {' | '.join(cells)} | {cell(study, key, DIVERGENCE)} | "
            f"{statistics.fmean(training_seconds(study, key)):.0f} |"
        )
    for title, published_number, score in (
        ("*before training*", f"{PUBLISHED_START:.2f}", study.before),
        ("*teacher*", "", study.teacher),
    ):
        shares = " | ".join(f"{100 * score.exact_match[name]:.1f}" for name in DECODINGS)
        lines.append(f"| {title} | {published_number} | {shares} | {score.reverse_kl:.3f} | |")
    return lines


def cell(study: Study, key: Key, name: str) -> str:
    values = list(study.values(key, name).values())
    mean, spread = statistics.fmean(values), spread_of(values)
    if name == DIVERGENCE:
        return f"{mean:.3f}" + (f" ± {spread:.3f}" if len(values) > 1 else "")
    return f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if len(values) > 1 else "")


def training_seconds(study: Study, key: Key) -> list[float]:
    return [
        sum(spent for name, spent in run["seconds"].items() if name != "evaluation")
        for run in study.finished()[key]
    ]


def remarks(study: Study) -> list[str]:
    settings = study.settings
    counts = {len(runs) for runs in study.finished().values()}
    seeds = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return [
        f"Per cent of {settings['problems']} problems that are answered rightly, by way of "
        f"decoding; mean ± standard deviation over {seeds} seeds of prompts and sampling, from one "
        f"student. Reverse KL: nats per token on the student's own rollouts. "
        f"{settings['steps']} updates of {settings['batch']} rollouts, learning rate "
        f"{settings['learning_rate']:g}; seconds of training, {settings['jobs']} runs at a time, a "
        f"thread each. *Published*: mean accuracy of a 1.5B student on mathematics ({SOURCE}); in "
        f"brackets the places of these methods there and here, at {MAIN}. "
        f"{machine_in_words({'machine': study.machine})}; {study.seconds / 60:.0f} minutes in all.",
        *(
            f"Given up: {ROWS[Key(run['method'], run['rollout'])].short}, seed {run['seed']}: "
            f"{run['failure']}."
            for run in study.runs
            if run["failure"] is not None
        ),
    ]


def judged(study: Study) -> Iterator[tuple[Claim, Difference]]:
    for claim in CLAIMS:
        found = study.difference(claim.better, claim.worse, MAIN)
        if found is not None:
            yield claim, found


def claims_table(study: Study) -> list[str]:
    lines = [
        f"| published | source | difference here, {MAIN} | T = 1 | greedy | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for claim, at_main in judged(study):
        others = [study.difference(claim.better, claim.worse, name) for name in DECODINGS[1:]]
        short = " − ".join(
            ROWS[key].short if key in ROWS else "start" for key in (claim.better, claim.worse)
        )
        cells = " | ".join(str(found) for found in (at_main, *others))
        lines.append(f"| {claim.text}: {short} | {claim.source} | {cells} | {at_main.verdict} |")
    lines += [
        "",
        "Points of accuracy, mean of the paired differences ± half of their 95 % interval "
        "(Student's t, and no narrower than the binomial error); bold where it leaves zero out.",
    ]
    return lines


def differences(study: Study) -> Iterator[str]:
    """A sentence or two on each claim that the run does not bear out."""
    for claim, found in judged(study):
        if found.verdict == HOLDS:
            continue
        ends = (
            f"{share(study, claim.better)} against {share(study, claim.worse)} at {MAIN}, "
            f"{found.verdict}"
        )
        text = f"**{claim.text}** ({claim.source}). Here: {ends}."
        if claim.worse == FORWARD and found.mean < 0:
            best = by_accuracy(study)[0]
            ahead = (
                "it is the best row"
                if best == FORWARD
                else f"it is behind only {place_of(study, FORWARD)} of {len(study.finished())} rows"
            )
            text = (
                f"**{claim.text}** ({claim.source}: 1.40 after {PUBLISHED_START:.2f}). Here it "
                f"goes from {share(study, START)} to {share(study, FORWARD)} at {MAIN}; {ahead}."
            )
        if claim.better == REOPOLD:
            text += " " + reopold_course(study)
        yield f"{text} {claim.otherwise}".rstrip()


def place_of(study: Study, key: Key) -> int:
    """How many rows are above it."""
    return by_accuracy(study).index(key)


def share(study: Study, key: Key, name: str = MAIN) -> str:
    return f"{100 * study.mean(key, name):.1f} %"


def reopold_course(study: Study) -> str:
    """Where it stood when its second phase began, and at the end."""
    runs = study.finished()[REOPOLD]
    steps = [score["updates"] for score in runs[0]["scores"]]
    switch = study.settings["steps"] / 3
    index = max(i for i, updates in enumerate(steps) if updates <= switch)
    then, last = study.mean(REOPOLD, MAIN, index), study.mean(REOPOLD, MAIN)
    fate = "falls after its switch" if last < then - 0.02 else "does not fall after its switch"
    return (
        f"It {fate} to the second phase, after a third of the updates: {100 * then:.1f} % at "
        f"update {steps[index]}, {100 * last:.1f} % at the end."
    )


def observations(study: Study) -> Iterator[str]:
    """What else the numbers say, each only where its rows are there."""
    order = by_accuracy(study)
    done = study.finished()
    listed = ", ".join(f"{ROWS[key].short} {share(study, key)}" for key in order[:3])
    last = f"{ROWS[order[-1]].short} {share(study, order[-1])}"
    yield f"The best at {MAIN}: {listed}; the last: {last}."
    if K1 in done:
        start, end = (study.mean(key, "greedy") for key in (START, K1))
        moved = study.difference(K1, START, "greedy")
        sampled = study.difference(K1, START, "T = 1")
        assert moved and sampled
        if moved.verdict == OPPOSITE and sampled.verdict == HOLDS:
            yield (
                f"OPD raises what is sampled at T = 1 by {signed(sampled.mean)} points and lowers "
                f"greedy decoding from {100 * start:.1f} % to {100 * end:.1f} %: presumably the "
                "noise of its gradient."
            )
        else:
            yield (
                f"OPD takes greedy decoding from {100 * start:.1f} % to {100 * end:.1f} %, and "
                f"sampling at T = 1 from {share(study, START, 'T = 1')} to "
                f"{share(study, K1, 'T = 1')}."
            )
    if OUTLIER in done and CLIP in done:
        warm, cool = (study.difference(OUTLIER, CLIP, name) for name in ("T = 1", MAIN))
        assert warm and cool
        if cool.verdict == HOLDS and warm.mean < cool.mean / 2:
            gains = f"{signed(cool.mean)} points at {MAIN}, {signed(warm.mean)} at T = 1"
            yield (
                f"What forward KL for the outliers gains over clipping is {gains}: its pull on a "
                "wrong token is bounded, which moves the mode quickly and cleans the tail slowly."
            )
    if LSM in done and REVERSE in done:
        found = study.difference(REVERSE, LSM, MAIN)
        tail = study.difference(TAIL, LSM, MAIN)
        assert found
        text = f"The whole vocabulary against the teacher's top 32 (LSM): {found} points"
        if tail:
            text += f"; one bucket for the rest of the vocabulary: {tail}"
        yield f"{text}."
    if K1 in done and REVERSE in done:
        found = study.difference(REVERSE, K1, MAIN)
        assert found
        yield f"`reverse_kl` against `k1`, the same divergence without sampling: {found} points."
    yield (
        "The intervals are those of prompts and sampling in training, from this one student and "
        "on these problems. Students of the same recipe with other seeds begin at 27 to 96 % "
        "greedily (`benchmarks/train_demo_models.py`): compare methods from one student only."
    )


# ---- the curves ------------------------------------------------------------------------------


def save_plot(study: Study, path: Path) -> None:
    """A column for each family of losses, with `k1` in all of them."""
    done = study.finished()
    panels = {
        title: [key for key in keys if key in done]
        for title, keys in PANELS.items()
        if any(key in done for key in keys)
    }
    figure = Figure(figsize=(4.1 * len(panels), 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
    for axes, name in zip(rows, (MAIN, DIVERGENCE), strict=True):
        for axis, (title, keys) in zip(axes, panels.items(), strict=True):
            if K1 in done and K1 not in keys:
                draw(axis, study, K1, name, "#888888", is_reference=True)
            for key, ink in zip(keys, INKS, strict=False):
                draw(axis, study, key, name, ink)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if name == DIVERGENCE:
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(ScalarFormatter())
                axis.yaxis.set_minor_formatter(NullFormatter())
                axis.set_xlabel("updates")
            else:
                axis.set_title(title, fontsize=11)
                axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    rows[0, 0].set_ylabel(f"right answers, {MAIN}")
    rows[1, 0].set_ylabel("reverse KL on policy, nats per token")
    last = study.settings["steps"]
    rows[0, 0].set_xlim(0, 1.48 * last)  # room for the names
    rows[0, 0].set_xticks([round(last * part / 4) for part in range(5)])
    counts = [len(runs) for runs in done.values()]
    figure.suptitle(
        f"On-policy distillation, {study.settings['batch']} rollouts an update, "
        f"{max(counts)} seeds: mean, and a band of one standard deviation"
    )
    figure.canvas.draw()  # the limits are known from here on
    for axes, name in zip(rows, (MAIN, DIVERGENCE), strict=True):
        for axis, keys in zip(axes, panels.values(), strict=True):
            write_names(axis, study, keys, name)
    figure.savefig(path, format="png", dpi=110)


def draw(
    axis: Any, study: Study, key: Key, name: str, ink: str, *, is_reference: bool = False
) -> None:
    runs = study.finished()[key]
    updates = [score["updates"] for score in runs[0]["scores"]]
    values = [list(study.values(key, name, index).values()) for index in range(len(updates))]
    means = [statistics.fmean(found) for found in values]
    spreads = [spread_of(found) for found in values]
    style = {"linewidth": 1.2, "linestyle": ":"} if is_reference else {"linewidth": 1.8}
    axis.plot(updates, means, color=ink, **style)
    if not is_reference:
        # On a logarithmic axis the band must not reach zero.
        low = [max(m - s, 0.02 * m) for m, s in zip(means, spreads, strict=True)]
        high = [m + s for m, s in zip(means, spreads, strict=True)]
        axis.fill_between(updates, low, high, color=ink, alpha=0.15, linewidth=0)


def write_names(axis: Any, study: Study, keys: list[Key], name: str) -> None:
    """Each name at the end of its curve, moved up or down where two would touch."""
    shown = list(zip(keys, INKS, strict=False))
    if K1 in study.finished() and K1 not in keys:
        shown.append((K1, "#888888"))
    last = study.settings["steps"]
    low, high = axis.transData.transform([(0, limit) for limit in axis.get_ylim()])[:, 1]
    heights = {key: axis.transData.transform((last, study.mean(key, name)))[1] for key, _ in shown}
    gap = 15.0  # pixels
    order = sorted(heights, key=lambda key: heights[key])
    places: dict[Key, float] = {}
    floor = low
    for key in order:
        places[key] = floor = max(heights[key], floor)
        floor += gap
    ceiling = high
    for key in reversed(order):
        places[key] = ceiling = min(places[key], ceiling)
        ceiling -= gap
    for key, ink in shown:
        y = axis.transData.inverted().transform((0, places[key]))[1]
        axis.text(1.03 * last, y, ROWS[key].short, color=ink, fontsize=9, va="center")


# ---- the command -----------------------------------------------------------------------------


def main(words: list[str] | None = None) -> int:
    defaults = run_arguments(K1, {**demo_defaults(), "epsilon": EPSILON})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of each method (default: 3)")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="updates of a run")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="rollouts of an update")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="rows whose method has one of these names"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(2, opdc.info.usable_cpus()), help="runs at a time"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of study.json, .png")
    parser.add_argument("--fresh", action="store_true", help="forget the runs of earlier")
    parser.add_argument("--report", action="store_true", help="measure nothing: show what is there")
    parser.add_argument("--update", type=Path, help="put the report between its markers")
    arguments = parser.parse_args(words)
    for name in ("seeds", "steps", "batch", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} is not positive")
    for name in arguments.only or ():
        if name not in METHODS:
            parser.error(f"--only {name}: one of {', '.join(key.method for key in ROWS)}")
    keys = [key for key in ROWS if not arguments.only or key.method in arguments.only]

    path = arguments.output / "study.json"
    settings = {
        "steps": arguments.steps,
        "batch": arguments.batch,
        "learning_rate": defaults.learning_rate,
        "temperature": defaults.temperature,
        "max_new_tokens": defaults.max_new_tokens,
        "epsilon": EPSILON,
        "jobs": arguments.jobs,
    }
    if arguments.report:
        if not path.exists():
            parser.error(f"--report: no {path}")
        study = Study.load(path)
    else:
        if path.exists() and not arguments.fresh:
            study = Study.load(path)
            if differing := changed(study, settings):
                parser.error(
                    f"{path} is of other settings: {'; '.join(differing)}. --fresh begins anew"
                )
        else:
            study = begin(settings)
            study.save(path)
        try:
            measure(study, path, keys, arguments.seeds, arguments.jobs)
        except KeyboardInterrupt:
            print(f"\nstopped with {len(study.runs)} runs in {path}: the same command goes on")
            return 130
    if not study.finished():
        parser.error(f"no run has come to its end: {[run['failure'] for run in study.runs]}")
    text = report(study)
    save_plot(study, path.with_suffix(".png"))
    print(text)
    if arguments.update:
        updated = replace_sections(arguments.update.read_text(), {"study": text})
        arguments.update.write_text(updated)
    return 0


def demo_defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return vars(parser.parse_args([]))


if __name__ == "__main__":
    raise SystemExit(main())
