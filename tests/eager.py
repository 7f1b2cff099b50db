"""What a researcher writes today: fp32 PyTorch, a line or two per loss, gradients by autograd.

The accuracy of the library is reported, and tested, next to the accuracy of these lines."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    s, tau = log_softmax(student, -1), log_softmax(teacher, -1)
    return kl_div(tau, s, reduction="none", log_target=True).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    s, tau = log_softmax(student, -1), log_softmax(teacher, -1)
    return kl_div(s, tau, reduction="none", log_target=True).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight_of_b: float) -> Tensor:
    return torch.logaddexp(log_a + math.log1p(-weight_of_b), log_b + math.log(weight_of_b))


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    if beta in (0.0, 1.0):
        return (reverse_kl if beta else forward_kl)(student, teacher)
    s, tau = log_softmax(student, -1), log_softmax(teacher, -1)
    mixture = _log_mixture(s, tau, beta)
    to_teacher = kl_div(mixture, tau, reduction="none", log_target=True).sum(-1)
    to_student = kl_div(mixture, s, reduction="none", log_target=True).sum(-1)
    return beta * to_teacher + (1 - beta) * to_student


def skew_kl(
    student: Tensor, teacher: Tensor, alpha: float = 0.1, direction: str = "forward"
) -> Tensor:
    s, tau = log_softmax(student, -1), log_softmax(teacher, -1)
    near, other = (tau, s) if direction == "forward" else (s, tau)
    mixture = _log_mixture(other, near, alpha)
    return kl_div(mixture, near, reduction="none", log_target=True).sum(-1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]


def entropy(logits: Tensor) -> Tensor:
    s = log_softmax(logits, -1)
    return -(s.exp() * s).sum(-1)


def k1(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    s = token_logprobs(student, tokens)
    advantages = (token_logprobs(teacher, tokens) - s).detach()
    return -advantages * torch.exp(s - s.detach())


def k2(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    return 0.5 * (token_logprobs(teacher, tokens).detach() - token_logprobs(student, tokens)) ** 2


def k3(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    log_ratio = token_logprobs(teacher, tokens).detach() - token_logprobs(student, tokens)
    return torch.expm1(log_ratio) - log_ratio
