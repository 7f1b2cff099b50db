"""The independent reference: what every loss means, in float64 PyTorch with automatic gradients.

Nothing here is fast and nothing is shared with the library. Rows are walked one at a time, ids that
do not exist are removed by indexing, and every gradient comes from autograd of the written formula.

Two levels of trust:

* the functions with the public names (``reverse_kl`` … ``entropy``) take the public arguments and
  return float64 tensors attached to ``student``. One refinement makes them usable where student and
  teacher almost agree: to each Kullback-Leibler sum ``Σ a (log a − log b)`` the zero ``Σ b − Σ a``
  is added term by term (``expm1``), because the plain sum keeps only 4 digits of a KL of 1e-12;
* ``exact`` evaluates the plain textbook formulas, without any such care, in 60-digit arithmetic
  (mpmath), value and gradient. It judges the functions above, and the library in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mpmath
import torch
from torch import Tensor

INFINITY = math.inf


# ----------------------------------------------------------------- rows


class _Poisoned(torch.autograd.Function):
    """A row without a derivative: the given value, and NaN as its gradient."""

    @staticmethod
    def forward(ctx, row: Tensor, value: float) -> Tensor:
        ctx.row_shape = row.shape
        return row.new_tensor(value)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.new_full(ctx.row_shape, math.nan), None


def _poisoned(row: Tensor, value: float) -> Tensor:
    return _Poisoned.apply(row, value)


def _is_undefined(row: Tensor) -> bool:
    """No distribution: a NaN, a +inf, or no possible id at all."""
    return bool(torch.isnan(row).any() or (row == INFINITY).any() or (row == -INFINITY).all())


def _log_mixture(weight: float, difference: Tensor) -> Tensor:
    """log((1 − w) + w e^x), exact to the last bits near x = 0 and at x = −inf."""
    if weight == 1.0:
        return difference
    if weight == 0.0:
        return torch.zeros_like(difference)
    near = difference.abs() < 0.5
    small = torch.where(near, difference, 0.0)
    large = torch.where(near, 0.0, difference)
    log_stay = difference.new_tensor(math.log1p(-weight)).expand_as(large)
    return torch.where(
        near,
        torch.log1p(weight * torch.expm1(small)),
        torch.logaddexp(log_stay, math.log(weight) + large),
    )


def _kl_to_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """KL(a ‖ μ) with μ = (1 − w) a + w b. All divergences are sums of these; w = 1 is KL(a ‖ b)."""
    possible = log_a > -INFINITY
    log_p, other = log_a[possible], log_b[possible]
    if weight == 1.0 and (other == -INFINITY).any():
        raise _InfiniteDivergenceError
    step = _log_mixture(weight, other - log_p)  # log μ − log a
    p = log_p.exp()
    near = step.abs() < 0.5
    small = torch.where(near, step, 0.0)
    large = torch.where(near, 0.0, step)
    # −a log(μ/a), plus the term's share μ − a of a sum that is zero.
    terms = torch.where(
        near,
        p * (torch.expm1(small) - small),
        torch.where(near, 0.0, (log_p + step).exp()) - p - p * large,
    )
    impossible = weight * log_b[~possible].exp().sum()  # there a = 0: only the share μ is left
    return terms.sum() + impossible


class _InfiniteDivergenceError(Exception):
    """b = 0 where a > 0 and the formula takes log b."""


Divergence = Callable[[Tensor, Tensor], Tensor]


def _jsd_of(beta: float) -> Divergence:
    if beta == 0.0:
        return _forward_of
    if beta == 1.0:
        return _reverse_of
    return lambda s, tau: (
        beta * _kl_to_mixture(tau, s, 1.0 - beta) + (1.0 - beta) * _kl_to_mixture(s, tau, beta)
    )


def _skew_of(alpha: float, direction: str) -> Divergence:
    if direction == "forward":
        return lambda s, tau: _kl_to_mixture(tau, s, 1.0 - alpha)
    return lambda s, tau: _kl_to_mixture(s, tau, 1.0 - alpha)


def _forward_of(s: Tensor, tau: Tensor) -> Tensor:
    return _kl_to_mixture(tau, s, 1.0)


def _reverse_of(s: Tensor, tau: Tensor) -> Tensor:
    return _kl_to_mixture(s, tau, 1.0)


def _divergence_row(z: Tensor, t: Tensor, temperature: float, divergence: Divergence) -> Tensor:
    if _is_undefined(z) or _is_undefined(t):
        return _poisoned(z, math.nan)
    exists = (z > -INFINITY) | (t > -INFINITY)
    s = torch.log_softmax(z[exists] / temperature, -1)
    tau = torch.log_softmax(t[exists] / temperature, -1)
    try:
        return divergence(s, tau)
    except _InfiniteDivergenceError:
        return _poisoned(z, INFINITY)


def _token_logprob_row(z: Tensor, token: int, temperature: float) -> Tensor:
    if _is_undefined(z):
        return _poisoned(z, math.nan)
    exists = z > -INFINITY
    if not exists[token]:
        return _poisoned(z, -INFINITY)
    position = int(exists[:token].sum())
    return torch.log_softmax(z[exists] / temperature, -1)[position]


def _entropy_row(z: Tensor, temperature: float) -> Tensor:
    if _is_undefined(z):
        return _poisoned(z, math.nan)
    s = torch.log_softmax(z[z > -INFINITY] / temperature, -1)
    return -(s.exp() * s).sum()


# ----------------------------------------------------------------- rows on a support


class TopK(NamedTuple):
    """A sparse teacher, ids and log-probs `(..., K)`; the fields of `opdc.TopK`."""

    ids: Tensor
    logprobs: Tensor
    token_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    tail_logprob: Tensor | None = None


class Slots(NamedTuple):
    """One row of a sparse teacher: float64 log-probs of the whole vocabulary, at T already."""

    ids: list[int]  # < 0: the slot is missing
    logprobs: Tensor
    token_logprob: float | None = None
    entropy: float | None = None
    tail_logprob: float | None = None


def is_sparse(teacher: Tensor | TopK) -> bool:
    return not isinstance(teacher, Tensor)


def teacher_rows(teacher: Tensor | TopK, size: int) -> list[Tensor] | list[Slots]:
    """The float64 rows of logits, or of slots, that `support_divergence_row` takes."""
    if not is_sparse(teacher):
        return list(_rows(teacher.detach(), size))

    def column(values: Tensor | None) -> list[float | None]:
        positions = math.prod(teacher.ids.shape[:-1])
        return [None] * positions if values is None else values.double().reshape(-1).tolist()

    slots = teacher.ids.shape[-1]
    return [
        Slots(*row)
        for row in zip(
            teacher.ids.reshape(-1, slots).tolist(),
            teacher.logprobs.detach().double().reshape(-1, slots),
            column(teacher.token_logprobs),
            column(teacher.entropy),
            column(teacher.tail_logprob),
            strict=True,
        )
    ]


def ranking(row: Tensor, k: int) -> list[int]:
    """The k largest of the ids that exist: value first, then the lower id."""
    values = row.tolist()
    existing = (index for index, value in enumerate(values) if value > -INFINITY)
    return sorted(existing, key=lambda index: (-values[index], index))[:k]


def _log_softmax(row: Tensor, temperature: float) -> Tensor:
    """−inf, as a constant, where the row has it."""
    exists = row > -INFINITY
    result = torch.full_like(row, -INFINITY)
    result[exists] = torch.log_softmax(row[exists] / temperature, -1)
    return result


def _log_sum(logprobs: Tensor) -> Tensor:
    possible = logprobs[logprobs > -INFINITY]
    return torch.logsumexp(possible, -1) if len(possible) else logprobs.new_tensor(-INFINITY)


def _plain_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ a (log a − log b) as it is printed, for measures that need not have the mass 1."""
    possible = log_a > -INFINITY
    if (log_b[possible] == -INFINITY).any():
        raise _InfiniteDivergenceError
    return (log_a[possible].exp() * (log_a[possible] - log_b[possible])).sum()


