"""What `opdc.hf` has to write, in plain PyTorch: each row by itself, without padding, masks,
positions or caches, the laws of `oracle_sampling`, the uniforms in the order that is promised."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import oracle_sampling as oracle

Constraint = Callable[[int, Tensor, Tensor], Tensor]  # of (length of the prompt, ids, scores)


@torch.no_grad()
def logits_of(model, ids: Sequence[int], constrain: Constraint | None = None, prompt: int = 0):
    """The scores `(1, V)` of the token after `ids`."""
    tensor = torch.tensor([list(ids)])
    scores = model(tensor, use_cache=False).logits[:, -1]
    return scores if constrain is None else constrain(prompt, tensor, scores)


def slow_generate(
    student,
    teacher,
    prompts: Sequence[Sequence[int]],
    epsilon: float,
    max_new_tokens: int,
    generator: torch.Generator,
    *,
    stop_ids: Sequence[int] = (),
    constrain: Constraint | None = None,
    **options,
) -> list[list[oracle.BlendSample]]:
    """A blended sample for each token of each row."""
    rows: list[list[oracle.BlendSample]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        uniforms = torch.rand(len(prompts), dtype=torch.float64, generator=generator)
        unfinished = [
            number
            for number, row in enumerate(rows)
            if not row or int(row[-1].tokens) not in stop_ids
        ]
        if not unfinished:
            break
        p, q = [], []
        for number in unfinished:
            prompt = prompts[number]
            ids = [*prompt, *(int(one.tokens) for one in rows[number])]
            p.append(logits_of(student, ids, constrain, len(prompt)))
            q.append(logits_of(teacher, ids))
        drawn = oracle.blend_sample(
            torch.cat(p), torch.cat(q), epsilon, uniforms=uniforms[unfinished], **options
        )
        for number, columns in zip(unfinished, zip(*drawn, strict=True), strict=True):
            rows[number].append(oracle.BlendSample(*columns))
    return rows


def slow_speculate(
    student,
    teacher,
    prompts: Sequence[Sequence[int]],
    epsilon: float,
    max_new_tokens: int,
    draft_length: int,
    generator: torch.Generator,
    *,
    stop_ids: Sequence[int] = (),
    constrain: Constraint | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    **common,
) -> tuple[list[list[int]], list[int]]:
    """The tokens of each row, and the number of drafts in each block."""
    rows: list[list[int]] = [[] for _ in prompts]
    blocks = []
    own = {name: value for name, value in common.items() if name != "eos_map"}

    def left(row: list[int]) -> int:
        return 0 if row and row[-1] in stop_ids else max_new_tokens - len(row)

    while any(left(row) for row in rows):
        count = min(draft_length, max(left(row) for row in rows))
        blocks.append(count)
        uniforms = torch.rand(len(prompts), count, 3, dtype=torch.float64, generator=generator)
        stands = set(range(len(prompts)))  # the rows of which no draft of this block is rejected
        for index in range(count):
            judging = [number for number in sorted(stands) if left(rows[number])]
            if not judging:
                break
            p, q = [], []
            for number in judging:
                ids = [*prompts[number], *rows[number]]
                p.append(logits_of(student, ids, constrain, len(prompts[number])))
                q.append(logits_of(teacher, ids))
            p, q, u = torch.cat(p), torch.cat(q), uniforms[judging, index]
            # Drafted as they are: verification reads the other's stop token as one's own.
            drafts = oracle.sample(p, uniforms=u[:, 0], **own).tokens
            judged = oracle.blend_verify(
                drafts[:, None],
                p[:, None],
                q[:, None],
                epsilon,
                top_k=top_k,
                top_p=top_p,
                uniforms=u[:, None, 1:],
                **common,
            )
            for number, token, stood in zip(
                judging, judged.tokens.tolist(), judged.accepted, strict=True
            ):
                rows[number] += token
                stands -= set() if stood else {number}
    return rows, blocks
