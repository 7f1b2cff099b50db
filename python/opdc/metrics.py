"""What the losses report beside their value with `return_metrics=True`.

A dict of detached 0-dim float64 tensors, on the device of the logits. Almost all are *sums* over
the active positions, so that micro-batches and processes add up; `positions` is their number and
`mean` divides. Reading one (`item`) waits for a GPU.

* `nonfinite_rows`: rows whose loss is not finite; on a GPU also for values out of range, which are
  errors on the CPU
* `student_entropy`, `teacher_entropy`, `reverse_kl`, `forward_kl`: of the whole distributions
* `k1`, `k2`, `k3`: estimates `−R`, `½R²`, `e^R − 1 − R` of the reverse KL from the sampled token
* `clipped`: tokens on the clipped branch of the loss
* `trusted`: `M` of `opdc.tropd`; `selected`: `M` of `opdc.reopold`; `gated`: the positions of
  `opdc.eopd` and `opdc.aopd` that get the forward KL
* `student_mass`, `teacher_mass`: `P` and `Q` of a support; `slots`: its size; `overlap`: how many
  of its ids are among as many that the student ranks first
* `log_ratio_min`, `log_ratio_max`: the extremes of `R`; `+inf` and `−inf` without any position

A loss reports those that it computes; for a support the distributions are read for them alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._groups import exchangeable

_MINIMA = ("log_ratio_min",)
_MAXIMA = ("log_ratio_max",)


def mean(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums divided by `positions`, 0 where there are none; `positions` and extremes as they are.

    >>> import opdc, torch
    >>> student, teacher = torch.zeros(2, 3), torch.zeros(2, 3)
    >>> _, metrics = opdc.reverse_kl(student, teacher, return_metrics=True)
    >>> round(opdc.metrics.mean(metrics)["student_entropy"].item(), 4)
    1.0986
    """
    if "positions" not in metrics:
        raise ValueError("metrics must hold `positions`, the number that the sums are divided by")
    count = metrics["positions"].clamp(min=1)
    untouched = ("positions", *_MINIMA, *_MAXIMA)
    return {name: x if name in untouched else x / count for name, x in metrics.items()}


def combine(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of several micro-batches, or processes, as one: sums added, extremes compared.

    A name that some of them lack counts as 0 in these.

    >>> import opdc, torch
    >>> student, teacher = torch.zeros(2, 3), torch.zeros(2, 3)
    >>> parts = [opdc.reverse_kl(student, teacher, return_metrics=True)[1] for _ in range(3)]
    >>> opdc.metrics.combine(parts)["positions"].item()
    6.0
    """
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = _joined(name, total[name], value) if name in total else value
    return total


def _joined(name: str, one: Tensor, other: Tensor) -> Tensor:
    if name in _MINIMA:
        return torch.minimum(one, other)
    return torch.maximum(one, other) if name in _MAXIMA else one + other


def all_reduce(
    metrics: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """The metrics over all processes of `group`: sums added, extremes compared."""
    extremes = [name for name in metrics if name in (*_MINIMA, *_MAXIMA)]
    sums = [name for name in metrics if name not in extremes]
    reduced = _reduced({name: metrics[name] for name in sums}, dist.ReduceOp.SUM, group)
    if extremes:
        # One message for both: a maximum is a minimum with the sign turned.
        lowest = _reduced(_turned(metrics, extremes), dist.ReduceOp.MIN, group)
        reduced |= _turned(lowest, extremes)
    return {name: reduced[name] for name in metrics}


def _turned(metrics: Mapping[str, Tensor], extremes: Iterable[str]) -> dict[str, Tensor]:
    return {name: -metrics[name] if name in _MAXIMA else metrics[name] for name in extremes}


def _reduced(
    metrics: Mapping[str, Tensor], operation: Any, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    total = torch.stack(list(metrics.values()))
    message = total.to(exchangeable(group, total.device))
    dist.all_reduce(message, operation, group)
    return dict(zip(metrics, message.to(total.device).unbind(), strict=True))
