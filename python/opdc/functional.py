"""The losses as functions: logits in, a loss with its gradient out.

Logits: a tensor, or a `Projection`: hidden states and the head that would make logits of them, of
which only a chunk exists at a time then. What follows holds for both.

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

Devices: the CPU, or a CUDA GPU; all tensors of a call are on one, but for `num_items`, which may be
anywhere. A GPU computes with the same rules, in the same order of the sums; the kernels are
compiled at their first use and kept on disk. A call only queues its work on the current stream: the
host never waits, and after a first call the work can be captured in a CUDA graph. What nobody looks
at then is no error: a token or an id of a `TopK` out of range, an id that comes twice there, a
uniform number outside of `[0, 1)` and a `num_items` on a GPU that is no count give a NaN loss in
their rows, which `nonfinite_rows` of the metrics counts. Calls with a `process_group` or DTensors,
whose processes agree before they compute, do wait.

Processes: a vocabulary that is split over processes is named by `process_group`, see `Common`. A
student of DTensors (`torch.distributed.tensor`) is more general: the loss is that of the whole
tensors, a DTensor itself, and gradients have the placements of what they belong to. `Shard` of the
last axis of logits, or of the rows of a head beside `Replicate` hidden states, splits the
vocabulary; `Shard` of another axis, beside a `Replicate` head, the positions, and denominators are
those of all processes. Other DTensors are redistributed to fit, plain tensors are whole on every
process, metrics are those of all processes. What positions cannot know of each other then is an
error that says what to give: `seq_mean` and `discount` over a split sequence axis, `reopold`
without `num_items` and `entropy_threshold`.

Undefined input: a NaN, a `+inf` or nothing but `−inf` in an active row makes the loss of this row
and its gradient NaN and leaves the gradients of the other rows alone. `−inf` in both models means
that an id does not exist; where a formula needs the log of a probability that is 0, the loss is
`+inf` and the gradient row NaN. Without any active position losses are 0 and so are gradients.

Errors: `ValueError` for shapes, numbers, token ids and combinations, `TypeError` for types, dtypes
and devices, `RuntimeError` for a GPU that cannot be used. Nothing has been written then.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _arguments, _ops, _projected
from ._arguments import Logits, Loss, Teacher
from .projection import Projection
from .support import TopK


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
    0-dim tensor, of which one on a GPU is not waited for; 0 gives 0.

    `inplace` (False): the gradient overwrites the student's logits during the call, which saves
    its memory and half of the time. Nothing may use the logits afterwards (autograd notices and
    raises); after `backward` the gradient of the logits shares their memory. With "none" a second
    rounding, of the product with the upstream gradient, is part of it. The logits must be
    the result of a computation, with rows of their own in memory, and outside of `torch.func`. Two
    such losses on slices of one tensor, and logits that are the input of a reentrant checkpoint,
    do not work; a hook that is registered on a view after the call crashes PyTorch 2.13, register
    it before. Where no gradient is needed, nothing is overwritten. Not with a `Projection`, whose
    logits are overwritten anyway.

    `return_metrics` (False): return `(loss, metrics)`; the metrics are detached 0-dim float64
    tensors, on the device of the logits, with the sums over active positions, unweighted, see
    `opdc.metrics`.

    `process_group` (None): of `torch.distributed`, when the vocabulary is split over its processes
    in the order of their ranks. Student and teacher logits are `(..., V_rank)` then, and the weight
    of a `Projection` `(V_rank, H)`; sizes may differ, and be 0. All else is the same on all ranks:
    positions, tokens and other ids, which count through the whole vocabulary as `valid_vocab` does,
    and a `TopK`. So are the value and the metrics that come out. The gradient of local logits
    and of a local weight is local; that of hidden states is summed over the ranks, in backward,
    which all of them must run then. What the ranks do not agree on is an error on each of them,
    for which the host waits for a GPU.
    """

    temperature: float
    mask: Tensor | None
    weights: Tensor | None
    valid_vocab: int | None
    reduction: str
    num_items: float | Tensor | None
    inplace: bool
    return_metrics: bool
    process_group: ProcessGroup | None


