"""The reference for the published methods: TrOPD, EOPD, REOPOLD, AOPD, the drift gate.

As in `oracle`: float64 PyTorch, one position at a time, the formula as it is printed, gradients by
autograd. Each method is one function of a position that returns its loss and its gate; the public
names reduce the losses, the functions `trusted`, `gated` and `selected` return the gates. Beyond
the public functions' keywords nothing is shared with the library, and nothing here is fast.

A teacher is logits `(..., V)`, any object with the fields of `opdc.TopK`, or (REOPOLD) the tokens'
log-probs `(...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oracle import (
    INFINITY,
    Slots,
    _active,
    _entropy_row,
    _is_undefined,
    _log_softmax,
    _over_positions,
    _poisoned,
    _reduce,
    _rows,
    _vocabulary,
    is_sparse,
    ranking,
    teacher_rows,
)

REOPOLD_FLOOR = math.log(0.3) / 0.7  # the default of TrOPD's threshold as well
ClipRange = float | Sequence[float] | None
Row = Callable[[int], tuple[Tensor, float]]  # the loss and the gate of one position


class _InfiniteLossError(Exception):
    """The formula takes the log of a probability that is 0."""


# ----------------------------------------------------------------- what a position offers


@dataclass
class _Teacher:
    """The teacher at one position: its top-K in order of rank, τ_y, and H(q)."""

    support: list[int]
    tau: Tensor
    tau_y: float
    entropy: float


def _dense_teacher(t: Tensor, token: int, k: int, temperature: float) -> _Teacher | None:
    if _is_undefined(t):
        return None
    tau, support = _log_softmax(t, temperature), ranking(t, k)
    return _Teacher(support, tau[support], float(tau[token]), float(_entropy_row(t, temperature)))


def _sparse_teacher(slots: Slots) -> _Teacher | None:
    filled = [
        slot
        for slot, (token, tau) in enumerate(zip(slots.ids, slots.logprobs, strict=True))
        if token >= 0 and tau != -INFINITY
    ]
    if slots.logprobs[filled].isnan().any():
        return None
    tau_y, entropy = (math.nan if x is None else x for x in (slots.token_logprob, slots.entropy))
    return _Teacher([slots.ids[slot] for slot in filled], slots.logprobs[filled], tau_y, entropy)


class _Batch:
    """Rows and tokens of a call, and the teacher of any of its positions."""

    def __init__(self, student, teacher, tokens, k, temperature, mask, valid_vocab):
        self.is_given = not is_sparse(teacher) and teacher.dim() < student.dim()
        is_logits = not self.is_given and not is_sparse(teacher)
        size = _vocabulary(student, teacher if is_logits else student, valid_vocab)
        self.student, self.tokens = student, tokens.reshape(-1).tolist()
        self.z = _rows(student, size)
        self.teacher = teacher.reshape(-1) if self.is_given else teacher_rows(teacher, size)
        self.k, self.temperature = k, float(temperature)
        self.active = _active(tokens.shape, mask)

    def student_at(self, index: int) -> Tensor | None:
        row = self.z[index]
        return None if _is_undefined(row) else _log_softmax(row, self.temperature)

    def teacher_at(self, index: int) -> _Teacher | None:
        row = self.teacher[index]
        if self.is_given:
            return _Teacher([], self.z.new_empty(0), float(row), math.nan)
        if isinstance(row, Slots):
            return _sparse_teacher(row)
        return _dense_teacher(row, self.tokens[index], self.k, self.temperature)

    def losses(self, row: Row) -> Tensor:
        return _over_positions(self.active, lambda index: row(index)[0], self.student)

    def gates(self, row: Row) -> Tensor:
        gates = _over_positions(
            self.active, lambda index: self.z.new_tensor(row(index)[1]), self.student
        )
        return gates.detach()

    def undefined(self, index: int) -> tuple[Tensor, float]:
        """Such a row is NaN, and no gate counts it."""
        return _poisoned(self.z[index], math.nan), 0.0


def _at(values: Tensor | None, index: int) -> float | None:
    return None if values is None else float(values.reshape(-1)[index])


# ----------------------------------------------------------------- terms


def _policy(s_y: Tensor, advantage: float, old: float | None, clip_range: ClipRange) -> Tensor:
    """−Aρ, or the loss of PPO; ρ is the ratio to the policy that drew the token."""
    if advantage == -INFINITY:
        raise _InfiniteLossError
    ratio = torch.exp(s_y - (s_y.detach() if old is None else old))
    if clip_range is None:
        return -ratio * advantage
    low, high = clip_range if isinstance(clip_range, Sequence) else (clip_range, clip_range)
    return torch.maximum(-ratio * advantage, -ratio.clamp(1 - low, 1 + high) * advantage)


def _truncated_forward_kl(s: Tensor, teacher: _Teacher, normalize: str) -> Tensor:
    """Σ q (τ − s) over the teacher's top-K, with q as it is or made to sum to 1 there."""
    tau, s = teacher.tau, s[teacher.support]
    if normalize == "teacher":
        if not teacher.support:
            return s.sum() * math.nan
        tau = torch.log_softmax(tau, -1)
    if (s == -INFINITY).any():
        raise _InfiniteLossError
    return (tau.exp() * (tau - s)).sum()


