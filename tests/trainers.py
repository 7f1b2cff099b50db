"""Small trainers of TRL, for the tests of `opdc.trl`: random models of one or two layers, a
tokenizer of whole words, prompts of unequal lengths, and what a run of few steps leaves behind.

A quarter of all ids end a response, so that these have unequal lengths too.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import queue
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CI"] = "true"  # a trainer that is built sends telemetry else
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer
from trl.experimental.async_distillation import AsyncDistillationConfig, AsyncDistillationTrainer
from trl.experimental.async_distillation.async_rollout_worker import RolloutSample
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.experimental.server_distillation import (
    ServerDistillationConfig,
    ServerDistillationTrainer,
)

VOCABULARY = 160
RESPONSE = 8  # tokens at most
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>"]
STOPS = [1, *range(100, 140)]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
QUESTIONS = [
    *("w7 w8 w9 w20", "w30", "w41 w42 w43 w44 w45 w46", "w50 w51"),
    *("w60 w61 w62", "w70 w71", "w72", "w73 w74 w75 w76 w77"),
]
ANSWERS = [
    *("w80 w81", "w82 w83 w84 w85 w86", "w87", "w88 w89 w90"),
    *("w91 w92 w93 w94", "w95", "w96 w97", "w98 w99 w80 w81 w82 w83"),
]


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Every `train()` begins with a collection of garbage, most of whose time goes to what the
    imported modules hold; a module of tests imports this fixture and is rid of that."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ------------------------------------------------------------------- models and what they read


@functools.cache
def folder() -> Path:
    """For what trainers write; removed when the process ends."""
    path = Path(tempfile.mkdtemp(prefix="opdc-trainers-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    words = SPECIAL + [f"w{number}" for number in range(len(SPECIAL), VOCABULARY)]
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        padding_side="left",
        model_max_length=128,
    )


def llama(seed: int, vocabulary: int = VOCABULARY, width: int = 16, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        **changes,
    )
    return with_stops(LlamaForCausalLM(config))


def qwen2(seed: int, vocabulary: int = VOCABULARY) -> Any:
    """The head is tied to the embedding."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return with_stops(Qwen2ForCausalLM(config))


