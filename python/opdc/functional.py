"""The losses as functions: logits in, a loss with its gradient out.

Shapes: logits are `(..., V)`, the vocabulary last; tokens, mask, weights and log-probs are `(...)`,
one per position. Logits are aligned with tokens already: `logits[..., t, :]` predicts
`tokens[..., t]`. The last position axis is the sequence.

Units: natural logarithms, so losses and log-probs are in nats. `p` and `q` are the student's and
the teacher's probabilities at the temperature `T`, `s = log p` and `τ = log q`, `y` the sampled
token and `R = τ_y − s_y` its log-ratio. No loss is multiplied by `T²`.

Types: logits in float32, float64, bfloat16 or float16, the student's and the teacher's independent
of each other. The arithmetic is float64 if one of them is float64, else float32; the loss comes in
that type and the gradient, rounded once, in the student's. Only the student receives a gradient,
and only a first one.

Memory: any strides; logits whose last axis has another stride than 1 are copied.

Undefined input: a NaN, a `+inf` or nothing but `−inf` in an active row makes the loss of this row
and its gradient NaN and leaves the gradients of the other rows alone. `−inf` in both models means
that an id does not exist; where a formula needs the log of a probability that is 0, the loss is
`+inf` and the gradient row NaN. Without any active position losses are 0 and so are gradients.

Errors: `ValueError` for shapes, numbers, token ids and combinations, `TypeError` for types, dtypes
and devices. Nothing has been written then.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor

from . import _ops

# Tensor, or (Tensor, dict[str, Tensor]) with return_metrics=True. A union would make every caller
# of a type checker take it apart.
Loss: TypeAlias = Any


class Common(TypedDict, total=False):
    """The keywords that all losses share.

    `temperature` (1.0): `T > 0`; both logits are divided by it. Log-probs that come in are at this
    temperature already.

    `mask` (None): `(...)`, bool or any dtype in which 0 means inactive. Inactive positions are
    never read; their loss and gradient are exactly 0.

    `weights` (None): `(...)`, floating, a factor of each position's loss; may be 0 or negative.

    `valid_vocab` (None): the softmaxes run over the ids `0 … valid_vocab − 1` and the gradient
    beyond is 0. Needed where the two vocabularies differ in size, e.g. by padding.

    `reduction` ("mean"): "none" gives `m w ℓ` of each position, "sum" their sum, "mean" the sum
    over the number of active positions, "seq_mean" the mean over sequences of each sequence's
    mean. Sequences without an active position do not count.

    `num_items` (None): a count that replaces the denominator of "mean" (active positions) or
    "seq_mean" (sequences), for batches that are spread over steps or processes. A number or a
    0-dim tensor; 0 gives 0.

    `inplace` (False): the gradient overwrites the student's logits during the call, which saves
    its memory and half of the time. Nothing may use the logits afterwards (autograd notices and
    raises); after `backward` the gradient of the logits shares their memory. With "none" a second
    rounding, of the product with the upstream gradient, is part of it. The logits must be
    the result of a computation, with rows of their own in memory, and outside of `torch.func`. Two
    such losses on slices of one tensor, and logits that are the input of a reentrant checkpoint,
    do not work. Where no gradient is needed, nothing is overwritten.

    `return_metrics` (False): return `(loss, metrics)`; the metrics are detached 0-dim float64
    tensors with the sums over active positions, unweighted, see `opdc.metrics`.
    """

    temperature: float
    mask: Tensor | None
    weights: Tensor | None
    valid_vocab: int | None
    reduction: str
    num_items: float | Tensor | None
    inplace: bool
    return_metrics: bool


def reverse_kl(student: Tensor, teacher: Tensor, **common: Unpack[Common]) -> Loss:
    """Reverse Kullback-Leibler divergence `KL(p ‖ q) = Σ p (s − τ)`: mode-seeking.

    The loss of on-policy distillation over the whole vocabulary (MiniLLM, arXiv 2306.08543, eq. 1;
    GKD, arXiv 2306.13649, with β = 1).

    Args:
        student: logits `(..., V)`; receives the gradient.
        teacher: logits `(..., V)`.
        **common: temperature, mask, weights, valid_vocab, reduction, num_items, inplace and
            return_metrics; see `Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> loss = opdc.reverse_kl(student, teacher)
    >>> loss.backward()
    >>> f"{loss.item():.4f}", [f"{g:+.4f}" for g in student.grad[0].tolist()]
    ('1.1504', ['-0.2836', '-0.2815', '+0.5652'])
    """
    return _loss("reverse_kl", student, teacher, **common)


def forward_kl(student: Tensor, teacher: Tensor, **common: Unpack[Common]) -> Loss:
    """Forward Kullback-Leibler divergence `KL(q ‖ p) = Σ q (τ − s)`: mass-covering.

    The loss of classical distillation (Hinton et al., arXiv 1503.02531, without `T²`); its gradient
    is `(p − q)/T`. GKD (arXiv 2306.13649) with β = 0.

    Args:
        student: logits `(..., V)`; receives the gradient.
        teacher: logits `(..., V)`.
        **common: see `Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> loss = opdc.forward_kl(student, teacher)
    >>> loss.backward()
    >>> f"{loss.item():.4f}", [f"{g:+.4f}" for g in student.grad[0].tolist()]
    ('1.1504', ['-0.5752', '+0.0000', '+0.5752'])
    """
    return _loss("forward_kl", student, teacher, **common)


def jsd(student: Tensor, teacher: Tensor, *, beta: float = 0.5, **common: Unpack[Common]) -> Loss:
    """Generalised Jensen-Shannon divergence `β KL(q ‖ μ) + (1 − β) KL(p ‖ μ)`, `μ = βq + (1 − β)p`.

    The loss of GKD (arXiv 2306.13649, eq. 1). `beta=0` is the forward and `beta=1` the reverse KL,
    by definition (the limits of the formula are 0).

    Args:
        student: logits `(..., V)`; receives the gradient.
        teacher: logits `(..., V)`.
        beta: the teacher's share of the mixture, in [0, 1].
        **common: see `Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]])
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> f"{opdc.jsd(student, teacher).item():.4f}"
    '0.2476'
    """
    return _loss("jsd", student, teacher, mixture=_number("beta", beta), **common)


def skew_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    direction: str = "forward",
    **common: Unpack[Common],
) -> Loss:
    """Skew Kullback-Leibler divergence, always finite for `alpha` between 0 and 1.

    The losses of DistiLLM (arXiv 2402.03898, eq. 4): "forward" is `KL(q ‖ αq + (1 − α)p)`,
    "reverse" is `KL(p ‖ (1 − α)q + αp)`.

    Args:
        student: logits `(..., V)`; receives the gradient.
        teacher: logits `(..., V)`.
        alpha: how much of its first argument is mixed into the second, in [0, 1).
        direction: "forward" or "reverse".
        **common: see `Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]])
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> f"{opdc.skew_kl(student, teacher).item():.4f}"
    '0.8299'
    """
    methods = ("skew_forward", "skew_reverse")
    method = methods[_choice("direction", direction, ("forward", "reverse"))]
    return _loss(method, student, teacher, mixture=_number("alpha", alpha), **common)


def k1(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    clip_range: float | tuple[float, float] | None = None,
    advantage: str = "old",
    discount: float = 0.0,
    reference_logprobs: Tensor | None = None,
    reward_scale: float = 1.0,
    **common: Unpack[Common],
) -> Loss:
    """Policy gradient with the teacher's log-ratio as reward: on-policy distillation by samples.

    The loss is `−A ρ`. Without `old_logprobs` the ratio `ρ = exp(s_y − s_y.detach())` is 1: the
    value is the k1 estimate `s_y − τ_y` of the reverse KL and the expected gradient over `y ~ p`
    is that of the reverse KL. (The value itself, differentiated, has an expected gradient of 0.)
    With them `ρ = exp(s_y − old)`, and `clip_range` gives the loss of PPO (arXiv 1707.06347, eq.
    7), `max(−ρA, −clip(ρ, 1 − ε_low, 1 + ε_high) A)`. The advantage `A` is never differentiated.

    Args:
        student: logits `(..., V)`; receives the gradient.
        teacher: logits `(..., V)`, or its log-probs of the tokens `(...)`.
        tokens: the sampled ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        old_logprobs: `(...)`, log-probs of the tokens under the policy that drew them.
        clip_range: `ε`, or `(ε_low, ε_high)`; needs `old_logprobs`. None: not clipped.
        advantage: "old" is `A = τ_y − old`; "current" is `A = τ_y − s_y` of the current student.
            Without `old_logprobs` they are the same.
        discount: `γ` in [0, 1]: `A_t` becomes `Σ γ^(u−t) A_u` over the active `u ≥ t` of the
            sequence.
        reference_logprobs: `(...)`, log-probs `r` of the tokens under a reference policy:
            `A = λ (τ_y − r) − (old − r)`.
        reward_scale: `λ`; anything but 1 needs `reference_logprobs`.
        **common: see `Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    >>> teacher_logprobs = torch.tensor([-0.5])
    >>> loss = opdc.k1(student, teacher_logprobs, torch.tensor([1]))
    >>> loss.backward()
    >>> f"{loss.item():.4f}", [f"{g:+.4f}" for g in student.grad[0].tolist()]
    ('-0.9076', ['+0.0817', '-0.6855', '+0.6038'])
    """
    if clip_range is None:
        clip_low = clip_high = math.inf
    else:
        if old_logprobs is None:
            raise ValueError(
                "clip_range needs old_logprobs: the ratio to the current policy itself is 1, "
                "which is never clipped; give old_logprobs or leave clip_range out"
            )
        clip_low, clip_high = _clip_range(clip_range)
    reward_scale = _number("reward_scale", reward_scale)
    if reference_logprobs is None and reward_scale != 1.0:
        raise ValueError(
            f"reward_scale is {reward_scale} without reference_logprobs: it scales the log-ratio "
            "of teacher and reference; give reference_logprobs or leave reward_scale at 1"
        )
    return _token_loss(
        "k1",
        student,
        teacher,
        tokens,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        clip_low=clip_low,
        clip_high=clip_high,
        advantage=_choice("advantage", advantage, _ops.ADVANTAGES),
        discount=_number("discount", discount),
        reward_scale=reward_scale,
        **common,
    )


def k2(student: Tensor, teacher: Tensor, tokens: Tensor, **common: Unpack[Common]) -> Loss:
    """`½ R²` of the sampled token, differentiated: its mean gradient is the *reverse* KL's.

    The estimator k2 of Schulman ("Approximating KL divergence", 2020) as a loss. Over `y ~ p` its
    expected gradient descends `KL(p ‖ q)`, although its expected value is not that divergence.

    Args:
        student: logits `(..., V)`; receives the gradient.
        teacher: logits `(..., V)`, or its log-probs of the tokens `(...)`.
        tokens: the sampled ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        **common: see `Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]])
    >>> f"{opdc.k2(student, torch.tensor([-0.5]), torch.tensor([1])).item():.4f}"
    '0.4119'
    """
    return _token_loss("k2", student, teacher, tokens, **common)


def k3(student: Tensor, teacher: Tensor, tokens: Tensor, **common: Unpack[Common]) -> Loss:
    """`e^R − 1 − R` of the sampled token, differentiated: its mean gradient is the *forward* KL's.

    The estimator k3 of Schulman ("Approximating KL divergence", 2020) as a loss, as in GRPO
    (arXiv 2402.03300, eq. 4). Over `y ~ p` its expected value is `KL(p ‖ q)`, but its expected
    gradient descends `KL(q ‖ p)`.

    Args:
        student: logits `(..., V)`; receives the gradient.
        teacher: logits `(..., V)`, or its log-probs of the tokens `(...)`.
        tokens: the sampled ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        **common: see `Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]])
    >>> f"{opdc.k3(student, torch.tensor([-0.5]), torch.tensor([1])).item():.4f}"
    '0.5708'
    """
    return _token_loss("k3", student, teacher, tokens, **common)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    valid_vocab: int | None = None,
) -> Tensor:
    """Log-probs `s_y` of given tokens, `(...)`; differentiable once. Inactive positions give 0.

    Args:
        logits: `(..., V)`.
        tokens: ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        temperature, mask, valid_vocab: see `Common`.

    >>> import opdc, torch
    >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
    >>> [f"{x:.4f}" for x in opdc.token_logprobs(logits, torch.tensor([2])).tolist()]
    ['-0.4076']
    """
    logprobs: Tensor = _evaluate(
        "token_logprobs",
        logits,
        name="logits",
        tokens=_token_ids(tokens),
        temperature=temperature,
        mask=mask,
        valid_vocab=valid_vocab,
        reduction="none",
    )
    return logprobs


def entropy(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    valid_vocab: int | None = None,
) -> Tensor:
    """Entropies `−Σ p s`, `(...)`; differentiable once. Inactive positions give 0.

    Args:
        logits: `(..., V)`.
        temperature, mask, valid_vocab: see `Common`.

    >>> import opdc, torch
    >>> [f"{x:.4f}" for x in opdc.entropy(torch.tensor([[0.0, 1.0, 2.0]])).tolist()]
    ['0.8324']
    """
    entropies: Tensor = _evaluate(
        "entropy",
        logits,
        name="logits",
        temperature=temperature,
        mask=mask,
        valid_vocab=valid_vocab,
        reduction="none",
    )
    return entropies


# ----------------------------------------------------------------- what they share


def _loss(method: str, student: Tensor, teacher: Tensor, **keywords: Any) -> Loss:
    return _evaluate(method, student, teacher=_logits("teacher", teacher), **keywords)


def _token_loss(
    method: str, student: Tensor, teacher: Tensor, tokens: Tensor, **keywords: Any
) -> Loss:
    _require_tensor("student", student)
    teacher = _constant("teacher", teacher)
    tokens = _token_ids(tokens)
    if teacher.dim() == student.dim():
        return _evaluate(
            method, student, teacher=_logits("teacher", teacher), tokens=tokens, **keywords
        )
    if teacher.dim() == student.dim() - 1:
        return _evaluate(method, student, teacher_logprobs=teacher, tokens=tokens, **keywords)
    raise ValueError(
        f"teacher has the shape {tuple(teacher.shape)} beside a student of the shape "
        f"{tuple(student.shape)}: give its logits (..., V), or its log-probs of the tokens (...)"
    )


def _evaluate(
    method: str,
    student: Tensor,
    *,
    name: str = "student",
    teacher: Tensor | None = None,
    tokens: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    mixture: float = 0.0,
    clip_low: float = math.inf,
    clip_high: float = math.inf,
    advantage: int = 0,
    discount: float = 0.0,
    reward_scale: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    return_metrics: bool = False,
) -> Loss:
    reduction_index = _choice("reduction", reduction, _ops.REDUCTIONS)
    if num_items is not None:
        if reduction not in ("mean", "seq_mean"):
            raise ValueError(
                f'num_items replaces the denominator of reduction="mean" or "seq_mean"; '
                f'"{reduction}" has none'
            )
        num_items = _count("num_items", num_items)
    _require_tensor(name, student)
    if inplace:
        _require_overwritable(student)
    settings = _ops.settings(
        _number("temperature", temperature),
        mixture,
        clip_low,
        clip_high,
        discount,
        reward_scale,
        num_items,
    )
    tensors = (
        teacher,
        tokens,
        None if mask is None else _active(mask),
        None if weights is None else _constant("weights", weights),
        teacher_logprobs,
        None if old_logprobs is None else _constant("old_logprobs", old_logprobs),
        None if reference_logprobs is None else _constant("reference_logprobs", reference_logprobs),
        settings,
    )
    value, metrics = _ops.loss(
        _with_dense_rows(student),
        tensors,
        method,
        reduction_index,
        advantage,
        _valid_vocab(valid_vocab),
        inplace=inplace,
        with_metrics=return_metrics,
    )
    if not return_metrics:
        return value
    computed = _ops.METRICS_OF[method, teacher is not None]
    named = zip(_ops.METRICS, metrics.unbind(), strict=True)
    return value, {name: metric for name, metric in named if name in computed}


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of the layout {value.layout}")


def _constant(name: str, value: Tensor) -> Tensor:
    """A tensor that receives no gradient, even if it asks for one."""
    _require_tensor(name, value)
    return value.detach() if value.requires_grad else value


def _with_dense_rows(logits: Tensor) -> Tensor:
    if logits.dim() == 0 or logits.shape[-1] == 1 or logits.stride(-1) == 1:
        return logits
    return logits.contiguous()


def _logits(name: str, value: Tensor) -> Tensor:
    return _with_dense_rows(_constant(name, value))


def _active(mask: Tensor) -> Tensor:
    _require_tensor("mask", mask)
    return mask if mask.dtype is torch.bool else mask != 0


_NARROW_INTEGERS = frozenset(
    {torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


def _token_ids(tokens: Tensor) -> Tensor:
    _require_tensor("tokens", tokens)
    return tokens.long() if tokens.dtype in _NARROW_INTEGERS else tokens


def _require_overwritable(student: Tensor) -> None:
    fix = "give logits that are the result of a computation, or inplace=False"
    if _ops.transforms_active():
        raise ValueError("inplace=True does not work under torch.func: use inplace=False")
    if student.dim() and student.shape[-1] > 1 and student.stride(-1) != 1:
        raise ValueError(
            f"inplace=True cannot overwrite student with the stride {student.stride(-1)} in its "
            "last axis: give student.contiguous(), or inplace=False"
        )
    if torch.compiler.is_compiling():
        return  # which traces none of the following, and works on a copy of what it was given
    if student.is_neg() or student.is_conj():
        raise ValueError(f"inplace=True cannot overwrite a negated or conjugated view: {fix}")
    if not (torch.is_grad_enabled() and student.requires_grad):
        return
    base = student if student._base is None else student._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace=True would overwrite a leaf that requires grad, a parameter or an input of "
            f"its own, with a gradient: {fix}"
        )


def _number(name: str, value: float) -> float:
    if isinstance(value, float):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {value}, which is beyond the range of float64") from None


def _count(name: str, value: float | Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        value = _number(name, value)
        if value != value:
            raise ValueError(f"{name} is NaN: give a count, or leave it out")
        return value
    if value.dim() or value.is_complex():
        raise ValueError(
            f"{name} must be a number or a 0-dim tensor, got {value.dtype} of the shape "
            f"{tuple(value.shape)}"
        )
    return value


def _clip_range(value: float | tuple[float, float]) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)):
        epsilon = _number("clip_range", value)
        return epsilon, epsilon
    if len(value) != 2:
        raise ValueError(
            f"clip_range has {len(value)} numbers: give one for both sides, or (low, high)"
        )
    low, high = value
    return _number("clip_range", low), _number("clip_range", high)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> int:
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    wanted = ", ".join(f'"{choice}"' for choice in choices)
    raise ValueError(f"{name} must be one of {wanted}, got {value!r}")


def _valid_vocab(value: int | None) -> int:
    """The size for the core, where 0 stands for the whole vocabulary."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"valid_vocab must be an integer, got {type(value).__name__}")
    if not 1 <= value < 2**63:
        raise ValueError(f"valid_vocab must be at least 1 and at most V, got {value}")
    return int(value)