def _sum_of_terms(row: Tensor, terms: list[tuple[float, Callable[[], Tensor]]]) -> Tensor:
    """Σ weight · term; a term of weight 0 is not evaluated."""
    try:
        total = row[:0].sum()
        for weight, term in terms:
            if weight != 0.0:
                total = total + weight * term()
    except _InfiniteLossError:
        return _poisoned(row, INFINITY)
    return _poisoned(row, math.nan) if total.isnan() else total


# ----------------------------------------------------------------- TrOPD


def _tropd_row(
    batch: _Batch,
    *,
    region: str = "sampled",
    outlier: str = "forward_kl",
    threshold: float | None = None,
    prefix_mask: Tensor | None = None,
    prefix_weight: float = 1e-3,
    old_logprobs: Tensor | None = None,
    clip_range: ClipRange = None,
    advantage: str = "old",
    uniforms: Tensor | None = None,
) -> Row:
    threshold = REOPOLD_FLOOR if threshold is None else threshold

    def row(index: int) -> tuple[Tensor, float]:
        s, y = batch.student_at(index), batch.tokens[index]
        if s is None:
            return batch.undefined(index)
        if prefix_mask is not None and bool(prefix_mask.reshape(-1)[index]):
            return -prefix_weight * s[y], 0.0
        teacher, old = batch.teacher_at(index), _at(old_logprobs, index)
        if teacher is None:
            return batch.undefined(index)
        current = float(s[y].detach())
        log_ratio = teacher.tau_y - (current if old is None else old)
        if math.isnan(log_ratio):
            return batch.undefined(index)
        trust = {
            "sampled": lambda: float(_at(uniforms, index) < math.exp(min(log_ratio, 0.0))),
            "expected": lambda: math.exp(min(log_ratio, 0.0)),
            "threshold": lambda: float(log_ratio >= threshold),
        }[region]()
        used = log_ratio if advantage == "old" else teacher.tau_y - current
        outlier_term = {
            "forward_kl": lambda: _truncated_forward_kl(s, teacher, "none"),
            "mask": lambda: s.new_zeros(()),
            "clip": lambda: _policy(s[y], max(used, threshold), old, clip_range),
        }[outlier]
        terms = [(trust, lambda: _policy(s[y], used, old, clip_range)), (1 - trust, outlier_term)]
        return _sum_of_terms(batch.z[index], terms), trust

    return row


def tropd(student, teacher, tokens, *, k=64, temperature=1.0, mask=None, weights=None,
          valid_vocab=None, reduction="mean", num_items=None, **method) -> Tensor:  # fmt: skip
    batch = _Batch(student, teacher, tokens, k, temperature, mask, valid_vocab)
    losses = batch.losses(_tropd_row(batch, **method))
    return _reduce(losses, mask, weights, reduction, num_items)


def trusted(
    student, teacher, tokens, *, k=64, temperature=1.0, mask=None, valid_vocab=None, **method
) -> Tensor:
    """M of each position: 0 at prefixes, in undefined rows and where nothing is active."""
    batch = _Batch(student, teacher, tokens, k, temperature, mask, valid_vocab)
    return batch.gates(_tropd_row(batch, **method))


