"""The losses as a researcher writes them in PyTorch: a few lines each, gradients by autograd.

Positions are rows; each function takes the student's logits, the teacher's logits and, where it
needs them, the tokens, and gives the loss of every row. The arithmetic is in float32 or better.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probs(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q), both given as log-probs."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return divergence(log_probs(student), log_probs(teacher))


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return divergence(log_probs(teacher), log_probs(student))


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    s, t = log_probs(student), log_probs(teacher)
    # The mixture by logsumexp of a stack, as TRL's generalized_jsd_loss has it.
    mixture = torch.logsumexp(torch.stack([s + math.log(1 - beta), t + math.log(beta)]), dim=0)
    return beta * divergence(t, mixture) + (1 - beta) * divergence(s, mixture)


def skew_forward_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    s, t = log_probs(student), log_probs(teacher)
    return divergence(t, torch.logaddexp(t + math.log(alpha), s + math.log(1 - alpha)))


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    s, t = log_probs(student), log_probs(teacher)
    return divergence(s, torch.logaddexp(s + math.log(alpha), t + math.log(1 - alpha)))


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return log_probs(logits).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    s = log_probs(logits)
    return -(s.exp() * s).sum(-1)


def k1_given(student: Tensor, teacher_logprobs: Tensor, tokens: Tensor) -> Tensor:
    s = token_logprobs(student, tokens)
    advantage = (teacher_logprobs - s).detach()
    return -advantage * torch.exp(s - s.detach())


def k1(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    return k1_given(student, token_logprobs(teacher, tokens), tokens)


def k2(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    return 0.5 * (token_logprobs(teacher, tokens) - token_logprobs(student, tokens)).square()


def k3(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    log_ratio = token_logprobs(teacher, tokens) - token_logprobs(student, tokens)
    return torch.exp(log_ratio) - 1 - log_ratio
