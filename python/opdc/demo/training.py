"""One run: a student trained with one method and one seed, scored on the way."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from .evaluate import Evaluation
from .loading import DemoError, check_prompts, knows_the_task, load_pair, read_prompts
from .loop import Clock, Update, distill
from .methods import METHODS, set_phase
from .report import BUILT_IN, Result
from .rollouts import STUDENT, BehaviourPolicy
from .task import Arithmetic, PromptList

# The built-in problems are quickly answered; one's own models may need minutes for as many.
BUILT_IN_EVALUATION = 512
OWN_EVALUATION = 64


class Run:
    """Loads what the arguments name; `updates` trains, and `result` has what came of it so far.

    Runs that differ in method and seed are scored on the same problems.
    """

    def __init__(self, arguments: argparse.Namespace, method: str, seed: int) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if arguments.student is None and arguments.teacher is None:
            torch.set_num_threads(1)  # the built-in models are too small to be worth a second one
        self.pair = load_pair(arguments.student, arguments.teacher)
        loss_function: Any = METHODS[method].loss(valid_vocab=self.pair.valid_vocab)
        self.loss_function: torch.nn.Module = loss_function
        # The student as it is before the first update.
        self._reference = copy.deepcopy(self.pair.student) if METHODS[method].reference else None
        self._policy: BehaviourPolicy | None = None
        if arguments.rollout != STUDENT:
            self._policy = BehaviourPolicy(
                arguments.rollout,
                self.pair.teacher,
                self.pair.valid_vocab,
                arguments.steps,
                arguments.epsilon,
            )
            if hasattr(loss_function, "advantage"):
                # Of tokens drawn from the blend: its ratio p/μ corrects the sampling, and must
                # weigh τ − s. With τ − log μ the loss would descend 1 − β of the reverse KL.
                loss_function.advantage = "current"

        self._source: Arithmetic | PromptList
        if arguments.prompts is not None:
            problems = read_prompts(arguments.prompts)
            self._source = PromptList(problems, seed)
        elif knows_the_task(self.pair.tokenizer):
            problems = Arithmetic(1_000_000 + arguments.seed).batch(BUILT_IN_EVALUATION)
            self._source = Arithmetic(seed)
        else:
            raise DemoError("--prompts is needed: the built-in problems suit the built-in models")
        check_prompts(self.pair, problems, arguments.max_new_tokens)
        if arguments.prompts is not None:
            problems = problems[:OWN_EVALUATION]
        self.evaluation = Evaluation(
            self.pair,
            problems,
            batch=arguments.batch if arguments.prompts else BUILT_IN_EVALUATION,
            temperature=arguments.temperature,
            max_new_tokens=arguments.max_new_tokens,
        )
        self.result = Result(
            method=method,
            rollout=arguments.rollout,
            student=str(arguments.student or BUILT_IN),
            teacher=str(arguments.teacher or BUILT_IN),
            prompts=str(arguments.prompts or BUILT_IN),
            steps=arguments.steps,
            batch=arguments.batch,
            seed=seed,
            learning_rate=arguments.learning_rate,
            temperature=arguments.temperature,
            max_new_tokens=arguments.max_new_tokens,
            evaluation_problems=len(problems),
            threads=torch.get_num_threads(),
        )
        self._clock = Clock()
        self.result.seconds = self._clock.seconds

    def score(self) -> None:
        """Score the student, unless that has been done since its last update."""
        result = self.result
        if not result.scores or result.scores[-1].updates != result.updates:
            with self._clock("evaluation"):
                result.scores.append(self.evaluation(self.pair.student, result.updates))

    def updates(self, scores: int) -> Iterator[Update]:
        """Train, with that many scores on the way beside the one before it."""
        result = self.result
        interval = max(1, result.steps // scores)
        torch.manual_seed(result.seed)
        self.score()
        for update in self._distill():
            if not math.isfinite(update.loss):
                raise DemoError(
                    f"the loss is {update.loss} at update {result.updates + 1}: "
                    "try a smaller --learning-rate"
                )
            result.losses.append(update.loss)
            if self._policy is not None:
                result.behaviour.append(self._policy.seen(result.rollout_seconds))
            yield update
            if result.updates % interval == 0 or result.updates == result.steps:
                self.score()

    def _distill(self) -> Iterator[Update]:
        result = self.result
        try:
            yield from distill(
                self.pair.student,
                self.pair.teacher,
                self.pair.tokenizer,
                self.loss_function,
                self._batches(),
                learning_rate=result.learning_rate,
                temperature=result.temperature,
                max_new_tokens=result.max_new_tokens,
                clock=self._clock,
                sampler=self._policy and self._policy.sampler,
                reference=self._reference,
            )
        except ValueError as error:
            if self._policy is None or result.updates:
                raise
            # What the sampler does not do with these models.
            raise DemoError(f"--rollout {result.rollout}: {error}") from error

    def _batches(self) -> Iterator[list[str]]:
        for step in range(self.result.steps):
            set_phase(self.loss_function, step / self.result.steps)
            yield [problem.prompt for problem in self._source.batch(self.result.batch)]
