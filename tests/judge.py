"""How a result is compared with the truth: relative errors, and what the arithmetic allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import eager
import oracle
from regimes import STATISTICS, Case, Inputs

# Relative error of a loss, and of a gradient row in the Euclidean norm.
FP32_BOUND = 2e-6
FP64_BOUND = 1e-12
# u − pΣu of the float64 oracle is itself known to this much, where the loss is of order 1.
ORACLE_NOISE = 1e-14
LOW_PRECISION = (torch.bfloat16, torch.float16)


def arithmetic(*tensors: Tensor) -> torch.dtype:
    """fp64 where an input is fp64, fp32 otherwise."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def bound(*tensors: Tensor) -> float:
    """The bound of the narrowest arithmetic that may be at work."""
    return FP64_BOUND if all(x.dtype == torch.float64 for x in tensors) else FP32_BOUND


@dataclass
class Result:
    """A value per position (or a scalar) and the gradient of the student's logits."""

    value: Tensor
    gradient: Tensor


def run(
    function: Callable[..., Tensor],
    case: Case,
    inputs: Inputs,
    upstream: Tensor | None = None,
    dtype: torch.dtype | None = None,
    **keywords,
) -> Result:
    """Call with a fresh leaf for the student and pull `upstream` (default: ones) back.

    `dtype` is that of the logits, where it is not their own."""
    leaf = inputs.student.detach().to(dtype, copy=True).requires_grad_()
    teacher = inputs.teacher.to(dtype)
    value = function(*inputs.arguments(case, leaf, teacher), **inputs.keywords(case), **keywords)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value.dtype))
    assert leaf.grad is not None
    return Result(value.detach(), leaf.grad)


def _per_position(case: Case, keywords: dict) -> dict:
    return keywords if case in STATISTICS else {"reduction": "none", **keywords}


def expected(case: Case, inputs: Inputs, upstream: Tensor | None = None, **keywords) -> Result:
    """The oracle's answer for the very same numbers, all in float64; by default per position."""
    function = getattr(oracle, case.function)
    return run(function, case, inputs, upstream, torch.float64, **_per_position(case, keywords))


def measured(case: Case, inputs: Inputs, upstream: Tensor | None = None, **keywords) -> Result:
    """The library's answer; by default per position."""
    import opdc

    function = getattr(opdc, case.function)
    return run(function, case, inputs, upstream, None, **_per_position(case, keywords))


def eager_answer(case: Case, inputs: Inputs, upstream: Tensor, dtype: torch.dtype) -> Result:
    """PyTorch's answer in the given dtype."""
    return run(getattr(eager, case.function), case, inputs, upstream, dtype)


def exact(case: Case, inputs: Inputs, **keywords) -> Result:
    """60 digits, row by row, rounded to float64 at the very end; the upstream is ones."""
    values, gradients = [], []
    rows = (x.tolist() for x in (inputs.student, inputs.teacher, inputs.tokens))
    for student, teacher, token in zip(*rows, strict=True):
        value, gradient = oracle.exact(
            case.function, student, teacher, token=token, **case.options, **keywords
        )
        values.append(float(value))
        gradients.append([float(x) for x in gradient])
    as_tensor = inputs.student.double().new_tensor
    return Result(as_tensor(values), as_tensor(gradients))


def row_errors(gradient: Tensor, truth: Tensor) -> Tensor:
    """‖g − g*‖ / ‖g*‖ per row; 0 where both are 0."""
    error = (gradient.double() - truth).norm(dim=-1)
    size = truth.norm(dim=-1)
    return torch.where(error == 0, 0.0, error / size)


def value_errors(value: Tensor, truth: Tensor) -> Tensor:
    error = (value.double() - truth).abs()
    return torch.where(error == 0, 0.0, error / truth.abs())


