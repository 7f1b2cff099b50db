"""The losses and samplers as a researcher writes them in PyTorch: a few lines each, gradients by
autograd.

Positions are rows; each function takes the student's logits, the teacher's logits and, where it
needs them, the tokens, and gives the loss of every row, except where it says otherwise. A sampler
gives a token of every row and its log-prob. The arithmetic is in float32 or better.
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
    s_y = token_logprobs(student, tokens)
    return _policy_gradient(s_y, (teacher_logprobs - s_y).detach())


def k1(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    return k1_given(student, token_logprobs(teacher, tokens), tokens)


def k1_clip(student: Tensor, teacher: Tensor, tokens: Tensor, mixture: float) -> Tensor:
    s_y, log_ratio = _of_tokens(log_probs(student), log_probs(teacher), tokens)
    return _policy_gradient(s_y, log_ratio.clamp(min=_floor(mixture)))


def k1_mask(student: Tensor, teacher: Tensor, tokens: Tensor, mixture: float) -> Tensor:
    s_y, log_ratio = _of_tokens(log_probs(student), log_probs(teacher), tokens)
    return _policy_gradient(s_y, log_ratio * (log_ratio >= _floor(mixture)))


def gopd(
    student: Tensor, teacher: Tensor, tokens: Tensor, reference_logprobs: Tensor, scale: float
) -> Tensor:
    s_y, t_y = token_logprobs(student, tokens), token_logprobs(teacher, tokens)
    reward = scale * (t_y - reference_logprobs)
    return _policy_gradient(s_y, reward - (s_y.detach() - reference_logprobs))


def k2(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    return 0.5 * (token_logprobs(teacher, tokens) - token_logprobs(student, tokens)).square()


def k3(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    log_ratio = token_logprobs(teacher, tokens) - token_logprobs(student, tokens)
    return torch.exp(log_ratio) - 1 - log_ratio


def topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids of the k largest logits and their log-probs."""
    values, ids = torch.topk(logits, k)
    normalizer = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return ids, values - normalizer.unsqueeze(-1)


