"""A loss in a trainer: what is set there, how the loss is called, what it reports."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor

import opdc
from opdc.hf.distill import check_loss, check_teacher, check_vocabularies, evaluate, freeze
from opdc.info import version

_NOTHING = object()
# The beginnings of names in the trainer's log.
LOSS, ROLLOUT = "opdc/", "opdc/rollout/"


def require(trainer: Any, method: str) -> None:
    if not hasattr(type(trainer), method):
        raise RuntimeError(
            f"TRL {version('trl')} has no {type(trainer).__name__}.{method}, which opdc needs; "
            "wanted a TRL that opdc.trl.support() lists"
        )


class Attachment:
    """What all trainers share. A subclass knows the hook of its trainers.

    Everything is set on the trainer object, nothing on its class, and `remove` takes it off.
    """

    options: ClassVar[tuple[str, ...]] = ()  # of `attach`, beyond those that all trainers take
    method: ClassVar[str] = "compute_loss"  # of the trainer, in which the loss gets its place
    replaces: ClassVar[bool] = True  # this method, and does not run it
    needs_teacher: ClassVar[bool] = True  # a model in this process
    always_called: ClassVar[bool] = True  # in every micro-batch

    def __init__(
        self,
        trainer: Any,
        loss: Callable[..., Any],
        *,
        teacher_model: Any = None,
        rollout: Any = None,
        prefix_column: str | None = None,
        normalizer: str = "trl",
        autocast: bool = False,
        metrics: bool = True,
    ) -> None:
        self.trainer = trainer
        self.loss = loss
        self.teacher_model = teacher_model
        self.rollout = rollout
        self.prefix_column = prefix_column
        self.normalizer = normalizer
        self.autocast = autocast
        self.metrics = metrics
        self.calls = 0
        self._measured: dict[str, list[Mapping[str, Tensor]]] = {LOSS: [], ROLLOUT: []}
        self._replaced: dict[str, Any] = {}

    # ------------------------------------------------------------- checks, before anything is set

    def check(self) -> None:
        """Raise for what cannot work. Subclasses add what only they know."""
        check_loss(self.loss)
        name = type(self.trainer).__name__
        require(self.trainer, self.method)
        device = self.trainer.accelerator.device
        if device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"trainer: it trains on {device}; opdc computes on CPUs and on CUDA GPUs: "
                "use_cpu=True in its arguments"
            )
        self._check_nothing_is_lost()
        given = {
            "teacher_model": self.teacher_model is not None,
            "rollout": self.rollout is not None,
            "prefix_column": self.prefix_column is not None,
            "normalizer": self.normalizer != "trl",
            "autocast": self.autocast,
        }
        for option, is_given in given.items():
            if is_given and option not in self.options:
                raise ValueError(f"{option}: not for {name}{self._instead(option)}; leave it out")
        if self.normalizer not in ("trl", "local"):
            raise ValueError(f'normalizer: got {self.normalizer!r}; wanted "trl" or "local"')
        if not self.needs_teacher:
            return
        teacher = self.teacher
        if teacher is None:
            raise ValueError(
                f"teacher_model: {name} has none; wanted a causal language model with the "
                "student's tokenizer, as attach(..., teacher_model=model)"
            )
        check_teacher(teacher, self.trainer.model)
        check_vocabularies(self.loss, self.trainer.model, teacher)
        self._check_devices(teacher)

    def _check_nothing_is_lost(self) -> None:
        """What a subclass of TRL's trainer computes in the method that is replaced."""
        method = getattr(type(self.trainer), self.method)
        if self.replaces and not method.__module__.startswith(("trl.", "transformers.", "opdc.")):
            raise ValueError(
                f"trainer: {method.__qualname__} would be replaced, with all that it adds to the "
                "loss; override another method, or give attach a loss that adds it"
            )

    def _instead(self, option: str) -> str:
        """Why an option is not for this trainer, if there is more to say."""
        return ""

    def _check_devices(self, teacher: Any) -> None:
        devices = [
            next((parameter.device for parameter in model.parameters()), None)
            for model in (self.trainer.model, teacher)
        ]
        moves = self.teacher_model is not None and devices[1] != torch.device("meta")
        spread = any(hasattr(model, "hf_device_map") for model in (self.trainer.model, teacher))
        if devices[0] != devices[1] and not moves and not spread:
            raise ValueError(
                f"teacher_model: on {devices[1]}, the student is on {devices[0]}; move it there "
                f"with teacher.to({str(devices[0])!r})"
            )

    def refuse_temperature(self, known: float, of: str) -> None:
        """A loss may have a temperature of its own, but not where the other side has this one."""
        own = getattr(self.loss, "temperature", None)
        if own is not None and own != known:
            raise ValueError(
                f"loss: its temperature is {own}, but {of} is at {known}; leave the temperature "
                "out of the loss, it is the trainer's then"
            )

    # ------------------------------------------------------------- what is set on the trainer

    def install(self) -> None:
        """Set everything, or nothing."""
        try:
            self.set("_opdc_attachment", self)
            if self.teacher_model is not None:
                self.teacher_model = self._prepared(self.teacher_model)
                self.set("teacher_model", self.teacher_model)
            self.hook()
            self.wrap("compute_loss", self._reporting)
            self.wrap("training_step", self._watched)
        except BaseException:
            self.remove()
            raise

    def hook(self) -> None:
        """Put the loss where the trainer computes its own: `compute` in the place of `method`."""
        self.set(self.method, self.compute)

    def compute(self, *arguments: Any, **keywords: Any) -> Any:
        """The loss, from what the trainer calls `method` with."""
        raise NotImplementedError

    def set(self, name: str, value: Any) -> None:
        self._replaced.setdefault(name, vars(self.trainer).get(name, _NOTHING))
        setattr(self.trainer, name, value)

    def wrap(self, name: str, wrapper: Callable[[Any], Any]) -> None:
        original = getattr(self.trainer, name)
        self.set(name, functools.wraps(original)(wrapper(original)))

    def remove(self) -> None:
        for name, value in self._replaced.items():
            if value is _NOTHING:
                delattr(self.trainer, name)
            else:
                setattr(self.trainer, name, value)
        self._replaced = {}

    def _prepared(self, teacher: Any) -> Any:
        freeze(teacher)
        accelerator = self.trainer.accelerator
        if getattr(self.trainer, "is_deepspeed_enabled", False):
            from trl.models.utils import prepare_deepspeed

            return prepare_deepspeed(teacher, accelerator)
        prepared: Any = accelerator.prepare_model(teacher, evaluation_mode=True)
        return prepared

    def _reporting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(*arguments: Any, **keywords: Any) -> Any:
            self._measured[LOSS] = []  # of a step that failed, if it is tried again
            result = original(*arguments, **keywords)
            # Here and not in the loss: no collective inside of a wrapped forward, nor where one
            # process may write its responses and another may not.
            if self.metrics or self.rollout is not None:
                self._report()
            return result

        return compute_loss

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*arguments: Any, **keywords: Any) -> Any:
            result = original(*arguments, **keywords)
            if self.always_called and not self.calls:
                raise RuntimeError(
                    f"{type(self.trainer).__name__} finished a step without calling opdc's loss: "
                    "its configuration takes another path than the hook is on (a subclass with a "
                    "loss of its own, or an objective other than a divergence)"
                )
            return result

        return training_step

    # ------------------------------------------------------------- the loss

    @property
    def training(self) -> bool:
        return bool(self.trainer.model.training)

    @property
    def teacher(self) -> Any:
        """The teacher that the trainer has, or will have."""
        given = self.teacher_model
        return getattr(self.trainer, "teacher_model", None) if given is None else given

    @property
    def uses_num_items(self) -> bool:
        return bool(getattr(self.loss, "uses_num_items", True))

    def evaluate(
        self,
        student: Any,
        teacher: Any,
        *,
        temperature: float,
        num_items: Any = None,
        scaled: bool = False,
        **positions: Tensor | None,
    ) -> Tensor:
        """The loss of a micro-batch. `positions`: what is known of each, such as `tokens` and
        `mask`. `scaled`: the trainer takes the loss for one that accounts for accumulation already,
        so that one with a denominator of its own has to."""
        self.calls += 1
        value, metrics = evaluate(
            self.loss,
            student,
            teacher,
            **positions,
            temperature=temperature,
            num_items=num_items if self.uses_num_items else None,
            return_metrics=self.metrics,
        )
        if self.training and torch.is_grad_enabled() and not value.requires_grad:
            raise ValueError(
                "loss: its value has no gradient; it must be computed from the student's logits, "
                "without `detach` or `no_grad`"
            )
        if metrics:
            self.note(metrics)
        if scaled and self.training and (num_items is None or not self.uses_num_items):
            value = value / self.trainer.current_gradient_accumulation_steps
        return value

    # ------------------------------------------------------------- what it reports

    def note(self, metrics: Mapping[str, Tensor], prefix: str = LOSS) -> None:
        """Keep what is to be reported with the next loss."""
        self._measured[prefix].append(metrics)

    def measured(self, name: str, like: Tensor) -> Tensor:
        """A sum of this micro-batch so far, NaN where the loss does not report it."""
        values = [part[name] for part in self._measured[LOSS] if name in part]
        return torch.stack(values).sum().to(like) if values else torch.full_like(like, torch.nan)

    def _report(self) -> None:
        """Means over the positions of all processes, into the trainer's log."""
        mine = {
            prefix: _on_cpu(opdc.metrics.combine(parts)) for prefix, parts in self._measured.items()
        }
        self._measured = {prefix: [] for prefix in mine}
        log = getattr(self.trainer, "_metrics", None)
        if log is None:
            return
        everyone = gather_object([mine])
        mode = "train" if self.training else "eval"
        for prefix in mine:
            total = opdc.metrics.combine(one[prefix] for one in everyone)
            if total and total["positions"] > 0:
                for name, value in opdc.metrics.mean(total).items():
                    log[mode][prefix + name].append(value.item())


def _on_cpu(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All in one copy, for which the host waits."""
    if not metrics:
        return {}
    numbers = torch.stack(list(metrics.values())).cpu()
    return dict(zip(metrics, numbers.unbind(), strict=True))
