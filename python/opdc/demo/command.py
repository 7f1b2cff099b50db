"""One run of the demo: load, distil, evaluate on the way, report."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import transformers
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

import opdc
from opdc.bench import textbook

from .evaluate import Evaluation
from .loading import DemoError, Pair, check_prompts, knows_the_task, load_pair, read_prompts
from .loop import Clock, Update, distill
from .report import BUILT_IN, LossTiming, Result, print_tables, save_plot
from .task import Arithmetic, Problem, PromptList

LOSSES: dict[str, Callable[..., torch.nn.Module]] = {
    "reverse_kl": opdc.nn.ReverseKLLoss,
    "forward_kl": opdc.nn.ForwardKLLoss,
    "jsd": opdc.nn.JSDLoss,
    "skew_kl": opdc.nn.SkewKLLoss,
    "k1": opdc.nn.K1Loss,
    "k2": opdc.nn.K2Loss,
    "k3": opdc.nn.K3Loss,
}

# The same losses of every token by hand, to compare the time with.
BY_HAND: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "reverse_kl": lambda student, teacher, _: textbook.reverse_kl(student, teacher),
    "forward_kl": lambda student, teacher, _: textbook.forward_kl(student, teacher),
    "jsd": lambda student, teacher, _: textbook.jsd(student, teacher, beta=0.5),
    "skew_kl": lambda student, teacher, _: textbook.skew_forward_kl(student, teacher, alpha=0.1),
    "k1": textbook.k1,
    "k2": textbook.k2,
    "k3": textbook.k3,
}

# The built-in problems are quickly answered; one's own models may need minutes for as many.
BUILT_IN_EVALUATION = 512
OWN_EVALUATION = 64
SCORES_PER_RUN = 10


def run_demo(arguments: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not arguments.output.parent.is_dir():
        raise DemoError(f"--output {arguments.output}: no folder {arguments.output.parent}")
    if arguments.output.is_dir():
        raise DemoError(f"--output {arguments.output}: is a folder, wanted a file name")

    if arguments.student is None and arguments.teacher is None:
        torch.set_num_threads(1)  # the built-in models are too small to be worth a second one
    pair = load_pair(arguments.student, arguments.teacher)
    source, problems = _problems(arguments, pair)
    result = Result(
        method=arguments.method,
        student=str(arguments.student or BUILT_IN),
        teacher=str(arguments.teacher or BUILT_IN),
        prompts=str(arguments.prompts or BUILT_IN),
        steps=arguments.steps,
        batch=arguments.batch,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        evaluation_problems=len(problems),
        threads=torch.get_num_threads(),
    )
    loss_function = LOSSES[arguments.method](valid_vocab=pair.valid_vocab)
    evaluation = Evaluation(
        pair,
        problems,
        batch=arguments.batch if arguments.prompts else BUILT_IN_EVALUATION,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
    )
    last = _distill(pair, loss_function, source, evaluation, result)
    if last is not None:
        result.loss_timing = _time_loss(loss_function, last, pair, result)

    save_plot(result, arguments.output)
    result.plot = str(arguments.output.resolve())
    if arguments.json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        console = Console(highlight=False)
        print_tables(console, result)
        console.print(f"Plot: {result.plot}", soft_wrap=True)


def _problems(
    arguments: argparse.Namespace, pair: Pair
) -> tuple[Arithmetic | PromptList, list[Problem]]:
    """Where the training prompts come from, and the problems to evaluate on."""
    if arguments.prompts is None:
        if not knows_the_task(pair.tokenizer):
            raise DemoError("--prompts is needed: the built-in problems suit the built-in models")
        problems = Arithmetic(seed=1_000_000 + arguments.seed).batch(BUILT_IN_EVALUATION)
        check_prompts(pair, problems, arguments.max_new_tokens)
        return Arithmetic(arguments.seed), problems
    problems = read_prompts(arguments.prompts)
    check_prompts(pair, problems, arguments.max_new_tokens)
    return PromptList(problems, arguments.seed), problems[:OWN_EVALUATION]


def _distill(
    pair: Pair,
    loss_function: torch.nn.Module,
    source: Arithmetic | PromptList,
    evaluation: Evaluation,
    result: Result,
) -> Update | None:
    """Run the loop under a progress bar; fill in the result; return the last update made."""
    console = Console(stderr=True, highlight=False)  # stdout is for the result alone
    clock = Clock()
    last = None
    interval = max(1, result.steps // SCORES_PER_RUN)

    def evaluate() -> None:
        with clock("evaluation"):
            result.scores.append(evaluation(result.updates))

    def batches() -> Iterator[list[str]]:
        for _ in range(result.steps):
            yield [problem.prompt for problem in source.batch(result.batch)]

    bar = Progress(
        TextColumn(result.method),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
    torch.manual_seed(result.seed)
    try:
        with bar:
            task = bar.add_task("evaluating", total=result.steps)
            evaluate()
            running = math.nan
            for last in distill(
                pair.student,
                pair.teacher,
                pair.tokenizer,
                loss_function,
                batches(),
                learning_rate=result.learning_rate,
                temperature=result.temperature,
                max_new_tokens=result.max_new_tokens,
                clock=clock,
            ):
                if not math.isfinite(last.loss):
                    raise DemoError(
                        f"the loss is {last.loss} at update {result.updates + 1}: "
                        "try a smaller --learning-rate"
                    )
                result.losses.append(last.loss)
                running = last.loss if math.isnan(running) else 0.9 * running + 0.1 * last.loss
                bar.update(task, advance=1, description=f"loss {running:.4f}")
                if result.updates % interval == 0 or result.updates == result.steps:
                    evaluate()
    except KeyboardInterrupt:
        result.interrupted = True
        if not result.scores:
            raise
        console.print(f"Interrupted: here is what {result.updates} updates have reached.")
        with contextlib.suppress(KeyboardInterrupt):  # impatient: the last score has to do
            if result.scores[-1].updates != result.updates:
                evaluate()
    finally:
        result.seconds = dict(clock.seconds)
    return last


def _time_loss(
    loss_function: torch.nn.Module, update: Update, pair: Pair, result: Result
) -> LossTiming:
    """Loss and gradient of the same tensors by opdc and by eager PyTorch, taken in turn."""
    logits = update.student_logits.requires_grad_()
    rollout = update.rollout

    def by_opdc() -> Tensor:
        loss: Tensor = loss_function(
            logits,
            update.teacher_logits,
            tokens=rollout.tokens,
            mask=rollout.mask,
            temperature=result.temperature,
        )
        return loss

    def by_hand() -> Tensor:
        per_token = BY_HAND[result.method](
            logits[..., : pair.valid_vocab] / result.temperature,
            update.teacher_logits[..., : pair.valid_vocab] / result.temperature,
            rollout.tokens,
        )
        return (per_token * rollout.mask).sum() / rollout.mask.sum()

    seconds: dict[str, list[float]] = {"opdc": [], "eager": []}
    losses = {}
    started = time.perf_counter()
    while len(seconds["opdc"]) < 3 or (
        len(seconds["opdc"]) < 50 and time.perf_counter() - started < 2
    ):
        for name, compute in (("opdc", by_opdc), ("eager", by_hand)):
            logits.grad = None
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
