"""What is measured: losses and samplers in textbook PyTorch and in opdc, and the inputs of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import opdc

from . import textbook

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BETA = 0.5  # of the Jensen-Shannon divergence
ALPHA = 0.1  # of the skew divergences
CHECKED_ROWS = 16  # that are compared with float64, where a row does not depend on the others
TOP = 32  # ids of a top-K support where a method has no number of its own
TOP_P, TOP_K = 0.9, 50  # of the samplers that truncate
EPSILON = 0.02  # nats, the budget of a blend
DRAFT_LENGTH = 4  # tokens in a block of drafts


@dataclass(frozen=True)
class Function:
    """One loss or sampler, twice: in textbook PyTorch and in opdc.

    Both are called with the student's logits and the inputs that `takes` names. A sampler, which
    has a `law`, gives tokens and their log-probs; a token below 0 does not count.
    """

    title: str
    takes: tuple[str, ...]
    textbook: Callable[..., Any]
    opdc: Callable[..., Any]  # takes inplace= too, where `inplace` is true
    matrices: int  # logits read and gradients written: what has to cross the memory bus
    inplace: bool = True
    gradient: bool = True  # else only the output counts
    whole: bool = False  # a row's gradient depends on the other rows
    law: Callable[..., Tensor] | None = None  # log-probs of all ids, which the draws must have


def sampler(title: str, takes: tuple[str, ...], **parts: Any) -> Function:
    return Function(
        title, takes, matrices=1 + ("teacher" in takes), inplace=False, gradient=False, **parts
    )


def _in_blocks(verify: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of blocks of drafts as one of rows: (student, teacher, tokens)."""

    def of_rows(*rows: Tensor) -> tuple[Tensor, Tensor]:
        length = math.gcd(len(rows[0]), DRAFT_LENGTH)
        tokens, logprobs, *_ = verify(*(tensor.unflatten(0, (-1, length)) for tensor in rows))
        return tokens.flatten(), logprobs.flatten()

    return of_rows