class Supports:
    """What a divergence on a support `S` is, by `normalize`. `P` and `Q` are the masses of `S`.

    | normalize | forward KL | reverse KL |
    |---|---|---|
    | "none" | `Σ_S q (τ − s)` | `Σ_S p (s − τ)` |
    | "teacher" | `Σ_S q̂ (log q̂ − s)`, `q̂ = q/Q` | `Σ_S p (s − log q̂)` |
    | "both" | `Σ_S q̂ (log q̂ − log p̂)` | `Σ_S p̂ (log p̂ − log q̂)`, `p̂ = p/P` |
    | "tail" | over `S` and one id for all others | over `S` and one id for all others |
    | "generalized" | not defined | `Σ_S [p (s − τ) − p + q]` |

    The Jensen-Shannon divergence is defined for "both" and "tail". "none" may be negative. "both"
    reads only the logits on `S`, and moves no mass between `S` and the other ids. An id that the
    ranking model excludes does not enter `S`. A row whose `S` has no mass in one of the models is
    NaN for "both", and for "teacher" if the model is the teacher.
    """


@_arguments.together
def reverse_kl(
    student: Logits,
    teacher: Teacher,
    *,
    support: str | None = None,
    k: int | None = None,
    normalize: str | None = None,
    tokens: Tensor | None = None,
    **common: Unpack[Common],
) -> Loss:
    """Reverse Kullback-Leibler divergence `KL(p ‖ q) = Σ p (s − τ)`: mode-seeking.

    The loss of on-policy distillation over the whole vocabulary (MiniLLM, arXiv 2306.08543, eq. 1;
    GKD, arXiv 2306.13649, with β = 1).

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)`, a `Projection`, or a `TopK`.
        support: which ids the divergence runs over. "full" (the default for logits); "teacher", the
            `k` that the teacher ranks first (the default for a `TopK`); "student", those of the
            student; "teacher+token", the teacher's and the token.
        k: the size of the support; for a `TopK` its number of slots.
        normalize: what the probabilities on a support are; must be named with one. See
            `opdc.functional.Supports`.
        tokens: the sampled ids `(...)`, for "teacher+token".
        **common: temperature, mask, weights, valid_vocab, reduction, num_items, inplace,
            return_metrics and process_group; see `opdc.functional.Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative over the vocabulary.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> loss = opdc.reverse_kl(student, teacher)
    >>> loss.backward()
    >>> f"{loss.item():.4f}", [f"{g:+.4f}" for g in student.grad[0].tolist()]
    ('1.1504', ['-0.2836', '-0.2815', '+0.5652'])
    """
    return _divergence("reverse_kl", student, teacher, support, k, normalize, tokens, **common)


@_arguments.together
def forward_kl(
    student: Logits,
    teacher: Teacher,
    *,
    support: str | None = None,
    k: int | None = None,
    normalize: str | None = None,
    tokens: Tensor | None = None,
    **common: Unpack[Common],
) -> Loss:
    """Forward Kullback-Leibler divergence `KL(q ‖ p) = Σ q (τ − s)`: mass-covering.

    The loss of classical distillation (Hinton et al., arXiv 1503.02531, without `T²`); its gradient
    is `(p − q)/T`. GKD (arXiv 2306.13649) with β = 0.

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)`, a `Projection`, or a `TopK`.
        support, k, normalize, tokens: as for `reverse_kl`.
        **common: see `opdc.functional.Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative over the vocabulary.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> loss = opdc.forward_kl(student, teacher)
    >>> loss.backward()
    >>> f"{loss.item():.4f}", [f"{g:+.4f}" for g in student.grad[0].tolist()]
    ('1.1504', ['-0.5752', '+0.0000', '+0.5752'])
    """
    return _divergence("forward_kl", student, teacher, support, k, normalize, tokens, **common)


