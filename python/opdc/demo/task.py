"""The built-in task: chained arithmetic modulo 16, written out step by step with filler words.

    prompt     3 + 5 * 2 - 7 ?
    response   now 3 + 5 gives 8 now 8 * 2 is 0 then 0 - 7 gives 9 so 9 <eos>

The three operations are taken from left to right, each modulo 16. The filler words carry no
information but make up a third of the response, as prose does in a real chain of thought: a good
student imitates their distribution, and must not pay for it with the arithmetic.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

MODULUS = 16
OPERATORS = ("+", "-", "*")


def _words(text: str) -> list[str]:
    return text.split()


# A word is drawn with weight 1 / rank^2 (1.43 nats), independently of everything else.
STEP_WORDS = _words(
    "now then next first here and take compute consider again let we with begin continue start "
    "still further onward meanwhile after from onto say"
)
RESULT_WORDS = _words(
    "gives is makes equals yields becomes leaves returns means produces shows brings reaches "
    "reads totals renders forms reveals implies provides delivers hits lands counts"
)
ANSWER_WORDS = _words(
    "so thus hence therefore finally answer result overall altogether conclusion ultimately "
    "accordingly consequently ergo total end done outcome value output solution verdict final last"
)
WORD_WEIGHTS = tuple(1 / rank**2 for rank in range(1, 25))

# 240 ids, of which the unused ones stand for the long tail of a real vocabulary.
VOCABULARY = (
    ["<pad>", "<bos>", "<eos>", "?"]
    + [str(number) for number in range(MODULUS)]
    + [*OPERATORS, *STEP_WORDS, *RESULT_WORDS, *ANSWER_WORDS]
    + [f"<unused{index}>" for index in range(144)]
    + ["<unknown>"]
)


class Problem(NamedTuple):
    """A prompt and, where one is known, the answer that its response has to end with."""

    prompt: str
    answer: str | None


class Arithmetic:
    """An endless source of problems; 16^4 * 27 = 1.77 million differ, so nothing is split off."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def batch(self, size: int) -> list[Problem]:
        return [self._problem() for _ in range(size)]

    def _problem(self) -> Problem:
        first, *others = (self._random.randrange(MODULUS) for _ in range(4))
        operators = self._random.choices(OPERATORS, k=3)
        words, value = [str(first)], first
        for operator, number in zip(operators, others, strict=True):
            words += [operator, str(number)]
            value = apply(operator, value, number)
        return Problem(" ".join([*words, "?"]), str(value))


class PromptList:
    """The problems of a file, in a new random order at every pass over them."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems, self._random = list(problems), random.Random(seed)
        self._pending: list[Problem] = []

    def batch(self, size: int) -> list[Problem]:
        while len(self._pending) < size:
            self._pending += self._random.sample(self._problems, len(self._problems))
        taken, self._pending = self._pending[:size], self._pending[size:]
        return taken


def apply(operator: str, left: int, right: int) -> int:
    """One step of the chain."""
    exact = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return exact % MODULUS


def is_correct(response: str, answer: str) -> bool:
    """Whether the last words of a response, up to a full stop, are the answer."""
    wanted = answer.split()
    return response.rstrip(" \n.").split()[-len(wanted) :] == wanted