# ----------------------------------------------------------------- EOPD


def _eopd_row(
    batch: _Batch,
    *,
    entropy_threshold: float = 0.8,
    forward_weight: float = 1.0,
    old_logprobs: Tensor | None = None,
    clip_range: ClipRange = 0.2,
) -> Row:
    def row(index: int) -> tuple[Tensor, float]:
        s, teacher, y = batch.student_at(index), batch.teacher_at(index), batch.tokens[index]
        if s is None or teacher is None:
            return batch.undefined(index)
        old = _at(old_logprobs, index)
        advantage = teacher.tau_y - (float(s[y].detach()) if old is None else old)
        if math.isnan(advantage) or math.isnan(teacher.entropy):
            return batch.undefined(index)
        gate = float(teacher.entropy > entropy_threshold)
        terms = [
            (1.0, lambda: _policy(s[y], advantage, old, None if old is None else clip_range)),
            (gate, lambda: forward_weight * _truncated_forward_kl(s, teacher, "teacher")),
        ]
        return _sum_of_terms(batch.z[index], terms), gate

    return row


def eopd(student, teacher, tokens, *, k=16, temperature=1.0, mask=None, weights=None,
         valid_vocab=None, reduction="mean", num_items=None, **method) -> Tensor:  # fmt: skip
    batch = _Batch(student, teacher, tokens, k, temperature, mask, valid_vocab)
    losses = batch.losses(_eopd_row(batch, **method))
    return _reduce(losses, mask, weights, reduction, num_items)


# ----------------------------------------------------------------- AOPD


def _aopd_row(batch: _Batch, *, threshold: float = 0.0) -> Row:
    def row(index: int) -> tuple[Tensor, float]:
        s, teacher, y = batch.student_at(index), batch.teacher_at(index), batch.tokens[index]
        if s is None or teacher is None:
            return batch.undefined(index)
        current = float(s[y].detach())
        if math.isnan(teacher.tau_y - current):
            return batch.undefined(index)
        gate = float(math.exp(teacher.tau_y) - math.exp(current) <= threshold)
        terms = [
            (gate, lambda: _truncated_forward_kl(s, teacher, "none")),
            (1 - gate, lambda: _policy(s[y], teacher.tau_y - current, None, None)),
        ]
        return _sum_of_terms(batch.z[index], terms), gate

    return row


def aopd(student, teacher, tokens, *, k=16, temperature=1.0, mask=None, weights=None,
         valid_vocab=None, reduction="mean", num_items=None, **method) -> Tensor:  # fmt: skip
    batch = _Batch(student, teacher, tokens, k, temperature, mask, valid_vocab)
    losses = batch.losses(_aopd_row(batch, **method))
    return _reduce(losses, mask, weights, reduction, num_items)


def gated(
    method, student, teacher, tokens, *, k=16, temperature=1.0, mask=None, valid_vocab=None, **own
) -> Tensor:
    """The gate of "eopd" or "aopd" at each position."""
    batch = _Batch(student, teacher, tokens, k, temperature, mask, valid_vocab)
    return batch.gates({"eopd": _eopd_row, "aopd": _aopd_row}[method](batch, **own))


# ----------------------------------------------------------------- REOPOLD


def _reopold_floor(mixture: float) -> float:
    if mixture == 0.0:
        return -INFINITY
    return -1.0 if mixture == 1.0 else math.log(mixture) / (1 - mixture)


def _log_ratio(batch: _Batch, index: int) -> float:
    """R of the current policy, NaN in an undefined row."""
    s, teacher = batch.student_at(index), batch.teacher_at(index)
    if s is None or teacher is None:
        return math.nan
    return teacher.tau_y - float(s[batch.tokens[index]].detach())


def entropy_of_the_last_kept(entropies: Sequence[float], keep: float) -> float:
    """The n-th largest of N entropies, n = ⌈keep · N⌉, at least 1."""
    count = max(1, math.ceil(keep * len(entropies) - 1e-9))
    return sorted(entropies, reverse=True)[count - 1]