@_arguments.together
def jsd(
    student: Logits,
    teacher: Teacher,
    *,
    beta: float = 0.5,
    support: str | None = None,
    k: int | None = None,
    normalize: str | None = None,
    tokens: Tensor | None = None,
    **common: Unpack[Common],
) -> Loss:
    """Generalised Jensen-Shannon divergence `β KL(q ‖ μ) + (1 − β) KL(p ‖ μ)`, `μ = βq + (1 − β)p`.

    The loss of GKD (arXiv 2306.13649, eq. 1). `beta=0` is the forward and `beta=1` the reverse KL,
    by definition (the limits of the formula are 0).

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)`, a `Projection`, or a `TopK`.
        beta: the teacher's share of the mixture, in [0, 1].
        support, k, normalize, tokens: as for `reverse_kl`; on a support with 0 < beta < 1 the
            divergence is defined for the normalisations "both" and "tail".
        **common: see `opdc.functional.Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]])
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> f"{opdc.jsd(student, teacher).item():.4f}"
    '0.2476'
    """
    settings = {"mixture": _arguments.number("beta", beta)}
    return _divergence(
        "jsd", student, teacher, support, k, normalize, tokens, settings=settings, **common
    )


@_arguments.together
def skew_kl(
    student: Logits,
    teacher: Logits,
    *,
    alpha: float = 0.1,
    direction: str = "forward",
    **common: Unpack[Common],
) -> Loss:
    """Skew Kullback-Leibler divergence, always finite for `alpha` between 0 and 1.

    The losses of DistiLLM (arXiv 2402.03898, eq. 4): "forward" is `KL(q ‖ αq + (1 − α)p)`,
    "reverse" is `KL(p ‖ (1 − α)q + αp)`.

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)` or a `Projection`.
        alpha: how much of its first argument is mixed into the second, in [0, 1).
        direction: "forward" or "reverse".
        **common: see `opdc.functional.Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]])
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> f"{opdc.skew_kl(student, teacher).item():.4f}"
    '0.8299'
    """
    methods = ("skew_forward", "skew_reverse")
    return _arguments.evaluate(
        methods[_arguments.choice("direction", direction, ("forward", "reverse"))],
        student,
        _arguments.teacher_logits(teacher),
        settings={"mixture": _arguments.number("alpha", alpha)},
        **common,
    )


@_arguments.together
def lsm(
    student: Logits,
    teacher: Teacher,
    *,
    k: int | None = None,
    support: str | None = None,
    tokens: Tensor | None = None,
    **common: Unpack[Common],
) -> Loss:
    """Local support matching: the reverse KL on the teacher's top `k`, both normalised there.

    `Σ_S p̂ (log p̂ − log q̂)`, the loss of "Revisiting On-Policy Distillation" (arXiv 2603.25562). It
    reads and moves the student's logits on the support only; it does not see mass that the student
    has elsewhere, where `reverse_kl(..., normalize="tail")` does.

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient, 0 off the support.
        teacher: logits `(..., V)`, a `Projection`, or a `TopK`.
        k: the size of the support; 32 or all ids, and for a `TopK` its number of slots.
        support: "teacher", the default; "student" or "teacher+token".
        tokens: the sampled ids `(...)`, for "teacher+token".
        **common: see `opdc.functional.Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> loss = opdc.lsm(student, teacher, k=2)
    >>> loss.backward()
    >>> f"{loss.item():.4f}", [f"{g:+.4f}" for g in student.grad[0].tolist()]
    ('0.4621', ['-0.3932', '+0.3932', '+0.0000'])
    """
    support = "teacher" if support is None else support
    return _divergence(
        "reverse_kl", student, teacher, support, k, "both", tokens, default_k=32, **common
    )


