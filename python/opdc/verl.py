"""opdc's losses in verl, chosen by `distillation.distillation_loss.loss_mode`.

verl has a registry of distillation losses, in which an entry gets what verl knows: the teacher's
top K, from its inference server, and the student's logits, packed without padding. This module puts
losses of `opdc.nn` there. Nothing here imports verl before it is needed; imported *by* verl it
registers `LOSSES` at once:

    VERL_USE_EXTERNAL_MODULES="opdc.verl" python -m verl.trainer.main_ppo \\
        distillation.enabled=True \\
        distillation.distillation_loss.loss_mode=opdc_lsm \\
        distillation.distillation_loss.topk=32 \\
        distillation.distillation_loss.use_policy_gradient=False \\
        distillation.distillation_loss.loss_max_clamp=null

Every process of the job has to do that, the driver too: verl looks the name up when it reads its
configuration. From verl 0.9 on it does so by itself, an installed opdc being a plugin by the entry
point `verl.plugins`; where the name is unknown all the same, `opdc.verl.register()` says why. Other
settings of a loss need a module of one's own in the variable:

    import opdc, opdc.verl
    opdc.verl.register({"jsd_of_a_tenth": opdc.nn.JSDLoss(beta=0.1, normalize="tail")})

The signatures were read in verl 0.9.0 (commit 483b8a0), and the losses run with it and with the
0.10.0 development version of August 2026 (1dda039); those of 0.8.0 are the same. The engines may be
those for FSDP, VeOmni and Megatron: the vocabulary may be split over Megatron's tensor parallel
ranks, the sequence by Ulysses or context parallelism. In another version `register` is one error
that names what is missing.

What is different from the loss modes of verl itself:

* verl reduces: `loss_agg_mode`, with its global counts, takes the place of `reduction` and
  `num_items`. It cuts the loss of a position at `loss_max_clamp`, whose gradient is 0 beyond (10
  unless set to null). Its `log_prob_min_clamp` is not read.
* The gradient is that of the loss: `use_policy_gradient=True`, which would take its value for a
  reward, is an error. So is `use_fused_kernels`, which makes no logits.
* verl divides the student's logits by the rollout's temperature and asks the teacher for log-probs
  at temperature 1: distil with a rollout temperature of 1. The losses add no temperature here.
* Of the sampled token the teacher's log-prob is known only if it is among the top K. `tropd` and
  `aopd` take the others for tokens that the teacher excludes: outside the trust region, where they
  get the forward KL. Losses that need the log-prob itself are refused; verl's own modes `k1` and
  `k3` ask its server for nothing else.
* Logits are compared where they are, on CPUs and CUDA GPUs. Those on another accelerator are copied
  to the CPU, and their gradient back.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import metrics, nn
from .support import TopK

__all__ = ["LOSSES", "register"]

LOSSES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "opdc_aopd": nn.AOPDLoss(),
        "opdc_forward_kl": nn.ForwardKLLoss(normalize="tail"),
        "opdc_jsd": nn.JSDLoss(normalize="tail"),
        "opdc_lsm": nn.LSMLoss(),
        "opdc_reverse_kl": nn.ReverseKLLoss(normalize="tail"),
        "opdc_tropd": nn.TrOPDLoss(),
    }
)
"""What is registered by default, by `loss_mode`. `topk` of verl's configuration is the `k` of all;
the divergences see the mass beyond it as one more id."""

_LOSSES = "verl.trainer.distillation.losses"
_NAMES = {  # what is used of verl, and the arguments that are used of it
    (_LOSSES, "DistillationLossSettings"): ("names", "use_topk"),
    (_LOSSES, "register_distillation_loss"): ("loss_settings",),
    (_LOSSES, "get_distillation_loss_fn"): ("loss_name",),
    (_LOSSES, "compute_topk_loss"): (
        *("config", "distillation_config", "data", "student_logits", "data_format"),
    ),
    ("verl.workers.utils.padding", "no_padding_2_padding"): ("tensor", "data"),
    ("verl.utils.metric", "Metric"): ("aggregation", "value"),
}
_LOG_RATIOS = ("k1", "k2", "k3", "log_ratio_min", "log_ratio_max")  # of the token: not always known

_registered: dict[str, Callable[..., Any]] = {}


def register(losses: Mapping[str, Callable[..., Any]] | None = None) -> None:
    """Make losses known to verl, as the `loss_mode` of their names. A later call may replace them.

    Args:
        losses: modules of `opdc.nn`, or callables with the same `forward` that give one loss for
            each position and, with `return_metrics=True`, sums over positions beside it. Of a
            module a copy with `reduction="none"` is taken, for verl to reduce. None: `LOSSES`.

    Raises:
        ImportError: verl is not there.
        RuntimeError: it is another verl than this was made for.
        TypeError: a loss that needs the teacher's log-probs of all sampled tokens.
        ValueError: the name is one of verl's own.

    >>> import opdc.verl
    >>> sorted(opdc.verl.LOSSES)  # doctest: +NORMALIZE_WHITESPACE
    ['opdc_aopd', 'opdc_forward_kl', 'opdc_jsd', 'opdc_lsm', 'opdc_reverse_kl', 'opdc_tropd']
    """
    _require_verl()
    verl = importlib.import_module(_LOSSES)
    for name, loss in (LOSSES if losses is None else losses).items():
        loss = _loss_of_positions(name, loss)
        try:
            known = verl.get_distillation_loss_fn(name)
        except ValueError:
            settings = verl.DistillationLossSettings(names=[name], use_topk=True)
            verl.register_distillation_loss(settings)(_of_responses)
        else:
            if known is not _of_responses:
                raise ValueError(
                    f'verl has a distillation loss "{name}" already: take another name'
                )
        _registered[name] = loss
    # The registry decides on what is done with the loss of each position, not on what is computed
    # from the logits: that is one function of verl, here asked only for losses that are not ours.
    if not hasattr(verl.compute_topk_loss, "_before_opdc"):
        vars(verl)["compute_topk_loss"] = _dispatch(verl.compute_topk_loss)


def _require_verl() -> None:
    try:
        verl = importlib.import_module("verl")
    except ModuleNotFoundError as error:
        if error.name != "verl":
            raise  # verl is there; something that it needs is not
        raise ImportError("opdc.verl needs verl: pip install verl") from None
    missing = []
    for (module, name), arguments in _NAMES.items():
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            found = None
        if found is None:
            missing.append(f"{module}.{name}")
        elif not set(arguments) <= set(inspect.signature(found).parameters):
            missing.append(f"{module}.{name}({', '.join(arguments)})")
    if missing:
        version = getattr(verl, "__version__", "of an unknown version")
        raise RuntimeError(
            f"verl {version} has no {', '.join(missing)}: opdc.verl was made for verl 0.8 to 0.9; "
            "install one of these, or an opdc for this one"
        )


def _loss_of_positions(name: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(loss, (nn.K1Loss, nn.K2Loss, nn.K3Loss, nn.EOPDLoss, nn.REOPOLDLoss)):
        raise TypeError(
            f'"{name}" is a {type(loss).__name__}, which needs the teacher\'s log-prob of every '
            "sampled token, and verl's teacher gives only those of its top K: use verl's own "
            'loss_mode "k1" or "k3", or a loss of the top K'
        )
    if getattr(loss, "support", None) not in (None, "teacher"):
        raise TypeError(
            f'"{name}" has support="{getattr(loss, "support", None)}", and verl gives the '
            'teacher\'s top K only: use support="teacher"'
        )
    if not hasattr(loss, "reduction"):
        return loss
    loss = copy.copy(loss)
    loss.reduction = "none"  # type: ignore[attr-defined]
    return loss


def _dispatch(verl_loss: Callable[..., Any]) -> Callable[..., Any]:
    """verl's step from logits to one loss for each position, with the losses that are registered
    here beside its own."""

    @functools.wraps(verl_loss)
    def compute_topk_loss(
        config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
    ) -> Any:
        loss = _registered.get(distillation_config.distillation_loss.loss_mode)
        if loss is None:
            return verl_loss(config, distillation_config, data, student_logits, data_format)
        return _of_logits(loss, config, data, student_logits, data_format)

    compute_topk_loss._before_opdc = verl_loss  # type: ignore[attr-defined]
    return compute_topk_loss


def _of_logits(
    loss: Callable[..., Any], config: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """The loss of each position `(1, N)`, from logits `(1, N, V)` of packed sequences: what verl
    asks of its logits processor. `N` are the positions of this rank, `V` its ids."""
    where, mask = _response_positions(data)
    input_ids = data["input_ids"]
    offsets = input_ids.offsets()

    def packed(values: Tensor) -> Tensor:
        """Values of the response's positions, where the packed sequences have them."""
        count = input_ids.values().shape[0]
        whole = values.new_zeros(count + 1)  # the last one is for those that are none
        return whole.index_put_((where.where(mask, count),), values)[:-1]

    layout, group = _layout(config.strategy, data_format, offsets)
    ids = layout(data["teacher_ids"].values())
    logprobs = layout(data["teacher_logprobs"].values())
    # A position predicts the token after it. The last one of a sequence predicts none: not active.
    tokens = layout(input_ids.values().roll(-1))
    known = torch.where(ids == tokens.unsqueeze(-1), logprobs, -math.inf).amax(-1)
    old_logprobs = data.get("old_log_probs", None)
    if old_logprobs is not None:
        old_logprobs = layout(packed(_padded(old_logprobs, 0.0)))
    if hasattr(loss, "process_group"):
        loss.process_group = group
    elif group is not None:
        raise TypeError(
            "a loss for a vocabulary that is split over processes needs the attribute "
            f"process_group, which {type(loss).__name__} has not: take a module of opdc.nn"
        )
    losses, sums = loss(
        _placed(student_logits),
        TopK(ids, logprobs, token_logprobs=known),
        tokens=tokens,
        mask=layout(packed(mask)),
        old_logprobs=old_logprobs,
        return_metrics=True,
    )
    losses = losses.to(student_logits.device)
    # verl gathers values of positions over sequence parallel ranks. Where each position carries the
    # mean of its rank, the mean over the response is that of all ranks.
    means = {
        f"opdc/{name}": torch.zeros_like(losses, requires_grad=False) + mean.to(losses)
        for name, mean in metrics.mean(sums).items()
        if name not in ("positions", *_LOG_RATIOS)
    }
    return {"distillation_losses": losses, **means}