def _selected(batch, phase, mixture, keep, entropy_threshold) -> Tensor:
    active = [i for i, yes in enumerate(batch.active.reshape(-1).tolist()) if yes]
    ratios = {index: _log_ratio(batch, index) for index in active}
    defined = [index for index in active if not math.isnan(ratios[index])]
    chosen = torch.zeros(batch.active.numel(), dtype=torch.bool)
    if phase == "exploration":
        floor = _reopold_floor(mixture)
        for index in defined:
            chosen[index] = ratios[index] >= floor
    elif defined:
        entropy = {i: _entropy_row(batch.z[i], batch.temperature).item() for i in defined}
        threshold = entropy_threshold
        if threshold is None:
            threshold = entropy_of_the_last_kept(list(entropy.values()), keep)
        for index in defined:
            chosen[index] = entropy[index] >= threshold
    return chosen.reshape(batch.active.shape)


def selected(student, teacher, tokens, *, phase="exploration", mixture=0.3, keep=0.2,
             entropy_threshold=None, temperature=1.0, mask=None, valid_vocab=None,
             **_) -> Tensor:  # fmt: skip
    teacher = teacher.token_logprobs if is_sparse(teacher) else teacher
    batch = _Batch(student, teacher, tokens, 0, temperature, mask, valid_vocab)
    return _selected(batch, phase, mixture, keep, entropy_threshold)


def reopold(student, teacher, tokens, *, phase="exploration", mixture=0.3, keep=0.2,
            entropy_threshold=None, old_logprobs=None, temperature=1.0, mask=None, weights=None,
            valid_vocab=None, reduction="mean", num_items=None) -> Tensor:  # fmt: skip
    teacher = teacher.token_logprobs if is_sparse(teacher) else teacher
    batch = _Batch(student, teacher, tokens, 0, temperature, mask, valid_vocab)
    chosen = _selected(batch, phase, mixture, keep, entropy_threshold)
    is_chosen, floor = chosen.reshape(-1).tolist(), _reopold_floor(mixture)

    def row(index: int) -> tuple[Tensor, float]:
        log_ratio, old = _log_ratio(batch, index), _at(old_logprobs, index)
        if math.isnan(log_ratio):
            return batch.undefined(index)
        s_y = batch.student_at(index)[batch.tokens[index]]
        terms = [(float(is_chosen[index]), lambda: _policy(s_y, max(log_ratio, floor), old, None))]
        return _sum_of_terms(batch.z[index], terms), 0.0

    losses = batch.losses(row)
    undefined = losses.isnan()
    reduced = _reduce(losses, chosen, weights, reduction, num_items)
    if not undefined.any():
        return reduced
    # Counted by nothing, and still NaN: the row itself, and every number it is part of.
    if reduction == "none":
        return torch.where(undefined, losses, reduced)
    return reduced + losses[undefined].sum()


# ----------------------------------------------------------------- weights, masks, schedules


def drift_gate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    block: int = 64,
    kappa: float = 1.0,
) -> Tensor:
    """exp(−κ |mean drift of the block|), divided by its mean over all active positions."""
    active = _active(logprobs.shape, mask)
    length = logprobs.shape[-1]
    drift = (logprobs.double() - old_logprobs.double()).detach().reshape(-1, length)
    gates = torch.zeros_like(drift)
    for sequence, here in enumerate(active.reshape(-1, length)):
        positions = here.nonzero()[:, 0].tolist()
        for position in positions:
            number = (position - positions[0]) // block
            others = [u for u in positions if (u - positions[0]) // block == number]
            mean = drift[sequence, others].sum() / len(others)
            gates[sequence, position] = torch.exp(-kappa * mean.abs())
    gates = gates.reshape(logprobs.shape)
    return gates / gates[active].mean() if active.any() else gates


def special_token_mask(tokens: Tensor, ids: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Without, for each id, the first active position of a sequence that holds it."""
    kept = _active(tokens.shape, mask).contiguous().clone()
    length = tokens.shape[-1]
    for row, keeps, active in zip(
        tokens.reshape(-1, length).tolist(),
        kept.view(-1, length),
        kept.clone().view(-1, length).tolist(),
        strict=True,
    ):
        for token in ids:
            found = [t for t in range(length) if active[t] and row[t] == token]
            if found:
                keeps[found[0]] = False
    return kept
