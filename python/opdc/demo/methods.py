"""The losses that the demo can train with, each beside the same thing written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import opdc
from opdc.bench import textbook


class Method(NamedTuple):
    """A loss, the same by hand, and what not to promise of it.

    By hand it is called (student, teacher, tokens, mask), and with the log-probs of the reference
    if there is one, and gives the mean over the mask.
    """

    loss: Callable[..., torch.nn.Module]
    by_hand: Callable[..., Tensor]
    color: str  # of its curve
    remark: str = ""  # measured on the built-in task
    reference: bool = False  # whether it takes log-probs of the student that training began with


def _mean(per_token: Callable[..., Tensor], *options: float) -> Callable[..., Tensor]:
    def mean(
        student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor, *reference: Tensor
    ) -> Tensor:
        losses = per_token(student, teacher, tokens, *reference, *options)
        return (losses * mask).sum() / mask.sum().clamp(min=1)

    return mean


def _mean_without_tokens(
    per_token: Callable[..., Tensor], *options: float
) -> Callable[..., Tensor]:
    return _mean(lambda student, teacher, _: per_token(student, teacher, *options))


METHODS = {
    "reverse_kl": Method(
        opdc.nn.ReverseKLLoss, _mean_without_tokens(textbook.reverse_kl), "#1f5fa8"
    ),
    "forward_kl": Method(
        opdc.nn.ForwardKLLoss,
        _mean_without_tokens(textbook.forward_kl),
        "#3a8f5c",
        "does not collapse here, as it was published to do on mathematics (1.40 against 46.79 of "
        "k1): this teacher is nearly deterministic and the answers are short, so that covering "
        "its modes presumably does no harm",
    ),
    "forward_kl_top": Method(
        functools.partial(opdc.nn.ForwardKLLoss, support="teacher", k=64, normalize="none"),
        _mean_without_tokens(textbook.forward_kl_top, 64),
        "#8fc31f",
    ),
    "reverse_kl_tail": Method(
        functools.partial(opdc.nn.ReverseKLLoss, support="teacher", k=32, normalize="tail"),
        _mean_without_tokens(textbook.reverse_kl_tail, 32),
        "#6d8fc7",
    ),
    "jsd": Method(opdc.nn.JSDLoss, _mean_without_tokens(textbook.jsd, 0.5), "#19a7c4"),
    "skew_kl": Method(
        opdc.nn.SkewKLLoss, _mean_without_tokens(textbook.skew_forward_kl, 0.1), "#a58fe0"
    ),
    "k1": Method(opdc.nn.K1Loss, _mean(textbook.k1), "#111111"),
    "k1_clip": Method(
        functools.partial(opdc.nn.TrOPDLoss, region="threshold", outlier="clip"),
        _mean(textbook.k1_clip, 0.3),
        "#4f5b66",
    ),
    "k1_mask": Method(
        functools.partial(opdc.nn.TrOPDLoss, region="threshold", outlier="mask"),
        _mean(textbook.k1_mask, 0.3),
        "#7d6b91",
    ),
    "gopd": Method(
        functools.partial(opdc.nn.K1Loss, reward_scale=1.25),
        _mean(textbook.gopd, 1.25),
        "#b5651d",
        reference=True,
    ),
    "k2": Method(
        opdc.nn.K2Loss,
        _mean(textbook.k2),
        "#9a9a9a",
        "has the gradient of k1 on the student's own tokens: the same run",
    ),
    "k3": Method(
        opdc.nn.K3Loss,
        _mean(textbook.k3),
        "#c2a27c",
        "descends the forward KL in expectation, not the reverse KL that it estimates",
    ),
    "lsm": Method(
        opdc.nn.LSMLoss,
        _mean_without_tokens(textbook.lsm, 32),
        "#d9a300",
        "does not see what the student does outside the teacher's top 32: a student that mostly "
        'uses other words collapses, reverse_kl with normalize="tail" counts them',
    ),
    "tropd": Method(
        opdc.nn.TrOPDLoss,
        _mean(lambda z, t, y: textbook.tropd(z, t, y, torch.rand(y.shape), 64)),
        "#d9381e",
        "gains most at T = 0.6 and greedily, little at T = 1",
    ),
    "eopd": Method(
        opdc.nn.EOPDLoss,
        _mean(textbook.eopd, 16),
        "#ee86c4",
        "is k1 but for noise: its gate opens at the filler words, where nothing is to be learned",
    ),
    "reopold": Method(
        opdc.nn.REOPOLDLoss,
        lambda z, t, y, mask: textbook.reopold(z, t, y, "refinement", mask),
        "#8c4a2f",
        "collapses when it refines, after a third of the updates: it trains on the tokens of which "
        "the student is least sure, here the filler words, and nothing holds the arithmetic",
    ),
    "aopd": Method(opdc.nn.AOPDLoss, _mean(textbook.aopd, 16), "#7a1fa2"),
}


def set_phase(loss_function: torch.nn.Module, progress: float) -> None:
    """Before each update: REOPOLD refines after the first third of the training."""
    if isinstance(loss_function, opdc.nn.REOPOLDLoss):
        loss_function.phase = "exploration" if progress < 1 / 3 else "refinement"