def _plain_of(name: str, beta: float) -> Divergence:
    def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
        mixture = torch.logaddexp(math.log(beta) + log_q, math.log1p(-beta) + log_p)
        return beta * _plain_kl(log_q, mixture) + (1.0 - beta) * _plain_kl(log_p, mixture)

    if name == "forward_kl" or (name == "jsd" and beta == 0.0):
        return lambda log_p, log_q: _plain_kl(log_q, log_p)
    if name == "reverse_kl" or (name == "jsd" and beta == 1.0):
        return _plain_kl
    return jsd


def _bregman_of(name: str, beta: float) -> Divergence:
    return {"forward_kl": _forward_of, "reverse_kl": _reverse_of}.get(name) or _jsd_of(beta)


def support_divergence_row(
    z: Tensor,
    teacher: Tensor | Slots,
    temperature: float,
    divergence: str,
    support: str,
    k: int | None,
    normalize: str,
    token: int | None = None,
    beta: float = 0.5,
) -> Tensor:
    """The top-K divergence of one position, attached to the student's row `z`.

    `teacher`: its logits, or its `Slots`; `divergence`: "forward_kl", "reverse_kl" or "jsd";
    `support`: "teacher", "student" or "teacher+token"; `normalize`: "none", "teacher", "both",
    "tail" or "generalized".
    """
    sparse = isinstance(teacher, Slots)
    ids, teacher_logits = _support(z, teacher, support, k, token)
    if ids is None:
        return _poisoned(z, math.nan)
    renormalised = normalize in ("teacher", "both")
    if not ids and not renormalised:
        return z[:0].sum()
    if not ids or torch.isnan(teacher_logits).any():
        return _poisoned(z, math.nan)

    # The teacher on S: its slots hold log-probs, a row of logits is normalised here.
    if renormalised:
        if _is_undefined(teacher_logits):
            return _poisoned(z, math.nan)
        tau = _log_softmax(teacher_logits, 1.0 if sparse else temperature)
    elif sparse:
        tau = teacher_logits
    else:
        if _is_undefined(teacher):
            return _poisoned(z, math.nan)
        tau = _log_softmax(teacher, temperature)[ids]

    # The student on S: `both` reads nothing else of it.
    read = z[ids] if normalize == "both" else z
    if _is_undefined(read):
        return _poisoned(z, math.nan)
    whole = _log_softmax(read, temperature)
    s = whole if normalize == "both" else whole[ids]

    # The Bregman shares of `_kl_to_mixture` are zero in sum where both sides have equal mass. The
    # generalised KL is defined with them.
    formula = _plain_of(divergence, beta)
    if normalize in ("both", "generalized"):
        assert normalize == "both" or divergence == "reverse_kl"
        formula = _bregman_of(divergence, beta)
    if normalize == "tail":
        outside = torch.ones(len(z), dtype=torch.bool)
        outside[ids] = False
        s = torch.cat([s, _log_sum(whole[outside])[None]])
        tau = torch.cat([tau, _log_teacher_tail(teacher, tau, outside, temperature)[None]])
        if not sparse:  # the mass of what a server sends is 1 up to its rounding only
            formula = _bregman_of(divergence, beta)
        exists = (s > -INFINITY) | (tau > -INFINITY)
        s, tau = s[exists], tau[exists]
    try:
        return formula(s, tau)
    except _InfiniteDivergenceError:
        return _poisoned(z, INFINITY)


