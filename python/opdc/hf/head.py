"""The head of a language model, for losses that start from its hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import opdc

from .transcript import config_of, unwrapped

# The factors that configurations have for their logits. One that divides instead is below.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def projection(model: Any, hidden: Tensor) -> opdc.Projection:
    """The logits that `model` would make of its last hidden states, as an `opdc.Projection`.

    It holds the weight and the bias of the model's own head, so that gradients go there, and what
    the configuration says is done to the logits: their factor (`logit_scale`, `output_multiplier`,
    `lm_head_multiplier`, `1 / logits_scaling`) and `final_logit_softcapping`.

    Args:
        model: a causal language model, also inside of PEFT or a parallel wrapper. Under FSDP2 or
            ZeRO-3 the head is whole only inside of the forward of the module that holds it.
        hidden: `(..., H)`, the hidden states after the last norm: `last_hidden_state` of the
            backbone `model.base_model`, or `hidden_states[-1]` of most models.

    Raises:
        ValueError: the model has no head, or an adapter is wrapped around it (a LoRA that names the
            head; `modules_to_save` is fine).

    >>> import opdc.hf, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
    >>> ids = torch.tensor([[1, 5, 9]])
    >>> hidden = student.base_model(ids).last_hidden_state
    >>> loss = opdc.reverse_kl(opdc.hf.projection(student, hidden), teacher(ids).logits)
    >>> torch.allclose(loss, opdc.reverse_kl(student(ids).logits, teacher(ids).logits))
    True
    """
    inner = unwrapped(model)
    known = hasattr(inner, "get_output_embeddings")
    head: Any = inner.get_output_embeddings() if known else None
    if head is None:
        raise ValueError(
            f"model: {type(inner).__name__} has no output embeddings (`get_output_embeddings`); a "
            "causal language model is wanted"
        )
    saved = getattr(head, "modules_to_save", None)
    if isinstance(saved, torch.nn.ModuleDict):  # PEFT trains a copy of the head
        head = head.original_module if head.disable_adapters else saved[head.active_adapter]
    elif hasattr(head, "base_layer"):
        raise ValueError(
            f"model: its head is wrapped by {type(head).__name__}, whose logits are not hidden @ "
            "weight.T; take the head out of the adapter's target_modules (modules_to_save trains "
            "it whole), or build an opdc.Projection with `adapter=`"
        )
    config = config_of(model).get_text_config()
    return opdc.Projection(
        hidden,
        head.weight,
        getattr(head, "bias", None),
        scale=_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _scale(config: Any) -> float:
    for name in _FACTORS:
        if (factor := getattr(config, name, None)) is not None:
            return float(factor)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    # The one family that multiplies by the number of that name.
    return float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)


def shared_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any) -> int:
    """The number of ids that mean the same to both tokenizers, for `valid_vocab`.

    Heads are often padded to a round size, and differently for models of one family. Ids from this
    number on are unused, or known to one of the two models only.

    Raises:
        ValueError: the tokenizers differ in what both of them know: no loss that compares logits
            id by id means anything then.

    >>> import opdc.hf
    >>> class Tokenizer:
    ...     def __init__(self, words): self.words = words
    ...     def get_vocab(self): return {word: id for id, word in enumerate(self.words)}
    >>> opdc.hf.shared_vocabulary(Tokenizer(["a", "b"]), Tokenizer(["a", "b", "<extra>"]))
    2
    """
    student, teacher = (
        {id: token for token, id in tokenizer.get_vocab().items()}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    wrong = [id for id in student.keys() & teacher.keys() if student[id] != teacher[id]]
    if wrong:
        first = min(wrong)
        raise ValueError(
            f"teacher_tokenizer: {len(wrong)} ids mean something else than to student_tokenizer, "
            f"the first is {first}: {teacher[first]!r}, not {student[first]!r}; a teacher with the "
            "student's tokenizer is wanted"
        )
    return min(max(student, default=-1), max(teacher, default=-1)) + 1
