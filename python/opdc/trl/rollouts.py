"""Rollouts of a blended policy in TRL's trainers, and how their log-probs reach the loss."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdc.hf import BlendSampler, Rollout, generating
from opdc.hf.transcript import config_of, unwrapped

from .attachment import ROLLOUT

if TYPE_CHECKING:
    from .attachment import Attachment
    from .trainers import GKD

# Keys of a batch: what is two-dimensional goes with the rows when TRL shuffles and splits them.
LOGPROBS = "opdc_old_logprobs"
PREFIX_MASK = "opdc_prefix_mask"


def check(attachment: Attachment, temperature: float) -> None:
    trainer, sampler = attachment.trainer, attachment.rollout
    if not isinstance(sampler, BlendSampler):
        raise TypeError(
            f"rollout: got {type(sampler).__name__}; wanted opdc.hf.BlendSampler(None, budget)"
        )
    for option in ("use_vllm", "tools"):
        if getattr(trainer, option, None):
            raise ValueError(
                f"rollout: {type(trainer).__name__} with {option} does not sample with the model's "
                f"own generate; wanted without {option}"
            )
    attachment.refuse_temperature(temperature, "the policy that is sampled")
    if getattr(attachment.loss, "advantage", None) == "old" and sampler.budget != 0:
        warnings.warn(
            f'loss: {type(attachment.loss).__name__} with advantage="old" takes 1 − β of its '
            'gradient at each token of a blend; take advantage="current"',
            stacklevel=5,
        )
    if _has_learned_positions(trainer.model):
        warnings.warn(
            f"rollout: {type(trainer.model).__name__} has learned positions; TRL's forward counts "
            "them from the padding, a rollout from the first token of the prompt, so with prompts "
            "of unequal lengths the log-probs of a rollout are not those of the model that learns",
            stacklevel=5,
        )
    if attachment.prefix_column is not None and sampler.prefix is None:
        raise ValueError(
            "prefix_column: its sampler has no schedule; wanted rollout=opdc.hf.BlendSampler(..., "
            "prefix=opdc.PrefixLength(...)), which says how much of the column is used"
        )


def _has_learned_positions(model: Any) -> bool:
    """Whether a model looks its positions up, so that an offset of all of them matters."""
    config = config_of(model)
    known = getattr(config, "max_position_embeddings", None)
    tokens = unwrapped(model).get_input_embeddings()
    return known is not None and any(
        isinstance(part, torch.nn.Embedding)
        and part is not tokens
        and part.num_embeddings in (known, known + 2)  # some models leave the first two out
        for part in model.modules()
    )


@contextlib.contextmanager
def sampling(attachment: Attachment, model: Any) -> Iterator[BlendSampler]:
    """Within this context `model.generate` draws with the attached sampler, which has the trainer's
    teacher and step."""
    sampler: BlendSampler = attachment.rollout
    before = sampler.teacher_model, sampler.valid_vocab
    sampler.step = attachment.trainer.state.global_step
    sampler.last = None  # what is there afterwards was written now
    if sampler.teacher_model is None:
        sampler.teacher_model = attachment.teacher
    if sampler.valid_vocab is None:
        sampler.valid_vocab = getattr(attachment.loss, "valid_vocab", None)
    try:
        with generating(model, sampler):
            yield sampler
    finally:
        sampler.teacher_model, sampler.valid_vocab = before


def install_in_distillation(attachment: Attachment) -> None:
    trainer = attachment.trainer

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_and_score(inputs: Any) -> Any:
            if not attachment.training:  # an evaluation is one of the student
                return original(inputs)
            model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            with sampling(attachment, model) as sampler, _prefixes(attachment, inputs):
                batch = original(inputs)
            rollout = _rollout(sampler)
            tokens = batch["completion_ids"]
            numbers = _fitted(rollout, tokens.shape[1])
            active = batch["completion_mask"] != 0
            same = (numbers["mask"] == active) & ((numbers["tokens"] == tokens) | ~active)
            if not same.all():
                raise RuntimeError(
                    "the completions of the batch are not those that the sampler wrote: TRL cut or "
                    "changed them, and their log-probs are unknown"
                )
            batch[LOGPROBS] = numbers["logprobs"]
            batch[PREFIX_MASK] = numbers["prefix_mask"]
            attachment.note(rollout.metrics(), ROLLOUT)
            return batch

        return generate_and_score

    attachment.wrap("_generate_and_score_completions", around)


def install_in_gkd(attachment: GKD) -> None:
    trainer = attachment.trainer

    def around_generate(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_on_policy_outputs(model: Any, inputs: Any, *arguments: Any) -> Any:
            if model is not trainer.accelerator.unwrap_model(trainer.model_wrapped):
                return original(model, inputs, *arguments)  # the teacher writes
            with sampling(attachment, model) as sampler:
                batch = original(model, inputs, *arguments)
            rollout = _rollout(sampler)
            room = (rollout.sequences.shape[1] - rollout.tokens.shape[1], 0)
            attachment.record(
                old_logprobs=torch.nn.functional.pad(rollout.logprobs, room),
                prefix_mask=torch.nn.functional.pad(rollout.prefix_mask, room),
            )
            attachment.note(rollout.metrics(), ROLLOUT)
            return batch

        return generate_on_policy_outputs

    def around_step(original: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*arguments: Any, **keywords: Any) -> Any:
            try:
                return original(*arguments, **keywords)
            finally:
                attachment.record()  # the next batch may be one of the data set

        return training_step

    attachment.wrap("generate_on_policy_outputs", around_generate)
    attachment.wrap("training_step", around_step)


def _rollout(sampler: BlendSampler) -> Rollout:
    if sampler.last is None:
        raise RuntimeError("rollout: the trainer generated without the sampler")
    return sampler.last


def _fitted(rollout: Rollout, count: int) -> dict[str, Tensor]:
    """The numbers of a rollout, cut or filled up to `count` positions."""

    def fitted(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, count - tensor.shape[1]))

    return {
        name: fitted(getattr(rollout, name))
        for name in ("tokens", "mask", "logprobs", "prefix_mask")
    }


@contextlib.contextmanager
def _prefixes(attachment: Attachment, inputs: list[dict[str, Any]]) -> Iterator[None]:
    """Within this context the responses begin as `prefix_column` does, as far as the sampler's
    schedule says."""
    column, sampler = attachment.prefix_column, attachment.rollout
    if column is None:
        yield
        return
    room = attachment.trainer.args.max_completion_length
    before = sampler.prefix_ids
    prefix_ids = []
    for example in inputs:
        ids = _ids(column, example, attachment.trainer.processing_class)[:room]
        prefix_ids.append(ids[: sampler.prefix(sampler.step, len(ids))])
    sampler.prefix_ids = prefix_ids
    try:
        yield
    finally:
        sampler.prefix_ids = before


def _ids(column: str, example: dict[str, Any], tokenizer: Any) -> list[int]:
    response = example.get(column)
    if isinstance(response, str):
        return list(tokenizer(text=response, add_special_tokens=False)["input_ids"])
    if isinstance(response, list) and all(isinstance(id, int) for id in response):
        return response
    raise TypeError(
        f"prefix_column: {column!r} holds {type(response).__name__} in an example with "
        f"{sorted(example)}; wanted a text or a list of token ids"
    )