def _response_positions(data: Any) -> tuple[Tensor, Tensor]:
    """The packed position that predicts each token of the responses `(B, R)`, and their mask."""
    padding = importlib.import_module("verl.workers.utils.padding")
    values = data["input_ids"].values()
    where = padding.no_padding_2_padding(torch.arange(len(values), device=values.device), data)
    mask = _padded(data["response_mask"], False).bool()
    if mask.shape != where.shape:
        raise ValueError(
            f"response_mask has the shape {tuple(mask.shape)}, but the responses have the shape "
            f"{tuple(where.shape)}"
        )
    return where, mask


def _padded(tensor: Tensor, padding: float) -> Tensor:
    return tensor.to_padded_tensor(padding) if tensor.is_nested else tensor


def _layout(
    strategy: str, data_format: str, offsets: Tensor
) -> tuple[Callable[[Tensor], Tensor], Any]:
    """How this rank has packed values `(N_all, …)` beside its logits: `(1, N, …)`, where opdc
    computes. And the processes that the vocabulary is split over."""
    if strategy == "megatron":
        util = importlib.import_module("verl.models.mcore.util")
        name = "preprocess_thd_engine" if data_format == "thd" else "preprocess_bshd_engine"
        preprocess = getattr(util, name)

        def of_megatron(values: Tensor) -> Tensor:
            nested = torch.nested.nested_tensor_from_jagged(values, offsets)
            local: Tensor = preprocess(nested, pre_process=True)[0]
            return _placed(local)

        state = importlib.import_module("megatron.core.parallel_state")
        parallel = state.get_tensor_model_parallel_world_size() > 1
        return of_megatron, state.get_tensor_model_parallel_group() if parallel else None

    ulysses = importlib.import_module("verl.utils.ulysses")
    split = ulysses.get_ulysses_sequence_parallel_world_size() > 1

    def of_fsdp(values: Tensor) -> Tensor:
        local: Tensor = values.unsqueeze(0)
        return _placed(ulysses.slice_input_tensor(local, dim=1) if split else local)

    return of_fsdp, None