def _over_the_vocabulary(ids: Tensor, p: Tensor, logits: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(-1, ids, p).log()


def _blend_law(student: Tensor, teacher: Tensor, *_: Tensor) -> Tensor:
    return textbook.blend(student, teacher, EPSILON, bisections=30)


FUNCTIONS = {
    "reverse_kl": Function(
        "reverse KL",
        ("teacher",),
        lambda z, t: textbook.reverse_kl(z, t).mean(),
        opdc.reverse_kl,
        matrices=3,
    ),
    "forward_kl": Function(
        "forward KL",
        ("teacher",),
        lambda z, t: textbook.forward_kl(z, t).mean(),
        opdc.forward_kl,
        matrices=3,
    ),
    "jsd": Function(
        "JSD",
        ("teacher",),
        lambda z, t: textbook.jsd(z, t, BETA).mean(),
        partial(opdc.jsd, beta=BETA),
        matrices=3,
    ),
    "skew_forward_kl": Function(
        "skew forward KL",
        ("teacher",),
        lambda z, t: textbook.skew_forward_kl(z, t, ALPHA).mean(),
        partial(opdc.skew_kl, alpha=ALPHA, direction="forward"),
        matrices=3,
    ),
    "skew_reverse_kl": Function(
        "skew reverse KL",
        ("teacher",),
        lambda z, t: textbook.skew_reverse_kl(z, t, ALPHA).mean(),
        partial(opdc.skew_kl, alpha=ALPHA, direction="reverse"),
        matrices=3,
    ),
    "forward_kl_tail": Function(
        f"forward KL, top {TOP} + tail",
        ("teacher",),
        lambda z, t: textbook.forward_kl_tail(z, t, TOP).mean(),
        partial(opdc.forward_kl, support="teacher", k=TOP, normalize="tail"),
        matrices=3,
    ),
    "lsm": Function(
        "LSM, teacher logits",
        ("teacher",),
        lambda z, t: textbook.lsm(z, t, TOP).mean(),
        partial(opdc.lsm, k=TOP),
        matrices=2,  # of the student only the support is read
    ),
    "lsm_given": Function(
        f"LSM, teacher top {TOP}",
        ("teacher_topk",),
        lambda z, top: textbook.lsm_given(z, top.ids, top.logprobs).mean(),
        opdc.lsm,
        matrices=1,  # the gradient, almost all of it zeros
    ),
    "k1": Function(
        "K1, teacher logits",
        ("teacher", "tokens"),
        lambda z, t, y: textbook.k1(z, t, y).mean(),
        opdc.k1,
        matrices=3,
    ),
    "k1_given": Function(
        "K1, teacher log-probs",
        ("teacher_logprobs", "tokens"),
        lambda z, t, y: textbook.k1_given(z, t, y).mean(),
        opdc.k1,
        matrices=2,
    ),
    "k2": Function(
        "K2",
        ("teacher", "tokens"),
        lambda z, t, y: textbook.k2(z, t, y).mean(),
        opdc.k2,
        matrices=3,
    ),
    "k3": Function(
        "K3",
        ("teacher", "tokens"),
        lambda z, t, y: textbook.k3(z, t, y).mean(),
        opdc.k3,
        matrices=3,
    ),
    "tropd": Function(
        "TrOPD",
        ("teacher", "tokens", "uniforms"),
        lambda z, t, y, u: textbook.tropd(z, t, y, u, 64).mean(),
        lambda z, t, y, u, **options: opdc.tropd(z, t, y, k=64, uniforms=u, **options),
        matrices=3,
    ),
    "eopd": Function(
        "EOPD",
        ("teacher", "tokens"),
        lambda z, t, y: textbook.eopd(z, t, y, 16).mean(),
        partial(opdc.eopd, k=16),
        matrices=3,
    ),
    "reopold_exploration": Function(
        "REOPOLD, exploration",
        ("teacher", "tokens"),
        lambda z, t, y: textbook.reopold(z, t, y, "exploration"),
        partial(opdc.reopold, phase="exploration"),
        matrices=3,
        whole=True,
    ),
    "reopold_refinement": Function(
        "REOPOLD, refinement",
        ("teacher", "tokens"),
        lambda z, t, y: textbook.reopold(z, t, y, "refinement"),
        partial(opdc.reopold, phase="refinement"),
        matrices=3,
        whole=True,
    ),
    "aopd": Function(
        "AOPD",
        ("teacher", "tokens"),
        lambda z, t, y: textbook.aopd(z, t, y, 16).mean(),
        partial(opdc.aopd, k=16),
        matrices=3,
    ),
    "token_logprobs": Function(
        "token log-probs",
        ("tokens",),
        lambda z, y: textbook.token_logprobs(z, y).mean(),
        lambda z, y: opdc.token_logprobs(z, y).mean(),
        matrices=2,
        inplace=False,
    ),
    "entropy": Function(
        "entropy",
        (),
        lambda z: textbook.entropy(z).mean(),
        lambda z: opdc.entropy(z).mean(),
        matrices=2,
        inplace=False,
    ),
    "topk": Function(
        f"top {TOP}, no gradient",
        (),
        lambda z: textbook.topk(z, TOP)[1],
        lambda z: opdc.topk(z, TOP).logprobs,
        matrices=1,
        inplace=False,
        gradient=False,
    ),
    "sample": sampler(
        "sample",
        (),
        textbook=lambda z: textbook.draw(textbook.probs(z)),
        opdc=lambda z: opdc.sample(z)[:2],
        law=textbook.log_probs,
    ),
    "sample_top_p": sampler(
        f"sample, top-p {TOP_P}",
        (),
        textbook=lambda z: textbook.draw_from(*textbook.top_p_probs(z, TOP_P)),
        opdc=lambda z: opdc.sample(z, top_p=TOP_P)[:2],
        law=lambda z: _over_the_vocabulary(*textbook.top_p_probs(z, TOP_P), z),
    ),
    "sample_top_k": sampler(
        f"sample, top-k {TOP_K}",
        (),
        textbook=lambda z: textbook.draw_from(*textbook.top_k_probs(z, TOP_K)),
        opdc=lambda z: opdc.sample(z, top_k=TOP_K)[:2],
        law=lambda z: _over_the_vocabulary(*textbook.top_k_probs(z, TOP_K), z),
    ),
    "blend_sample": sampler(
        f"TRB, ε {EPSILON}, sample",
        ("teacher",),
        textbook=lambda z, t: textbook.blend_sample(z, t, EPSILON),
        opdc=lambda z, t: opdc.blend_sample(z, t, EPSILON)[:2],
        law=_blend_law,
    ),
    "blend_verify": sampler(
        f"TRB, ε {EPSILON}, verify {DRAFT_LENGTH} drafts",
        ("teacher", "tokens"),
        textbook=_in_blocks(lambda z, t, y: textbook.blend_verify(z, t, y, EPSILON)),
        opdc=_in_blocks(lambda z, t, y: opdc.blend_verify(y, z, t, EPSILON)),
        law=_blend_law,
    ),
}


# ---- the others ------------------------------------------------------------------------------

PACKAGES = {"liger": "liger-kernel", "flashinfer": "flashinfer-python"}  # may not be there
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}  # what Liger calls these divergences


