"""`demo --method`: one run under a progress bar, and the time of its loss."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from .loop import Update
from .methods import METHODS, set_phase
from .report import LossTiming, print_tables, save_plot
from .training import Run

SCORES_PER_RUN = 10


def run_demo(arguments: argparse.Namespace) -> None:
    run = Run(arguments, arguments.method, arguments.seed)
    result = run.result
    last = _train(run)
    if last is not None:
        result.loss_timing = _time_loss(run, last)

    save_plot(result, arguments.output)
    result.plot = str(arguments.output.resolve())
    if arguments.json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        console = Console(highlight=False)
        print_tables(console, result)
        console.print(f"Plot: {result.plot}", soft_wrap=True)


def progress(title: str) -> Progress:
    return Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True, highlight=False),  # stdout is for the result alone
    )


def _train(run: Run) -> Update | None:
    """Train and score; return the last update made."""
    result = run.result
    last = None
    running = math.nan
    bar = progress(result.method)
    try:
        with bar:
            task = bar.add_task("evaluating", total=result.steps)
            for last in run.updates(SCORES_PER_RUN):
                running = last.loss if math.isnan(running) else 0.9 * running + 0.1 * last.loss
                lines = [f"loss {running:.4f}"]
                if result.behaviour:
                    lines.append(result.behaviour[-1].in_short())
                bar.update(task, advance=1, description="\n".join(lines))
    except KeyboardInterrupt:
        result.interrupted = True
        if not result.scores:
            raise
        bar.console.print(f"Interrupted: here is what {result.updates} updates have reached.")
        with contextlib.suppress(KeyboardInterrupt):  # impatient: the last score has to do
            run.score()
    return last


def _time_loss(run: Run, update: Update) -> LossTiming:
    """Loss and gradient of the same tensors by opdc and by eager PyTorch, taken in turn.

    As of the student's own tokens: without the log-probs and the prefixes of another policy.
    """
    logits = update.student_logits.requires_grad_()
    rollout, temperature = update.rollout, run.result.temperature
    mask = rollout.mask_of(run.loss_function)
    method, reference_logprobs = METHODS[run.result.method], update.reference_logprobs
    reference = () if reference_logprobs is None else (reference_logprobs,)
    set_phase(run.loss_function, 1.0)

    def by_opdc() -> Tensor:
        loss: Tensor = run.loss_function(
            logits,
            update.teacher_logits,
            tokens=rollout.tokens,
            mask=mask,
            reference_logprobs=reference_logprobs,
            temperature=temperature,
        )
        return loss

    def by_hand() -> Tensor:
        return method.by_hand(
            logits[..., : run.pair.valid_vocab] / temperature,
            update.teacher_logits[..., : run.pair.valid_vocab] / temperature,
            rollout.tokens,
            mask,
            *reference,
        )

    seconds: dict[str, list[float]] = {"opdc": [], "eager": []}
    losses = {}
    started = time.perf_counter()
    while len(seconds["opdc"]) < 3 or (
        len(seconds["opdc"]) < 50 and time.perf_counter() - started < 2
    ):
        for name, compute in (("opdc", by_opdc), ("eager", by_hand)):
            logits.grad = None
            torch.manual_seed(run.result.seed)  # the same coins in a loss that tosses some
            start = time.perf_counter()
            loss = compute()
            loss.backward()
            seconds[name].append(time.perf_counter() - start)
            losses[name] = loss.item()
    return LossTiming(
        shape=tuple(logits.shape),
        opdc_seconds=statistics.median(seconds["opdc"]),
        eager_seconds=statistics.median(seconds["eager"]),
        opdc_loss=losses["opdc"],
        eager_loss=losses["eager"],
    )
