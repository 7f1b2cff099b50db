"""What a sampler leaves behind for the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RolloutStatistics:
    """What a rollout cost.

    Attributes:
        student_forwards, teacher_forwards: calls of the models, prompts included.
        drafted: the student's drafts that came to be judged; 0 without speculation. Those after a
            rejection or after the end of a response are void and do not count, so that the share
            of rejected ones estimates the total variation between the student and `μ`.
        accepted: those of them that stood.
        student_seconds, teacher_seconds: spent in the models. On a GPU that is the time of the
            host, which queues their work.
        sampling_seconds: spent between them: processors, blending and drawing; on a GPU with the
            time that the host waits for all of it.
    """

    student_forwards: int
    teacher_forwards: int
    drafted: int
    accepted: int
    student_seconds: float
    teacher_seconds: float
    sampling_seconds: float


@dataclass(frozen=True)
class Rollout:
    """Responses, and what the policy that wrote them thought of each token.

    B rows, prompts of P tokens, responses of at most C. The numbers are float32 (float64 if the
    logits of a model are), in nats, at the temperature of the sampling, and 0 off the mask.

    Attributes:
        sequences: `(B, P + C)`, as `generate` returns them.
        tokens: `(B, C)`, the responses, filled up with the padding id.
        mask: `(B, C)`, bool: true up to and including the token that ended the response.
        logprobs: `(B, C)`, `log μ` of the tokens under the law that they were drawn from, i.e.
            after top-k, top-p and the like; of forced tokens `log μ` before these.
        student_logprobs, teacher_logprobs: `(B, C)`, of the whole laws; the teacher's are NaN where
            it was not called.
        beta: `(B, C)`, its weight in `μ ∝ p^(1−β) q^β`.
        kl: `(B, C)`, `KL(μ ‖ p)`, what was used of the budget.
        prefix_mask: `(B, C)`, bool: tokens that were forced, not drawn.
        statistics: what it cost.
    """

    sequences: Tensor
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    beta: Tensor
    kl: Tensor
    prefix_mask: Tensor
    statistics: RolloutStatistics

    def metrics(self) -> dict[str, Tensor]:
        """Sums over the tokens of the responses, for `opdc.metrics`.

        `beta`, `kl`, their number `positions`, and from speculative sampling `drafted` and
        `accepted`; on the device of the rollout.
        """
        sums = {
            "beta": self.beta.sum(dtype=torch.float64),  # 0 off the mask
            "kl": self.kl.sum(dtype=torch.float64),
            "positions": self.mask.sum(dtype=torch.float64),
        }
        if self.statistics.drafted:
            for name in ("drafted", "accepted"):
                sums[name] = sums["beta"].new_full((), float(getattr(self.statistics, name)))
        return sums
