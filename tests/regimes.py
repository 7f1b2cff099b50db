"""The inputs every numeric test draws from: named, seeded, and each one a place where a kernel of
this kind has been wrong. Logits are made in the dtype under test; whoever judges upcasts the same
values, so that a comparison never includes the rounding of the input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import oracle

INFINITY = math.inf
Make = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]

NEAR_NOISES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
PEAKS = (0.9, 0.99, 0.999, 0.99999, 1 - 1e-7)
VOCABULARY_SIZES = (1, 2, 17, 1000, 1023, 1024, 1025, 5003, 32003)


@dataclass(frozen=True)
class Regime:
    """`make(rows, vocabulary, generator)` gives float64 student and teacher logits."""

    name: str
    make: Make
    masks_student: bool = False  # −inf in the student where the teacher has mass
    masks_teacher: bool = False  # −inf in the teacher where the student has mass
    gap: float = 0.0  # differences of logits so large that one id takes the whole mass

    def __str__(self) -> str:
        return self.name

    @property
    def saturates(self) -> bool:
        """Rows whose true gradient is 1e-80: everything in it cancels."""
        return self.gap > 0.0


def _normal(rows: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def _uniform(rows, vocabulary, generator):
    student = 0.1 * _normal(rows, vocabulary, generator)
    return student, 0.1 * _normal(rows, vocabulary, generator)


def _near(noise: float) -> Make:
    def make(rows, vocabulary, generator):
        teacher = 3.0 * _normal(rows, vocabulary, generator)
        return teacher + noise * _normal(rows, vocabulary, generator), teacher

    return make


def _far(rows, vocabulary, generator):
    student = 5.0 * _normal(rows, vocabulary, generator)
    return student, 5.0 * _normal(rows, vocabulary, generator)


def _raise_to(logits: Tensor, token: int, probability: float) -> Tensor:
    """The logits with `token` lifted until it has the given probability."""
    others = torch.cat([logits[:, :token], logits[:, token + 1 :]], -1)
    lift = math.log(probability) - math.log1p(-probability)
    result = logits.clone()
    if others.shape[-1]:
        result[:, token] = torch.logsumexp(others, -1) + lift
    return result


def _peaked(student_peak: float, teacher_peak: float | None) -> Make:
    """Both models favour the same id; with `teacher_peak=None` the teacher does not."""

    def make(rows, vocabulary, generator):
        student = 2.0 * _normal(rows, vocabulary, generator)
        teacher = student + 0.5 * _normal(rows, vocabulary, generator)
        token = (2 * vocabulary) // 3
        student = _raise_to(student, token, student_peak)
        return student, teacher if teacher_peak is None else _raise_to(teacher, token, teacher_peak)

    return make


def _offset(student_offset: float, teacher_offset: float, noise: float) -> Make:
    def make(rows, vocabulary, generator):
        student, teacher = _near(noise)(rows, vocabulary, generator)
        return student + student_offset, teacher + teacher_offset

    return make


def _masked(in_student: bool, in_teacher: bool) -> Make:
    """A quarter of the ids is −inf in the named models; the rest is drawn as in `far`, milder."""

    def make(rows, vocabulary, generator):
        student = 2.0 * _normal(rows, vocabulary, generator)
        teacher = student + _normal(rows, vocabulary, generator)
        absent = torch.rand(rows, vocabulary, generator=generator) < 0.25
        absent[:, 0] = True
        absent[:, vocabulary // 2] = False  # someone must be left
        if in_student:
            student = student.masked_fill(absent, -INFINITY)
        if in_teacher:
            teacher = teacher.masked_fill(absent, -INFINITY)
        return student, teacher

    return make


def _realistic(rows, vocabulary, generator):
    """A heavy tail over ranks as language models have it, the same order in both models."""
    noise = torch.rand(rows, vocabulary, generator=generator)
    ranks = noise.argsort(-1)  # a random permutation per row
    tail = -1.3 * torch.log1p(ranks.double()) - 4.0 * (ranks > vocabulary // 2)
    teacher = tail + 0.8 * _normal(rows, vocabulary, generator) + 12.0
    return teacher + 0.6 * _normal(rows, vocabulary, generator), teacher


def _wide(gap: float) -> Make:
    def make(rows, vocabulary, generator):
        student = gap * torch.rand(rows, vocabulary, generator=generator, dtype=torch.float64)
        teacher = gap * torch.rand(rows, vocabulary, generator=generator, dtype=torch.float64)
        return student, teacher

    return make


REGIMES = (
    Regime("uniform", _uniform),
    *(Regime(f"near_{noise:.0e}", _near(noise)) for noise in NEAR_NOISES),
    Regime("far", _far),
    *(Regime(f"peaked_{peak:.7g}", _peaked(peak, 1 - 1.5 * (1 - peak))) for peak in PEAKS),
    Regime("peaked_against_flat", _peaked(0.9, None)),
    Regime("flat_against_peaked", lambda *args: _peaked(0.9, None)(*args)[::-1]),
    Regime("offset_1e4_both", _offset(1e4, 1e4, 0.5)),
    Regime("offset_1e4_student", _offset(1e4, 0.0, 0.5)),
    Regime("offset_1e4_teacher", _offset(0.0, -1e4, 0.5)),
    Regime("masked_both", _masked(True, True)),
    Regime("masked_teacher", _masked(False, True), masks_teacher=True),
    Regime("masked_student", _masked(True, False), masks_student=True),
    Regime("realistic", _realistic),
    Regime("wide_1e2", _wide(1e2), gap=1e2),
    Regime("wide_1e3", _wide(1e3), gap=1e3),
    Regime("wide_1e4", _wide(1e4), gap=1e4),
)
BY_NAME = {regime.name: regime for regime in REGIMES}


# ----------------------------------------------------------------- the losses under test


@dataclass(frozen=True)
class Case:
    """One public function with its options. `extra` names further per-position arguments."""

    name: str
    function: str
    options: dict = field(default_factory=dict, hash=False)
    extra: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def reads_tokens(self) -> bool:
        return self.function in ("k1", "k2", "k3", "token_logprobs")

    @property
    def is_divergence(self) -> bool:
        return self.function in ("reverse_kl", "forward_kl", "jsd", "skew_kl", "lsm")

    def is_finite_in(self, regime: Regime) -> bool:
        """Whether the formula never takes the log of a probability 0 of the regime."""
        name = self.function
        if name == "jsd" and self.options.get("beta") in (0.0, 1.0):
            name = "reverse_kl" if self.options["beta"] else "forward_kl"
        if name == "forward_kl":
            return not regime.masks_student
        if name == "reverse_kl":
            return not regime.masks_teacher
        return True


DIVERGENCES = (
    Case("reverse_kl", "reverse_kl"),
    Case("forward_kl", "forward_kl"),
    Case("jsd", "jsd"),
    Case("jsd_0.1", "jsd", {"beta": 0.1}),
    Case("jsd_0.9", "jsd", {"beta": 0.9}),
    Case("jsd_0", "jsd", {"beta": 0.0}),
    Case("jsd_1", "jsd", {"beta": 1.0}),
    Case("skew_forward", "skew_kl"),
    Case("skew_reverse", "skew_kl", {"direction": "reverse"}),
    Case("skew_forward_0.6", "skew_kl", {"alpha": 0.6}),
    Case("skew_reverse_0.6", "skew_kl", {"alpha": 0.6, "direction": "reverse"}),
)
POLICY = (
    Case("k1", "k1"),
    Case("k1_old", "k1", {}, ("old_logprobs",)),
    Case("k1_clip", "k1", {"clip_range": 0.2}, ("old_logprobs",)),
    Case("k1_clip_pair", "k1", {"clip_range": (0.1, 0.3)}, ("old_logprobs",)),
    Case("k1_current", "k1", {"advantage": "current"}, ("old_logprobs",)),
    Case("k1_reference", "k1", {"reward_scale": 1.25}, ("reference_logprobs",)),
    Case(
        "k1_reference_old",
        "k1",
        {"reward_scale": 1.25},
        ("reference_logprobs", "old_logprobs"),
    ),
    Case("k1_discount", "k1", {"discount": 0.9}),
    Case(
        "k1_everything",
        "k1",
        {"discount": 0.5, "clip_range": 0.2, "reward_scale": 1.25, "advantage": "current"},
        ("reference_logprobs", "old_logprobs"),
    ),
    Case("k2", "k2"),
    Case("k3", "k3"),
)
STATISTICS = (Case("token_logprobs", "token_logprobs"), Case("entropy", "entropy"))
CASES = (*DIVERGENCES, *POLICY, *STATISTICS)


@dataclass
class Inputs:
    student: Tensor
    teacher: Tensor
    tokens: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor
    mask: Tensor
    weights: Tensor
    upstream: Tensor
    generator: torch.Generator

    def arguments(self, case: Case, student: Tensor, teacher: Tensor | None = None) -> tuple:
        """Positional arguments of the case's function."""
        teacher = self.teacher if teacher is None else teacher
        if case.function == "entropy":
            return (student,)
        if case.function == "token_logprobs":
            return (student, self.tokens)
        return (student, teacher, self.tokens) if case.reads_tokens else (student, teacher)

    def keywords(self, case: Case) -> dict:
        return {**case.options, **{name: getattr(self, name) for name in case.extra}}