def gpt2(seed: int, vocabulary: int = VOCABULARY) -> Any:
    """Learned positions: a wrong position shows."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return with_stops(GPT2LMHeadModel(config))


def with_stops(model: PreTrainedModel) -> PreTrainedModel:
    model.config.eos_token_id = STOPS
    model.config.pad_token_id = 0
    model.generation_config.eos_token_id = STOPS
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def saved(kind: str = "teacher") -> str:
    """The folder of a tokenizer, and of a student: some trainers load them by name."""
    path = folder() / kind
    tokenizer().save_pretrained(path)
    if kind == "student":
        llama(0).save_pretrained(path)
    return str(path)


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [[said("user", text)] for text in QUESTIONS]})


def conversations() -> Dataset:
    pairs = zip(QUESTIONS, ANSWERS, strict=True)
    return Dataset.from_dict(
        {"messages": [[said("user", text), said("assistant", reply)] for text, reply in pairs]}
    )


def prompt_completions() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [[said("user", text)] for text in QUESTIONS],
            "completion": [[said("assistant", reply)] for reply in ANSWERS],
        }
    )


def hints() -> Dataset:
    return Dataset.from_dict({"prompt": QUESTIONS, "privileged_context": ANSWERS})


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


# --------------------------------------------------------------------------------- trainers


def settings(config: type, **changes: Any) -> Any:
    """Three steps of four examples; no dropout, no clipping that would hide a wrong factor."""
    common = {
        "output_dir": tempfile.mkdtemp(dir=folder()),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return config(**{**common, **changes})


def distillation(
    student: Any = None, teacher: Any = None, *, remote: bool = False, **changes: Any
) -> DistillationTrainer:
    """`remote`: without a teacher of its own, as for a teacher of another vocabulary."""
    arguments, config = parted(changes)
    return DistillationTrainer(
        llama(0) if student is None else student,
        teacher_model=None if remote else llama(1, width=24) if teacher is None else teacher,
        args=settings(
            DistillationConfig,
            **{"max_completion_length": RESPONSE, "beta": 0.5, **config},
        ),
        processing_class=tokenizer(),
        **{"train_dataset": prompts(), **arguments},
    )


def gkd(student: Any = None, teacher: Any = None, **changes: Any) -> GKDTrainer:
    arguments, config = parted(changes)
    return GKDTrainer(
        llama(0) if student is None else student,
        teacher_model=llama(1, width=24) if teacher is None else teacher,
        args=settings(
            GKDConfig,
            **{"max_new_tokens": RESPONSE, "max_length": 64, "temperature": 1.0, **config},
        ),
        processing_class=tokenizer(),
        **{"train_dataset": conversations(), **arguments},
    )


def gold(student: Any = None, teacher: Any = None, **changes: Any) -> GOLDTrainer:
    arguments, config = parted(changes)
    return GOLDTrainer(
        llama(0) if student is None else student,
        teacher_model=llama(1, width=24) if teacher is None else teacher,
        args=settings(
            GOLDConfig,
            **{
                "max_completion_length": RESPONSE,
                "max_length": 64,
                "num_generations": 1,
                "use_uld_loss": False,
                "top_k": 0,
                # Else it wants byte offsets, which a tokenizer of words does not have.
                "dataset_kwargs": {"skip_prepare_dataset": True},
                **config,
            },
        ),
        processing_class=tokenizer(),
        **{"train_dataset": conversations(), **arguments},
    )


def iw_opd(student: Any = None, teacher: Any = None, **changes: Any) -> IWOPDTrainer:
    arguments, config = parted(changes)
    teacher = llama(1, width=24) if teacher is None else teacher
    teacher.config._name_or_path = saved()  # its tokenizer is compared with the student's
    return IWOPDTrainer(
        llama(0) if student is None else student,
        teacher_model=teacher,
        args=settings(
            IWOPDConfig,
            **{
                "distillation_objective": "jsd",
                "loss_top_k": 0,
                "max_completion_length": RESPONSE,
                "max_length": 64,
                "max_prompt_length": 48,
                "top_k": 0,
                **config,
            },
        ),
        processing_class=tokenizer(),
        **{"train_dataset": conversations(), **arguments},
    )


def sdft(student: Any = None, **changes: Any) -> SDFTTrainer:
    """The teacher is the student itself, which reads the answer in its prompt."""
    arguments, config = parted(changes)
    return SDFTTrainer(
        llama(0) if student is None else student,
        args=settings(
            SDFTConfig,
            **{
                "teacher_model_kind": "live",
                "distillation_mode": "full_logits",
                "distillation_alpha": 0.5,
                "max_completion_length": RESPONSE,
                "max_prompt_length": 48,
                "num_generations": 2,
                **config,
            },
        ),
        processing_class=tokenizer(),
        **{"train_dataset": hints(), **arguments},
    )


def sdpo(student: Any = None, **changes: Any) -> SDPOTrainer:
    """Every response of an even length succeeds, and is shown to the student as its teacher."""
    arguments, config = parted(changes)
    return SDPOTrainer(
        llama(0) if student is None else student,
        reward_funcs=[even_length],
        args=settings(
            SDPOConfig,
            **{
                "teacher_model_kind": "live",
                "distillation_mode": "full_logits",
                "distillation_alpha": 0.5,
                "max_completion_length": RESPONSE,
                "max_prompt_length": 48,
                "num_generations": 4,
                "dont_reprompt_on_self_success": False,
                **config,
            },
        ),
        processing_class=tokenizer(),
        **{"train_dataset": prompts(), **arguments},
    )


def even_length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids) % 2 == 0) for ids in completion_ids]


def sft(student: Any = None, **changes: Any) -> SFTTrainer:
    arguments, config = parted(changes)
    return SFTTrainer(
        llama(0) if student is None else student,
        args=settings(SFTConfig, **{"max_length": 64, **config}),
        processing_class=tokenizer(),
        **{"train_dataset": prompt_completions(), **arguments},
    )


class TeacherServer:
    """In the place of TRL's HTTP client: the log-probs of a model of this process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.teacher = llama(1, width=24)

    def get_sequence_logprobs(
        self,
        sequences: list[list[int]],
        prompt_lengths: list[int],
        top_logprobs: int,
        temperature: float,
    ) -> dict[str, list[Any]]:
        answer: dict[str, list[Any]] = {
            name: [] for name in ("logprobs", "logprob_token_ids", "actual_logprobs")
        }
        for sequence, start in zip(sequences, prompt_lengths, strict=True):
            rows = scores(self.teacher, sequence, temperature)[start - 1 : -1]
            best = rows.topk(top_logprobs)
            sampled = torch.tensor(sequence[start:])[:, None]
            answer["logprobs"].append(best.values.tolist())
            answer["logprob_token_ids"].append(best.indices.tolist())
            answer["actual_logprobs"].append(rows.gather(-1, sampled).tolist())
        return answer


@torch.no_grad()
def scores(model: Any, sequence: list[int], temperature: float) -> Tensor:
    """Log-probs `(n, V)` of one sequence."""
    logits = model.eval()(torch.tensor([sequence])).logits[0]
    return (logits.double() / temperature).log_softmax(-1).float()


def server(student: Any = None, **changes: Any) -> ServerDistillationTrainer:
    arguments, config = parted(changes)
    with mock.patch("trl.generation.vllm_client.VLLMClient", TeacherServer):
        return ServerDistillationTrainer(
            llama(0) if student is None else student,
            args=settings(
                ServerDistillationConfig,
                **{
                    "teacher_model_server_url": "http://teacher",
                    "max_completion_length": RESPONSE,
                    "beta": 0.0,
                    "loss_top_k": 8,
                    **config,
                },
            ),
            processing_class=tokenizer(),
            **{"train_dataset": prompts(), **arguments},
        )


