"""Behaviour policies: which token a rollout goes on with.

Shapes: logits are `(..., V)`, everything else `(...)`, one per position. Log-probs and divergences
are in nats; `p` and `q` are the student's and the teacher's probabilities at the temperature.

Types: logits in float32, float64, bfloat16 or float16, the two models independent of each other;
any strides. Tokens come in int64, numbers in float32, in float64 if one of the logits is float64.

Randomness: one uniform number in `[0, 1)` a draw, from `uniforms` or, where it is None, from
`torch.rand(..., dtype=torch.float64, generator=generator)`, on the device of the generator: one of
the CPU draws the same for logits on a GPU (but not inside of a CUDA graph). A token is the first
id, in the order of ids, whose cumulative mass exceeds that part of the whole: never an id of
probability 0. The same uniforms give the same tokens, whatever else is in the batch, on every
processor.

Devices: the CPU, or a CUDA GPU, see `opdc.functional`; all tensors of a call are on one, but for an
`epsilon` of one number, which may be on the CPU. On a GPU, where nobody looks, a uniform number or
a draft out of range and an `epsilon` that is negative or NaN are no errors: such a row gives the
token −1 and NaN numbers.

Undefined input: a row with NaN, `+inf` or nothing but `−inf`, in one of the models, gives the token
−1 and NaN numbers; other rows are untouched. An empty batch gives empty results.

Nothing here is differentiable: all results are detached.

Errors: `ValueError` for shapes, numbers, token ids and combinations, `TypeError` for types, dtypes
and devices. No token has been drawn then, but a generator may have advanced.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _arguments, _ops


class Sample(NamedTuple):
    """What `opdc.sample` gives, each `(...)`.

    Attributes:
        tokens: int64 ids.
        logprobs: their log-probs under the law that they were drawn from, cut off and renormalised.
        untruncated_logprobs: those under the whole softmax.

    >>> import opdc, torch
    >>> opdc.sample(torch.zeros(2, 8), top_k=1).tokens
    tensor([0, 0])
    """

    tokens: Tensor
    logprobs: Tensor
    untruncated_logprobs: Tensor


class Blend(NamedTuple):
    """What `opdc.blend` gives.

    Attributes:
        logprobs: `(..., V)`, `log μ`.
        beta: `(...)`, the weight of the teacher in `[0, 1]`.
        student_kl: `(...)`, `KL(μ‖p)`, at most the budget, to a relative 1e-4.
        teacher_kl: `(...)`, `KL(μ‖q)`.

    >>> import opdc, torch
    >>> opdc.blend(torch.zeros(2), torch.tensor([1.0, 0.0]), epsilon=float("inf")).beta
    tensor(1.)
    """

    logprobs: Tensor
    beta: Tensor
    student_kl: Tensor
    teacher_kl: Tensor


class BlendSample(NamedTuple):
    """What `opdc.blend_sample` gives, each `(...)`.

    Attributes:
        tokens: int64 ids.
        logprobs: `log μ` of them, of `μ` cut off and renormalised: what they were drawn from.
        student_logprobs: `log p` of them, of the whole vocabulary.
        teacher_logprobs: `log q` of them, of the whole vocabulary.
        beta: the weight of the teacher in `[0, 1]`.
        student_kl: `KL(μ‖p)` of the whole `μ`, at most the budget, to a relative 1e-4.
        teacher_kl: `KL(μ‖q)` of the whole `μ`.

    >>> import opdc, torch
    >>> opdc.blend_sample(torch.zeros(2), torch.tensor([1.0, 0.0]), epsilon=0.0).student_kl
    tensor(0.)
    """

    tokens: Tensor
    logprobs: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    beta: Tensor
    student_kl: Tensor
    teacher_kl: Tensor


class BlendVerify(NamedTuple):
    """What `opdc.blend_verify` gives, each `(...)`; the first seven as in `BlendSample`.

    Attributes:
        accepted: bool, the draft stood.
        valid: bool, the position counts: those up to the first draft that did not stand, that one
            included; a row of undefined input counts as one that did not. Elsewhere the token is
            −1 and the numbers are NaN. (Drafts and uniforms there must be in range all the same.)

    >>> import opdc, torch
    >>> drafts = torch.tensor([0, 1])
    >>> opdc.blend_verify(drafts, torch.zeros(2, 2), torch.zeros(2, 2), epsilon=0.02).accepted
    tensor([True, True])
    """

    tokens: Tensor
    logprobs: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    beta: Tensor
    student_kl: Tensor
    teacher_kl: Tensor
    accepted: Tensor
    valid: Tensor


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
    """A token of each position from `softmax(logits / temperature)`, cut off if asked.

    Args:
        logits: `(..., V)`.
        temperature: `T > 0`.
        top_k: keeps exactly so many ids, the larger logits and of equal ones the lower ids; more
            than there are keeps all. 1 is greedy, with the log-prob 0.
        top_p: in `(0, 1]`. Keeps, in the same order, the fewest ids whose part of the mass (of what
            `top_k` left) is at least this, and at least one.
        valid_vocab: only the ids below it exist.
        uniforms: `(...)`, floating, in `[0, 1)`.
        generator: of the uniforms, where none are given; None: the global one of the device of the
            logits.

    >>> import opdc, torch
    >>> logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    >>> drawn = opdc.sample(logits, top_p=0.7, uniforms=torch.tensor([0.9]))
    >>> drawn.tokens, drawn.logprobs.exp(), drawn.untruncated_logprobs.exp()
    (tensor([1]), tensor([0.3333]), tensor([0.2500]))
    """
    tokens, columns = _ops.sample(
        _arguments.tensor_of_logits("logits", logits),
        None,
        None,
        None,
        _uniforms(logits, uniforms, generator),
        *_numbers(temperature, top_k, top_p, valid_vocab, None),
    )
    logprobs, untruncated, *_ = columns.unbind(-1)
    return Sample(tokens, logprobs, untruncated)


def blend(
    student: Tensor,
    teacher: Tensor,
    epsilon: float | Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    eos_map: tuple[int, int] | None = None,
) -> Blend:
    """The trust-region behaviour policy: the student, moved towards the teacher as far as a KL
    budget allows (TRB, arXiv 2605.31159).

    `μ ∝ p^(1−β) q^β` with the largest `β` in `[0, 1]` for which `KL(μ‖p) ≤ ε`, met to a relative
    1e-4 of `ε` where it binds. An id that one model excludes is none of `μ`'s for `β > 0`; where
    that alone exceeds the budget, or leaves no id, `β = 0` and `μ = p`.

    Args:
        student: `(..., V)` logits.
        teacher: logits for the same positions; another size of vocabulary needs `valid_vocab`.
        epsilon: the budget in nats, at least 0, a number or a tensor that broadcasts to `(...)`;
            0 gives the student and `inf` the teacher.
        temperature: `T > 0`, of both models.
        valid_vocab: only the ids below it exist, in both models; `log μ` of the others is `−inf`.
        eos_map: `(student_eos, teacher_eos)`, where the models end a text with different ids: in
            both the mass of `teacher_eos` is added to `student_eos`, and everything that comes out
            is of the rows after that.

    >>> import opdc, torch
    >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0]])
    >>> policy = opdc.blend(student, teacher, epsilon=0.02)
    >>> f"{policy.beta.item():.3f} {policy.student_kl.item():.4f}", policy.logprobs.exp()
    ('0.136 0.0200', tensor([[0.4295, 0.2852, 0.2852]]))
    """
    logprobs, columns = _ops.blend(
        *_models(student, teacher, epsilon),
        None,
        None,
        *_numbers(temperature, None, 1.0, valid_vocab, eos_map),
    )
    _, _, _, beta, student_kl, teacher_kl, *_ = columns.unbind(-1)
    return Blend(logprobs, beta, student_kl, teacher_kl)


def blend_sample(
    student: Tensor,
    teacher: Tensor,
    epsilon: float | Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    valid_vocab: int | None = None,
    eos_map: tuple[int, int] | None = None,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> BlendSample:
    """A token of each position from the policy of `opdc.blend`, cut off after the blend if asked.

    The arguments are those of `opdc.blend` and `opdc.sample`. A loss of the sampled token on such
    rollouts is unbiased with `old_logprobs=logprobs` and `advantage="current"`, and without
    `top_k` and `top_p`.

    >>> import opdc, torch
    >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0]])
    >>> drawn = opdc.blend_sample(student, teacher, epsilon=0.02, uniforms=torch.tensor([0.4]))
    >>> drawn.tokens, drawn.logprobs.exp(), drawn.student_logprobs.exp()
    (tensor([0]), tensor([0.4295]), tensor([0.3333]))
    """
    tokens, columns = _ops.sample(
        *_models(student, teacher, epsilon),
        None,
        _uniforms(student, uniforms, generator),
        *_numbers(temperature, top_k, top_p, valid_vocab, eos_map),
    )
    return BlendSample(tokens, *columns.unbind(-1)[:6])


def blend_verify(
    draft_tokens: Tensor,
    student: Tensor,
    teacher: Tensor,
    epsilon: float | Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    valid_vocab: int | None = None,
    eos_map: tuple[int, int] | None = None,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> BlendVerify:
    """Tokens from the policy of `opdc.blend`, out of drafts of the student: exact, with one forward
    of the teacher for a block of drafts.

    A draft `a`, drawn from `p` at the same temperature and not cut off, stands with the probability
    `min(1, μ(a) / p(a))`; otherwise the token is drawn from what `μ` has more than `p`. So each
    token that counts is distributed exactly as `μ`, and a draft falls with the probability
    `TV(p, μ) ≤ √(ε / 2)`. The drafts after the first that falls are void: they followed a token
    that is not there.

    Args:
        draft_tokens: `(...)`, integer ids; a block is the last axis. A draft `teacher_eos` of
            `eos_map` counts as `student_eos`.
        student: `(..., V)`, the logits that the drafts were drawn from.
        teacher: logits for the same positions.
        uniforms: `(..., 2)`, floating, in `[0, 1)`: to accept a draft, and to put it right.

    The other arguments are those of `opdc.blend_sample`.

    >>> import opdc, torch
    >>> student, teacher = torch.zeros(3, 3), torch.tensor([3.0, 0.0, 0.0]).expand(3, 3)
    >>> drafts, uniforms = torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.5]).expand(3, 2)
    >>> block = opdc.blend_verify(drafts, student, teacher, epsilon=0.02, uniforms=uniforms)
    >>> block.tokens, block.accepted, block.valid
    (tensor([ 0,  0, -1]), tensor([ True, False, False]), tensor([ True,  True, False]))
    """
    models = _models(student, teacher, epsilon)
    tokens, columns = _ops.sample(
        *models,
        _arguments.token_ids("draft_tokens", draft_tokens),
        _uniforms(student, uniforms, generator, (2,)),
        *_numbers(temperature, top_k, top_p, valid_vocab, eos_map),
    )
    numbers = columns.unbind(-1)
    drawn = BlendSample(tokens, *numbers[:6])
    return BlendVerify(*drawn, numbers[6] != 0, numbers[7] != 0)


# ----------------------------------------------------------------- what they share


def _models(
    student: Tensor, teacher: Tensor, epsilon: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    student = _arguments.tensor_of_logits("student", student)
    teacher = _arguments.tensor_of_logits("teacher", teacher)
    positions = student.shape[:-1]
    one = torch.ones((), dtype=torch.float64, device=student.device)
    if not isinstance(epsilon, Tensor):
        number = _arguments.number("epsilon", epsilon)
        if not torch.compiler.is_compiling() and not number >= 0:
            raise ValueError(f"epsilon: got {number}, want a KL budget in nats of at least 0")
        budget = one * number
    else:
        budget = _arguments.constant("epsilon", epsilon)
        if not budget.is_floating_point():
            raise TypeError(f"epsilon must be floating, got {budget.dtype}: give epsilon.float()")
        if not budget.dim() and budget.is_cpu:
            budget = one * budget
    try:
        return student, teacher, budget.expand(positions)
    except RuntimeError:
        raise ValueError(
            f"epsilon has the shape {tuple(budget.shape)}, which does not broadcast to the "
            f"positions {tuple(positions)} of the student's logits: give a number, or one for each"
        ) from None


def _uniforms(
    logits: Tensor,
    uniforms: Tensor | None,
    generator: torch.Generator | None,
    each: tuple[int, ...] = (),
) -> Tensor:
    if uniforms is None:
        shape = (*logits.shape[:-1], *each)
        return _arguments.uniforms(shape, torch.float64, logits.device, generator)
    if generator is not None:
        raise ValueError("give uniforms, or a generator that makes them, not both")
    uniforms = _arguments.constant("uniforms", uniforms)
    return _arguments.with_dense_rows(uniforms) if each else uniforms


def _numbers(
    temperature: float,
    top_k: int | None,
    top_p: float,
    valid_vocab: int | None,
    eos_map: tuple[int, int] | None,
) -> tuple[Any, ...]:
    """The arguments of a sampler that are no tensors; a tensor of those that may be scheduled."""
    numbers = _arguments.number("temperature", temperature), _arguments.number("top_p", top_p)
    ends = (-1, -1)
    if eos_map is not None:
        if not isinstance(eos_map, (tuple, list)) or len(eos_map) != 2:
            raise ValueError(f"eos_map must be (student_eos, teacher_eos), got {eos_map!r}")
        student_eos, teacher_eos = eos_map
        ends = (
            _arguments.integer("eos_map", student_eos, 0),
            _arguments.integer("eos_map", teacher_eos, 0),
        )
    return (
        _ops.scheduled(*numbers),
        0 if top_k is None else _arguments.integer("top_k", top_k),
        _arguments.vocabulary_size(valid_vocab),
        *ends,
    )