def _support(
    z: Tensor, teacher: Tensor | Slots, support: str, k: int | None, token: int | None
) -> tuple[list[int] | None, Tensor]:
    """S, and the teacher's logits (its log-probs if sparse) there; None where nothing ranks."""
    if isinstance(teacher, Slots):
        assert support in ("teacher", "teacher+token")
        present = [
            slot
            for slot, index in enumerate(teacher.ids)
            if index >= 0 and teacher.logprobs[slot] != -INFINITY
        ]
        ids, logprobs = [teacher.ids[slot] for slot in present], teacher.logprobs[present]
        joins = support == "teacher+token" and token not in ids
        if joins and teacher.token_logprob != -INFINITY:
            ids = [*ids, token]
            logprobs = torch.cat([logprobs, logprobs.new_tensor([teacher.token_logprob])])
        assert not logprobs.exp().sum() > 1.0 + 1e-4, "more mass than a distribution has"
        return ids, logprobs
    ranked = z.detach() if support == "student" else teacher
    if _is_undefined(ranked):
        return None, teacher
    ids = ranking(ranked, k)
    if support == "teacher+token" and token not in ids and teacher[token] > -INFINITY:
        ids.append(token)
    return ids, teacher[ids]


def _log_teacher_tail(
    teacher: Tensor | Slots, tau: Tensor, outside: Tensor, temperature: float
) -> Tensor:
    """log(1 − Q)."""
    if not isinstance(teacher, Slots):
        return _log_sum(_log_softmax(teacher, temperature)[outside])
    if teacher.tail_logprob is not None:
        return tau.new_tensor(teacher.tail_logprob)
    return torch.log1p(-tau.exp().sum().clamp(max=1.0))


