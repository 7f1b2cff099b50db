"""TRL's own loss functions, with its arguments, computed by opdc."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import opdc

IGNORED = -100  # the label of a position that does not count


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    top_k: int = 0,
    add_tail: bool = True,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """`generalized_jsd_loss` of TRL's GKD, GOLD and IW-OPD trainers.

    `GKDTrainer.generalized_jsd_loss = staticmethod(opdc.trl.generalized_jsd_loss)` puts it in the
    place of TRL's. It is the divergences only: `opdc.trl.attach` brings any loss.

    Args:
        student_logits, teacher_logits: `(B, T, V)`, of any strides; or probabilities, see below.
        labels: `(B, T)`, −100 where a position does not count.
        beta: 0: forward KL, 1: reverse KL, between: JSD (`opdc.jsd`), arXiv 2306.13649.
        temperature: divides the logits of both.
        reduction: `"batchmean"`: over the number of labels that count (without labels over the
            first axis), `"sum"`, `"mean"`: over those times `V`, as TRL has it.
        logits_are_probs: the arguments are probabilities, as GOLD's are. A 0 is a 0 here, where
            TRL takes it for 1e-8, and they are made to sum to 1.
        top_k: only that many ids: of the teacher at `beta = 0`, of the student at 1, of both
            between; 0, or as many as there are: all.
        add_tail: what is off these ids counts as one more; otherwise the rest is normalised.
        num_items_in_batch: takes the place of the denominator, whatever `reduction` says.

    Returns:
        a number. Without any label that counts 0, connected to the graph.

    Raises:
        ValueError: `reduction="none"`, whose terms for each id opdc does not make, or `"mean"`
            with `top_k`.

    >>> import opdc.trl, torch
    >>> student, teacher = torch.zeros(1, 2, 3), torch.tensor([[[0.0, 1, 2], [3, 0, 0]]])
    >>> loss = opdc.trl.generalized_jsd_loss(student, teacher, beta=1.0)
    >>> torch.allclose(loss, opdc.reverse_kl(student, teacher, reduction="sum"))
    True
    """
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(
            f'reduction: got {reduction!r}; wanted "batchmean", "sum" or "mean" (the terms of each '
            'id are not made: opdc.jsd(reduction="none") gives a loss for each position)'
        )
    vocabulary = student_logits.shape[-1]
    on_support = 0 < top_k < vocabulary
    if reduction == "mean" and on_support and num_items_in_batch is None:
        raise ValueError('reduction: "mean" has no meaning on top_k ids; wanted "batchmean"')
    if logits_are_probs:
        student_logits, teacher_logits = student_logits.log(), teacher_logits.log()
        temperature = 1.0
    mask = None if labels is None else labels != IGNORED
    teacher: Any = teacher_logits
    support: dict[str, Any] = {}
    if on_support:
        normalize = "tail" if add_tail else "both"
        if beta in (0, 1):
            support = {"support": "student" if beta else "teacher", "k": top_k}
        else:
            teacher = _of_both(student_logits, teacher_logits, top_k, temperature)
        support["normalize"] = normalize
    total: Tensor = opdc.jsd(
        student_logits,
        teacher,
        beta=beta,
        mask=mask,
        temperature=temperature,
        reduction="sum",
        **support,
    )
    # A tensor of one number stays where it is, the loss goes on without waiting for it.
    denominator: Any
    if num_items_in_batch is not None:
        denominator = num_items_in_batch
        if isinstance(denominator, Tensor):
            denominator = denominator.to(total.device)
    elif reduction == "sum":
        return total
    elif reduction == "batchmean":
        denominator = max(student_logits.shape[0], 1) if mask is None else mask.sum().clamp(min=1)
    else:
        rows = student_logits[..., 0].numel() if mask is None else mask.sum()
        denominator = rows * vocabulary
    loss: Tensor = total / denominator
    return loss


@torch.no_grad()
def _of_both(student: Tensor, teacher: Tensor, k: int, temperature: float) -> opdc.TopK:
    """The teacher on the ids that either ranks first, each once."""
    own = opdc.topk(teacher, k, temperature=temperature)
    ids = torch.cat([own.ids, opdc.topk(student, k, temperature=temperature).ids], dim=-1)
    # Of one teacher's row, log-probs and logits differ by one number.
    scaled = teacher.gather(-1, ids).to(own.logprobs.dtype) / temperature
    logprobs = scaled - scaled[..., :1] + own.logprobs[..., :1]
    seen = (ids[..., k:, None] == ids[..., None, :k]).any(-1)
    twice = torch.cat([torch.zeros_like(own.ids, dtype=torch.bool), seen], dim=-1)
    return opdc.TopK(ids.masked_fill(twice, -1), logprobs)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | float | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_chunked_divergence_loss` of TRL's `DistillationTrainer`.

    `trl.trainer.distillation_trainer._chunked_divergence_loss = opdc.trl.chunked_divergence_loss`
    puts it in the place of TRL's. It is the divergences only: `opdc.trl.attach` brings any loss.

    Args:
        student_hidden_states, teacher_hidden_states: `(B, K, H)`, of a width each; a position that
            is masked is not read.
        student_lm_head_weight, teacher_lm_head_weight: `(V, H)`, also as a `DTensor`.
        completion_mask: `(B, K)`, not 0 where a position counts.
        beta: 0: forward KL, 1: reverse KL, between: JSD, arXiv 2306.13649.
        num_items_in_batch: the denominator; None: the positions that count, at least 1.
        student_lm_head_bias, teacher_lm_head_bias: `(V,)`.
        student_logit_scale, teacher_logit_scale: factors of the logits.
        student_final_logit_softcapping, teacher_final_logit_softcapping: bounds of the logits.
        temperature: divides the logits of both.

    Returns:
        the loss; the sum of the student's entropies, in nats, which has no gradient; the number of
        positions that count.

    >>> import opdc.trl, torch
    >>> _ = torch.manual_seed(0)
    >>> hidden, head = torch.randn(1, 3, 4), torch.randn(5, 4)
    >>> loss, entropy_sum, count = opdc.trl.chunked_divergence_loss(
    ...     hidden, hidden, head, head, torch.ones(1, 3), beta=1.0)
    >>> loss.item(), count.item()
    (0.0, 3)
    """
    student = projection(
        student_hidden_states,
        student_lm_head_weight,
        student_lm_head_bias,
        student_logit_scale,
        student_final_logit_softcapping,
    )
    teacher = projection(
        teacher_hidden_states,
        teacher_lm_head_weight,
        teacher_lm_head_bias,
        teacher_logit_scale,
        teacher_final_logit_softcapping,
    )
    mask = completion_mask != 0
    loss, metrics = opdc.jsd(
        student,
        teacher,
        beta=beta,
        mask=mask,
        temperature=temperature,
        num_items=num_items_in_batch,
        return_metrics=True,
    )
    return loss, metrics["student_entropy"].to(loss), mask.sum()


def projection(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> opdc.Projection:
    """A head that FSDP2 has cut is gathered here, once and not for each chunk."""
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    if isinstance(bias, DTensor):
        bias = bias.full_tensor()
    return opdc.Projection(hidden, weight, bias, scale=scale, softcap=softcap)
