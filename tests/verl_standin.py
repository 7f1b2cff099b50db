"""What opdc.verl needs of verl 0.9, in few lines: its names, their arguments and the shapes of what
they take and give. Not a line of verl; it stands in where verl cannot be installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

VERSION = "0.9.0"


@dataclass
class DistillationLossSettings:
    names: list[str]
    use_topk: bool = False
    use_estimator: bool = False


class Metric:
    def __init__(self, aggregation: str, value: Tensor) -> None:
        self.aggregation, self.value = aggregation, float(value)


def no_padding_2_padding(tensor: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Values of the positions that predict the responses, `(B, longest response, …)`."""
    values = tensor.values() if tensor.is_nested else tensor
    responses = data["responses"].offsets().diff().tolist()
    ends = data["input_ids"].offsets()[1:].tolist()
    rows = [values[end - n - 1 : end - 1] for end, n in zip(ends, responses, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class _Losses(ModuleType):
    """verl.trainer.distillation.losses."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.registry: dict[str, Callable[..., Any]] = {"forward_kl_topk": self._own_mode}
        self.settings: dict[str, DistillationLossSettings] = {}
        self.DistillationLossSettings = DistillationLossSettings

        # Functions, not methods: as in verl they are replaced in the module.
        def register_distillation_loss(
            loss_settings: DistillationLossSettings,
        ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
            def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
                for name in loss_settings.names:
                    if name in self.registry:
                        raise ValueError(f"{name} is there already")
                    self.registry[name], self.settings[name] = function, loss_settings
                return function

            return decorator

        def get_distillation_loss_fn(loss_name: str) -> Callable[..., Any]:
            if loss_name not in self.registry:
                raise ValueError(f"no {loss_name}")
            return self.registry[loss_name]

        def compute_topk_loss(
            config: Any,
            distillation_config: Any,
            data: Any,
            student_logits: Tensor,
            data_format: str,
        ) -> dict[str, Tensor]:
            return {"distillation_losses": student_logits.sum(-1)}

        self.register_distillation_loss = register_distillation_loss
        self.get_distillation_loss_fn = get_distillation_loss_fn
        self.compute_topk_loss = compute_topk_loss

    @staticmethod
    def _own_mode(*, config: Any, distillation_config: Any, model_output: Any, data: Any) -> Any:
        return no_padding_2_padding(model_output["distillation_losses"], data), {}


def _padded_between(group: dist.ProcessGroup | None) -> Callable[..., tuple[Tensor, None]]:
    """As Megatron packs sequences: each padded to a multiple of the tensor parallel size."""
    size = 1 if group is None else dist.get_world_size(group)

    def preprocess_thd_engine(input_ids: Tensor, pre_process: bool = True) -> tuple[Tensor, None]:
        parts = []
        for row in input_ids.unbind():
            padding = row.new_zeros((-len(row) % size, *row.shape[1:]))
            parts += [row, padding]
        return torch.cat(parts).unsqueeze(0), None

    return preprocess_thd_engine


@contextlib.contextmanager
def installed(
    *, ulysses: dist.ProcessGroup | None = None, tensor_parallel: dist.ProcessGroup | None = None
) -> Iterator[_Losses]:
    """verl in `sys.modules`, without importing opdc.verl anew."""

    def slice_input_tensor(x: Tensor, dim: int, padding: bool = True) -> Tensor:
        size, rank = dist.get_world_size(ulysses), dist.get_rank(ulysses)
        missing = list(x.shape)
        missing[dim] = -x.shape[dim] % size
        return torch.cat([x, x.new_zeros(missing)], dim).chunk(size, dim)[rank]

    losses = _Losses("verl.trainer.distillation.losses")
    contents = {
        "verl": {"__version__": VERSION, "__path__": []},
        "verl.trainer.distillation.losses": None,
        "verl.workers.utils.padding": {"no_padding_2_padding": no_padding_2_padding},
        "verl.utils.metric": {"Metric": Metric},
        "verl.utils.ulysses": {
            "get_ulysses_sequence_parallel_world_size": lambda: (
                1 if ulysses is None else dist.get_world_size(ulysses)
            ),
            "slice_input_tensor": slice_input_tensor,
        },
        "verl.models.mcore.util": {
            "preprocess_thd_engine": _padded_between(tensor_parallel),
            "preprocess_bshd_engine": None,
        },
        "megatron.core.parallel_state": {
            "get_tensor_model_parallel_world_size": lambda: (
                1 if tensor_parallel is None else dist.get_world_size(tensor_parallel)
            ),
            "get_tensor_model_parallel_group": lambda: tensor_parallel,
        },
    }
    modules: dict[str, ModuleType] = {}
    for name, values in contents.items():
        parents = name.split(".")
        for length in range(1, len(parents)):
            package = ".".join(parents[:length])
            modules.setdefault(package, ModuleType(package)).__path__ = []
        modules[name] = losses if values is None else ModuleType(name)
        vars(modules[name]).update(values or {})
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield losses
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def configuration(loss_mode: str, **changed: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    """verl's configurations of the actor and of distillation, as far as they are read."""
    settings = {"loss_mode": loss_mode, "use_policy_gradient": False, "strategy": "fsdp", **changed}
    actor = SimpleNamespace(strategy=settings.pop("strategy"))
    return actor, SimpleNamespace(distillation_loss=SimpleNamespace(**settings))


def step(
    loss_mode: str,
    micro_batches: list[tuple[dict[str, Tensor], Tensor]],
    *,
    gather: Callable[[Tensor], Tensor] = lambda values: values,
    **changed: Any,
) -> tuple[Tensor, list[dict[str, Metric]]]:
    """The loss of an update over micro-batches of data and packed logits, `loss_agg_mode`
    "token-mean", and the metrics of each; `gather` makes whole sequences of a rank's positions."""
    losses = sys.modules["verl.trainer.distillation.losses"]
    actor, distillation = configuration(loss_mode, **changed)
    total, all_metrics = torch.zeros(()), []
    tokens = sum(int(data["response_mask"].sum()) for data, _ in micro_batches)
    for data, logits in micro_batches:
        output = losses.compute_topk_loss(actor, distillation, data, logits, "thd")
        offsets = data["input_ids"].offsets()
        nested = {}
        for name, values in output.items():
            assert values.shape == logits.shape[:2], name
            whole = gather(values.squeeze(0))[: int(offsets[-1])]
            nested[name] = torch.nested.nested_tensor_from_jagged(whole, offsets)
        of_responses, metrics = losses.get_distillation_loss_fn(loss_mode)(
            config=actor, distillation_config=distillation, model_output=nested, data=data
        )
        mask = data["response_mask"]
        mask = mask.to_padded_tensor(0) if mask.is_nested else mask
        # As verl has it: a product with the mask, which a NaN would not survive.
        total = total + (of_responses * mask).sum() / tokens
        all_metrics.append(metrics)
    return total, all_metrics
