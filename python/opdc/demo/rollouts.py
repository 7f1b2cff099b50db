"""The policies that can write the rollouts, beside the student itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import opdc

STUDENT = "student"
_NO_GAIN = "is no better here than rollouts of the student, beyond noise"
# Each with what not to promise of it, measured on the built-in task.
ROLLOUTS = {
    STUDENT: "",
    "trb": _NO_GAIN,
    "trb-speculative": _NO_GAIN,
    "teacher-prefix": "ends a little below rollouts of the student here: the first updates have "
    "few of its own tokens to learn from",
}
DRAFT_LENGTH = 4  # tokens that the student drafts between two looks at the teacher
EPSILON = 0.02  # nats; TRB's own choice


@dataclass(frozen=True)
class Behaviour:
    """How one update's rollouts were written: means over the tokens of the responses."""

    epsilon: float  # nats, the budget
    beta: float  # the weight of the teacher
    kl: float  # nats, of the policy that wrote from the student: what was used of the budget
    accepted: float | None  # share of the drafts; None where nothing was drafted
    prefix: float  # share of the tokens that are the teacher's own

    def in_short(self) -> str:
        if self.prefix:
            return f"{self.prefix:.0%} of the tokens the teacher's"
        text = f"ε {self.epsilon:.4f}, β {self.beta:.3f}, KL {self.kl:.4f}"
        return text + ("" if self.accepted is None else f"\n{self.accepted:.1%} of drafts accepted")


class BehaviourPolicy:
    """Makes the sampler of a kind of rollouts, and looks at what it has done.

    The budget of a blend, `epsilon` nats at the first update, lasts for half of the training, the
    teacher's prefixes for 60 % of it.
    """

    def __init__(
        self, kind: str, teacher: Any, valid_vocab: int | None, steps: int, epsilon: float
    ) -> None:
        from opdc.hf import BlendSampler  # needs transformers, which the command line does not

        prefixed = kind == "teacher-prefix"
        self._budget = opdc.BlendBudget(0.0 if prefixed else epsilon, max(1, steps // 2))
        self.sampler = BlendSampler(
            teacher,
            self._budget,
            draft_length=DRAFT_LENGTH if kind == "trb-speculative" else 0,
            prefix=opdc.PrefixLength(max(1, round(0.6 * steps))) if prefixed else None,
            valid_vocab=valid_vocab,
        )

    def seen(self, seconds: dict[str, float]) -> Behaviour:
        """What the last rollouts were like; adds the time that they took to `seconds`."""
        rollout: Any = self.sampler.last
        statistics = rollout.statistics
        for name, spent in (
            ("student forward", statistics.student_seconds),
            ("teacher forward", statistics.teacher_seconds),
            ("sampling", statistics.sampling_seconds),
        ):
            seconds[name] = seconds.get(name, 0.0) + spent
        drafted = statistics.drafted
        return Behaviour(
            epsilon=self._budget(self.sampler.step),
            beta=rollout.beta[rollout.mask].mean().item(),
            kl=rollout.kl[rollout.mask].mean().item(),
            accepted=statistics.accepted / drafted if drafted else None,
            prefix=rollout.prefix_mask[rollout.mask].float().mean().item(),
        )
