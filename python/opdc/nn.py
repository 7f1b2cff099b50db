"""The losses as modules: what is fixed goes into the constructor, what changes into the call.

Every module has the same `forward`, so that a training loop can hold any of them:

    loss(student, teacher, *, tokens=None, mask=None, weights=None, old_logprobs=None,
         reference_logprobs=None, prefix_mask=None, temperature=None, num_items=None,
         return_metrics=False)

A loss ignores what it has no use for. `opdc.functional` says what the arguments mean.

The constructors take the loss's own options and, as `common`, `temperature`, `valid_vocab`,
`reduction`, `inplace` and `process_group` of `opdc.functional.Common`. A `temperature` given there
wins over the one of the call; the default, None, leaves it to the call, and is 1.0 if that names
none. `uses_num_items` says whether `num_items` may be a count of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import functional
from ._arguments import Logits, Loss, Teacher

__all__ = [
    "AOPDLoss",
    "EOPDLoss",
    "ForwardKLLoss",
    "JSDLoss",
    "K1Loss",
    "K2Loss",
    "K3Loss",
    "LSMLoss",
    "REOPOLDLoss",
    "ReverseKLLoss",
    "SkewKLLoss",
    "TrOPDLoss",
]


class _DistillationLoss(torch.nn.Module):
    """The part that all losses share.

    `temperature=None` leaves it to the caller of the module, 1.0 if there is none; a number here
    wins over the caller's.
    """

    _function: ClassVar[Callable[..., Loss]]
    _sampled: ClassVar[tuple[str, ...]] = ()  # what the function takes of forward's own arguments
    _options: ClassVar[tuple[str, ...]] = ()  # what it takes of the constructor's

    def __init__(
        self,
        *,
        temperature: float | None = None,
        valid_vocab: int | None = None,
        reduction: str = "mean",
        inplace: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.valid_vocab = valid_vocab
        self.reduction = reduction
        self.inplace = inplace
        self.process_group = process_group

    @property
    def uses_num_items(self) -> bool:
        """Whether `num_items` may be the number of tokens in all micro-batches of a step."""
        return self.reduction == "mean"

    def forward(
        self,
        student: Logits,
        teacher: Teacher,
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
    ) -> Loss:
        if self.temperature is not None:
            temperature = self.temperature
        sampled = {
            "tokens": tokens,
            "old_logprobs": old_logprobs,
            "reference_logprobs": reference_logprobs,
            "prefix_mask": prefix_mask,
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
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "training"
        )


class _SupportLoss(_DistillationLoss):
    """A divergence over the vocabulary or, with `support`, over a part of it."""

    _sampled: ClassVar[tuple[str, ...]] = ("tokens",)
    _options: ClassVar[tuple[str, ...]] = ("support", "k", "normalize")

    def __init__(
        self,
        *,
        support: str | None = None,
        k: int | None = None,
        normalize: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.support = support
        self.k = k
        self.normalize = normalize


class ReverseKLLoss(_SupportLoss):
    """`opdc.reverse_kl` as a module.

    >>> import opdc, torch
    >>> opdc.nn.ReverseKLLoss(temperature=2.0).temperature
    2.0
    """

    _function = staticmethod(functional.reverse_kl)


class ForwardKLLoss(_SupportLoss):
    """`opdc.forward_kl` as a module.

    >>> import opdc, torch
    >>> opdc.nn.ForwardKLLoss(reduction="seq_mean").uses_num_items
    False
    """

    _function = staticmethod(functional.forward_kl)


class JSDLoss(_SupportLoss):
    """`opdc.jsd` as a module.

    >>> import opdc, torch
    >>> loss = opdc.nn.JSDLoss(beta=0.1)
    >>> loss(torch.zeros(2, 3), torch.zeros(2, 3))
    tensor(0.)
    """

    _function = staticmethod(functional.jsd)
    _options: ClassVar[tuple[str, ...]] = ("beta", *_SupportLoss._options)

    def __init__(self, *, beta: float = 0.5, **common: Any) -> None:
        super().__init__(**common)
        self.beta = beta


class LSMLoss(_DistillationLoss):
    """`opdc.lsm` as a module.

    >>> import opdc, torch
    >>> opdc.nn.LSMLoss(k=2)(torch.zeros(2, 3), torch.zeros(2, 3))
    tensor(0.)
    """

    _function = staticmethod(functional.lsm)
    _sampled: ClassVar[tuple[str, ...]] = ("tokens",)
    _options: ClassVar[tuple[str, ...]] = ("k", "support")

    def __init__(self, *, k: int | None = None, support: str | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.k = k
        self.support = support


class SkewKLLoss(_DistillationLoss):
    """`opdc.skew_kl` as a module.

    >>> import opdc, torch
    >>> loss = opdc.nn.SkewKLLoss(alpha=0.2, direction="reverse")
    >>> loss(torch.zeros(2, 3), torch.zeros(2, 3))
    tensor(0.)
    """

    _function = staticmethod(functional.skew_kl)
    _options: ClassVar[tuple[str, ...]] = ("alpha", "direction")

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
    _sampled: ClassVar[tuple[str, ...]] = ("tokens", "old_logprobs", "reference_logprobs")
    _options: ClassVar[tuple[str, ...]] = ("clip_range", "advantage", "discount", "reward_scale")

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
    _sampled: ClassVar[tuple[str, ...]] = ("tokens",)


class K3Loss(_DistillationLoss):
    """`opdc.k3` as a module; needs `tokens`.

    >>> import opdc, torch
    >>> loss = opdc.nn.K3Loss(reduction="none")
    >>> loss(torch.zeros(1, 3), torch.zeros(1, 3), tokens=torch.tensor([1]))
    tensor([0.])
    """

    _function = staticmethod(functional.k3)
    _sampled: ClassVar[tuple[str, ...]] = ("tokens",)


class TrOPDLoss(_DistillationLoss):
    """`opdc.tropd` as a module; needs `tokens`.

    >>> import opdc, torch
    >>> loss = opdc.nn.TrOPDLoss(k=2, region="expected")
    >>> loss(torch.zeros(2, 3), torch.zeros(2, 3), tokens=torch.tensor([0, 2]))
    tensor(0.)
    """

    _function = staticmethod(functional.tropd)
    _sampled: ClassVar[tuple[str, ...]] = ("tokens", "old_logprobs", "prefix_mask")
    _options: ClassVar[tuple[str, ...]] = (
        *("k", "region", "outlier", "threshold", "prefix_weight", "clip_range", "advantage"),
        "generator",
    )

    def __init__(
        self,
        *,
        k: int | None = None,
        region: str = "sampled",
        outlier: str = "forward_kl",
        threshold: float | None = None,
        prefix_weight: float = 1e-3,
        clip_range: float | tuple[float, float] | None = None,
        advantage: str = "old",
        generator: torch.Generator | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.k = k
        self.region = region
        self.outlier = outlier
        self.threshold = threshold
        self.prefix_weight = prefix_weight
        self.clip_range = clip_range
        self.advantage = advantage
        self.generator = generator


class EOPDLoss(_DistillationLoss):
    """`opdc.eopd` as a module; needs `tokens`.

    >>> import opdc, torch
    >>> loss = opdc.nn.EOPDLoss(entropy_threshold=2.0, k=2)
    >>> loss(torch.zeros(2, 3), torch.zeros(2, 3), tokens=torch.tensor([0, 2]))
    tensor(0.)
    """

    _function = staticmethod(functional.eopd)
    _sampled: ClassVar[tuple[str, ...]] = ("tokens", "old_logprobs")
    _options: ClassVar[tuple[str, ...]] = ("k", "entropy_threshold", "forward_weight", "clip_range")

    def __init__(
        self,
        *,
        k: int | None = None,
        entropy_threshold: float = 0.8,
        forward_weight: float = 1.0,
        clip_range: float | tuple[float, float] | None = 0.2,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.k = k
        self.entropy_threshold = entropy_threshold
        self.forward_weight = forward_weight
        self.clip_range = clip_range


class REOPOLDLoss(_DistillationLoss):
    """`opdc.reopold` as a module; needs `tokens`. Set `phase` when it is time to switch.

    >>> import opdc, torch
    >>> loss = opdc.nn.REOPOLDLoss()
    >>> loss.phase = "refinement"
    >>> loss(torch.zeros(2, 3), torch.zeros(2, 3), tokens=torch.tensor([0, 2]))
    tensor(0.)
    """

    _function = staticmethod(functional.reopold)
    _sampled: ClassVar[tuple[str, ...]] = ("tokens", "old_logprobs")
    _options: ClassVar[tuple[str, ...]] = ("phase", "mixture", "keep", "entropy_threshold")

    def __init__(
        self,
        *,
        phase: str = "exploration",
        mixture: float = 0.3,
        keep: float = 0.2,
        entropy_threshold: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.phase = phase
        self.mixture = mixture
        self.keep = keep
        self.entropy_threshold = entropy_threshold

    @property
    def uses_num_items(self) -> bool:
        """False: the denominator is the number of positions that the loss selects."""
        return False


class AOPDLoss(_DistillationLoss):
    """`opdc.aopd` as a module; needs `tokens`.

    >>> import opdc, torch
    >>> loss = opdc.nn.AOPDLoss(k=3)
    >>> loss(torch.zeros(2, 3), torch.zeros(2, 3), tokens=torch.tensor([0, 2]))
    tensor(0.)
    """

    _function = staticmethod(functional.aopd)
    _sampled: ClassVar[tuple[str, ...]] = ("tokens",)
    _options: ClassVar[tuple[str, ...]] = ("k", "threshold")

    def __init__(self, *, k: int | None = None, threshold: float = 0.0, **common: Any) -> None:
        super().__init__(**common)
        self.k = k
        self.threshold = threshold