# ----------------------------------------------------------------- positions and reductions


def _vocabulary(student: Tensor, teacher: Tensor, valid_vocab: int | None) -> int:
    if valid_vocab is None:
        assert student.shape[-1] == teacher.shape[-1], "vocabulary sizes differ"
        return student.shape[-1]
    return valid_vocab


def _active(shape: torch.Size, mask: Tensor | None) -> Tensor:
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()


def _over_positions(active: Tensor, row: Callable[[int], Tensor], student: Tensor) -> Tensor:
    """One number per position, 0 (and never evaluated) where the position is inactive."""
    connected_zero = student.double().reshape(-1)[:0].sum()
    values = [
        row(index) if is_active else connected_zero
        for index, is_active in enumerate(active.reshape(-1).tolist())
    ]
    if not values:
        return connected_zero + torch.zeros(active.shape, dtype=torch.float64)
    return torch.stack(values).reshape(active.shape)


def _reduce(
    losses: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    num_items: float | None,
) -> Tensor:
    active = _active(losses.shape, mask)
    weighted = losses if weights is None else losses * weights.double()
    weighted = torch.where(active, weighted, 0.0)
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    if reduction == "mean":
        items = float(active.sum()) if num_items is None else float(num_items)
        return weighted.sum() / items if items else losses.reshape(-1)[:0].sum()
    if reduction == "seq_mean":
        counts = active.sum(-1)
        filled = counts > 0
        means = weighted.sum(-1)[filled] / counts[filled]
        items = float(filled.sum()) if num_items is None else float(num_items)
        return means.sum() / items if items else losses.reshape(-1)[:0].sum()
    raise ValueError(reduction)


def _rows(tensor: Tensor, size: int) -> Tensor:
    return tensor.double()[..., :size].reshape(-1, size)


def _divergence(
    student: Tensor,
    teacher: Tensor | TopK,
    row: Callable[[Tensor, Tensor | Slots, int | None, float], Tensor],
    *,
    tokens: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
) -> Tensor:
    size = _vocabulary(student, student if is_sparse(teacher) else teacher, valid_vocab)
    z, rows = _rows(student, size), teacher_rows(teacher, size)
    y = [None] * len(rows) if tokens is None else tokens.reshape(-1).tolist()
    losses = _over_positions(
        _active(student.shape[:-1], mask),
        lambda index: row(z[index], rows[index], y[index], float(temperature)),
        student,
    )
    return _reduce(losses, mask, weights, reduction, num_items)


# ----------------------------------------------------------------- the public names


