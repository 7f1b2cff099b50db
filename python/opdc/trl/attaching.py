"""`attach` and `detach`: which adapter a trainer gets."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from opdc.info import version

from . import trainers
from .attachment import Attachment

Trainer = TypeVar("Trainer")


def attach(
    trainer: Trainer,
    loss: Callable[..., Any],
    *,
    teacher_model: Any = None,
    rollout: Any = None,
    prefix_column: str | None = None,
    path: str = "auto",
    normalizer: str = "trl",
    autocast: bool = False,
    metrics: bool = True,
) -> Trainer:
    """Have a TRL trainer train with `loss`.

    After the trainer is built and before `train()`, or in a subclass's `__init__` after that of
    its parents. Attributes are set on this one object; its class, what it saves and how it resumes
    stay TRL's. `detach` takes them off.

        trainer = DistillationTrainer(model, teacher_model=teacher, args=args, train_dataset=data)
        opdc.trl.attach(trainer, opdc.nn.TrOPDLoss(k=64))

    The metrics of `loss` are in the trainer's log as `opdc/<name>`, means over the positions of
    all processes (see `opdc.metrics`); those of a rollout as `opdc/rollout/<name>`.

    Args:
        trainer: a `DistillationTrainer`, `ServerDistillationTrainer`, `AsyncDistillationTrainer`,
            `GKDTrainer`, `GOLDTrainer`, `IWOPDTrainer`, `SDFTTrainer`, `SDPOTrainer`, `SFTTrainer`
            or one of a subclass.
        loss: an `opdc.nn` module, or a callable with the same arguments that returns a number, or
            a number and metrics. It gets the tokens of the responses and their mask; its
            temperature is the trainer's, unless it has one of its own. TRL's own losses are
            `ForwardKLLoss` (its `beta = 0`), `JSDLoss(beta=…)` and `ReverseKLLoss` (1).
        teacher_model: in the place of the trainer's. `SFTTrainer` has none of its own; elsewhere
            for heads of different sizes, which TRL refuses (and `loss` takes, with `valid_vocab`).
            It is frozen.
        rollout: an `opdc.hf.BlendSampler` that writes the responses of `DistillationTrainer` or
            `GKDTrainer`, with the trainer's teacher if it has none; its step is the trainer's.
            The log-probs under its policy reach the loss as `old_logprobs`, for which a loss of the
            sampled token wants `advantage="current"`. Evaluation samples from the plain student.
        prefix_column: a column of the data set with responses of the teacher, texts or lists of
            ids, with which responses begin as far as `rollout.prefix` says. `DistillationTrainer`
            only.
        path: of `DistillationTrainer`. `"hidden"` compares hidden states and heads, as TRL does,
            without whole logits (see `opdc.Projection`); `"logits"` calls the models for logits;
            `"auto"` takes hidden states if the installed TRL has the hook.
        normalizer: the denominator of `GKDTrainer`, `GOLDTrainer` and `IWOPDTrainer`. `"trl"` is
            TRL's number, which is wrong for sampled responses and for accumulated or distributed
            batches; a warning says so then. `"local"`: the tokens of a micro-batch times the
            accumulation steps.
        autocast: run the hidden path under the trainer's autocast. TRL's own runs in float32
            whatever `bf16` says, though rollouts do not.
        metrics: whether the metrics of the loss are computed. On a support the whole rows are read
            for them alone: `opdc.lsm` takes a fraction of the time without. To log them the host
            waits for a GPU once in each micro-batch.

    Returns:
        `trainer`.

    Raises:
        TypeError: a trainer without a hook; a loss that is not callable or does not return a
            number.
        ValueError: a second loss; an option that the trainer has no use for; a configuration that
            never calls the loss; no teacher, or one with another vocabulary or on another device; a
            temperature that is not the one of the other side; a trainer on another accelerator
            than a CUDA GPU, or whose subclass adds to the loss in the method that would be
            replaced.
        RuntimeError: the installed TRL lacks the hook; or, in training, a step that did not call
            the loss.

    A batch without any position to train on gives a loss of 0.

    >>> import opdc.trl
    >>> class Mine: pass
    >>> opdc.trl.attach(Mine(), opdc.nn.ReverseKLLoss())
    Traceback (most recent call last):
    TypeError: trainer: got Mine; wanted one of TRL's DistillationTrainer, ...
    """
    kind = _adapter(trainer, path)
    if "_opdc_attachment" in vars(trainer):
        raise ValueError(
            f"trainer: this {type(trainer).__name__} has a loss already; "
            "opdc.trl.detach(trainer) takes it off"
        )
    attachment = kind(
        trainer,
        loss,
        teacher_model=teacher_model,
        rollout=rollout,
        prefix_column=prefix_column,
        normalizer=normalizer,
        autocast=autocast,
        metrics=metrics,
    )
    attachment.check()
    attachment.install()
    return trainer


def detach(trainer: Trainer) -> Trainer:
    """Take off what `attach` set: the trainer is TRL's again.

    Raises:
        ValueError: nothing is attached.
    """
    attachment = vars(trainer).get("_opdc_attachment")
    if attachment is None:
        raise ValueError(f"trainer: no loss is attached to this {type(trainer).__name__}")
    attachment.remove()
    return trainer


def _adapter(trainer: Any, path: str) -> type[Attachment]:
    name = next(
        (
            kind.__name__
            for kind in type(trainer).__mro__
            if kind.__name__ in trainers.ADAPTERS and kind.__module__.startswith("trl.")
        ),
        None,
    )
    if name is None:
        raise TypeError(
            f"trainer: got {type(trainer).__name__}; wanted one of TRL's "
            f"{', '.join(trainers.ADAPTERS)}"
        )
    if path not in ("auto", "hidden", "logits"):
        raise ValueError(f'path: got {path!r}; wanted "auto", "hidden" or "logits"')
    adapter = trainers.ADAPTERS[name]
    if adapter is not trainers.Distillation:
        if path != "auto":
            raise ValueError(f'path: {type(trainer).__name__} has one only; wanted "auto"')
        return adapter
    if path == "logits":
        return adapter
    lacking = trainers.DistillationHidden.lacks(*trainers.module_of(trainer, name))
    if lacking is None:
        return trainers.DistillationHidden
    installed = version("trl")
    if path == "hidden":
        raise RuntimeError(f'path: "hidden" has no hook in TRL {installed}: {lacking}')
    warnings.warn(
        f"TRL {installed} has no hook for hidden states ({lacking}): whole logits are made "
        '(path="logits")',
        stacklevel=3,
    )
    return adapter