class Worker:
    """In the place of TRL's rollout process: the same responses, scored by a model of this one."""

    def __init__(self, top_k: int) -> None:
        self.rollout_buffer: queue.Queue[RolloutSample] = queue.Queue()
        self.metrics_queue: queue.Queue[dict[str, float]] = queue.Queue()
        self.top_k = top_k
        self.teacher = llama(1, width=24)

    def start(self) -> None:
        words = tokenizer()
        for number in range(32):
            question, answer = QUESTIONS[number % 8], ANSWERS[number * 5 % 8]
            prompt, reply = [said("user", question)], [said("assistant", answer)]
            start = len(words.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
            ids = words.apply_chat_template(prompt + reply)["input_ids"]
            self.rollout_buffer.put(
                RolloutSample(
                    prompt=prompt,
                    completion=reply,
                    input_ids=np.array(ids),
                    completion_mask=np.array([0] * start + [1] * (len(ids) - start)),
                    **self.scored(ids, start),
                    model_version=0,
                    metrics={},
                    teacher_id="default",
                    prompt_id=number % 8,
                )
            )

    def scored(self, ids: list[int], start: int) -> dict[str, np.ndarray]:
        """The best ids and, where it is none of them, the sampled one: the rest is -1."""
        width = self.top_k + 1
        best = np.full((len(ids), width), -1)
        logprobs = np.full((len(ids), width), -np.inf, dtype=np.float32)
        rows = scores(self.teacher, ids, 1.0)
        for position in range(start, len(ids)):
            row = rows[position - 1]
            here = row.topk(self.top_k).indices.tolist()
            here += [ids[position]] * (ids[position] not in here)
            best[position, : len(here)] = here
            logprobs[position, : len(here)] = row[here].numpy()
        return {"teacher_topk_ids": best, "teacher_topk_logprobs": logprobs}

    def stop(self) -> None: ...

    def update_model_version(self, model_version: int) -> None: ...

    def check_health(self, stale_after_s: float) -> None: ...


_ASYNC = "trl.experimental.async_distillation.async_distillation_trainer"


@mock.patch(f"{_ASYNC}.get_peak_flops_per_device", mock.Mock(return_value=None))  # of a GPU
@mock.patch(f"{_ASYNC}.VLLMClient", mock.Mock())
def asynchronous(top_k: int = 8, **changes: Any) -> AsyncDistillationTrainer:
    arguments, config = parted(changes)
    return AsyncDistillationTrainer(
        saved("student"),
        args=settings(
            AsyncDistillationConfig,
            **{
                "max_completion_length": RESPONSE,
                "teacher_top_k": top_k,
                "token_budget": -1,  # else it asks the server
                "max_staleness": 99,
                "model_init_kwargs": {"attn_implementation": "sdpa"},
                **config,
            },
        ),
        processing_class=tokenizer(),
        rollout_worker=Worker(top_k),
        weight_transfer=mock.MagicMock(),
        **{"train_dataset": prompts(), **arguments},
    )


_ARGUMENTS = {"train_dataset", "eval_dataset", "peft_config", "callbacks"}


def parted(changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the constructor of the trainer takes, and what its configuration takes."""
    arguments = {name: value for name, value in changes.items() if name in _ARGUMENTS}
    return arguments, {name: value for name, value in changes.items() if name not in _ARGUMENTS}


# -------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """What a run of few steps left behind, in the order of the steps."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)


class _Recorder(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self.run = run

    def on_pre_optimizer_step(self, args, state, control, *, model, **_):
        self.run.gradients.append(
            {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        )

    def on_log(self, args, state, control, *, logs, **_):
        self.run.logs.append(dict(logs))
        if "loss" in logs:
            self.run.losses.append(logs["loss"])
            self.run.norms.append(logs["grad_norm"])


def train(trainer: Any, **keywords: Any) -> Run:
    """Training, from the same state of the global generator whatever was drawn before."""
    run = Run()
    trainer.add_callback(_Recorder(run))
    torch.manual_seed(7)
    trainer.train(**keywords)
    assert run.losses
    return run


def assert_same(run: Run, other: Run, *, loss: float = 1e-5, norm: float = 1e-4) -> None:
    """Every loss and gradient norm, and every parameter's gradient of the first step."""
    assert run.losses == pytest.approx(other.losses, rel=loss)
    assert run.norms == pytest.approx(other.norms, rel=norm)
    assert distance(run.gradients[0], other.gradients[0]) <= norm


def distance(gradients: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Of the parameter that differs most, relative to its norm."""
    assert gradients.keys() == others.keys() and gradients
    return max(
        float((gradients[name] - other).norm() / other.norm().clamp_min(1e-30))
        for name, other in others.items()
    )
