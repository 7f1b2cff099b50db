"""Distillation inside `transformers.Trainer`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdc import _ops

from .transcript import unwrapped, vocabulary_size

# What the student's forward takes that is not for the teacher.
_NOT_FOR_THE_TEACHER = ("labels", "shift_labels", "num_items_in_batch", "use_cache")

NO_POSITION = (
    "labels: no position to train on, all are {ignored}; the loss is 0. Is a prompt longer than "
    "what the batches are cut to?"
)


def check_loss(loss: Any) -> None:
    """Whether `loss` can stand in a trainer at all."""
    if isinstance(loss, type):
        raise TypeError(
            f"loss: got the class {loss.__name__}; wanted an object, {loss.__name__}(...)"
        )
    if not callable(loss):
        raise TypeError(
            f"loss: got {type(loss).__name__}; wanted an opdc.nn module, or any callable with its "
            "arguments"
        )
    reduction = getattr(loss, "reduction", "mean")
    if reduction in ("none", "sum"):
        raise ValueError(
            f'loss: reduction="{reduction}" has no denominator, which trainers count for batches '
            'in parts; wanted "mean"'
        )


def check_teacher(teacher: Any, student: Any) -> None:
    for name, model in (("model", student), ("teacher_model", teacher)):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"{name}: got {type(model).__name__}; wanted a causal language model, loaded"
            )
    if unwrapped(teacher) is unwrapped(student):
        raise ValueError(
            "teacher_model: it is the student itself, whose parameters would be frozen; wanted "
            "another model, or a copy"
        )


def check_vocabularies(loss: Any, student: Any, teacher: Any) -> None:
    """Heads of different sizes can only be compared on the ids that both have."""
    if not hasattr(loss, "valid_vocab") or loss.valid_vocab is not None:
        return
    sizes = vocabulary_size(student), vocabulary_size(teacher)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"teacher_model: its vocabulary has {sizes[1]} ids and the student's {sizes[0]}; if "
            "the tokenizer is the same and the rest is padding, give the loss valid_vocab=n "
            "(opdc.hf.shared_vocabulary(student_tokenizer, teacher_tokenizer)); otherwise a "
            "teacher with the student's tokenizer is wanted"
        )


def freeze(teacher: Any) -> None:
    teacher.eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)


class DistillLoss:
    """A loss function for `transformers.Trainer(compute_loss_func=...)` that distils.

    The trainer hands a loss function the outputs of the model and the labels, not the inputs; so a
    hook on `model` keeps these, and the teacher reads the same, under `no_grad`. Logits and labels
    are shifted by one, unless the batch has `shift_labels`, which are shifted already. The labels
    are the tokens of losses that want them, and `ignore_index` marks what is no part of a response.
    Accumulation and processes are counted as `Trainer` does it, by `num_items_in_batch`.

    For evaluation too: `eval_loss` is the distillation loss. The teacher runs outside of autocast,
    in the dtype that it was loaded in. Not for TRL's `SFTTrainer`, which would run the student
    twice: `opdc.trl.attach` is.

    Args:
        loss: an `opdc.nn` module or any callable with its arguments.
        model: the very model that the trainer gets.
        teacher_model: a causal language model with the student's tokenizer. Its parameters are
            frozen, and it moves to the device of the student's logits at the first call unless it
            was spread over several. Sizes of vocabularies that differ by padding want the loss's
            `valid_vocab`.
        ignore_index: the label of a position that is not trained on.
        metrics: whether the metrics of the loss are computed, which takes some time.

    Attributes:
        metrics: of the last call, sums for `opdc.metrics`; None without.

    Raises:
        ValueError: a loss with another reduction than "mean", or with denominators of its own
            (`uses_num_items`), which a loss function of `Trainer` cannot scale for accumulation;
            vocabularies that differ; in a call, labels that are missing or `nn.DataParallel`.
        TypeError: `loss` is not callable, or does not return a number.
        RuntimeError: in a call, another model than `model` was trained.

    A batch without any position to train on gives 0, connected to the graph, and one warning. (On
    a GPU only the first batch is looked at: for more the host would have to wait.)

    >>> import opdc.hf, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
    >>> distil = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher, metrics=True)
    >>> ids = torch.tensor([[1, 5, 9, 2]])  # a Trainer does this, with compute_loss_func=distil:
    >>> loss = distil(student(input_ids=ids), torch.tensor([[-100, -100, 9, 2]]))
    >>> loss.backward()
    >>> int(distil.metrics["positions"])
    2
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        model: Any,
        teacher_model: Any,
        *,
        ignore_index: int = -100,
        metrics: bool = False,
    ) -> None:
        check_loss(loss)
        if not getattr(loss, "uses_num_items", True):
            raise ValueError(
                f"loss: {type(loss).__name__} chooses its own denominator (uses_num_items is "
                "False), which a loss function of Trainer cannot scale for accumulated batches; "
                'use reduction="mean", or opdc.trl.attach'
            )
        check_teacher(teacher_model, model)
        check_vocabularies(loss, model, teacher_model)
        freeze(teacher_model)
        self.loss = loss
        self.teacher_model = teacher_model
        self.ignore_index = ignore_index
        self.wants_metrics = metrics
        self.metrics: dict[str, Tensor] | None = None
        self._read: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._placed = hasattr(teacher_model, "hf_device_map")  # on several devices: as it is
        self._looked = False
        self._hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off the model, and forget what it kept."""
        self._hook.remove()
        self._read = None

    def _keep(self, model: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if getattr(model, "_is_replica", False):
            raise ValueError(
                "model: under nn.DataParallel its replicas share one DistillLoss, which would mix "
                "their inputs; use one process for each device (DistributedDataParallel)"
            )
        self._read = arguments, keywords

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        read, self._read = self._read, None
        if read is None:
            raise RuntimeError(
                "model: the model that was trained is not the one that this DistillLoss was given, "
                "or `remove` was called; build it with the model that the Trainer gets"
            )
        arguments, keywords = read
        if isinstance(outputs, tuple):
            raise TypeError("outputs: got a tuple; wanted a model with return_dict=True")
        student = outputs["logits"]
        shifted = keywords.get("shift_labels")
        labels = labels if shifted is None else shifted
        if labels is None:
            raise ValueError(
                "labels: none came with the batch; wanted (B, T), with ignore_index at prompts and "
                "padding (a collator such as DataCollatorForLanguageModeling(mlm=False) makes them)"
            )
        if labels.shape != student.shape[:-1]:
            raise ValueError(
                f"labels: got {tuple(labels.shape)}; wanted {tuple(student.shape[:-1])}, as many "
                "as the logits"
            )
        if not self._placed:
            self.teacher_model.to(student.device)
            self._placed = True
        teacher = teacher_logits(self.teacher_model, *arguments, **keywords)
        if shifted is None:
            student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        positions = labelled(labels, self.ignore_index)
        if not self._looked:
            self._looked = warn_of_nothing(positions["mask"], self.ignore_index)
        loss, self.metrics = evaluate(
            self.loss,
            student,
            teacher,
            **positions,
            num_items=num_items_in_batch,
            return_metrics=self.wants_metrics,
        )
        return loss


def warn_of_nothing(mask: Tensor, ignored: int) -> bool:
    """Whether that was enough: after a warning, and of a GPU, for which the host would wait in each
    step, after one look."""
    is_empty = not mask.any()
    if is_empty:
        warnings.warn(NO_POSITION.format(ignored=ignored), stacklevel=3)
    return is_empty or _ops.is_on_gpu(mask)


def labelled(labels: Tensor, ignored: int) -> dict[str, Tensor]:
    """The tokens of labels, and where they count."""
    mask = labels != ignored
    return {"tokens": labels.masked_fill(~mask, 0), "mask": mask}


@torch.no_grad()
def teacher_logits(teacher: Any, *arguments: Any, **keywords: Any) -> Tensor:
    """What the teacher makes of what the student reads."""
    teacher.eval()
    known = {name: x for name, x in keywords.items() if name not in _NOT_FOR_THE_TEACHER}
    if "use_cache" in inspect.signature(unwrapped(teacher).forward).parameters:
        known["use_cache"] = False
    logits: Tensor = teacher(*arguments, **known)["logits"]
    return logits


# What a loss is called with, beside the models and `return_metrics`.
_ARGUMENTS = (
    *("tokens", "mask", "weights", "old_logprobs", "prefix_mask"),
    *("temperature", "num_items"),
)


def evaluate(
    loss: Callable[..., Any], student: Any, teacher: Any, *, return_metrics: bool, **given: Any
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """The value and the metrics of a loss, which may be a user's own. What is not given is None."""
    arguments = dict.fromkeys(_ARGUMENTS) | given
    result = loss(student, teacher, **arguments, return_metrics=return_metrics)
    name = type(loss).__name__ if isinstance(loss, torch.nn.Module) else repr(loss)
    value, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(value, Tensor) or value.dim() != 0:
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"loss: {name} returned {came}; wanted a tensor of one number, reduced over the "
            "positions, or that and a dict of metrics"
        )
    if metrics is None:
        return value, None
    try:
        numbers = {key: _number(number, value) for key, number in metrics.items()}
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"loss: {name} returned metrics that are no numbers ({error}); wanted a dict of sums "
            "over positions"
        ) from error
    if numbers and "positions" not in numbers:
        raise TypeError(
            f"loss: {name} returned the metrics {sorted(numbers)}; wanted among them `positions`, "
            "the number that the sums are divided by"
        )
    return value, numbers


def _number(number: Any, value: Tensor) -> Tensor:
    """What may be no tensor, where the loss is; nobody waits for either."""
    if isinstance(number, Tensor):
        return number.detach().to(value.device, torch.float64).reshape(())
    known = torch.as_tensor(number, dtype=torch.float64, device="cpu").reshape(())
    return value.new_full((), known.item(), dtype=torch.float64)
