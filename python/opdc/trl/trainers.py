"""The hooks of TRL's trainers: where each computes its loss, and what it knows there."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

import opdc
from opdc.hf.distill import labelled, teacher_logits, warn_of_nothing
from opdc.info import version

from . import rollouts
from .attachment import Attachment, require
from .functions import IGNORED, projection

# ------------------------------------------------------------------ functions of TRL's modules


_replacing = threading.RLock()


@contextlib.contextmanager
def replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within this context `module.name` is `function`, for this thread only.

    Another trainer in another thread gets what was there before.
    """
    thread = threading.get_ident()
    with _replacing:
        original = getattr(module, name)

        def choose(*arguments: Any, **keywords: Any) -> Any:
            mine = threading.get_ident() == thread
            return (function if mine else original)(*arguments, **keywords)

        setattr(module, name, choose)
        try:
            yield
        finally:
            setattr(module, name, original)


class Parameters:
    """The parameters of a function of TRL, by name: their order is TRL's affair."""

    def __init__(self, function: Callable[..., Any], read: set[str], ignored: set[str]) -> None:
        self.signature = inspect.signature(function)
        self.missing = sorted(read - self.signature.parameters.keys())
        self.known = read | ignored

    def of(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        bound = self.signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        unknown = [
            name
            for name, value in bound.arguments.items()
            if name not in self.known and value is not self.signature.parameters[name].default
        ]
        if unknown:
            raise RuntimeError(
                f"TRL {version('trl')} gives its loss {unknown}, which opdc does not know and "
                'would leave out; wanted a TRL that opdc.trl.support() lists, or path="logits"'
            )
        return dict(bound.arguments)


def module_of(trainer: Any, name: str) -> tuple[type, Any]:
    """The class of TRL that `trainer` is, and the module where it stands."""
    for kind in type(trainer).__mro__:
        if kind.__name__ == name and kind.__module__.startswith("trl."):
            return kind, sys.modules[kind.__module__]
    raise TypeError(f"{type(trainer).__name__} is no {name}")


def sequences(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Prompts and completions, as models read them."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    }


def last_logits(trainer: Any, count: int) -> dict[str, int]:
    """Asks for the logits that predict the last `count` tokens alone, of models that can do so."""
    return {"logits_to_keep": count + 1} if "logits_to_keep" in trainer.model_kwarg_keys else {}


class OfFunction(Attachment):
    """Trainers whose loss is a function of TRL's module: their own method runs, in which that
    function is replaced for the time of the call, so that all that TRL guards stays."""

    method = "_compute_loss"
    replaces = False
    takes: ClassVar[list[str]]  # the parameters of the method
    function: ClassVar[str]
    read: ClassVar[set[str]]  # parameters of the function that are used
    optional: ClassVar[set[str]]  # those that are used if they are there, or are the loss's affair

    @classmethod
    def lacks(cls, kind: Any, module: Any) -> str | None:
        """What the installed TRL has not that is needed here."""
        function = getattr(module, cls.function, None)
        if function is None:
            return f"no {module.__name__}.{cls.function}"
        if missing := Parameters(function, cls.read, cls.optional).missing:
            return f"{cls.function} has no {missing}"
        method = getattr(kind, cls.method, None)
        if method is None or list(inspect.signature(method).parameters) != ["self", *cls.takes]:
            return f"{kind.__name__}.{cls.method} does not take {cls.takes}"
        return None

    def hook_function(self, trainer: str) -> None:
        _, module = module_of(self.trainer, trainer)

        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def compute(model: Any, inputs: Any, *others: Any) -> Any:
                known = self.known(inputs)
                function = getattr(module, self.function)
                parameters = Parameters(function, self.read, self.optional)

                def divergence(*arguments: Any, **keywords: Any) -> tuple[Tensor, ...]:
                    return self.divergence(parameters.of(*arguments, **keywords), inputs, **known)

                with contextlib.ExitStack() as stack:
                    stack.enter_context(replaced(module, self.function, divergence))
                    if self.autocast:
                        stack.enter_context(self.trainer.accelerator.autocast())
                    return original(model, inputs, *others)

            return compute

        self.wrap(self.method, around)

    def known(self, inputs: Any) -> dict[str, Any]:
        """What the batch says of each position."""
        raise NotImplementedError

    def divergence(self, given: dict[str, Any], inputs: Any, **known: Any) -> tuple[Tensor, ...]:
        """What the function of TRL returns, from the arguments that it is called with."""
        raise NotImplementedError


# ------------------------------------------------------------------ DistillationTrainer


class Distillation(Attachment):
    """`DistillationTrainer`, by logits: needs nothing but what the batch holds."""

    options = ("teacher_model", "rollout", "prefix_column", "autocast")
    _batch: ClassVar[tuple[str, ...]] = (
        *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
        "num_items_in_batch",
    )
    _images: ClassVar[tuple[str, ...]] = (
        *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes"),
        *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
    )

    def check(self) -> None:
        super().check()
        if self.rollout is not None:
            rollouts.check(self, float(self.trainer.temperature))
        elif self.prefix_column is not None:
            raise ValueError(
                "prefix_column: wanted with rollout=opdc.hf.BlendSampler(..., "
                "prefix=opdc.PrefixLength(...)), which says how much of the column is used"
            )

    def hook(self) -> None:
        if self.rollout is not None:
            rollouts.install_in_distillation(self)
        self.hook_loss()

    def hook_loss(self) -> None:
        super().hook()

    def positions(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What is known of each position of the completions, `(B, C)`."""
        missing = [name for name in self._batch if name not in inputs]
        if missing:
            raise RuntimeError(
                f"the batch of TRL {version('trl')} has no {missing}; it has {sorted(inputs)}"
            )
        return {
            "tokens": inputs["completion_ids"],
            "old_logprobs": inputs.get(rollouts.LOGPROBS),
            "prefix_mask": inputs.get(rollouts.PREFIX_MASK),
        }

    def compute(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer = self.trainer
        positions = self.positions(inputs)
        if images := [name for name in self._images if name in inputs]:
            raise ValueError(f'path: "logits" reads text alone, the batch has {images}: "hidden"')
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        count = inputs["completion_ids"].shape[1]

        reads = sequences(inputs) | last_logits(trainer, count)
        student = model(**reads, use_cache=False).logits
        teacher = teacher_logits(self.teacher, **reads)
        num_items = None
        if self.training:
            items = inputs["num_items_in_batch"].clamp(min=1)
            num_items = items / trainer.accelerator.num_processes
        loss = self.evaluate(
            student[:, :-1][:, -count:],
            teacher[:, :-1][:, -count:],
            **positions,
            mask=mask != 0,
            temperature=trainer.temperature,
            num_items=num_items,
            scaled=True,
        )
        return (loss, None) if return_outputs else loss


class DistillationHidden(OfFunction, Distillation):
    """`DistillationTrainer`, by hidden states and heads."""

    takes: ClassVar[list[str]] = ["unwrapped_student", "inputs", "num_items_in_batch"]
    function = "_chunked_divergence_loss"
    read: ClassVar[set[str]] = {
        *("student_hidden_states", "teacher_hidden_states", "completion_mask"),
        *("student_lm_head_weight", "teacher_lm_head_weight", "num_items_in_batch"),
    }
    optional: ClassVar[set[str]] = {
        *("student_lm_head_bias", "teacher_lm_head_bias", "temperature", "beta"),
        *("student_logit_scale", "teacher_logit_scale"),
        *("student_final_logit_softcapping", "teacher_final_logit_softcapping"),
    }

    def check(self) -> None:
        super().check()
        if getattr(self.loss, "inplace", False):
            raise ValueError(
                "loss: inplace=True overwrites logits, of which there are none from hidden states; "
                'leave it out, or use path="logits"'
            )

    def hook_loss(self) -> None:
        self.hook_function("DistillationTrainer")

    def known(self, inputs: Any) -> dict[str, Any]:
        return self.positions(inputs)

    def divergence(self, given: dict[str, Any], inputs: Any, **known: Any) -> tuple[Tensor, ...]:
        student, teacher = (
            projection(
                given[f"{model}_hidden_states"],
                given[f"{model}_lm_head_weight"],
                given.get(f"{model}_lm_head_bias"),
                given.get(f"{model}_logit_scale", 1.0),
                given.get(f"{model}_final_logit_softcapping"),
            )
            for model in ("student", "teacher")
        )
        mask = given["completion_mask"] != 0
        on_device = {
            name: value if value is None else value.to(mask.device) for name, value in known.items()
        }
        loss = self.evaluate(
            student,
            teacher,
            **on_device,
            mask=mask,
            temperature=given.get("temperature", 1.0),
            num_items=given["num_items_in_batch"],
            scaled=True,
        )
        return loss, self.measured("student_entropy", loss.detach()), mask.sum()


# ------------------------------------------------------------------ trainers with labels


class Labelled(Attachment):
    """Trainers with labels that mark the response."""

    _looked = False

    def warn_of_nothing(self, mask: Tensor) -> None:
        if not self._looked:
            self._looked = warn_of_nothing(mask, IGNORED)

    def is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether `Trainer` takes the loss for one that accounts for accumulation."""
        declared = self.trainer.loss_is_scaled_for_ga
        if declared is not None:
            return bool(declared)
        return self.trainer.compute_loss_func is not None or (
            self.trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        )


class Generalized(Labelled):
    """Trainers that call `self.generalized_jsd_loss(student_logits=, teacher_logits=, labels=)`."""

    options: ClassVar[tuple[str, ...]] = ("teacher_model", "normalizer")
    method = "generalized_jsd_loss"
    counts_steps_twice: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        wrong = self.wrong_factors()
        if wrong and self.normalizer == "trl" and self.uses_num_items:
            warnings.warn(
                f"{type(self.trainer).__name__} divides the loss by {' and '.join(wrong)}; "
                'normalizer="local" divides by the tokens of each micro-batch instead',
                stacklevel=4,
            )

    def wrong_factors(self) -> list[str]:
        """What TRL's own denominator counts that it should not."""
        trainer = self.trainer
        wrong = []
        if getattr(trainer, "lmbda", 0) > 0 or getattr(trainer, "seq_kd", False):
            wrong.append("the tokens of the data set, not of the responses that were sampled")
        gathered = trainer.args.average_tokens_across_devices
        if trainer.accelerator.num_processes > 1 and gathered:
            wrong.append("the number of processes twice")
        if trainer.args.gradient_accumulation_steps > 1 and self.counts_steps_twice:
            wrong.append("the accumulation steps twice")
        return wrong

    def recorded(self) -> dict[str, Tensor]:
        """What a sampler recorded of the positions of this micro-batch."""
        return {}

    def compute(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> Tensor:
        positions = {} if labels is None else labelled(labels, IGNORED)
        num_items = num_items_in_batch
        if labels is not None:
            self.warn_of_nothing(positions["mask"])
            if num_items is not None and self.normalizer == "local":
                # An evaluation accumulates nothing.
                steps = self.trainer.current_gradient_accumulation_steps if self.training else 1
                num_items = positions["mask"].sum().clamp(min=1) * steps
        return self.evaluate(
            student_logits,
            teacher_logits,
            **positions,
            **self.recorded(),
            temperature=temperature,
            num_items=num_items,
            scaled=self.is_scaled(num_items_in_batch),
        )


class GKD(Generalized):
    """`GKDTrainer`: its divergence is at temperature 1, whatever its samples are at."""

    options = ("teacher_model", "normalizer", "rollout")
    counts_steps_twice = False

    def check(self) -> None:
        super().check()
        if self.rollout is not None:
            if self.trainer.args.temperature != 1.0:
                raise ValueError(
                    f"rollout: GKDTrainer samples at temperature {self.trainer.args.temperature} "
                    "and computes its loss at 1, so the sampler's log-probs are those of another "
                    "policy; wanted GKDConfig(temperature=1.0)"
                )
            rollouts.check(self, 1.0)

    def hook(self) -> None:
        super().hook()
        self._recorded: dict[str, Tensor] = {}
        if self.rollout is not None:
            rollouts.install_in_gkd(self)

    def record(self, **numbers: Tensor) -> None:
        """Of the batch that comes next, `(B, L)`."""
        self._recorded = numbers

    def recorded(self) -> dict[str, Tensor]:
        return {name: x[:, 1:] for name, x in self._recorded.items()}


class GOLD(Generalized):
    def check(self) -> None:
        if self.trainer.use_uld_loss:
            raise ValueError(
                "trainer: GOLDTrainer with use_uld_loss=True compares tokenizers that differ and "
                "calls no divergence of logits; wanted GOLDConfig(use_uld_loss=False)"
            )
        super().check()


class IWOPD(Generalized):
    def check(self) -> None:
        trainer = self.trainer
        if getattr(trainer, "use_teacher_server", False):
            raise ValueError("trainer: IWOPDTrainer with a teacher server has no teacher's logits")
        if trainer.distillation_objective != "jsd" or (
            trainer.beta > 0 and trainer.loss_top_k == 1
        ):
            raise ValueError(
                f"trainer: IWOPDTrainer with distillation_objective="
                f"{trainer.distillation_objective!r}, beta={trainer.beta}, loss_top_k="
                f"{trainer.loss_top_k} calls no divergence of logits; wanted "
                'IWOPDConfig(distillation_objective="jsd", loss_top_k=0)'
            )
        super().check()


class Supervised(Labelled):
    """`SFTTrainer`, which has no teacher of its own."""

    options = ("teacher_model",)

    def check(self) -> None:
        super().check()
        trainer = self.trainer
        if trainer.compute_loss_func is not None:
            raise ValueError(
                "trainer: it was given a compute_loss_func, which would not be called; leave it out"
            )
        if getattr(trainer, "aux_loss_enabled", False):
            raise ValueError(
                "trainer: the loss of its router (router_aux_loss_coef) would be left out; wanted "
                "a model with router_aux_loss_coef=0"
            )

    def compute(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer = self.trainer
        if "labels" not in inputs and "shift_labels" not in inputs:
            raise ValueError(f"labels: none came with the batch; it has {sorted(inputs)}")
        others = ("labels", "shift_labels", "skip_logits")
        reads = {name: x for name, x in inputs.items() if name not in others}
        reads["use_cache"] = False
        outputs = model(**reads)
        student, teacher = outputs.logits, teacher_logits(self.teacher, **reads)
        labels = inputs.get("shift_labels")
        if labels is None:
            student, teacher, labels = student[:, :-1], teacher[:, :-1], inputs["labels"][:, 1:]
        positions = labelled(labels, IGNORED)
        self.warn_of_nothing(positions["mask"])
        num_items = num_items_in_batch
        if num_items is not None and trainer.args.average_tokens_across_devices:
            # It counts the tokens of all processes, whose gradients are then averaged.
            num_items = num_items / (trainer.accelerator.num_processes // trainer.get_tp_size())
        loss = self.evaluate(
            student,
            teacher,
            **positions,
            temperature=1.0,
            num_items=num_items,
            scaled=self.is_scaled(num_items_in_batch),
        )
        return (loss, outputs) if return_outputs else loss


# ------------------------------------------------------------------ self-distillation


class SelfDistillation(Attachment):
    """`SDFTTrainer` and `SDPOTrainer`, whose logits are divided by the temperature already."""

    method = "_compute_self_distillation_loss"
    needs_teacher = False  # the student itself, with more to read

    def check(self) -> None:
        super().check()
        trainer = self.trainer
        name = type(trainer).__name__
        if getattr(trainer, "use_teacher_server", False):
            raise ValueError(f"trainer: {name} with a teacher server has no teacher's logits")
        if getattr(trainer.args, "distillation_weight", 1.0) == 0:
            raise ValueError(f"trainer: {name} with distillation_weight=0 does not distil")
        self.refuse_temperature(1.0, f"what {name} gives it, divided by the trainer's own,")

    def compute(self, model: Any, inputs: Any, distillation_logits: Any) -> Tensor:
        logits = distillation_logits
        return self.evaluate(
            logits.student_logits,
            logits.teacher_logits,
            tokens=logits.completion_ids,
            mask=logits.loss_mask != 0,
            old_logprobs=inputs.get("old_per_token_logps"),
            temperature=1.0,
        )


# ------------------------------------------------------------------ teachers behind a server


def sparse_teacher(
    ids: Tensor, logprobs: Tensor, token_logprobs: Tensor, active: Tensor
) -> opdc.TopK:
    """What a server sent. −inf and ids of −1 are what it did not send.

    Without the log-prob of each token that counts, there is none at all: a loss that wants them
    then says so.
    """
    missing = (ids < 0) | ~torch.isfinite(logprobs)
    unknown = active & missing.all(-1)
    if unknown.any():
        raise ValueError(
            f"the teacher's server sent nothing for {int(unknown.sum())} of {int(active.sum())} "
            "positions; is its max_model_len shorter than the sequences?"
        )
    complete = bool(torch.isfinite(token_logprobs[active]).all())
    return opdc.TopK(
        ids.masked_fill(missing, -1),
        logprobs.masked_fill(missing, 0.0),
        token_logprobs.masked_fill(~active, 0.0) if complete else None,
    )


class Remote(Attachment):
    needs_teacher = False

    def _instead(self, option: str) -> str:
        return ", whose teacher is behind a server" if option == "teacher_model" else ""


class Server(Remote):
    """`ServerDistillationTrainer`: the teacher's top K of each position over HTTP."""

    SOURCE = "_get_teacher_token_logprobs_from_server"

    def check(self) -> None:
        super().check()
        require(self.trainer, self.SOURCE)
        self.refuse_temperature(float(self.trainer.temperature), "what the server sends")

    def compute(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer = self.trainer
        prompt, response = inputs["prompt_ids"], inputs["completion_ids"]
        active = inputs["completion_mask"] != 0
        reads = sequences(inputs)
        asked = reads | {
            "prompt_attention_mask": inputs["prompt_mask"],
            "labels": torch.cat(
                [torch.full_like(prompt, IGNORED), response.masked_fill(~active, IGNORED)], dim=1
            ),
        }
        count = response.shape[1]
        answer = getattr(trainer, self.SOURCE)(asked, prompt.shape[1])
        # The answer ends with the longest response.
        room = count - answer["actual_logprobs"].shape[1]
        pad = torch.nn.functional.pad
        teacher = sparse_teacher(
            pad(answer["topk_token_ids"], (0, 0, 0, room), value=-1),
            pad(answer["topk_logprobs"], (0, 0, 0, room), value=-torch.inf),
            pad(answer["actual_logprobs"], (0, room), value=-torch.inf),
            active,
        )
        outputs = model(**reads, **last_logits(trainer, count), use_cache=False)
        loss = self.evaluate(
            outputs.logits[:, :-1][:, -count:],
            teacher,
            tokens=response,
            mask=active,
            temperature=trainer.temperature,
            scaled=True,
        )
        return (loss, outputs) if return_outputs else loss


class Async(OfFunction, Remote):
    """`AsyncDistillationTrainer`: rows of packed responses, the teacher's top K in the batch."""

    always_called = False  # not for a micro-batch of which the teacher says nothing
    takes: ClassVar[list[str]] = ["unwrapped_model", "inputs"]
    function = "_chunked_jsd_loss"
    read: ClassVar[set[str]] = {
        *("hidden_valid", "lm_head_weight", "lm_head_bias", "logit_scale", "temperature"),
        *("final_logit_softcapping", "target_ids", "teacher_target_logps", "num_teachers"),
        "valid_candidate_mask",
    }
    optional: ClassVar[set[str]] = {"beta", "add_tail_bucket", "teacher_id_idx", "chunk_size"}

    def check(self) -> None:
        super().check()
        args = self.trainer.args
        if args.beta != 0:
            raise ValueError(
                f"trainer: AsyncDistillationConfig(beta={args.beta}) keeps two of the teacher's "
                "ids; wanted beta=0.0, which leaves all of them to the loss"
            )
        self.refuse_temperature(float(args.teacher_temperature), "what the server sends")
        if getattr(self.loss, "reduction", "mean") == "seq_mean":
            raise ValueError(
                'loss: reduction="seq_mean" wants sequences, AsyncDistillationTrainer packs them '
                'into one row; wanted "mean"'
            )
        kind, module = module_of(self.trainer, "AsyncDistillationTrainer")
        if lacking := self.lacks(kind, module):
            raise RuntimeError(f"TRL {version('trl')} has no hook for opdc: {lacking}")

    def hook(self) -> None:
        self.hook_function("AsyncDistillationTrainer")

    def known(self, inputs: Any) -> dict[str, Any]:
        """The tokens of the positions that count, in the order of the packed row."""
        real = inputs["attention_mask"].bool()
        known = (inputs["teacher_topk_ids"][real][1:] != -1).any(-1)
        tokens: Tensor = inputs["input_ids"][real][1:]
        return {"tokens": tokens[inputs["completion_mask"][real][1:].bool() & known]}

    def divergence(self, given: dict[str, Any], inputs: Any, **known: Any) -> tuple[Tensor, ...]:
        hidden, ids, tokens = given["hidden_valid"], given["target_ids"], known["tokens"]
        if tokens.shape[0] != hidden.shape[0]:
            raise RuntimeError(
                f"TRL {version('trl')} has {hidden.shape[0]} positions where opdc counts "
                f"{tokens.shape[0]}; wanted a TRL that opdc.trl.support() lists"
            )
        logprobs = given["teacher_target_logps"].masked_fill(
            ~given["valid_candidate_mask"], -torch.inf
        )
        own = logprobs.masked_fill(ids != tokens[:, None], -torch.inf).amax(-1)
        active = torch.ones_like(tokens, dtype=torch.bool)
        student = projection(
            hidden,
            given["lm_head_weight"],
            given["lm_head_bias"],
            given["logit_scale"],
            given["final_logit_softcapping"],
        )
        # TRL divides the sum: by the tokens of a process and by the accumulation steps.
        loss = self.evaluate(
            student,
            sparse_teacher(ids, logprobs, own, active),
            tokens=tokens,
            mask=active,
            temperature=given["temperature"],
            num_items=1,
        )
        if not self.uses_num_items:
            processes = self.trainer.accelerator.num_processes
            loss = loss * (inputs["global_n_tokens"][0] / processes).clamp(min=1).to(loss)
        total = loss.detach()
        entropies = (self.measured(f"{model}_entropy", total) for model in ("student", "teacher"))
        # Of each teacher: positions, and sums that are not known apart.
        each = total.new_full((given["num_teachers"], 3), torch.nan)
        if given.get("teacher_id_idx") is not None:
            teachers = torch.arange(given["num_teachers"], device=total.device)
            each[:, 0] = (given["teacher_id_idx"][:, None] == teachers).sum(0)
        return loss, total, *entropies, each.flatten()


# The nearest class of a trainer's ancestry decides.
ADAPTERS: dict[str, type[Attachment]] = {
    "DistillationTrainer": Distillation,
    "ServerDistillationTrainer": Server,
    "AsyncDistillationTrainer": Async,
    "GKDTrainer": GKD,
    "GOLDTrainer": GOLD,
    "IWOPDTrainer": IWOPD,
    "SDFTTrainer": SelfDistillation,
    "SDPOTrainer": SelfDistillation,
    "SFTTrainer": Supervised,
}
