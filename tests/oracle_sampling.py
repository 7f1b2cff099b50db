"""The reference for the samplers: what is drawn, and from which law, in float64 PyTorch.

As in `oracle`: the formulas as they are printed, nothing fast, nothing shared with the library
beyond the public keywords. The trust region is found by bisection, a truncated law by sorting, a
token by walking down the cumulative sum.

The functions with the public names take the public arguments and return float64 tuples with the
public fields. `exact_kl` evaluates the plain sum in 60-digit arithmetic and judges the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mpmath
import torch
from torch import Tensor

from oracle import INFINITY

BISECTIONS = 62  # of [0, 1]; β may be as small as 1e-7, and is then known to 11 digits


# ----------------------------------------------------------------- laws


def log_law(
    logits: Tensor,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    eos_map: tuple[int, int] | None = None,
) -> Tensor:
    """log_softmax(x / T) over the valid ids, −inf for an id that does not exist, NaN throughout a
    row that says nothing. `eos_map`: the mass of its second id goes to its first."""
    x = logits.detach().double()[..., :valid_vocab]
    undefined = x.isnan().any(-1) | (x == INFINITY).any(-1) | (x == -INFINITY).all(-1)
    logprobs = torch.log_softmax(x / temperature, -1)
    logprobs = logprobs.masked_fill(undefined[..., None], math.nan)
    if eos_map is not None:
        own, other = eos_map
        logprobs[..., own] = torch.logaddexp(logprobs[..., own], logprobs[..., other])
        logprobs[..., other] = logprobs[..., other].where(undefined, -INFINITY)
    return logprobs


def blended(s: Tensor, tau: Tensor, beta: Tensor) -> Tensor:
    """log μ of `μ ∝ p^(1−β) q^β`. At β = 0 it is p, ids that q lacks included; for β > 0 an id that
    either model lacks has no mass."""
    weight = beta[..., None]
    shared = (s > -INFINITY) & (tau > -INFINITY)
    exponent = (1 - weight) * s.where(shared, 0.0) + weight * tau.where(shared, 0.0)
    exponent = torch.where(weight == 0, s, exponent.masked_fill(~shared, -INFINITY))
    return torch.log_softmax(exponent, -1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a ‖ b) of whole laws: `Σ a (log a − log b)`, and where the logs are close the zero
    `Σ b − Σ a` added term by term, which saves the digits of a KL of 1e-12."""
    a, b = log_a.exp(), log_b.exp()
    possible = log_a > -INFINITY
    infinite = (possible & (log_b == -INFINITY)).any(-1)
    d = (log_a - log_b).where(possible & (log_b > -INFINITY), 0.0)
    near = d.abs() < 0.5
    small, large = d.where(near, 0.0), d.where(~near, 0.0)
    terms = torch.where(near, a * (torch.expm1(-small) + small), b - a + a * large)
    total = torch.where(possible, terms, b).sum(-1)
    undefined = log_a.isnan().any(-1) | log_b.isnan().any(-1)
    return total.masked_fill(infinite, INFINITY).masked_fill(undefined, math.nan)


def largest_beta(s: Tensor, tau: Tensor, epsilon: Tensor) -> Tensor:
    """`max{β ∈ [0, 1] : KL(μ_β ‖ p) ≤ ε}`. KL(μ_β ‖ p) grows with β, and where q lacks ids that p
    has it begins at −log p(supp q), not at 0: a budget below that leaves β = 0."""
    epsilon = epsilon.double().expand(s.shape[:-1])
    shared = (s > -INFINITY) & (tau > -INFINITY)
    lacking = ((s > -INFINITY) & ~shared).any(-1)
    start = torch.where(lacking, -s.masked_fill(~shared, -INFINITY).logsumexp(-1), 0.0)
    low, high = torch.zeros_like(epsilon), torch.ones_like(epsilon)
    everything = kl(blended(s, tau, high), s) <= epsilon
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        feasible = kl(blended(s, tau, middle), s) <= epsilon
        low, high = middle.where(feasible, low), high.where(feasible, middle)
    beta = torch.where(everything, 1.0, low)
    beta = beta.masked_fill((epsilon == 0) | ~shared.any(-1) | (start > epsilon), 0.0)
    return beta.masked_fill(s.isnan().any(-1) | tau.isnan().any(-1), math.nan)


