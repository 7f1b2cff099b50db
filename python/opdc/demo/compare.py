"""`demo --compare`: methods and seeds side by side, from one student and one teacher."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import signal
from collections.abc import Callable, Generator
from multiprocessing.sharedctypes import Synchronized
from typing import Any, NamedTuple

import torch
from rich.console import Console

import opdc.info

from . import COMPARED
from .command import progress
from .comparison import Comparison, print_comparison, save_comparison_plot
from .evaluate import Score
from .loading import DemoError
from .report import Result
from .training import Run

SEEDS = 3
SCORES_PER_RUN = 5
POLL = 0.3  # seconds


def run_compare(arguments: argparse.Namespace) -> None:
    methods = list(dict.fromkeys(arguments.compare or COMPARED))
    seeds = range(arguments.seed, arguments.seed + (arguments.seeds or SEEDS))
    # Seed by seed: an interruption leaves the methods with as many runs as each other.
    chosen = [(method, seed) for seed, method in itertools.product(seeds, methods)]
    first = Run(arguments, *chosen[0])
    comparison = Comparison(
        methods=methods,
        before=first.evaluation(first.pair.student, 0),
        teacher=first.evaluation(first.pair.teacher, 0),
    )
    del first

    bar = progress("{task.fields[runs]} runs")
    try:
        with bar:
            total = len(chosen) * arguments.steps
            task = bar.add_task("starting", total=total, runs=len(chosen))
            tasks = [Task(arguments, method, seed, comparison.before) for method, seed in chosen]
            with contextlib.closing(
                results_of(
                    tasks,
                    _jobs(arguments, len(tasks)),
                    lambda done: bar.update(task, completed=done),
                )
            ) as results:
                for result in results:
                    comparison.runs.append(result)
                    left = len(tasks) - len(comparison.runs)
                    done = f"{result.method}, seed {result.seed} done; {left} left"
                    bar.update(task, description=done)
    except KeyboardInterrupt:
        if not comparison.finished():
            raise
        comparison.interrupted = True
        bar.console.print(f"Interrupted: here is what {len(comparison.runs)} runs have reached.")
    if not comparison.finished():
        raise DemoError(f"no run came to its end: {comparison.runs[0].failure}")

    save_comparison_plot(comparison, arguments.output)
    comparison.plot = str(arguments.output.resolve())
    if arguments.json:
        print(json.dumps(comparison.as_json(), indent=2))
    else:
        console = Console(highlight=False)
        print_comparison(console, comparison)
        console.print(f"Plot: {comparison.plot}", soft_wrap=True)


def _jobs(arguments: argparse.Namespace, runs: int) -> int:
    """How many runs at a time. Models of one's own use all processors and memory by themselves."""
    own = arguments.student is not None or arguments.teacher is not None
    wanted: int = arguments.jobs or (1 if own else opdc.info.usable_cpus())
    return min(wanted, runs)


class Task(NamedTuple):
    """A run that is to be made."""

    arguments: argparse.Namespace
    method: str
    seed: int
    before: Score  # of the student
    scores: int = SCORES_PER_RUN


def results_of(
    tasks: list[Task], jobs: int, report: Callable[[int], None]
) -> Generator[Result, None, None]:
    """The result of each run as it comes, `jobs` at a time in processes of their own.

    `report` is told the number of updates so far.
    """
    if jobs == 1:
        counter = itertools.count(1)
        for task in tasks:
            yield _one(task, lambda: report(next(counter)))
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    done = context.Value("q", 0)
    threads = max(1, opdc.info.usable_cpus() // jobs)
    # Ctrl-C is for this process, which then ends the workers: they inherit that it is ignored.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool = context.Pool(jobs, _begin_worker, (done, threads))
    signal.signal(signal.SIGINT, on_interrupt)
    with pool:
        results = pool.imap_unordered(_one_in_worker, tasks)
        while True:
            report(done.value)
            try:
                yield results.next(timeout=POLL)
            except multiprocessing.TimeoutError:
                continue
            except StopIteration:
                return


def _one(task: Task, on_update: Callable[[], Any]) -> Result:
    run = Run(task.arguments, task.method, task.seed)
    run.result.scores.append(task.before)
    try:
        for _ in run.updates(task.scores):
            on_update()
    except DemoError as error:  # the other runs go on
        run.result.failure = str(error)
    return run.result


_updates: Synchronized[int]  # of all workers together


def _begin_worker(updates: Synchronized[int], threads: int) -> None:
    global _updates
    _updates = updates
    torch.set_num_threads(threads)


def _one_in_worker(task: Task) -> Result:
    return _one(task, _count_update)


def _count_update() -> None:
    with _updates.get_lock():
        _updates.value += 1