def _liger(name: str) -> Callable[..., Tensor]:
    """Liger's kernel, which starts from log-probs."""
    loss = import_module("liger_kernel.transformers.jsd").LigerJSD(beta=BETAS[name])

    def of_logits(student: Tensor, teacher: Tensor) -> Tensor:
        value: Tensor = loss(textbook.log_probs(student), textbook.log_probs(teacher))
        return value

    return of_logits


def _flashinfer(name: str) -> Callable[..., Tensor]:
    """FlashInfer's kernels, two of which start from probabilities; they give tokens alone."""
    module = import_module("flashinfer.sampling")
    samplers: dict[str, Callable[[Tensor], Tensor]] = {
        "sample": module.sampling_from_logits,
        "sample_top_p": lambda z: module.top_p_sampling_from_probs(textbook.probs(z), TOP_P),
        "sample_top_k": lambda z: module.top_k_sampling_from_probs(textbook.probs(z), TOP_K),
    }
    return samplers[name]


def rivals(name: str) -> dict[str, Callable[[], Callable[..., Any]]]:
    """How to get what opdc's form of a function is compared with; getting one fails where its
    package is missing."""
    call = FUNCTIONS[name].textbook
    found: dict[str, Callable[[], Callable[..., Any]]] = {
        "eager": lambda: call,
        "compile": lambda: torch.compile(call, fullgraph=True, dynamic=False),
    }
    if name in BETAS:
        found["liger"] = lambda: _liger(name)
    if name in ("sample", "sample_top_p", "sample_top_k"):
        found["flashinfer"] = lambda: _flashinfer(name)
    return found


# ---- the inputs ------------------------------------------------------------------------------


@dataclass
class Inputs:
    """The tensors of one dtype, one row per position."""

    student: Tensor
    teacher: Tensor
    teacher_logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    tokens: Tensor
    uniforms: Tensor
    scratch: Tensor  # the student's logits again, for in-place calls to overwrite

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def teacher_topk(self) -> opdc.TopK:
        return opdc.TopK(self.top_ids, self.top_logprobs)

    def of(self, function: Function) -> list[Any]:
        """What a function is called with after the student's logits."""
        return [getattr(self, name) for name in function.takes]

    def slice(self, start: int, stop: int) -> Inputs:
        return Inputs(**{name: tensor[start:stop] for name, tensor in vars(self).items()})

    def to(self, dtype: torch.dtype) -> Inputs:
        student = self.student.to(dtype)
        changed = {
            "student": student,
            "teacher": self.teacher.to(dtype),
            "scratch": student.clone(),
        }
        return replace(self, **changed)


def make_inputs(
    rows: int,
    vocabulary: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    place: torch.device | str = "cpu",
) -> Inputs:
    """Logits as language models make them, rounded to the dtype at the end.

    Tokens are frequent or rare (Zipf), a handful at each position is far above the rest, and
    the student is the teacher plus noise. Values and speed both depend on such things: on zeros
    or tiny noise most branches are never taken.
    """
    generator = torch.Generator(place).manual_seed(seed)
    empty = partial(torch.empty, device=place)
    frequency = -torch.arange(1, vocabulary + 1, device=place).log()[
        torch.randperm(vocabulary, generator=generator, device=place)
    ]
    student, teacher = (empty(rows, vocabulary, dtype=dtype) for _ in range(2))
    tokens = empty(rows, dtype=torch.int64)
    teacher_logprobs = empty(rows)
    top = min(TOP, vocabulary)
    top_ids, top_logprobs = empty(rows, top, dtype=torch.int64), empty(rows, top)
    candidates = min(20, vocabulary)
    for start in range(0, rows, 32):  # in pieces, for the temporary tensors to stay small
        piece = slice(start, min(start + 32, rows))
        t, z = empty(2, piece.stop - start, vocabulary)
        t.normal_(0, 1.5, generator=generator).add_(frequency)
        ids = torch.randint(vocabulary, (len(t), candidates), generator=generator, device=place)
        t.scatter_(-1, ids, empty(ids.shape).exponential_(0.25, generator=generator) + 4)
        z.normal_(0, 0.5, generator=generator).add_(t)
        tokens[piece] = torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(-1)
        teacher_logprobs[piece] = textbook.token_logprobs(t, tokens[piece])
        top_ids[piece], top_logprobs[piece] = textbook.topk(t, top)
        teacher[piece], student[piece] = t, z
    return Inputs(
        student,
        teacher,
        teacher_logprobs,
        top_ids,
        top_logprobs,
        tokens,
        uniforms=torch.rand(rows, generator=generator, device=place),
        scratch=student.clone(),
    )


