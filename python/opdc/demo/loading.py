"""Models, tokenizers and prompts from local folders and files, checked before any work begins."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from .loop import end_tokens
from .task import VOCABULARY, Problem

SHIPPED_MODELS = Path(__file__).parent / "models"


class DemoError(Exception):
    """Something the user can put right; its text is one line."""


@dataclass(frozen=True)
class Pair:
    """A student and a teacher with the tokenizer they share."""

    student: Any
    teacher: Any
    tokenizer: Any
    valid_vocab: int | None  # the ids both models have, where their heads are padded differently


def load_pair(student_folder: Path | None, teacher_folder: Path | None) -> Pair:
    """The models of two Hugging Face folders; the shipped ones stand in for None."""
    student_folder = student_folder or SHIPPED_MODELS / "student"
    teacher_folder = teacher_folder or SHIPPED_MODELS / "teacher"
    student, tokenizer = _load("--student", student_folder)
    teacher, teacher_tokenizer = _load("--teacher", teacher_folder)
    if tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        raise DemoError(
            f"the tokenizers of student and teacher differ ({len(tokenizer)} and "
            f"{len(teacher_tokenizer)} entries): their logits mean different tokens; "
            "choose two models of one family"
        )
    teacher.requires_grad_(False)
    # Dropout stays off in the student too: the policy that samples is the policy that is trained.
    student.eval()
    teacher.eval()

    size = max(tokenizer.get_vocab().values()) + 1
    heads = {"student": _head_size(student), "teacher": _head_size(teacher)}
    for name, head in heads.items():
        if head < size:
            raise DemoError(f"the {name} has {head} logits for a tokenizer of {size} ids")
    valid_vocab = size if heads["student"] != heads["teacher"] else None

    if tokenizer.pad_token is None:  # padding is masked everywhere: any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    # A folder's own sampling settings (top-k, repetition penalty, ...) would change the policy
    # behind the loss: only its end tokens are kept.
    for model, head in ((student, heads["student"]), (teacher, heads["teacher"])):
        model.generation_config = GenerationConfig(
            eos_token_id=end_tokens(model) or tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=list(range(size, head)) if valid_vocab and head > size else None,
        )
    return Pair(student, teacher, tokenizer, valid_vocab)


def _load(option: str, folder: Path) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise DemoError(f"{option} {folder}: not a Hugging Face model folder (no config.json)")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except Exception as error:  # whatever a broken folder makes the libraries raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DemoError(f"{option} {folder}: cannot be loaded: {reason[0]}") from error
    wanted = {"position_ids", "logits_to_keep"}
    if missing := wanted - inspect.signature(model.forward).parameters.keys():
        raise DemoError(
            f"{option} {folder}: {type(model).__name__} takes no {' and no '.join(sorted(missing))}"
        )
    return model, tokenizer


def _head_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def read_prompts(path: Path) -> list[Problem]:
    """The problems of a JSONL file: {"prompt": "...", "answer": "..."}, the answer optional."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DemoError(f"--prompts {path}: {reason}") from error
    problems = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            problems.append(_parse_problem(line, f"--prompts {path}, line {number}"))
    if not problems:
        raise DemoError(f"--prompts {path}: holds no prompt")
    return problems


def _parse_problem(line: str, place: str) -> Problem:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DemoError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise DemoError(f'{place}: wanted {{"prompt": "some text"}}')
    answer = record.get("answer")
    if answer is None:
        return Problem(prompt, None)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DemoError(f'{place}: "answer" must be text or a number')
    if not str(answer).strip():
        raise DemoError(f'{place}: "answer" is empty; leave it out if there is none')
    return Problem(prompt, str(answer))


def check_prompts(pair: Pair, problems: Sequence[Problem], max_new_tokens: int) -> None:
    """Every prompt has tokens, and leaves room for the response in both models."""
    lengths = [len(ids) for ids in pair.tokenizer([p.prompt for p in problems])["input_ids"]]
    if min(lengths) == 0:
        prompt = problems[lengths.index(0)].prompt
        raise DemoError(f"the prompt {prompt!r} has no tokens")
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        room = getattr(model.config, "max_position_embeddings", None)
        if room is not None and max(lengths) + max_new_tokens > room:
            raise DemoError(
                f"the longest prompt ({max(lengths)} tokens) and --max-new-tokens "
                f"{max_new_tokens} exceed the {room} positions of the {name}"
            )


def knows_the_task(tokenizer: Any) -> bool:
    """Whether the built-in problems can be put to models with this tokenizer."""
    return set(tokenizer.get_vocab()) == set(VOCABULARY)