def reverse_kl(student: Tensor, teacher: Tensor | TopK, **keywords) -> Tensor:
    return _full_or_top_k(student, teacher, "reverse_kl", **keywords)


def forward_kl(student: Tensor, teacher: Tensor | TopK, **keywords) -> Tensor:
    return _full_or_top_k(student, teacher, "forward_kl", **keywords)


def jsd(student: Tensor, teacher: Tensor | TopK, *, beta: float = 0.5, **keywords) -> Tensor:
    return _full_or_top_k(student, teacher, "jsd", beta, **keywords)


def lsm(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    k: int | None = None,
    support: str | None = None,
    **keywords,
) -> Tensor:
    if k is None and not is_sparse(teacher):
        k = 32
    return reverse_kl(
        student, teacher, k=k, support=support or "teacher", normalize="both", **keywords
    )


def _full_or_top_k(
    student: Tensor,
    teacher: Tensor | TopK,
    name: str,
    beta: float = 0.5,
    *,
    support: str | None = None,
    k: int | None = None,
    normalize: str | None = None,
    **common,
) -> Tensor:
    if support is None:
        support = "teacher" if is_sparse(teacher) else "full"

    def row(z: Tensor, t: Tensor | Slots, token: int | None, temperature: float) -> Tensor:
        if support == "full":
            return _divergence_row(z, t, temperature, _bregman_of(name, beta))
        return support_divergence_row(
            z, t, temperature, name, support, k, normalize, token=token, beta=beta
        )

    return _divergence(student, teacher, row, **common)


def topk(
    logits: Tensor, k: int, *, temperature: float = 1.0, valid_vocab: int | None = None
) -> TopK:
    rows = _rows(logits.detach(), _vocabulary(logits, logits, valid_vocab))
    ids = torch.full((len(rows), k), -1)
    logprobs = torch.full((len(rows), k), -INFINITY, dtype=torch.float64)
    for index, row in enumerate(rows):
        if _is_undefined(row):
            logprobs[index] = math.nan
            continue
        best = ranking(row, k)
        ids[index, : len(best)] = torch.tensor(best)
        logprobs[index, : len(best)] = _log_softmax(row, float(temperature))[best]
    shape = (*logits.shape[:-1], k)
    return TopK(ids.reshape(shape), logprobs.reshape(shape))


def skew_kl(
    student: Tensor, teacher: Tensor, *, alpha: float = 0.1, direction: str = "forward", **common
) -> Tensor:
    divergence = _skew_of(alpha, direction)
    return _divergence(
        student, teacher, lambda z, t, _, T: _divergence_row(z, t, T, divergence), **common
    )


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    valid_vocab: int | None = None,
) -> Tensor:
    z = _rows(logits, _vocabulary(logits, logits, valid_vocab))
    y = tokens.reshape(-1).tolist()
    return _over_positions(
        _active(tokens.shape, mask),
        lambda index: _token_logprob_row(z[index], y[index], float(temperature)),
        logits,
    )


def entropy(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    valid_vocab: int | None = None,
) -> Tensor:
    z = _rows(logits, _vocabulary(logits, logits, valid_vocab))
    return _over_positions(
        _active(logits.shape[:-1], mask),
        lambda index: _entropy_row(z[index], float(temperature)),
        logits,
    )


def _token_pair(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    temperature: float,
    mask: Tensor | None,
    valid_vocab: int | None,
) -> tuple[Tensor, Tensor]:
    """s_y (attached) and τ_y (detached; the teacher may be given as these log-probs alone)."""
    keywords = {"temperature": temperature, "mask": mask, "valid_vocab": valid_vocab}
    s = token_logprobs(student, tokens, **keywords)
    if teacher.shape == tokens.shape:  # given log-probs are at this temperature already
        tau = torch.where(_active(tokens.shape, mask), teacher.detach().double(), 0.0)
    else:
        tau = token_logprobs(teacher.detach(), tokens, **keywords).detach()
    return s, tau