def _placed(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else tensor.cpu()


def _of_responses(
    *, config: Any, distillation_config: Any, model_output: Mapping[str, Tensor], data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The losses of the responses `(B, R)` and their metrics: an entry of verl's registry."""
    settings = distillation_config.distillation_loss
    if settings.use_policy_gradient:
        raise ValueError(
            f'loss_mode="{settings.loss_mode}" brings its own gradient: set '
            "distillation.distillation_loss.use_policy_gradient=False"
        )
    named = [name for name in model_output if name.startswith("opdc/")]
    if not named:
        raise RuntimeError(
            f'loss_mode="{settings.loss_mode}" was not computed, because no logits were made: set '
            "use_fused_kernels=False in the model's configuration"
        )
    pad = importlib.import_module("verl.workers.utils.padding").no_padding_2_padding
    metric = importlib.import_module("verl.utils.metric").Metric
    mask = _padded(data["response_mask"], False).bool()
    losses: Tensor = pad(model_output["distillation_losses"], data)
    count = mask.sum()
    means = {name: pad(model_output[name], data).where(mask, 0).sum() / count for name in named}
    return losses, {name: metric("mean", mean) for name, mean in means.items()}


if "verl" in sys.modules:  # imported by verl, or beside it
    try:
        register()
    except RuntimeError as error:  # another verl, which may be wanted for other things
        warnings.warn(str(error), stacklevel=2)
