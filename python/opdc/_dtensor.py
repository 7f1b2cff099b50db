"""Losses of DTensors: what they are of the whole tensors, from what each process holds of them.

The student's placements say how a call is split over each dimension of the mesh: `Shard` of the
last axis of logits, or of the rows of a head, splits the vocabulary; `Shard` of an axis before it
splits the positions; `Replicate` splits nothing. Everything else is brought to this layout: other
DTensors by redistribution, plain tensors, which are whole on every process, by cutting.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import _ops
from . import metrics as _metrics
from ._groups import CPU, exchangeable
from .projection import Projection

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def of_whole_tensors(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """`_arguments.evaluate` that takes DTensors as well."""

    @functools.wraps(function)
    def evaluate(*arguments: _Parameters.args, **keywords: _Parameters.kwargs) -> _Result:
        # A DTensor exists only where its module is loaded; torch.compile cannot look.
        module = "torch.distributed.tensor"
        if torch.compiler.is_compiling() or module not in sys.modules:
            return function(*arguments, **keywords)
        if not any(is_dtensor(tensor) for tensor in _tensors_in((arguments, keywords))):
            return function(*arguments, **keywords)
        result: _Result = _evaluate(function, *arguments, **keywords)  # type: ignore[arg-type]
        return result

    return evaluate


def is_dtensor(value: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


# ----------------------------------------------------------------- how a call is split


class _Layout(NamedTuple):
    mesh: DeviceMesh
    positions: torch.Size  # the shape of all of them
    axes: dict[int, int]  # the position axis that a dimension of the mesh splits
    vocabulary: int | None  # the dimension of the mesh that splits the vocabulary

    def _placements(self, axis: int | None) -> list[Placement]:
        """Those of a tensor whose first axes are the positions and whose `axis` are the ids."""
        from torch.distributed.tensor import Replicate, Shard

        placements: list[Placement] = [Replicate()] * self.mesh.ndim
        for dimension, position_axis in self.axes.items():
            placements[dimension] = Shard(position_axis)
        if axis is not None and self.vocabulary is not None:
            placements[self.vocabulary] = Shard(axis)
        return placements

    @property
    def of_logits(self) -> list[Placement]:
        return self._placements(len(self.positions))

    @property
    def of_positions(self) -> list[Placement]:
        """Of masks and the like, of hidden states, and of the slots of a sparse teacher."""
        return self._placements(None)

    @property
    def of_head(self) -> list[Placement]:
        return self._replace(axes={})._placements(0)

    @property
    def of_head_gradient(self) -> list[Placement]:
        """Every process has seen some positions: their sum is the gradient."""
        from torch.distributed.tensor import Partial

        placements = self.of_head
        for dimension in self.axes:
            placements[dimension] = Partial()
        return placements

    @property
    def position_groups(self) -> list[dist.ProcessGroup]:
        return [self.mesh.get_group(dimension) for dimension in self.axes]

    @property
    def splits_sequences(self) -> bool:
        return len(self.positions) - 1 in self.axes.values()


def _layout(name: str, student: Tensor | Projection) -> _Layout:
    if isinstance(student, Projection):
        return _layout_of_projection(name, student)
    if not is_dtensor(student):
        _refuse_plain_student(name)
    logits: DTensor = student  # type: ignore[assignment]
    axes, vocabulary = {}, None
    for dimension, placement in enumerate(logits.placements):
        axis = _axis(name, logits, placement)
        if axis is None:
            continue
        if axis < logits.dim() - 1:
            axes[dimension] = axis
        elif vocabulary is None:
            vocabulary = dimension
        else:
            raise ValueError(
                f"{name} splits the vocabulary over two dimensions of the mesh, "
                f"{tuple(logits.placements)}: split it over one"
            )
    return _checked(name, _Layout(logits.device_mesh, logits.shape[:-1], axes, vocabulary))


def _layout_of_projection(name: str, student: Projection) -> _Layout:
    if not is_dtensor(student.hidden) and not is_dtensor(student.weight):
        _refuse_plain_student(f"{name}.hidden")
    if not is_dtensor(student.hidden):
        raise ValueError(
            f"{name}.weight is a DTensor but {name}.hidden is a plain tensor: under FSDP call the "
            "loss in the forward of the module that owns the head, or give weight.full_tensor("
            'grad_placements=[Partial("avg")]); for a split vocabulary give weight.to_local() and '
            "process_group=..., or hidden as a DTensor"
        )
    if not is_dtensor(student.weight):
        raise ValueError(
            f"{name}.hidden is a DTensor but {name}.weight is a plain tensor, whose gradient would "
            "be that of one process: give it as a DTensor, e.g. distribute_tensor(weight, mesh, "
            "[Replicate()])"
        )
    hidden: DTensor = student.hidden  # type: ignore[assignment]
    weight: DTensor = student.weight  # type: ignore[assignment]
    if weight.device_mesh != hidden.device_mesh:
        raise ValueError(
            f"{name}.weight and {name}.hidden are on different meshes, {weight.device_mesh} and "
            f"{hidden.device_mesh}"
        )
    axes, vocabulary = {}, None
    for dimension, placements in enumerate(zip(hidden.placements, weight.placements, strict=True)):
        axis = _axis(f"{name}.hidden", hidden, placements[0])
        row = _axis(f"{name}.weight", weight, placements[1])
        if axis is not None and axis < hidden.dim() - 1 and row is None:
            axes[dimension] = axis
        elif axis is None and row == 0 and vocabulary is None:
            vocabulary = dimension
        elif axis is not None or row is not None:
            raise ValueError(
                f"{name}.hidden is {placements[0]!r} and {name}.weight {placements[1]!r} over "
                f"dimension {dimension} of the mesh: want hidden Replicate and weight Shard(0) "
                "over one dimension to split the vocabulary, or hidden Shard of a position axis "
                "and weight Replicate to split the positions; redistribute one of them"
            )
    return _checked(name, _Layout(hidden.device_mesh, hidden.shape[:-1], axes, vocabulary))


def _axis(name: str, tensor: DTensor, placement: Placement) -> int | None:
    """The axis that the placement splits."""
    from torch.distributed.tensor import Shard

    if placement.is_replicate():
        return None
    if type(placement) is not Shard:
        raise ValueError(
            f"{name} is {placement!r} over a dimension of its mesh, want Shard or Replicate: "
            "redistribute it"
        )
    return placement.dim % tensor.dim()


def _checked(name: str, layout: _Layout) -> _Layout:
    """The processes of a group are numbered by their ranks, the shards by their place in it."""
    mesh = layout.mesh
    if layout.vocabulary is not None:
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"this process is not a part of {name}'s {mesh}")
        here: list[Any] = list(coordinate)
        here[layout.vocabulary] = slice(None)
        ranks = mesh.mesh[tuple(here)].tolist()
        if ranks != dist.get_process_group_ranks(mesh.get_group(layout.vocabulary)):
            raise ValueError(
                f"{name} splits the vocabulary over the processes {ranks}: give a mesh that lists "
                "them in the order of their ranks"
            )
    return layout


def _refuse_plain_student(name: str) -> NoReturn:
    raise ValueError(
        f"{name} is a plain tensor but another argument is a DTensor: give {name} as a DTensor, or "
        "all of the arguments as plain tensors"
    )


# ----------------------------------------------------------------- from whole tensors to shares


def _share(name: str, tensor: Tensor, placements: Sequence[Placement], layout: _Layout) -> Tensor:
    """What this process needs of a constant."""
    from torch.distributed.tensor import DTensor, Replicate

    with torch.no_grad():
        if is_dtensor(tensor):
            whole: DTensor = tensor  # type: ignore[assignment]
            if whole.device_mesh != layout.mesh:
                raise ValueError(
                    f"{name} is on {whole.device_mesh} but the student on {layout.mesh}: give both "
                    "on one mesh"
                )
        else:
            everywhere = [Replicate()] * layout.mesh.ndim
            whole = DTensor.from_local(tensor, layout.mesh, everywhere, run_check=False)
        return whole.redistribute(placements=placements).to_local()


def _share_of_positions(name: str, tensor: Tensor, layout: _Layout) -> Tensor:
    _require_all_positions(name, tensor, layout)
    return _share(name, tensor, layout.of_positions, layout)


def _require_all_positions(name: str, tensor: Tensor, layout: _Layout) -> None:
    if tensor.shape[: len(layout.positions)] != layout.positions:
        raise ValueError(
            f"{name} has the shape {tuple(tensor.shape)} but the positions of all processes are "
            f"{tuple(layout.positions)}: give all of them, or a DTensor"
        )


def _share_of_teacher(
    teacher: Tensor | Projection, student: Tensor | Projection, layout: _Layout
) -> Tensor | Projection:
    ids = teacher.weight.shape[0] if isinstance(teacher, Projection) else teacher.shape[-1]
    own = student.weight.shape[0] if isinstance(student, Projection) else student.shape[-1]
    if layout.vocabulary is not None and ids != own:
        raise ValueError(
            f"the teacher's vocabulary has {ids} ids and the student's {own}, so that their "
            "shards differ: give logits, or heads, of one size, padded if need be, and valid_vocab"
        )
    if not isinstance(teacher, Projection):
        _require_all_positions("teacher", teacher, layout)
        return _share("teacher", teacher, layout.of_logits, layout)
    head = functools.partial(_share, placements=layout.of_head, layout=layout)
    return teacher._replace(
        hidden=_share_of_positions("teacher.hidden", teacher.hidden, layout),
        weight=head("teacher.weight", teacher.weight),
        bias=None if teacher.bias is None else head("teacher.bias", teacher.bias),
        adapter=teacher.adapter
        and (
            _share_of_positions("teacher.adapter[0]", teacher.adapter[0], layout),
            head("teacher.adapter[1]", teacher.adapter[1]),
        ),
    )


def _share_of_student(
    name: str, student: Tensor | Projection, layout: _Layout
) -> Tensor | Projection:
    """With gradients that arrive in the placements of what came in."""

    def local(part: str, tensor: Tensor, placements: Any, gradient: Any) -> Tensor:
        if not is_dtensor(tensor):
            raise ValueError(
                f"{name}{part} is a plain tensor but {name} is split over processes: give it as a "
                "DTensor too"
            )
        whole: DTensor = tensor  # type: ignore[assignment]
        return whole.redistribute(placements=placements).to_local(grad_placements=gradient)

    if not isinstance(student, Projection):
        return local("", student, layout.of_logits, layout.of_logits)
    rows = functools.partial(local, placements=layout.of_positions, gradient=layout.of_positions)
    head = functools.partial(local, placements=layout.of_head, gradient=layout.of_head_gradient)
    return student._replace(
        hidden=rows(".hidden", student.hidden),
        weight=head(".weight", student.weight),
        bias=None if student.bias is None else head(".bias", student.bias),
        adapter=student.adapter
        and (rows(".adapter[0]", student.adapter[0]), head(".adapter[1]", student.adapter[1])),
    )


# ----------------------------------------------------------------- the loss


def _evaluate(
    function: Callable[..., Any],
    method: str,
    student: Tensor | Projection,
    tensors: Mapping[str, Tensor | Projection | None] | None = None,
    *,
    name: str = "student",
    settings: Mapping[str, float] | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    return_metrics: bool = False,
    process_group: dist.ProcessGroup | None = None,
    **keywords: Any,
) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    layout = _layout(name, student)
    _require_a_sum_of_shares(method, settings or {}, reduction, num_items, layout)
    if inplace:
        raise ValueError(
            "inplace=True does not work with a DTensor: give inplace=False, or "
            f"{name}.to_local() and process_group=..."
        )
    if process_group is not None:
        raise ValueError("process_group comes from the mesh of a DTensor: leave it out")
    if isinstance(student, Projection) and student.sparse_gradient:
        raise ValueError(
            f"{name}.sparse_gradient does not work with a DTensor, whose gradients are dense: "
            "leave it out"
        )
    if isinstance(num_items, Tensor) and is_dtensor(num_items):
        num_items = num_items.full_tensor()  # type: ignore[attr-defined]
    split = bool(layout.axes)
    counted = split and num_items is None and reduction in ("mean", "seq_mean")
    group = None if layout.vocabulary is None else layout.mesh.get_group(layout.vocabulary)
    with _Agreement(layout.position_groups, group) as shares:
        local_student = _share_of_student(name, student, layout)
        local = {
            key: _local(key, tensor, student, layout)
            for key, tensor in {**(tensors or {}), "mask": mask, "weights": weights}.items()
        }
        shares.number = _items(local["mask"], local_student, reduction) if counted else 0
    if counted:
        num_items = shares.number
    if local.get("uniforms") is not None:
        local["uniforms"] = _of_first(local["uniforms"], layout)
    with _Agreement(layout.position_groups) as result:
        value = function(
            method,
            local_student,
            {key: local[key] for key in tensors or {}},
            name=name,
            settings=settings,
            mask=local["mask"],
            weights=local["weights"],
            reduction=reduction,
            num_items=num_items,
            return_metrics=return_metrics,
            process_group=group,
            **keywords,
        )
        value, metrics = value if return_metrics else (value, {})
        result.number = 0 if reduction == "none" else value.item()
    if reduction == "none":
        value = DTensor.from_local(
            value,
            layout.mesh,
            layout.of_positions,
            run_check=False,
            shape=layout.positions,
            stride=torch.empty(layout.positions, device="meta").stride(),
        )
    else:
        if split:
            value = _ops._apply(_SumOfShares, value, result.number)
        everywhere = [Replicate()] * layout.mesh.ndim
        value = DTensor.from_local(value, layout.mesh, everywhere, run_check=False)
    if not return_metrics:
        return value
    for position_group in layout.position_groups:
        metrics = _metrics.all_reduce(metrics, position_group)
    return value, metrics


def _of_first(uniforms: Any, layout: _Layout) -> Tensor:
    """Replicas decide alike: by the numbers of the first. (A split vocabulary sees to itself.)"""
    shared: Tensor = uniforms.contiguous().clone()
    for dimension in range(layout.mesh.ndim):
        if dimension not in layout.axes and dimension != layout.vocabulary and shared.numel():
            dist.broadcast(shared, group=layout.mesh.get_group(dimension), group_src=0)
    return shared


def _local(
    name: str, tensor: Tensor | Projection | None, student: Tensor | Projection, layout: _Layout
) -> Tensor | Projection | None:
    if tensor is None:
        return None
    if name == "teacher":
        return _share_of_teacher(tensor, student, layout)
    assert isinstance(tensor, Tensor)
    return _share_of_positions(name, tensor.detach(), layout)


def _items(mask: Tensor | Projection | None, student: Tensor | Projection, reduction: str) -> float:
    """What the denominator counts, of the positions of this process."""
    hidden = student.hidden if isinstance(student, Projection) else student
    positions = hidden.shape[:-1]
    if mask is None:
        sequences = math.prod(positions[:-1]) if positions[-1] else 0
        return sequences if reduction == "seq_mean" else math.prod(positions)
    assert isinstance(mask, Tensor)
    active = mask != 0
    return (active.any(-1) if reduction == "seq_mean" else active).sum().item()


def _require_a_sum_of_shares(
    method: str,
    settings: Mapping[str, float],
    reduction: str,
    num_items: float | Tensor | None,
    layout: _Layout,
) -> None:
    """Refuses what no process can compute from its own positions."""
    if not layout.axes:
        return
    if layout.splits_sequences and settings.get("discount", 0.0) != 0.0:
        raise ValueError(
            f"discount={settings['discount']} adds up the advantages of whole sequences, but the "
            "processes have parts of them: split the axis of the batch instead, or leave discount "
            "out"
        )
    if layout.splits_sequences and reduction == "seq_mean":
        raise ValueError(
            'reduction="seq_mean" needs whole sequences, but the processes have parts of them: '
            "split the axis of the batch instead"
        )
    if not method.startswith("reopold"):
        return
    threshold = settings.get("entropy_threshold", math.nan)
    if method == "reopold_refinement" and threshold != threshold:
        raise ValueError(
            "keep ranks the entropies of all positions, but the processes have parts of them: give "
            "entropy_threshold=..."
        )
    if reduction in ("mean", "seq_mean") and num_items is None:
        raise ValueError(
            f'reduction="{reduction}" counts the selected positions of all processes: give '
            "num_items=..., e.g. the metric `selected` of a call without gradient"
        )


class _SumOfShares(torch.autograd.Function):
    """A sum whose terms are the values of all processes; its derivative by each is 1."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, total: float) -> Tensor:
        return value.new_full((), total)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


class _Agreement:
    """Lets all processes go on or none: an error inside is raised by every process.

    `number` is then its sum over the processes that have other positions. `group` are those that
    have the same ones, where they do not agree by themselves.
    """

    def __init__(
        self, position_groups: list[dist.ProcessGroup], group: dist.ProcessGroup | None = None
    ) -> None:
        self.position_groups = position_groups
        self.groups = position_groups if group is None else [*position_groups, group]
        self.number: float = 0.0

    def __enter__(self) -> _Agreement:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self.groups or not (error is None or isinstance(error, Exception)):
            return
        device = exchangeable(self.groups[0], CPU)
        sums = torch.tensor([self.number, error is not None], dtype=torch.float64, device=device)
        for group in self.position_groups:
            dist.all_reduce(sums, group=group)
        failures = sums[1:].clone()
        for group in self.groups[len(self.position_groups) :]:
            dist.all_reduce(failures, group=group)
        self.number = sums[0].item()
        if not failures.item():
            return
        errors: list[Any] = [None if error is None else (dist.get_rank(), error)]
        for group in self.groups:
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, errors, group)
            errors = [found for part in gathered for found in part if found is not None]
        if error is None:
            rank, first = errors[0]
            raise type(first)(f"rank {rank}: {first}")