class _FromBuffer(torch.autograd.Function):
    """A tensor over the memory of a buffer, with a history as the output of a model has one.

    In-place losses refuse leaves, which would lose their values; this is the cheapest non-leaf.
    """

    @staticmethod
    def forward(_: Any, anchor: Tensor, buffer: Tensor) -> Tensor:
        return buffer.data  # not a view, which autograd would watch for in-place changes

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


@dataclass
class Contender:
    """One way to do a piece of work. Only ``run`` is timed; what it returns is freed afterwards."""

    run: Callable[[], Any]
    prepare: Callable[[], None] = field(default=lambda: None)


def work(
    call: Callable[..., Any],
    function: Function,
    inputs: Inputs,
    *,
    inplace: bool = False,
    pieces: int = 1,
) -> Contender:
    """Loss and gradient of one function, or its output where only that counts.

    ``run`` gives the gradient, or the output, of the first piece.
    """
    size = math.ceil(len(inputs) / pieces)
    parts = [inputs.slice(start, start + size) for start in range(0, len(inputs), size)]
    students: list[Tensor] = []

    def prepare() -> None:
        students.clear()
        if inplace:
            inputs.scratch.copy_(inputs.student)
            anchor = torch.zeros((), requires_grad=True)
            for part in parts:
                students.append(_FromBuffer.apply(anchor, part.scratch))  # type: ignore[no-untyped-call]
        else:
            students.extend(
                part.student.detach().requires_grad_(function.gradient) for part in parts
            )

    options = {"inplace": True} if inplace else {}

    def run() -> Any:
        first = None
        for student, part in zip(students, parts, strict=True):
            result = call(student, *part.of(function), **options)
            if function.gradient:
                loss = result if len(parts) == 1 else result * (len(part) / len(inputs))
                (result,) = torch.autograd.grad(loss, student)
            first = result if first is None else first
        assert first is not None
        return first

    return Contender(run, prepare)


def exact(function: Function, inputs: Inputs) -> Tensor:
    """What the first rows should be, or all of them: by the textbook in float64.

    Of a sampler, which nobody can foretell, the log-probs of all that it could draw.
    """
    few = inputs if function.whole else inputs.slice(0, CHECKED_ROWS)
    student = few.student.double().requires_grad_(function.gradient)
    compute = function.law or function.textbook
    result: Tensor = compute(student, *map(_in_double, few.of(function)))
    if function.gradient:
        (result,) = torch.autograd.grad(result * (len(few) / len(inputs)), student)
    return result


def error(function: Function, result: Any, reference: Tensor) -> float | None:
    """How far a result is from `exact`: relative, in norm. None of a token without a log-prob."""
    if function.law is not None:
        if isinstance(result, Tensor):
            return None
        tokens, result = result
        count = min(len(tokens), len(reference))
        drawn = tokens[:count].clamp(min=0).unsqueeze(-1)
        reference = reference[:count].gather(-1, drawn).squeeze(-1)[tokens[:count] >= 0]
        result = result[:count][tokens[:count] >= 0]
    count = min(len(result), len(reference))  # a piece may be shorter
    difference = result[:count].double() - reference[:count]
    return float(difference.norm() / reference[:count].norm())


def _in_double(value: Any) -> Any:
    if isinstance(value, opdc.TopK):
        return value._replace(logprobs=value.logprobs.double())
    return value.double() if value.is_floating_point() else value