def make_inputs(
    regime: Regime | str,
    positions: tuple[int, ...] = (4,),
    vocabulary: int = 1025,
    student_dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Inputs:
    """Everything a call may need, from one seed; tokens are drawn from the student (on policy)."""
    regime = BY_NAME[regime] if isinstance(regime, str) else regime
    generator = torch.Generator().manual_seed(seed)
    rows = math.prod(positions)
    student, teacher = regime.make(rows, vocabulary, generator)
    student = student.to(student_dtype).reshape(*positions, vocabulary)
    teacher = teacher.to(teacher_dtype or student_dtype).reshape(*positions, vocabulary)
    law = torch.softmax(student.double(), -1) * (teacher > -INFINITY)
    tokens = (
        torch.multinomial(law.reshape(rows, vocabulary), 1, generator=generator).reshape(positions)
        if rows
        else torch.zeros(positions, dtype=torch.long)
    )
    number = torch.float64 if student_dtype == torch.float64 else torch.float32
    logprobs = oracle.token_logprobs(student, tokens)

    def noisy(scale: float) -> Tensor:
        noise = torch.randn(positions, generator=generator, dtype=torch.float64)
        return (logprobs + scale * noise).to(number)

    mask = torch.rand(positions, generator=generator) < 0.7
    return Inputs(
        student=student,
        teacher=teacher,
        tokens=tokens,
        old_logprobs=noisy(0.3),
        reference_logprobs=noisy(1.0),
        mask=mask,
        weights=torch.randn(positions, generator=generator, dtype=number),
        upstream=torch.randn(positions, generator=generator, dtype=number),
        generator=generator,
    )
