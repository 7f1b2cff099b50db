"""Teachers behind an inference server: what it sends, as an `opdc.TopK`.

The server gets the prompt and the student's completion in one, as token ids, generates next to
nothing, and says what it thinks of each token that it was given. These log-probs are those of the
model itself, at temperature 1, whatever the sampling parameters are: train with `temperature=1`.
(vLLM's `logprobs_mode` has to stay at log-probs; it could be set to logits.)

Entries are aligned with the tokens that they judge, as the losses want them: the entry of a token
was computed from the tokens before it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _arguments
from .support import TopK

__all__ = ["from_sglang", "from_vllm"]

_Entry = tuple[float, list[tuple[int, float]]]  # log-prob of the token; ids and theirs

# JSON has no infinity: vLLM's server writes this for the log of 0.
_LOG_OF_ZERO = -9999.0


def from_vllm(
    prompt_logprobs: Sequence[Sequence[Mapping[Any, Any] | None]],
    tokens: Tensor,
    prompt_lengths: Iterable[int],
    *,
    k: int,
) -> TopK:
    """The teacher of what vLLM returns for `prompt_logprobs=k`.

    From `LLM.generate(…, SamplingParams(prompt_logprobs=k, max_tokens=1))` it is
    `output.prompt_logprobs` of each output, from the server's `/v1/completions`, where
    `prompt_logprobs` is a parameter too, `choices[i]["prompt_logprobs"]`. The server has to allow
    `k`: `--max-logprobs` is 20 unless it is set. vLLM adds the token itself where it is not among
    the `k`: it becomes the `token_logprobs`, and no slot.

    Args:
        prompt_logprobs: for each sequence and each of its tokens, prompt and completion, None or a
            mapping from token id (int, or str in JSON) to an object or a mapping with `logprob`
            and, if it is known, `rank`.
        tokens: the completions `(B, C)`, of an integer dtype, which begin at the left. What is
            right of a completion is padding, whatever it is.
        prompt_lengths: the number of tokens before each completion, at least 1.
        k: the number of slots, at least 1.

    Returns:
        TopK: ids and log-probs `(B, C, k)`, the larger first, and `token_logprobs` `(B, C)`; in
        float32, on the device of the tokens. What the server did not send is a slot with the id −1;
        a position beyond the completion has no other, and its `token_logprobs` is NaN. An id of
        probability 0 is such a slot too; as the token its log-prob is `−inf`.

    Raises:
        ValueError: the entries do not belong to the tokens: too many of them, none at a token,
            or none for the token itself; an id that comes twice; no number.

    >>> import opdc.teachers, torch
    >>> answer = [
    ...     None,  # the first token has nothing before it
    ...     {"7": {"logprob": -0.2, "rank": 1}, "4": {"logprob": -2.0, "rank": 2}},
    ...     {"5": {"logprob": -6.0, "rank": 31}, "4": {"logprob": -0.1, "rank": 1}},
    ... ]
    >>> teacher = opdc.teachers.from_vllm([answer], torch.tensor([[7, 5, 0]]), [1], k=1)
    >>> teacher.ids.tolist(), teacher.token_logprobs.tolist()
    ([[[7], [4], [-1]]], [[-0.2..., -6.0, nan]])
    """

    def entry(given: Any, token: int) -> _Entry:
        found, token_logprob = [], None
        for key, value in given.items():
            id = int(key)
            logprob = _number(_field(value, "logprob"))
            if id == token:
                token_logprob = logprob
            rank = _field(value, "rank")
            if rank is None or rank <= k:
                found.append((id, logprob))
        if token_logprob is None:
            raise ValueError(f"it has nothing for it; {_ALIGNMENT}")
        return token_logprob, found

    return _topk("prompt_logprobs", prompt_logprobs, tokens, prompt_lengths, k, entry)


def from_sglang(
    meta_infos: Sequence[Mapping[str, Any]],
    tokens: Tensor,
    prompt_lengths: Iterable[int],
    *,
    k: int,
) -> TopK:
    """The teacher of what SGLang's `/generate`, or `Engine.generate`, returns as `meta_info`.

    Ask with `return_logprob=True, logprob_start_len=0, top_logprobs_num=k` and
    `sampling_params={"max_new_tokens": 0}`.

    Args:
        meta_infos: of each sequence; `input_token_logprobs` are `(logprob, id, text)` of each of
            its tokens, `input_top_logprobs` lists of as many as were asked for, or None.
        tokens, prompt_lengths, k: as for `from_vllm`.

    Returns:
        TopK: as from `from_vllm`.

    Raises:
        ValueError: as for `from_vllm`.

    >>> import opdc.teachers, torch
    >>> meta_info = {
    ...     "input_token_logprobs": [(None, 3, None), (-2.0, 4, None)],
    ...     "input_top_logprobs": [None, [(-0.2, 7, None), (-2.0, 4, None)]],
    ... }
    >>> teacher = opdc.teachers.from_sglang([meta_info], torch.tensor([[4]]), [1], k=2)
    >>> teacher.ids.tolist(), teacher.token_logprobs.tolist()
    ([[[7, 4]]], [[-2.0]])
    """

    def entry(given: Any, token: int) -> _Entry:
        (logprob, id, *_), best = given
        if id != token:
            raise ValueError(f"it is of the token {id}; {_ALIGNMENT}")
        return _number(logprob), [(int(id), _number(value)) for value, id, *_ in best or ()]

    rows = []
    for row, meta_info in enumerate(meta_infos):
        of_tokens, best = (
            meta_info.get(name) for name in ("input_token_logprobs", "input_top_logprobs")
        )
        if of_tokens is None or best is None or len(of_tokens) != len(best):
            lengths = [None if x is None else len(x) for x in (of_tokens, best)]
            raise ValueError(
                f"meta_infos[{row}] has input_token_logprobs and input_top_logprobs of the lengths "
                f"{lengths[0]} and {lengths[1]}: ask with return_logprob=True, "
                "logprob_start_len=0, top_logprobs_num=k"
            )
        rows.append(list(zip(of_tokens, best, strict=True)))
    return _topk("meta_infos", rows, tokens, prompt_lengths, k, entry)


_ALIGNMENT = "send prompt and completion in one, and say how long the prompt is"


def _topk(
    name: str,
    rows: Sequence[Sequence[Any]],
    tokens: Tensor,
    prompt_lengths: Iterable[int],
    k: int,
    entry: Callable[[Any, int], _Entry],
) -> TopK:
    _arguments.require_tensor("tokens", tokens)
    k = _arguments.integer("k", k)
    starts = [_arguments.integer("prompt_lengths", length) for length in prompt_lengths]
    if tokens.dim() != 2 or not len(rows) == len(starts) == tokens.shape[0]:
        raise ValueError(
            f"tokens has the shape {tuple(tokens.shape)}, want (B, C) for B = {len(rows)} "
            f"sequences in {name} and {len(starts)} prompt_lengths"
        )
    shape = tuple(tokens.shape)
    ids = [[[-1] * k for _ in range(shape[1])] for _ in rows]
    logprobs = [[[-math.inf] * k for _ in range(shape[1])] for _ in rows]
    token_logprobs = [[math.nan] * shape[1] for _ in rows]
    for b, (row, start, completion) in enumerate(zip(rows, starts, tokens.tolist(), strict=True)):
        if not start <= len(row) <= start + shape[1]:
            raise ValueError(
                f"{name}[{b}] has {len(row)} entries for a prompt of {start} tokens and a "
                f"completion of at most {shape[1]}; {_ALIGNMENT}"
            )
        for c, given in enumerate(row[start:]):
            try:
                if given is None:
                    raise ValueError("it is None, as for the first token of a sequence")
                token_logprobs[b][c], found = entry(given, completion[c])
                if len({id for id, _ in found}) < len(found):
                    raise ValueError("an id comes twice")
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{name}[{b}][{start + c}], of the token {completion[c]}: {error}"
                ) from error
            best = heapq.nlargest(k, found, key=lambda slot: slot[1])
            for slot, (id, logprob) in enumerate(best):
                if logprob > -math.inf:
                    ids[b][c][slot], logprobs[b][c][slot] = id, logprob
    device = tokens.device
    return TopK(
        torch.tensor(ids, dtype=torch.int64, device=device).reshape(*shape, k),
        torch.tensor(logprobs, dtype=torch.float32, device=device).reshape(*shape, k),
        torch.tensor(token_logprobs, dtype=torch.float32, device=device).reshape(shape),
    )


def _field(value: Any, name: str) -> Any:
    """Of an object of vLLM's, or of what it is in JSON."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _number(value: Any) -> float:
    logprob = _arguments.number("its log-prob", value)
    if not logprob < math.inf:
        raise ValueError(f"its log-prob is {logprob}")
    return -math.inf if logprob == _LOG_OF_ZERO else logprob
