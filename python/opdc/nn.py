"""The losses as modules: what is fixed goes into the constructor, what changes into the call.

Every module has the same `forward`, so that a training loop can hold any of them:

    loss(student, teacher, *, tokens=None, mask=None, weights=None, old_logprobs=None,
         reference_logprobs=None, prefix_mask=None, temperature=None, num_items=None,
         return_metrics=False)

A loss ignores what it has no use for. `opdc.functional` says what the arguments mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import functional

__all__ = [
    "ForwardKLLoss",
    "JSDLoss",
    "K1Loss",
    "K2Loss",
    "K3Loss",
    "ReverseKLLoss",
    "SkewKLLoss",
]


class _DistillationLoss(torch.nn.Module):
    """The part that all losses share.

    `temperature=None` leaves it to the caller of the module, 1.0 if there is none; a number here
    wins over the caller's.
    """

    _function: ClassVar[Callable[..., functional.Loss]]
    _sampled: ClassVar[tuple[str, ...]] = ()  # what the function takes of forward's own arguments
    _options: ClassVar[tuple[str, ...]] = ()  # what it takes of the constructor's

    def __init__(
        self,
        *,
        temperature: float | None = None,
        valid_vocab: int | None = None,
        reduction: str = "mean",
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.valid_vocab = valid_vocab
        self.reduction = reduction
        self.inplace = inplace

    @property
    def uses_num_items(self) -> bool:
        """Whether `num_items` may be the number of tokens in all micro-batches of a step."""
        return self.reduction == "mean"

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        reference_logprobs: Tensor | None = None,
        prefix_mask: Tensor | None = None,  # for losses that treat prefixes apart
        temperature: float | None = None,
        num_items: float | Tensor | None = None,
        return_metrics: bool = False,
    ) -> functional.Loss:
        if self.temperature is not None:
            temperature = self.temperature
        sampled = {
            "tokens": tokens,
            "old_logprobs": old_logprobs,
            "reference_logprobs": reference_logprobs,
        }
        return type(self)._function(
            student,
            teacher,
            **{name: sampled[name] for name in self._sampled},
            **{name: getattr(self, name) for name in self._options},
            temperature=1.0 if temperature is None else temperature,
            mask=mask,
            weights=weights,
            valid_vocab=self.valid_vocab,
            reduction=self.reduction,
            num_items=num_items,
            inplace=self.inplace,
            return_metrics=return_metrics,
        )

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "training"
        )


class ReverseKLLoss(_DistillationLoss):
    """`opdc.reverse_kl` as a module.

    >>> import opdc, torch
    >>> opdc.nn.ReverseKLLoss(temperature=2.0)
    ReverseKLLoss(temperature=2.0, valid_vocab=None, reduction='mean', inplace=False)
    """

    _function = staticmethod(functional.reverse_kl)


class ForwardKLLoss(_DistillationLoss):
    """`opdc.forward_kl` as a module.

    >>> import opdc, torch
    >>> opdc.nn.ForwardKLLoss(reduction="seq_mean").uses_num_items
    False
    """

    _function = staticmethod(functional.forward_kl)


class JSDLoss(_DistillationLoss):
    """`opdc.jsd` as a module.

    >>> import opdc, torch
    >>> loss = opdc.nn.JSDLoss(beta=0.1)
    >>> loss(torch.zeros(2, 3), torch.zeros(2, 3))
    tensor(0.)
    """

    _function = staticmethod(functional.jsd)
    _options = ("beta",)

    def __init__(self, *, beta: float = 0.5, **common: Any) -> None:
        super().__init__(**common)
        self.beta = beta


class SkewKLLoss(_DistillationLoss):
    """`opdc.skew_kl` as a module.

    >>> import opdc, torch
    >>> loss = opdc.nn.SkewKLLoss(alpha=0.2, direction="reverse")
    >>> loss(torch.zeros(2, 3), torch.zeros(2, 3))
    tensor(0.)
    """

    _function = staticmethod(functional.skew_kl)
    _options = ("alpha", "direction")

    def __init__(self, *, alpha: float = 0.1, direction: str = "forward", **common: Any) -> None:
        super().__init__(**common)
        self.alpha = alpha
        self.direction = direction


class K1Loss(_DistillationLoss):
    """`opdc.k1` as a module; needs `tokens`.

    >>> import opdc, torch
    >>> loss = opdc.nn.K1Loss(discount=0.5)
    >>> loss(torch.zeros(2, 3), torch.zeros(2, 3), tokens=torch.tensor([0, 2]))
    tensor(0.)
    """

    _function = staticmethod(functional.k1)
    _sampled = ("tokens", "old_logprobs", "reference_logprobs")
    _options = ("clip_range", "advantage", "discount", "reward_scale")

    def __init__(
        self,
        *,
        clip_range: float | tuple[float, float] | None = None,
        advantage: str = "old",
        discount: float = 0.0,
        reward_scale: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.clip_range = clip_range
        self.advantage = advantage
        self.discount = discount
        self.reward_scale = reward_scale


class K2Loss(_DistillationLoss):
    """`opdc.k2` as a module; needs `tokens`.

    >>> import opdc, torch
    >>> loss = opdc.nn.K2Loss(reduction="none")
    >>> loss(torch.zeros(1, 3), torch.zeros(1, 3), tokens=torch.tensor([1]))
    tensor([0.])
    """

    _function = staticmethod(functional.k2)
    _sampled = ("tokens",)


class K3Loss(_DistillationLoss):
    """`opdc.k3` as a module; needs `tokens`.

    >>> import opdc, torch
    >>> loss = opdc.nn.K3Loss(reduction="none")
    >>> loss(torch.zeros(1, 3), torch.zeros(1, 3), tokens=torch.tensor([1]))
    tensor([0.])
    """

    _function = staticmethod(functional.k3)
    _sampled = ("tokens",)
