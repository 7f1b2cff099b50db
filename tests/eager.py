"""What a researcher writes today: PyTorch, a line or two per loss, with the signatures of opdc.

The accuracy of the library is reported, and tested, next to the accuracy of these lines, which are
the ones that the benchmark times."""

from __future__ import annotations

from torch import Tensor

from opdc.bench import textbook
from opdc.bench.textbook import entropy, forward_kl, k1, k2, k3, lsm, reverse_kl, token_logprobs

__all__ = [
    "entropy",
    "forward_kl",
    "jsd",
    "k1",
    "k2",
    "k3",
    "lsm",
    "reverse_kl",
    "skew_kl",
    "token_logprobs",
]


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    if beta in (0.0, 1.0):
        return (reverse_kl if beta else forward_kl)(student, teacher)
    return textbook.jsd(student, teacher, beta)


def skew_kl(
    student: Tensor, teacher: Tensor, alpha: float = 0.1, direction: str = "forward"
) -> Tensor:
    methods = {"forward": textbook.skew_forward_kl, "reverse": textbook.skew_reverse_kl}
    return methods[direction](student, teacher, alpha)