def truncated(law: Tensor, ranked: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """One row of log-probs, renormalised on its `top_k` best ids (`ranked`: value, then the lower
    id), then on the fewest of these, in that order, that hold `top_p` of their mass."""
    order = ranked.double().sort(descending=True, stable=True).indices
    order = order[ranked[order] > -INFINITY][:top_k]
    if top_p < 1:  # at 1 nothing is cut, however little mass it has
        mass = (law[order] - law.max()).exp().cumsum(-1)
        order = order[: int((mass < top_p * mass[-1]).sum()) + 1]
    result = torch.full_like(law, -INFINITY)
    result[order] = torch.log_softmax(law[order], -1)
    return result


def drawn(law: Tensor, u: float) -> int:
    """The first id with mass, in order of ids, whose cumulative mass exceeds u · total."""
    mass = law.exp()
    cumulative = mass.cumsum(-1)
    return int(((mass > 0) & (cumulative > u * cumulative[-1])).nonzero()[0])


def correction(law: Tensor, s: Tensor) -> Tensor:
    """Log of the law of a rejected draft's replacement: (μ − p)_+ renormalised."""
    surplus = (law.exp() - s.exp()).clamp_min(0.0)
    return (surplus / surplus.sum()).log()


# ----------------------------------------------------------------- the public names


class Sample(NamedTuple):
    tokens: Tensor
    logprobs: Tensor
    untruncated_logprobs: Tensor


class Blend(NamedTuple):
    logprobs: Tensor
    beta: Tensor
    student_kl: Tensor
    teacher_kl: Tensor


class BlendSample(NamedTuple):
    tokens: Tensor
    logprobs: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    beta: Tensor
    student_kl: Tensor
    teacher_kl: Tensor


class BlendVerify(NamedTuple):
    tokens: Tensor
    logprobs: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    beta: Tensor
    student_kl: Tensor
    teacher_kl: Tensor
    accepted: Tensor
    valid: Tensor


def _uniforms(shape, uniforms: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if uniforms is not None:
        return uniforms.double()
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    valid_vocab: int | None = None,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Sample:
    shape = logits.shape[:-1]
    u = _uniforms(shape, uniforms, generator).reshape(-1).tolist()
    s = log_law(logits, temperature, valid_vocab)
    tokens = torch.full((len(u),), -1)
    logprobs, untruncated = torch.full((2, len(u)), math.nan, dtype=torch.float64)
    values = logits.detach()[..., : s.shape[-1]]
    for index, (row, ranked) in enumerate(zip(_rows(s), _rows(values), strict=True)):
        if row.isnan().any():
            continue
        law = truncated(row, ranked, top_k, top_p)
        tokens[index] = token = drawn(law, u[index])
        logprobs[index], untruncated[index] = law[token], row[token]
    return Sample(*(x.reshape(shape) for x in (tokens, logprobs, untruncated)))


def blend(
    student: Tensor,
    teacher: Tensor,
    epsilon: float | Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    eos_map: tuple[int, int] | None = None,
) -> Blend:
    """`logprobs` over the valid ids only."""
    s = log_law(student, temperature, valid_vocab, eos_map)
    tau = log_law(teacher, temperature, valid_vocab, eos_map)
    beta = largest_beta(s, tau, torch.as_tensor(epsilon))
    law = blended(s, tau, beta)
    return Blend(law, beta, kl(law, s), kl(law, tau))


def blend_sample(
    student: Tensor,
    teacher: Tensor,
    epsilon: float | Tensor,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    **common,
) -> BlendSample:
    shape = student.shape[:-1]
    u = _uniforms(shape, uniforms, generator).reshape(-1).tolist()
    mu = blend(student, teacher, epsilon, **common)
    s, tau = log_law(student, **common), log_law(teacher, **common)
    tokens = torch.full((len(u),), -1)
    columns = torch.full((3, len(u)), math.nan, dtype=torch.float64)
    for index, row in enumerate(_rows(mu.logprobs)):
        if row.isnan().any():
            continue
        law = truncated(row, row, top_k, top_p)
        tokens[index] = token = drawn(law, u[index])
        columns[:, index] = torch.stack(
            [x[token] for x in (law, _rows(s)[index], _rows(tau)[index])]
        )
    return BlendSample(tokens.reshape(shape), *columns.reshape(3, *shape), *mu[1:])


def blend_verify(
    draft_tokens: Tensor,
    student: Tensor,
    teacher: Tensor,
    epsilon: float | Tensor,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    **common,
) -> BlendVerify:
    shape = draft_tokens.shape
    u = _uniforms((*shape, 2), uniforms, generator).reshape(-1, 2).tolist()
    mu = blend(student, teacher, epsilon, **common)
    s, tau = log_law(student, **common), log_law(teacher, **common)
    own, other = common.get("eos_map") or (None, None)
    drafts = draft_tokens.reshape(-1).tolist()
    tokens = torch.full((len(drafts),), -1)
    columns = torch.full((3, len(drafts)), math.nan, dtype=torch.float64)
    numbers = [x.reshape(-1).clone() for x in mu[1:]]
    accepted, valid = torch.zeros(2, len(drafts), dtype=torch.bool)
    block = shape[-1] if shape else 1
    stands = True
    for index, draft in enumerate(drafts):
        stands = stands or index % block == 0
        valid[index] = stands
        if not stands:
            for x in numbers:
                x[index] = math.nan
            continue
        row, p, q = (_rows(x)[index] for x in (mu.logprobs, s, tau))
        stands = False
        if row.isnan().any():
            continue
        law = truncated(row, row, top_k, top_p)
        token = own if draft == other else draft
        # An impossible draft has neither p nor μ: it is not accepted.
        stands = u[index][0] * math.exp(p[token]) < math.exp(law[token])
        accepted[index] = stands
        if not stands:
            replacement = correction(law, p)
            token = drawn(law if replacement.isnan().any() else replacement, u[index][1])
        tokens[index] = token
        columns[:, index] = torch.stack([x[token] for x in (law, p, q)])
    fields = (tokens, *columns, *numbers, accepted, valid)
    return BlendVerify(*(x.reshape(shape) for x in fields))


# ----------------------------------------------------------------- 60 digits


def exact_kl(
    student: Sequence[float], teacher: Sequence[float], beta: float
) -> tuple[mpmath.mpf, mpmath.mpf]:
    """KL(μ_β ‖ p) and KL(μ_β ‖ q) of one row, whose ids all exist."""
    with mpmath.workdps(60):
        s, tau = (_exact_log_softmax(row) for row in (student, teacher))
        weight = mpmath.mpf(beta)
        exponents = [(1 - weight) * a + weight * b for a, b in zip(s, tau, strict=True)]
        mu = _exact_log_softmax(exponents)
        return tuple(
            mpmath.fsum(mpmath.exp(m) * (m - x) for m, x in zip(mu, law, strict=True))
            for law in (s, tau)
        )


def _exact_log_softmax(values: Sequence) -> list[mpmath.mpf]:
    values = [mpmath.mpf(x) for x in values]
    normaliser = mpmath.log(mpmath.fsum(mpmath.exp(x) for x in values))
    return [x - normaliser for x in values]