def _with_undefined_rows(
    losses: Tensor, undefined: Tensor, student: Tensor, size: int, active: Tensor
) -> Tensor:
    """Replace the losses marked in `undefined` by themselves with a NaN gradient row."""
    if not undefined.any():
        return losses
    z = _rows(student, size)
    flat, bad = losses.reshape(-1), (undefined & active).reshape(-1).tolist()
    return torch.stack(
        [_poisoned(z[i], float(flat[i])) if bad[i] else flat[i] for i in range(len(bad))]
    ).reshape(losses.shape)


def discounted(advantages: Tensor, active: Tensor, discount: float) -> Tensor:
    """A_t = Σ_{u ≥ t} γ^(u−t) A_u over the active u of a sequence; u − t counts holes too."""
    if discount == 0.0 or advantages.dim() == 0:
        return advantages
    length = advantages.shape[-1]
    result = torch.zeros_like(advantages)
    for t in range(length):
        for u in range(t, length):
            coupled = discount ** (u - t) * advantages[..., u]
            result[..., t] += torch.where(active[..., u], coupled, 0.0)
    return result


def k1(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    clip_range: float | Sequence[float] | None = None,
    advantage: str = "old",
    discount: float = 0.0,
    reference_logprobs: Tensor | None = None,
    reward_scale: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
) -> Tensor:
    active = _active(tokens.shape, mask)
    s, tau = _token_pair(student, teacher, tokens, temperature, mask, valid_vocab)
    current = s.detach()
    old = current if old_logprobs is None else torch.where(active, old_logprobs.double(), 0.0)
    behaviour = old if advantage == "old" else current
    if reference_logprobs is None:
        advantages = tau - behaviour
    else:
        reference = torch.where(active, reference_logprobs.double(), 0.0)
        advantages = reward_scale * (tau - reference) - (behaviour - reference)
    advantages = discounted(advantages, active, discount)
    ratio = torch.exp(s - old)
    losses = -ratio * advantages
    if clip_range is not None:
        low, high = clip_range if isinstance(clip_range, Sequence) else (clip_range, clip_range)
        clipped = -ratio.detach().clamp(1.0 - low, 1.0 + high) * advantages
        losses = torch.where(clipped > losses, clipped, losses)
    undefined = ~torch.isfinite(advantages) | ~torch.isfinite(ratio)
    size = student.shape[-1] if valid_vocab is None else valid_vocab
    losses = _with_undefined_rows(losses, undefined, student, size, active)
    return _reduce(losses, mask, weights, reduction, num_items)


def _direct(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    formula: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
) -> Tensor:
    s, tau = _token_pair(student, teacher, tokens, temperature, mask, valid_vocab)
    log_ratio = tau - s
    undefined = ~torch.isfinite(log_ratio)
    losses = formula(log_ratio)
    size = student.shape[-1] if valid_vocab is None else valid_vocab
    active = _active(tokens.shape, mask)
    losses = _with_undefined_rows(losses, undefined, student, size, active)
    return _reduce(losses, mask, weights, reduction, num_items)


def k2(student: Tensor, teacher: Tensor, tokens: Tensor, **common) -> Tensor:
    return _direct(student, teacher, tokens, lambda r: 0.5 * r * r, **common)


def k3(student: Tensor, teacher: Tensor, tokens: Tensor, **common) -> Tensor:
    return _direct(student, teacher, tokens, lambda r: torch.expm1(r) - r, **common)


# ----------------------------------------------------------------- 60 digits


def exact(
    loss: str, student: Sequence[float], teacher: Sequence[float], **keywords
) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    """Value and gradient of one row, from the plain formulas in 60-digit arithmetic.

    `loss`: a public name; `token` is needed by the sampled-token losses. All ids must exist.
    """
    with mpmath.workdps(60):
        temperature = mpmath.mpf(keywords.get("temperature", 1.0))
        s = _exact_log_softmax(student, temperature)
        tau = _exact_log_softmax(teacher, temperature)
        p = _exp(s)
        value, u = _EXACT[loss](s, tau, keywords)
        total = mpmath.fsum(u)
        return value, [(u_j - p_j * total) / temperature for u_j, p_j in zip(u, p, strict=True)]