@_arguments.together
def k1(
    student: Logits,
    teacher: Teacher,
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
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)` or a `Projection`; its log-probs of the tokens `(...)`; or a
            `TopK` with them.
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
        **common: see `opdc.functional.Common`.

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
    reward_scale = _arguments.number("reward_scale", reward_scale)
    if reference_logprobs is None and reward_scale != 1.0:
        raise ValueError(
            f"reward_scale is {reward_scale} without reference_logprobs: it scales the log-ratio "
            "of teacher and reference; give reference_logprobs or leave reward_scale at 1"
        )
    return _arguments.evaluate(
        "k1",
        student,
        {
            **_arguments.teacher_of_tokens(student, teacher),
            "tokens": _arguments.token_ids("tokens", tokens),
            "old_logprobs": _arguments.constant_or_none("old_logprobs", old_logprobs),
            "reference_logprobs": _arguments.constant_or_none(
                "reference_logprobs", reference_logprobs
            ),
        },
        integers={"advantage": _arguments.choice("advantage", advantage, _ops.ADVANTAGES)},
        settings={
            **_clipping(clip_range, old_logprobs),
            "discount": _arguments.number("discount", discount),
            "reward_scale": reward_scale,
        },
        **common,
    )


@_arguments.together
def k2(student: Logits, teacher: Teacher, tokens: Tensor, **common: Unpack[Common]) -> Loss:
    """`½ R²` of the sampled token, differentiated: its mean gradient is the *reverse* KL's.

    The estimator k2 of Schulman ("Approximating KL divergence", 2020) as a loss. Over `y ~ p` its
    expected gradient descends `KL(p ‖ q)`, although its expected value is not that divergence.

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)` or a `Projection`; its log-probs of the tokens `(...)`; or a
            `TopK` with them.
        tokens: the sampled ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        **common: see `opdc.functional.Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]])
    >>> f"{opdc.k2(student, torch.tensor([-0.5]), torch.tensor([1])).item():.4f}"
    '0.4119'
    """
    tensors = {
        **_arguments.teacher_of_tokens(student, teacher),
        "tokens": _arguments.token_ids("tokens", tokens),
    }
    return _arguments.evaluate("k2", student, tensors, **common)


@_arguments.together
def k3(student: Logits, teacher: Teacher, tokens: Tensor, **common: Unpack[Common]) -> Loss:
    """`e^R − 1 − R` of the sampled token, differentiated: its mean gradient is the *forward* KL's.

    The estimator k3 of Schulman ("Approximating KL divergence", 2020) as a loss, as in GRPO
    (arXiv 2402.03300, eq. 4). Over `y ~ p` its expected value is `KL(p ‖ q)`, but its expected
    gradient descends `KL(q ‖ p)`.

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)` or a `Projection`; its log-probs of the tokens `(...)`; or a
            `TopK` with them.
        tokens: the sampled ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        **common: see `opdc.functional.Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; never negative.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]])
    >>> f"{opdc.k3(student, torch.tensor([-0.5]), torch.tensor([1])).item():.4f}"
    '0.5708'
    """
    tensors = {
        **_arguments.teacher_of_tokens(student, teacher),
        "tokens": _arguments.token_ids("tokens", tokens),
    }
    return _arguments.evaluate("k3", student, tensors, **common)


@_arguments.together
def tropd(
    student: Logits,
    teacher: Teacher,
    tokens: Tensor,
    *,
    k: int | None = None,
    region: str = "sampled",
    outlier: str = "forward_kl",
    threshold: float | None = None,
    prefix_mask: Tensor | None = None,
    prefix_weight: float = 1e-3,
    old_logprobs: Tensor | None = None,
    clip_range: float | tuple[float, float] | None = None,
    advantage: str = "old",
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    **common: Unpack[Common],
) -> Loss:
    """Trust-region on-policy distillation: policy gradient where the teacher trusts the token.

    TrOPD (arXiv 2606.01249): `M (−A ρ) + (1 − M) Σ_topk q (τ − s)`, with `M = 1` in the trust
    region; there the teacher finds the token at least as likely as the student, or nearly so. The
    tokens outside of it, on which the log-ratio is a poor signal, get the teacher's distribution
    instead. On positions that the teacher wrote the loss is `−prefix_weight s_y`.

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)`, a `Projection`, or a `TopK` with `token_logprobs`.
        tokens: the sampled ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        k: ids of the forward KL, which is not normalised; 64 or all, and for a `TopK` its slots.
        region: "sampled": `M = 1` with probability `min(q_y / p_y, 1)`, the method; "expected":
            `M` is that probability; "threshold": `M = 1` where `R ≥ threshold`.
        outlier: what the others get: "forward_kl", the method; "mask", nothing; "clip", the policy
            term with an advantage of at least `threshold`.
        threshold: a log-ratio in nats; `log(0.3)/0.7 = −1.72`.
        prefix_mask: `(...)`, positions that the teacher wrote; they must be active to count.
        prefix_weight: of the loss on those.
        old_logprobs: `(...)`, log-probs of the tokens under the policy that drew them. The region
            is then that of this policy, and `ρ` its ratio to the current one.
        clip_range, advantage: as for `k1`.
        uniforms: `(...)` in [0, 1), what decides `M`; drawn from `generator` if not given.
        generator: of `torch`, also one of the CPU beside logits on a GPU; None: the global one of
            the device of the logits.
        **common: see `opdc.functional.Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`. Metrics besides: `trusted`, Σ M, whose
        mean is 1 minus the total variation of the two models in expectation.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> loss = opdc.tropd(student, teacher, torch.tensor([2]), k=2, uniforms=torch.tensor([0.5]))
    >>> loss.backward()
    >>> f"{loss.item():.4f}", [f"{g:+.4f}" for g in student.grad[0].tolist()]
    ('1.3305', ['-0.5833', '-0.0220', '+0.6053'])
    """
    tensors = {
        "old_logprobs": _arguments.constant_or_none("old_logprobs", old_logprobs),
        "prefix_mask": None
        if prefix_mask is None
        else _arguments.active("prefix_mask", prefix_mask),
    }
    region_index = _arguments.choice("region", region, _ops.REGIONS)
    if region == "sampled":
        if uniforms is None:
            uniforms = _uniforms(student, teacher, generator)
        tensors["uniforms"] = _arguments.constant("uniforms", uniforms)
    return _token_loss_on_support(
        "tropd",
        student,
        teacher,
        tokens,
        k,
        64,
        "none",
        tensors,
        {
            "region": region_index,
            "outlier": _arguments.choice("outlier", outlier, _ops.OUTLIERS),
            "advantage": _arguments.choice("advantage", advantage, _ops.ADVANTAGES),
        },
        settings={
            **_clipping(clip_range, old_logprobs),
            "threshold": _arguments.number_or_nan("threshold", threshold),
            "prefix_weight": _arguments.number("prefix_weight", prefix_weight),
        },
        **common,
    )


@_arguments.together
def eopd(
    student: Logits,
    teacher: Teacher,
    tokens: Tensor,
    *,
    k: int | None = None,
    entropy_threshold: float = 0.8,
    forward_weight: float = 1.0,
    old_logprobs: Tensor | None = None,
    clip_range: float | tuple[float, float] | None = 0.2,
    **common: Unpack[Common],
) -> Loss:
    """Entropy-aware on-policy distillation: a forward KL besides, where the teacher is undecided.

    EOPD (arXiv 2603.07079): `−A ρ + λ 1[H(q) > h] Σ_topk q̂ (log q̂ − s)`. The policy term stands on
    every position; the forward KL on the teacher's top `k`, normalised to 1, keeps the student from
    settling on one of several good tokens.

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)`, a `Projection`, or a `TopK` with `token_logprobs` and `entropy`.
        tokens: the sampled ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        k: ids of the forward KL; 16 or all, and for a `TopK` its slots.
        entropy_threshold: `h`, in nats.
        forward_weight: `λ`.
        old_logprobs: `(...)`, log-probs of the tokens under the policy that drew them; `A` is then
            relative to it, and `ρ` its ratio to the current one.
        clip_range: of `ρ`, as for `k1`; used only with `old_logprobs`.
        **common: see `opdc.functional.Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`. Metrics besides: `gated`, the
        positions with a forward KL.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]])
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> f"{opdc.eopd(student, teacher, torch.tensor([2]), k=2).item():.4f}"
    '3.5565'
    """
    if old_logprobs is None:
        clip_range = None
    return _token_loss_on_support(
        "eopd",
        student,
        teacher,
        tokens,
        k,
        16,
        "teacher",
        {"old_logprobs": _arguments.constant_or_none("old_logprobs", old_logprobs)},
        settings={
            **_clipping(clip_range, old_logprobs),
            "entropy_threshold": _arguments.number("entropy_threshold", entropy_threshold),
            "forward_weight": _arguments.number("forward_weight", forward_weight),
        },
        **common,
    )


@_arguments.together
def reopold(
    student: Logits,
    teacher: Teacher,
    tokens: Tensor,
    *,
    phase: str = "exploration",
    mixture: float = 0.3,
    keep: float = 0.2,
    entropy_threshold: float | None = None,
    old_logprobs: Tensor | None = None,
    **common: Unpack[Common],
) -> Loss:
    """Relaxed on-policy distillation: rewards with a floor, on selected positions.

    REOPOLD (arXiv 2603.11137): `Σ M (−ρ max(R, floor)) / Σ M` with `floor = log(n)/(1 − n)`, `n`
    the `mixture`. In the first phase, "exploration", `M` leaves out the tokens below the floor; in
    the second, "refinement", it keeps the fraction `keep` of positions on which the student's
    entropy is largest. Switch after about a third of the steps.

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)` or a `Projection`; its log-probs of the tokens `(...)`; or a
            `TopK` with them.
        tokens: the sampled ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        phase: "exploration" or "refinement".
        mixture: `n` in [0, 1]; 0: no floor.
        keep: in (0, 1]; entropies equal to the last one kept are kept too.
        entropy_threshold: what the entropy must reach, in nats, in place of `keep`: for batches
            that are spread over steps or processes.
        old_logprobs: `(...)`, log-probs of the tokens under the policy that drew them; `ρ` is then
            its ratio to the current one.
        **common: see `opdc.functional.Common`. `M` takes the place of the mask in every reduction;
            `num_items` replaces `Σ M`, whose local value is the metric `selected`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`; 0 if nothing is selected.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.5]])
    >>> f"{opdc.reopold(student, teacher, torch.tensor([2, 2])).item():.4f}"
    '-0.1412'
    """
    phases = ("exploration", "refinement")
    return _arguments.evaluate(
        "reopold_" + phases[_arguments.choice("phase", phase, phases)],
        student,
        {
            **_arguments.teacher_of_tokens(student, teacher),
            "tokens": _arguments.token_ids("tokens", tokens),
            "old_logprobs": _arguments.constant_or_none("old_logprobs", old_logprobs),
        },
        settings={
            "mixture": _arguments.number("mixture", mixture),
            "keep": _arguments.number("keep", keep),
            "entropy_threshold": _arguments.number_or_nan("entropy_threshold", entropy_threshold),
        },
        **common,
    )


@_arguments.together
def aopd(
    student: Logits,
    teacher: Teacher,
    tokens: Tensor,
    *,
    k: int | None = None,
    threshold: float = 0.0,
    **common: Unpack[Common],
) -> Loss:
    """A forward KL where the teacher does not want more of the token, policy gradient elsewhere.

    Routing as in AOPD (arXiv 2605.06387): `G Σ_topk q (τ − s) + (1 − G) (−R ρ)` with
    `G = 1[q_y − p_y ≤ threshold]`. Where both models agree `G` is 1.

    Args:
        student: logits `(..., V)` or a `Projection`; receives the gradient.
        teacher: logits `(..., V)`, a `Projection`, or a `TopK` with `token_logprobs`.
        tokens: the sampled ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        k: ids of the forward KL, which is not normalised; 16 or all, and for a `TopK` its slots.
        threshold: a difference of probabilities.
        **common: see `opdc.functional.Common`.

    Returns:
        The loss, `()` or, with `reduction="none"`, `(...)`. Metrics besides: `gated`, Σ G.

    >>> import opdc, torch
    >>> student = torch.tensor([[0.0, 1.0, 2.0]])
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
    >>> f"{opdc.aopd(student, teacher, torch.tensor([0]), k=2).item():.4f}"
    '-2.0000'
    """
    return _token_loss_on_support(
        "aopd",
        student,
        teacher,
        tokens,
        k,
        16,
        "none",
        settings={"threshold": _arguments.number("threshold", threshold)},
        **common,
    )


@_arguments.together
def token_logprobs(
    logits: Logits,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    valid_vocab: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probs `s_y` of given tokens, `(...)`; differentiable once. Inactive positions give 0.

    Args:
        logits: `(..., V)`, or a `Projection`.
        tokens: ids `(...)`, of an integer dtype, in `[0, valid_vocab)` where active.
        temperature, mask, valid_vocab, process_group: see `opdc.functional.Common`.

    >>> import opdc, torch
    >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
    >>> [f"{x:.4f}" for x in opdc.token_logprobs(logits, torch.tensor([2])).tolist()]
    ['-0.4076']
    """
    logprobs: Tensor = _arguments.evaluate(
        "token_logprobs",
        logits,
        {"tokens": _arguments.token_ids("tokens", tokens)},
        name="logits",
        temperature=temperature,
        mask=mask,
        valid_vocab=valid_vocab,
        reduction="none",
        process_group=process_group,
    )
    return logprobs


@_arguments.together
def entropy(
    logits: Logits,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    valid_vocab: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Entropies `−Σ p s`, `(...)`; differentiable once. Inactive positions give 0.

    Args:
        logits: `(..., V)`, or a `Projection`.
        temperature, mask, valid_vocab, process_group: see `opdc.functional.Common`.

    >>> import opdc, torch
    >>> [f"{x:.4f}" for x in opdc.entropy(torch.tensor([[0.0, 1.0, 2.0]])).tolist()]
    ['0.8324']
    """
    entropies: Tensor = _arguments.evaluate(
        "entropy",
        logits,
        name="logits",
        temperature=temperature,
        mask=mask,
        valid_vocab=valid_vocab,
        reduction="none",
        process_group=process_group,
    )
    return entropies


def topk(
    logits: Logits, k: int, *, temperature: float = 1.0, valid_vocab: int | None = None
) -> TopK:
    """The `k` largest logits of each position: the larger first, of equal ones the lower id.

    Exact and reproducible, where `torch.topk` leaves the order of equal logits open. Not
    differentiable.

    Args:
        logits: `(..., V)`, float32, float64, bfloat16 or float16; or a `Projection`, which is
            ranked by chunks of positions.
        k: from 1 to V, or to `valid_vocab`.
        temperature: of the log-probs.
        valid_vocab: only the ids below it exist.

    Returns:
        `TopK(ids, logprobs)`: int64 ids and their log-probs over the vocabulary, `(..., k)`, in
        float32 (float64 for float64). An id of logit `−inf` never enters: the id of its slot is −1
        and the log-prob `−inf`. A row with NaN, `+inf` or nothing but `−inf` gives ids −1 and
        log-probs NaN; as a teacher it has no support then, and its loss is NaN or, with the
        normalisations "none", "tail" and "generalized", 0.

    >>> import opdc, torch
    >>> best = opdc.topk(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3)
    >>> best.ids.tolist(), [f"{x:.4f}" for x in best.logprobs.tolist()]
    ([1, 3, 2], ['-0.9176', '-0.9176', '-1.9176'])
    """
    logits = _arguments.logits("logits", logits)
    k = _arguments.integer("k", k)
    vocabulary = _arguments.vocabulary("logits", logits)
    if vocabulary and k > vocabulary:
        raise ValueError(f"k is {k} but the vocabulary has {vocabulary} ids")
    temperature = _arguments.number("temperature", temperature)
    T = torch.ones((), dtype=torch.float64, device="cpu") * temperature
    valid = _arguments.vocabulary_size(valid_vocab)
    _arguments.require_ids("logits", logits)
    if isinstance(logits, Projection):
        return TopK(*_projected.topk(logits, k, T, valid))
    return TopK(*_ops.topk(logits, k, T, valid))


# ----------------------------------------------------------------- what they share


def _divergence(
    method: str,
    student: Logits,
    teacher: Teacher,
    support: str | None,
    k: int | None,
    normalize: str | None,
    tokens: Tensor | None,
    *,
    default_k: int | None = None,
    **keywords: Any,
) -> Loss:
    integers = _arguments.support_integers(
        student,
        teacher,
        support,
        k,
        normalize,
        default_k=default_k,
        process_group=keywords.get("process_group"),
        valid_vocab=keywords.get("valid_vocab"),
    )
    tensors = _arguments.teacher_on_support(teacher)
    with_token = integers.get("support") == _ops.SUPPORTS.index("teacher+token")
    if with_token and tokens is not None:
        tensors["tokens"] = _arguments.token_ids("tokens", tokens)
    if not with_token and "teacher_logprobs" in tensors:
        del tensors["teacher_logprobs"]
    return _arguments.evaluate(method, student, tensors, integers=integers, **keywords)


def _token_loss_on_support(
    method: str,
    student: Logits,
    teacher: Teacher,
    tokens: Tensor,
    k: int | None,
    default_k: int,
    normalize: str,
    tensors: dict[str, Tensor | None] | None = None,
    integers: dict[str, int] | None = None,
    **keywords: Any,
) -> Loss:
    """A loss that compares the tokens, with a divergence on the teacher's top `k`."""
    return _arguments.evaluate(
        method,
        student,
        {
            **_arguments.teacher_on_support(teacher),
            "tokens": _arguments.token_ids("tokens", tokens),
            **(tensors or {}),
        },
        integers={
            **_arguments.support_integers(
                student,
                teacher,
                "teacher",
                k,
                normalize,
                default_k=default_k,
                process_group=keywords.get("process_group"),
                valid_vocab=keywords.get("valid_vocab"),
            ),
            **(integers or {}),
        },
        **keywords,
    )


def _clipping(
    clip_range: float | tuple[float, float] | None, old_logprobs: Tensor | None
) -> dict[str, float]:
    if clip_range is None:
        return {}
    if old_logprobs is None:
        raise ValueError(
            "clip_range needs old_logprobs: the ratio to the current policy itself is 1, "
            "which is never clipped; give old_logprobs or leave clip_range out"
        )
    low, high = _arguments.clip_range(clip_range)
    return {"clip_low": low, "clip_high": high}


def _uniforms(student: Logits, teacher: Teacher, generator: torch.Generator | None) -> Tensor:
    """One number in [0, 1) for each position, in the type of the arithmetic."""
    positions = _arguments.positions("student", student)
    models = [model for model in (student, teacher) if not isinstance(model, TopK)]
    given = student.hidden if isinstance(student, Projection) else student
    dtype = _arguments.arithmetic(*models)
    return _arguments.uniforms(positions, dtype, given.device, generator)
