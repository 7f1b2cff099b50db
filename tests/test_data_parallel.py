"""The batch spread over processes: gradients and metrics are those of one process with all of it.

DistributedDataParallel and FSDP2 average the gradients of the processes. A loss that is divided by
the number of items of all of them is a share of the whole loss, and shares have to be added: the
loss is multiplied by the number of processes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

import opdc
from processes import Raised, attempt, on_ranks

V, H, BATCH, LENGTH = 21, 6, 6, 4
PROCESSES = 2


class Model(nn.Module):
    """A language model of one layer."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


class LossInside(Model):
    """The loss is a part of forward, where FSDP has put the weights together."""

    def forward(self, ids: Tensor, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_of(opdc.Projection(self.hidden(ids), self.head.weight), **arguments)


class HiddenOut(Model):
    """The head is applied outside."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids)


def loss_of(student: Any, *, teacher: Tensor, **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A divergence and a policy term."""
    tokens = keywords.pop("tokens")
    keywords["return_metrics"] = True
    divergence, metrics = opdc.jsd(student, teacher, **keywords)
    policy, of_tokens = opdc.k1(student, teacher, tokens, **keywords)
    return divergence + policy, metrics | of_tokens


def step(model: nn.Module, batch: dict[str, Tensor], num_items: Tensor, scale: float = 1.0) -> Any:
    """Gradients arrive in the model; returns the loss and its metrics."""
    arguments = {name: x for name, x in batch.items() if name != "ids"} | {"num_items": num_items}
    used = model.module if isinstance(model, DistributedDataParallel) else model
    if isinstance(used, LossInside):
        loss, metrics = model(batch["ids"], **arguments)
    else:
        student = model(batch["ids"])
        if isinstance(used, HiddenOut):
            student = opdc.Projection(student, used.head.weight)
        loss, metrics = loss_of(student, **arguments)
    (scale * loss).backward()
    return loss.detach(), metrics


def model_of(kind: type[Model], tied: bool) -> Model:
    torch.manual_seed(1)
    return kind(tied).double()


def whole_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (BATCH, LENGTH)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[:2] = False  # so that the processes have different numbers of items
    return {
        "ids": torch.randint(0, V, shape, generator=generator),
        "teacher": torch.randn(*shape, V, generator=generator, dtype=torch.float64),
        "tokens": torch.randint(0, V, shape, generator=generator),
        "mask": mask,
    }


def share_of(group: Any) -> dict[str, Tensor]:
    """Unequal numbers of sequences."""
    mine = slice(0, 4) if dist.get_rank(group) == 0 else slice(4, BATCH)
    return {name: x[mine] for name, x in whole_batch().items()}


def items_of_all(mask: Tensor, group: Any) -> Tensor:
    items = mask.sum()
    dist.all_reduce(items, group=group)
    return items


def whole(parameter: Tensor) -> Tensor:
    """A gradient of which every process may have a shard."""
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


# DistributedDataParallel's destructor may wait for ever for a thread that waits for it.
_never_destroyed: list[nn.Module] = []


def one_of_several(group: Any, wrapper: str, kind: type[Model], tied: bool) -> Any:
    model: nn.Module = model_of(kind, tied)
    if wrapper == "DDP":
        model = DistributedDataParallel(model, process_group=group)
        _never_destroyed.append(model)
    else:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    batch = share_of(group)
    num_items = items_of_all(batch["mask"], group)
    loss, metrics = step(model, batch, num_items, scale=dist.get_world_size(group))
    dist.all_reduce(loss, group=group)
    gradients = {name.removeprefix("module."): whole(x) for name, x in model.named_parameters()}
    return loss, opdc.metrics.all_reduce(metrics, group), gradients


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("wrapper", "kind"),
    [
        ("DDP", Model),
        ("DDP", HiddenOut),
        ("DDP", LossInside),
        ("FSDP", Model),
        ("FSDP", HiddenOut),  # a root module keeps its weights together until backward
        ("FSDP", LossInside),
    ],
)
def test_processes_with_parts_of_the_batch_are_one_with_all_of_it(wrapper, kind, tied):
    model, batch = model_of(kind, tied), whole_batch()
    loss, metrics = step(model, batch, batch["mask"].sum())
    for total, reduced, gradients in on_ranks(PROCESSES, one_of_several, wrapper, kind, tied):
        torch.testing.assert_close(total, loss, rtol=1e-12, atol=1e-12)
        assert list(reduced) == list(metrics)
        for name, metric in metrics.items():
            torch.testing.assert_close(reduced[name], metric, rtol=1e-12, atol=1e-12)
        assert set(gradients) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-11, atol=1e-13)


# ----------------------------------------------------------------- the head of FSDP from outside


def head_from_outside(group: Any, how: str) -> Any:
    mesh = DeviceMesh.from_group(group, "cpu")
    model = fully_shard(model_of(HiddenOut, False), mesh=mesh, reshard_after_forward=True)
    batch = share_of(group)
    hidden, weight = model(batch["ids"]), model.head.weight
    if how == "full":
        # Every process has the gradient of its positions: FSDP's mean of them.
        weight = weight.full_tensor(grad_placements=[Partial("avg")])
    arguments = {name: x for name, x in batch.items() if name != "ids"}
    loss, _ = loss_of(
        opdc.Projection(hidden, weight), num_items=items_of_all(batch["mask"], group), **arguments
    )
    (loss * dist.get_world_size(group)).backward()
    return {name: whole(x) for name, x in model.named_parameters()}


def test_a_sharded_head_beside_plain_hidden_states_is_refused():
    for raised in attempt(PROCESSES, head_from_outside, "sharded"):
        assert isinstance(raised, Raised) and raised.type is ValueError, raised
        assert "student.weight" in raised.text and "full_tensor(" in raised.text


def test_a_head_that_is_put_together_by_hand():
    model, batch = model_of(HiddenOut, False), whole_batch()
    step(model, batch, batch["mask"].sum())
    for gradients in on_ranks(PROCESSES, head_from_outside, "full"):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-11, atol=1e-13)
