"""Schedules over the steps of a training: plain numbers from a step, without state."""

from __future__ import annotations

import math
from dataclasses import dataclass


def _check_step(step: float, steps: float) -> None:
    if not steps > 0:
        raise ValueError(f"steps must be above 0, got {steps}")
    if not step >= 0:
        raise ValueError(f"step must be at least 0, got {step}")


@dataclass(frozen=True)
class PrefixLength:
    """How many tokens of the teacher's response a rollout begins with: from all to none, by a
    cosine.

    The guidance of TrOPD (arXiv 2606.01249): `⌊½ (1 + cos(π step / steps)) length⌋`, 0 from `steps`
    on.

    >>> import opdc
    >>> length_at = opdc.PrefixLength(steps=200)
    >>> [length_at(step, 100) for step in (0, 50, 100, 200, 999)]
    [100, 85, 50, 0, 0]
    """

    steps: int = 200

    def __call__(self, step: int, length: int) -> int:
        _check_step(step, self.steps)
        if length < 0:
            raise ValueError(f"length must be at least 0, got {length}")
        if step >= self.steps:
            return 0
        return math.floor(0.5 * (1 + math.cos(math.pi * step / self.steps)) * length)


@dataclass(frozen=True)
class BlendBudget:
    """The KL budget of a trust-region behaviour policy, in nats: linear from `epsilon` to 0.

    The schedule of TRB (arXiv 2605.31159): `epsilon max(0, 1 − step / steps)`.

    >>> import opdc
    >>> budget_at = opdc.BlendBudget(epsilon=0.02, steps=50)
    >>> [budget_at(step) for step in (0, 25, 50, 51)]
    [0.02, 0.01, 0.0, 0.0]
    """

    epsilon: float = 0.02
    steps: int = 50

    def __call__(self, step: int) -> float:
        _check_step(step, self.steps)
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon must be a finite number of at least 0, got {self.epsilon}")
        return self.epsilon * max(0.0, 1 - step / self.steps)