def half_spacing(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of `dtype` around `truth`: one rounding."""
    information = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(truth.abs().clamp_min(information.smallest_normal)))
    return torch.exp2(exponent) * information.eps / 2


@dataclass
class Allowance:
    """Absolute error per position that the conditioning of a loss forces on value and gradient."""

    value: Tensor
    coefficient: Tensor


def conditioning(case: Case, inputs: Inputs, temperature: float = 1.0, **common) -> Allowance:
    """What fp arithmetic must be granted beyond the relative bound, per position.

    A divergence gets nothing: it is a sum of terms of one sign (Bregman form). A sampled-token loss
    is a function of s_y and τ_y, each the difference of a logit and a log-sum-exp: a number of size
    |s_y| known to a few units in its last place, at least to a few units of log Σ. Their difference
    R may be far smaller than either (student near teacher) and has no sum to correct it, so what is
    demanded is the error of s_y and τ_y carried through the formula; gradients are c (1_y − p) with
    c carried the same way.
    """
    zeros = torch.zeros(inputs.tokens.shape, dtype=torch.float64)
    if case.is_divergence:
        return Allowance(zeros, zeros)
    ulp = torch.finfo(arithmetic(inputs.student)).eps
    keywords = {"temperature": temperature, **common}
    mask = keywords.get("mask")
    active = torch.ones_like(inputs.tokens, dtype=torch.bool) if mask is None else mask.bool()
    s = oracle.token_logprobs(inputs.student, inputs.tokens, **keywords)
    if case.function == "entropy":
        # H = log Σ − Σ p x, and −p (s + H): differences of numbers of size H, as above.
        size = 4 * ulp * (1 + oracle.entropy(inputs.student, **keywords))
        return Allowance(size, size)
    slack_s = 4 * ulp * (1 + s.abs())
    if case.function == "token_logprobs":
        return Allowance(slack_s, zeros)
    if inputs.teacher.shape == inputs.tokens.shape:
        tau, slack_tau = inputs.teacher.double(), zeros
    else:
        tau = oracle.token_logprobs(inputs.teacher, inputs.tokens, **keywords)
        slack_tau = 4 * ulp * (1 + tau.abs())
    log_ratio, slack = tau - s, slack_s + slack_tau
    if case.function == "k2":
        return Allowance((log_ratio.abs() + slack) * slack, slack)
    if case.function == "k3":
        growth = torch.exp(log_ratio)
        return Allowance((torch.expm1(log_ratio).abs() + growth * slack) * slack, growth * slack)
    # k1: −ρA. The reference and old log-probs come in rounded; they add nothing but their own ulp.
    scale = case.options.get("reward_scale", 1.0)
    given = sum((getattr(inputs, name).double().abs() for name in case.extra), zeros)
    slack_advantage = scale * slack + 4 * ulp * (given + scale * tau.abs())
    old = inputs.old_logprobs.double() if "old_logprobs" in case.extra else s
    behaviour = s if case.options.get("advantage", "old") == "current" else old
    if "reference_logprobs" in case.extra:
        reference = inputs.reference_logprobs.double()
        advantage = scale * (tau - reference) - (behaviour - reference)
    else:
        advantage = tau - behaviour
    discount = case.options.get("discount", 0.0)
    advantage = oracle.discounted(advantage, active, discount)
    slack_advantage = oracle.discounted(slack_advantage, active, discount)
    slack_advantage = slack_advantage + 4 * ulp * oracle.discounted(
        advantage.abs(), active, discount
    )
    ratio = torch.exp(s - old)
    slack_ratio = ratio * (slack_s + ulp * old.abs()) if "old_logprobs" in case.extra else zeros
    total = ratio * slack_advantage + slack_ratio * (advantage.abs() + slack_advantage)
    return Allowance(total, total)


def mixture_condition(case: Case) -> float:
    """How much a mixture divergence amplifies rounding, near one of the ends of its weight.

    There it is a small part of its terms: β(1−β)/2 of d² for the JSD, (1−α)²/2 for a skew KL, out
    of terms of size d². 1 at β = 1/2 and at α = 0.
    """
    if case.function == "jsd":
        beta = case.options.get("beta", 0.5)
        return 1.0 if beta in (0.0, 1.0) else 0.25 / (beta * (1 - beta))
    if case.function == "skew_kl":
        return (1 - case.options.get("alpha", 0.1)) ** -2
    return 1.0


def direction_size(case: Case, inputs: Inputs, temperature: float = 1.0) -> Tensor:
    """‖1_y − p‖ / T per position (‖p‖ / T for the entropy): what the coefficient multiplies."""
    p = torch.softmax(inputs.student.double() / temperature, -1)
    if case.reads_tokens:
        p.scatter_add_(-1, inputs.tokens[..., None], torch.full_like(p[..., :1], -1.0))
    return p.norm(dim=-1) / temperature


def check(
    case: Case,
    inputs: Inputs,
    result: Result,
    truth: Result,
    upstream: Tensor,
    floor: float = ORACLE_NOISE,
    tolerance: float | None = None,
    **common,
) -> None:
    """Per-position values and gradient rows of `result` against the truth.

    A gradient in fp32 or fp64 is judged by the norm of its row; in bf16 and fp16 every entry must
    lie within one rounding of the truth. `floor` is the absolute error of a saturated row;
    `tolerance` the relative error, where it is not that of the arithmetic.
    """
    if tolerance is None:
        tolerance = bound(inputs.student, inputs.teacher)
    tolerance *= mixture_condition(case)
    allowance = conditioning(case, inputs, **common)
    slope = direction_size(case, inputs, common.get("temperature", 1.0))
    value_error = (result.value.double() - truth.value).abs()
    # 1e-20: the divergence of models of one id is the square of a rounding, where it should be 0.
    value_limit = tolerance * truth.value.abs() + allowance.value + 1e-20
    assert torch.isfinite(result.value).all(), result.value
    assert (value_error <= value_limit).all(), (
        f"value off by {value_error.tolist()}, allowed {value_limit.tolist()}, "
        f"true {truth.value.tolist()}"
    )
    scale = upstream.double().abs()
    error = result.gradient.double() - truth.gradient
    limit = tolerance * truth.gradient.norm(dim=-1) + scale * (
        allowance.coefficient * slope + floor
    )
    assert torch.isfinite(result.gradient).all(), "gradient not finite"
    assert result.gradient.dtype == inputs.student.dtype
    if inputs.student.dtype in LOW_PRECISION:
        excess = error.abs() - half_spacing(truth.gradient, inputs.student.dtype)
        assert (excess <= limit[..., None]).all(), (
            f"gradient beyond one rounding by {worst(excess):.2e}, allowed {limit.tolist()}"
        )
    else:
        assert (error.norm(dim=-1) <= limit).all(), (
            f"gradient rows off by {error.norm(dim=-1).tolist()}, allowed {limit.tolist()}, "
            f"relative {row_errors(result.gradient, truth.gradient).tolist()}"
        )


def typical(errors: Tensor) -> float:
    """The root mean square; NaN counts as infinitely wrong."""
    return float(torch.nan_to_num(errors, nan=math.inf).square().mean().sqrt())


def worst(errors: Tensor) -> float:
    """The largest error; NaN counts as infinitely wrong."""
    return float(torch.nan_to_num(errors, nan=math.inf).max()) if errors.numel() else 0.0
