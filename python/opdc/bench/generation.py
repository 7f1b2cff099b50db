"""`generate` end to end: a student that samples alone, and one that samples from the blend with a
teacher, token by token or by way of drafts.

The models are random, of one size, and near each other as student and teacher are in training.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import opdc

from .contenders import DRAFT_LENGTH, EPSILON, Contender

GENERATE = "generate"
# So large that a forward takes longer than what Python and the caches do around it.
VOCABULARY, HIDDEN, FEED_FORWARD, LAYERS, HEADS = 32_000, 384, 1024, 4, 6
BATCH, PROMPT, NEW_TOKENS = 16, 16, 64
LOGIT_SPREAD = 4.0  # standard deviation of the logits: some nats of entropy, as of a trained model
DIVERGENCE = 0.05  # nats, the mean KL of the student from the teacher


@dataclass
class Setting:
    """A student, its teacher, and the prompts."""

    student: Any
    teacher: Any
    prompts: Tensor  # (BATCH, PROMPT)

    def described(self) -> dict[str, Any]:
        return {
            "model": f"Llama, {LAYERS} layers of {HIDDEN}",
            "vocabulary": VOCABULARY,
            "batch": BATCH,
            "prompt": PROMPT,
            "new_tokens": NEW_TOKENS,
            "epsilon": EPSILON,
            "draft_length": DRAFT_LENGTH,
            "divergence": self.divergence(),
        }

    def divergence(self) -> float:
        """The mean reverse KL in nats after the prompts and after each of their tokens."""
        with torch.no_grad():
            logits = [model(self.prompts).logits for model in (self.student, self.teacher)]
            return float(opdc.reverse_kl(*logits))


def make_setting(seed: int = 0, place: torch.device | str = "cpu") -> Setting:
    """Both models; the teacher is the student plus as much noise as gives the divergence."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                intermediate_size=FEED_FORWARD,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                max_position_embeddings=PROMPT + NEW_TOKENS,
                tie_word_embeddings=False,
            )
        ).eval()
        student.requires_grad_(False)
        torch.nn.init.normal_(student.lm_head.weight, std=LOGIT_SPREAD / HIDDEN**0.5)
        # No end token: every contender writes as many tokens.
        student.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
        noise = [torch.randn_like(weight) * weight.std() for weight in student.parameters()]
        prompts = torch.randint(VOCABULARY, (BATCH, PROMPT))
    student, noise = student.to(place), [tensor.to(place) for tensor in noise]
    setting = Setting(student, copy.deepcopy(student), prompts.to(place))
    scale = 0.05
    for _ in range(4):  # the KL grows with the square of the noise
        for weight, start, change in zip(
            setting.teacher.parameters(), student.parameters(), noise, strict=True
        ):
            weight.copy_(start + scale * change)
        scale *= (DIVERGENCE / setting.divergence()) ** 0.5
    return setting


def contenders(setting: Setting, record: dict[str, Any]) -> dict[str, Contender]:
    """Ways to write the same number of tokens; what the blends did is left in `record`."""
    from opdc.hf import BlendSampler

    def prepare() -> None:
        torch.manual_seed(0)

    def contender(key: str, sampler: BlendSampler | None) -> Contender:
        def run() -> Tensor:
            written: Tensor = setting.student.generate(
                setting.prompts,
                attention_mask=torch.ones_like(setting.prompts),
                max_new_tokens=NEW_TOKENS,
                do_sample=True,
                top_k=0,
                custom_generate=sampler,
            )
            if sampler is not None:
                last: Any = sampler.last
                record[key] = dataclasses.asdict(last.statistics) | {
                    "beta": float(last.beta[last.mask].mean()),
                    "kl": float(last.kl[last.mask].mean()),
                }
            return written

        return Contender(run, prepare)

    return {
        "plain": contender("plain", None),
        # A budget of 0 is the student's own policy: what the blend adds, apart from opdc's sampler
        # being faster than the softmax and multinomial of `generate`.
        "student": contender("student", BlendSampler(None, 0.0)),
        "blend": contender("blend", BlendSampler(setting.teacher, EPSILON)),
        "speculative": contender(
            "speculative", BlendSampler(setting.teacher, EPSILON, draft_length=DRAFT_LENGTH)
        ),
    }