def _exact_log_softmax(logits: Sequence[float], temperature: mpmath.mpf) -> list[mpmath.mpf]:
    scaled = [mpmath.mpf(float(x)) / temperature for x in logits]
    top = max(scaled)
    normaliser = mpmath.log(mpmath.fsum(mpmath.exp(x - top) for x in scaled))
    return [x - top - normaliser for x in scaled]


def _exp(logarithms: list[mpmath.mpf]) -> list[mpmath.mpf]:
    return [mpmath.exp(x) for x in logarithms]


def _exact_forward(s, tau, _):
    q = _exp(tau)
    terms = zip(q, tau, s, strict=True)
    return mpmath.fsum(a * (x - y) for a, x, y in terms), [-a for a in q]


def _exact_reverse(s, tau, _):
    terms = [a * (x - y) for a, x, y in zip(_exp(s), s, tau, strict=True)]
    return mpmath.fsum(terms), terms


def _exact_jsd(s, tau, keywords):
    p, q = _exp(s), _exp(tau)
    beta = mpmath.mpf(keywords.get("beta", 0.5))
    mixture = [mpmath.log(beta * b + (1 - beta) * a) for a, b in zip(p, q, strict=True)]
    value = beta * mpmath.fsum(b * (x - m) for b, x, m in zip(q, tau, mixture, strict=True))
    student_side = [a * (x - m) for a, x, m in zip(p, s, mixture, strict=True)]
    return value + (1 - beta) * mpmath.fsum(student_side), [(1 - beta) * u for u in student_side]


def _exact_skew(s, tau, keywords):
    p, q = _exp(s), _exp(tau)
    alpha = mpmath.mpf(keywords.get("alpha", 0.1))
    if keywords.get("direction", "forward") == "forward":
        mixture = [alpha * b + (1 - alpha) * a for a, b in zip(p, q, strict=True)]
        value = mpmath.fsum(
            b * (x - mpmath.log(m)) for b, x, m in zip(q, tau, mixture, strict=True)
        )
        return value, [-(1 - alpha) * b * a / m for a, b, m in zip(p, q, mixture, strict=True)]
    mixture = [(1 - alpha) * b + alpha * a for a, b in zip(p, q, strict=True)]
    value = mpmath.fsum(a * (x - mpmath.log(m)) for a, x, m in zip(p, s, mixture, strict=True))
    return value, [
        a * (x - mpmath.log(m) + 1 - alpha * a / m) for a, x, m in zip(p, s, mixture, strict=True)
    ]


def _exact_token(value_and_slope):
    def rule(s, tau, keywords):
        token = keywords["token"]
        value, slope = value_and_slope(s[token], tau[token])
        return value, [slope if j == token else mpmath.mpf(0) for j in range(len(s))]

    return rule


def _exact_entropy(s, _tau, _keywords):
    # The gradient −p(s + H) is u − pΣu with u = −p s, because Σu = H.
    terms = [-a * x for a, x in zip(_exp(s), s, strict=True)]
    return mpmath.fsum(terms), terms


_EXACT = {
    "forward_kl": _exact_forward,
    "reverse_kl": _exact_reverse,
    "jsd": _exact_jsd,
    "skew_kl": _exact_skew,
    "k1": _exact_token(lambda s, tau: (s - tau, s - tau)),
    "k2": _exact_token(lambda s, tau: ((tau - s) ** 2 / 2, s - tau)),
    "k3": _exact_token(lambda s, tau: (mpmath.expm1(tau - s) - (tau - s), 1 - mpmath.exp(tau - s))),
    "token_logprobs": _exact_token(lambda s, _: (s, mpmath.mpf(1))),
    "entropy": _exact_entropy,
}
