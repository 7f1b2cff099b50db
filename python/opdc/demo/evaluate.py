"""How good a student is: exact match of its answers, and its distance from the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import opdc

from .loading import Pair
from .loop import Rollout, response_logits, roll_out
from .task import Problem, is_correct


@dataclass(frozen=True)
class Score:
    """A model after `updates` updates."""

    updates: int
    reverse_kl: float  # nats per token, on the model's own responses
    exact_match: dict[str, float]  # by way of decoding; empty where no answers are known


class Evaluation:
    """Scores models on the same problems with the same random numbers.

    The reverse KL is taken on responses sampled at the training temperature. Answers are checked
    there, at a lower temperature and greedily.
    """

    def __init__(
        self,
        pair: Pair,
        problems: Sequence[Problem],
        *,
        batch: int,
        temperature: float,
        max_new_tokens: int,
    ) -> None:
        self._pair, self._batch, self._max_new_tokens = pair, batch, max_new_tokens
        self._problems = list(problems)
        self._temperature = temperature
        self.answers = sum(problem.answer is not None for problem in problems)

    def __call__(self, model: Any, updates: int) -> Score:
        # A generator of its own, so that looking at the student does not change its training.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            reverse_kl, matches = self._sampled(model)
            exact_match = {f"T = {self._temperature:g}": matches}
            if self.answers:
                if self._temperature > 0.6:
                    exact_match["T = 0.6"] = self._matches(model, 0.6)
                exact_match["greedy"] = self._matches(model, 0.0)
        return Score(updates, reverse_kl, exact_match if self.answers else {})

    def _sampled(self, model: Any) -> tuple[float, float]:
        divergence = 0.0
        tokens = correct = 0
        for problems in self._batches():
            rollout, right = self._respond(model, problems, self._temperature)
            total = opdc.reverse_kl(
                response_logits(model, rollout),
                response_logits(self._pair.teacher, rollout),
                temperature=self._temperature,
                mask=rollout.mask,
                valid_vocab=self._pair.valid_vocab,
                reduction="sum",
            )
            divergence += total.item()
            tokens += int(rollout.mask.sum())
            correct += right
        return divergence / tokens, correct / max(self.answers, 1)

    def _matches(self, model: Any, temperature: float) -> float:
        counts = [self._respond(model, problems, temperature)[1] for problems in self._batches()]
        return sum(counts) / self.answers

    def _batches(self) -> list[list[Problem]]:
        starts = range(0, len(self._problems), self._batch)
        return [self._problems[start : start + self._batch] for start in starts]

    def _respond(
        self, model: Any, problems: list[Problem], temperature: float
    ) -> tuple[Rollout, int]:
        prompts = [problem.prompt for problem in problems]
        tokenizer = self._pair.tokenizer
        rollout = roll_out(model, tokenizer, prompts, temperature, self._max_new_tokens)
        correct = 0
        for problem, tokens, mask, finished in zip(
            problems, rollout.tokens, rollout.mask, rollout.finished, strict=True
        ):
            if problem.answer is not None and finished:
                response = tokenizer.decode(tokens[mask], skip_special_tokens=True)
                correct += is_correct(response, problem.answer)
        return rollout, correct