def lsm(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    values, ids = torch.topk(teacher, k)
    return lsm_given(student, ids, values)


def lsm_given(student: Tensor, ids: Tensor, teacher_logprobs: Tensor) -> Tensor:
    # Renormalised on the support: what the logits or log-probs have in common drops out.
    return divergence(log_probs(student.gather(-1, ids)), log_probs(teacher_logprobs))


def forward_kl_top(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    top, ids = torch.topk(log_probs(teacher), k)
    return divergence(top, log_probs(student).gather(-1, ids))


def forward_kl_tail(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    s, t, s_tail, t_tail = _top_and_tail(student, teacher, k)
    return divergence(t, s) + t_tail.exp() * (t_tail - s_tail)


def reverse_kl_tail(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    s, t, s_tail, t_tail = _top_and_tail(student, teacher, k)
    return divergence(s, t) + s_tail.exp() * (s_tail - t_tail)


def _top_and_tail(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, ...]:
    """Log-probs on the teacher's top k, and of all the rest together."""
    s, t = log_probs(student), log_probs(teacher)
    top, ids = torch.topk(t, k)
    # Not log(1 - mass): of a confident teacher nothing but the rounding would be left.
    tails = (x.scatter(-1, ids, -math.inf).logsumexp(-1) for x in (s, t))
    return s.gather(-1, ids), top, *tails


def tropd(student: Tensor, teacher: Tensor, tokens: Tensor, uniforms: Tensor, k: int) -> Tensor:
    s, t = log_probs(student), log_probs(teacher)
    s_y, log_ratio = _of_tokens(s, t, tokens)
    top, ids = torch.topk(t, k)
    return torch.where(
        uniforms < log_ratio.exp(),
        _policy_gradient(s_y, log_ratio),
        divergence(top, s.gather(-1, ids)),
    )


def eopd(
    student: Tensor, teacher: Tensor, tokens: Tensor, k: int, entropy_threshold: float = 0.8
) -> Tensor:
    s, t = log_probs(student), log_probs(teacher)
    top, ids = torch.topk(t, k)
    forward = divergence(top.log_softmax(-1), s.gather(-1, ids))
    gate = -(t.exp() * t).sum(-1) > entropy_threshold
    return _policy_gradient(*_of_tokens(s, t, tokens)) + gate * forward


def reopold(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    phase: str,
    mask: Tensor | None = None,
    mixture: float = 0.3,
    keep: float = 0.2,
) -> Tensor:
    """The mean over the rows that the phase selects, a single number."""
    s, t = log_probs(student), log_probs(teacher)
    s_y, log_ratio = _of_tokens(s, t, tokens)
    active = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    floor = _floor(mixture)
    if phase == "exploration":
        selected = active & (log_ratio >= floor)
    else:
        entropies = -(s.detach().exp() * s.detach()).sum(-1).masked_fill(~active, -math.inf)
        rank = (keep * active.sum().double() - 1e-9).ceil().long() - 1  # of the last one kept
        ordered = entropies.flatten().sort(descending=True).values
        selected = active & (entropies >= ordered.gather(0, rank.unsqueeze(0)))
    losses = _policy_gradient(s_y, log_ratio.clamp(min=floor))
    return (losses * selected).sum() / selected.sum().clamp(min=1)


def aopd(student: Tensor, teacher: Tensor, tokens: Tensor, k: int) -> Tensor:
    s, t = log_probs(student), log_probs(teacher)
    s_y, log_ratio = _of_tokens(s, t, tokens)
    top, ids = torch.topk(t, k)
    return torch.where(
        log_ratio <= 0, divergence(top, s.gather(-1, ids)), _policy_gradient(s_y, log_ratio)
    )


def _of_tokens(s: Tensor, t: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The student's log-probs of the tokens, and how far the teacher's are above them."""
    index = tokens.unsqueeze(-1)
    s_y, t_y = s.gather(-1, index).squeeze(-1), t.gather(-1, index).squeeze(-1)
    return s_y, (t_y - s_y).detach()


def _floor(mixture: float) -> float:
    """What bounds the advantage from below in REOPOLD."""
    return math.log(mixture) / (1 - mixture)


def _policy_gradient(s_y: Tensor, advantage: Tensor) -> Tensor:
    return -advantage * torch.exp(s_y - s_y.detach())


# ---- samplers --------------------------------------------------------------------------------


def probs(logits: Tensor) -> Tensor:
    return F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def top_k_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids of the k largest logits and their probabilities among themselves."""
    values, ids = torch.topk(logits, k)
    return ids, probs(values)


def top_p_probs(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """All ids, the likeliest first, and their probabilities within the first mass of top_p."""
    p, ids = probs(logits).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return ids, p / p.sum(-1, keepdim=True)


def draw(p: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.multinomial(p, 1)
    return places.squeeze(-1), p.gather(-1, places).squeeze(-1).log()


def draw_from(ids: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    places, logprobs = draw(p)
    return ids.gather(-1, places.unsqueeze(-1)).squeeze(-1), logprobs


def blend(student: Tensor, teacher: Tensor, epsilon: float, bisections: int = 20) -> Tensor:
    """The log-probs of `p^(1 − β) q^β`, normalised, at the largest β whose KL from p is in budget.

    TRB (arXiv 2605.31159), by bisection.
    """
    s, t = log_probs(student), log_probs(teacher)
    low = torch.zeros_like(s[..., :1])
    high = torch.ones_like(low)
    for _ in range(bisections):
        beta = (low + high) / 2
        within = divergence(log_probs(torch.lerp(s, t, beta)), s).unsqueeze(-1) <= epsilon
        low, high = torch.where(within, beta, low), torch.where(within, high, beta)
    return log_probs(torch.lerp(s, t, low))


def blend_sample(student: Tensor, teacher: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return draw(blend(student, teacher, epsilon).exp())


def blend_verify(
    student: Tensor, teacher: Tensor, drafts: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Of blocks (..., n) of tokens drawn from the student: those that stand as if drawn from the
    blend, the correction of the first that does not, and −1 for what came after."""
    s, mu = log_probs(student), blend(student, teacher, epsilon)
    index = drafts.unsqueeze(-1)
    ratio = (mu.gather(-1, index) - s.gather(-1, index)).squeeze(-1).exp()
    accepted = torch.rand_like(ratio) < ratio
    # Where the two laws are the same nothing is left to draw from, nor is it needed.
    rest = (mu.exp() - s.exp()).clamp(min=torch.finfo(mu.dtype).tiny)
    corrections = draw(rest.flatten(0, -2))[0].view_as(drafts)
    tokens = torch.where(accepted, drafts, corrections)
    logprobs = mu.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    rejected = (~accepted).long()
    return torch.where(rejected.cumsum(-1) - rejected == 0, tokens, -1), logprobs
