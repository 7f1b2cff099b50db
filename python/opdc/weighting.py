"""What decides how much a position counts: a gate for `weights=`, a filter for `mask=`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _arguments, _ops


def drift_gate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    block: int = 64,
    kappa: float = 1.0,
) -> Tensor:
    """Weights that turn down blocks of a rollout from which the policy has drifted away.

    The blockwise gate of arXiv 2606.24084: over each block of `block` positions the mean `b` of
    `logprobs − old_logprobs` over its active positions gives `exp(−κ |b|)`; the weights are these,
    divided by their mean over all active positions of the call. They go into the `weights` of any
    loss. For the policy that wrote the rollout all are 1.

    Args:
        logprobs: `(...)`, log-probs of the tokens under the current policy; no gradient.
        old_logprobs: `(...)`, under the policy that drew them.
        mask: `(...)`; inactive positions are not read and get the weight 0.
        block: positions in a block. Blocks start at the first active position of a sequence (last
            axis) and count holes; the last one may be shorter.
        kappa: `κ`, at least 0.

    Returns:
        Weights `(...)`, float32 or, for float64, float64; all 0 without an active position.

    >>> import opdc, torch
    >>> now, old = torch.tensor([[-1.0, -1.0, -2.0]]), torch.tensor([[-1.0, -1.0, -1.0]])
    >>> [f"{w:.4f}" for w in opdc.drift_gate(now, old, block=2)[0].tolist()]
    ['1.2670', '1.2670', '0.4661']
    """
    kappa = _arguments.number("kappa", kappa)
    kappa_tensor = torch.ones((), dtype=torch.float64, device="cpu") * kappa
    return _ops.drift_gate(
        _arguments.constant("logprobs", logprobs),
        _arguments.constant("old_logprobs", old_logprobs),
        None if mask is None else _arguments.active("mask", mask),
        _arguments.integer("block", block),
        kappa_tensor,
    )


def special_token_mask(
    tokens: Tensor, ids: int | Sequence[int] | Tensor, mask: Tensor | None = None
) -> Tensor:
    """The mask without the first occurrence of each special token in each sequence.

    Teacher and student may use tokens such as an end of thought differently. As in "Revisiting
    On-Policy Distillation" (arXiv 2603.25562), the first active position of each sequence (last
    axis) whose token is a listed id leaves the loss, for each id.

    Args:
        tokens: `(...)`, the sampled ids.
        ids: the special ids; inside of a CUDA graph a tensor on the GPU.
        mask: `(...)`, what is active before; None: everything.

    Returns:
        A bool mask `(...)` for `mask=`.

    >>> import opdc, torch
    >>> opdc.special_token_mask(torch.tensor([[5, 9, 9, 7]]), [9, 7]).tolist()
    [[True, False, True, False]]
    """
    _arguments.require_tensor("tokens", tokens)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise TypeError(f"tokens must hold integer ids, got {tokens.dtype}")
    if mask is None:
        kept = torch.ones_like(tokens, dtype=torch.bool)
    else:
        kept = _arguments.active("mask", mask)
        if kept.shape != tokens.shape:
            raise ValueError(
                f"mask has the shape {tuple(kept.shape)}, tokens {tuple(tokens.shape)}: one each "
                "for every position"
            )
    try:
        device = ids.device if isinstance(ids, Tensor) else "cpu"
        listed = torch.as_tensor(ids, device=device).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"ids must be an integer or several, got {ids!r}") from None
    if listed.numel() and (listed.is_floating_point() or listed.dtype is torch.bool):
        raise TypeError(f"ids must hold integer ids, got {listed.dtype}")
    listed = listed.long().to(tokens.device, non_blocking=listed.is_cpu)
    if not tokens.dim():
        return kept & ~torch.isin(tokens, listed)
    found = (tokens.unsqueeze(-1) == listed) & kept.unsqueeze(-1)  # (..., sequence, id)
    first = found & (found.cumsum(-2) == 1)
    return kept & ~first.any(-1)
