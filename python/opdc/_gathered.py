"""Losses that read the student's logits on the ids of a sparse teacher only, from hidden states:
the operators `torch.ops.opdc.gathered_*` and their derivatives.

The logits of those ids are dot products with the rows of the head that they name. The C core then
takes them for the logits of a vocabulary as small as the support: a loss that is normalised on it
in both models cannot tell the difference.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C, _ops, _projected
from ._arguments import with_dense_rows
from .projection import Projection

if TYPE_CHECKING:
    from ._phases import Shard

METRICS = ("positions", "nonfinite_rows", "teacher_mass", "slots")

# `ids` are below 0 where there are none. `places` are those of the tokens among the ids, and
# without elements if the support has no token.
for _schema in (
    f"gathered_support(Tensor hidden, Tensor weight, {_ops._CALL})"
    " -> (Tensor ids, Tensor columns, Tensor places)",
    "gathered_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids) -> Tensor",
    # `wanted` has bit i if the gradient of the i-th of hidden, weight, bias is wanted; the last two
    # are whole, or those of `rows` alone.
    "gathered_gradient(Tensor hidden, Tensor weight, Tensor ids, Tensor upstream, int wanted, "
    "bool sparse) -> (Tensor d_hidden, Tensor rows, Tensor d_weight, Tensor d_bias)",
):
    _ops._library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_core_gradient: Callable[..., None] = _C.gathered_gradient  # its arguments are passed on
_support_operator: Callable[..., tuple[Tensor, ...]] = torch.ops.opdc.gathered_support.default
_logits_operator: Callable[..., Any] = torch.ops.opdc.gathered_logits.default
_gradient_operator: Callable[..., tuple[Tensor, ...]] = torch.ops.opdc.gathered_gradient.default

# ----------------------------------------------------------------- operators


def _support_cpu(hidden: Tensor, weight: Tensor, *call: Any) -> tuple[Tensor, ...]:
    """The ids that are read of each position, and where a loss finds the teacher's slots among
    them, and the token."""
    no_others = (None,) * (len(_projected._HEADS) - 1)
    checked = _projected.Call(hidden, (*call, weight, *no_others, None, 0, 0))
    value, rows, _ = checked.outputs(False)
    checked.check(value, rows, None)
    tensors = checked.tensors
    slot_ids, logprobs = _given(tensors["slot_ids"]).long(), _given(tensors["slot_logprobs"])
    slots = slot_ids.shape[-1]
    columns = torch.arange(slots).where(slot_ids >= 0, -1)
    active = tensors["mask"]
    if active is None:
        active = torch.ones(slot_ids.shape[:-1], dtype=torch.bool)
    if checked.settings[-1] == 0:  # num_items: nothing is evaluated
        active = torch.zeros_like(active)
    enters = (slot_ids >= 0) & (logprobs != -math.inf) & active[..., None]
    ids = slot_ids.where(enters, -1)
    if checked.integers["support"] != _ops.SUPPORTS.index("teacher+token"):
        return ids, columns, ids.new_empty(0)
    tokens = _given(tensors["tokens"]).long()
    is_token = enters & (slot_ids == tokens[..., None])
    is_slot = is_token.any(-1)
    places = is_token.int().argmax(-1).where(is_slot, slots)
    is_added = active & ~is_slot & (_given(tensors["teacher_logprobs"]) != -math.inf)
    return torch.cat([ids, tokens.where(is_added, -1)[..., None]], -1), columns, places


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # the check has refused a call without it
    return tensor


def _support_fake(hidden: Tensor, weight: Tensor, *call: Any) -> tuple[Tensor, ...]:
    _ops._check_devices(hidden, (weight, *call), ("weight", *_ops.TENSORS))
    tensors = dict(zip(_ops.TENSORS, call, strict=False))
    integers = dict(zip(_ops.INTEGERS, call[_ops._REDUCTION :], strict=False))
    slot_ids = tensors["slot_ids"]
    *positions, slots = slot_ids.shape
    columns = slot_ids.new_empty((*positions, slots), dtype=torch.int64)
    if integers["support"] != _ops.SUPPORTS.index("teacher+token"):
        return torch.empty_like(columns), columns, columns.new_empty(0)
    return columns.new_empty((*positions, slots + 1)), columns, columns.new_empty(positions)


def _logits_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    _ops._check_devices(hidden, (weight, bias, ids), ("weight", "bias", "ids"))
    return hidden.new_empty(ids.shape, dtype=_ops._arithmetic(hidden, weight))


def _logits_cpu(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    logits = _logits_fake(hidden, weight, bias, ids)
    _C.gathered_logits(hidden, weight, bias, ids, logits, torch.get_num_threads())
    return logits


def _gradients(
    hidden: Tensor, weight: Tensor, wanted: int, rows: Any, of_rows: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of hidden, weight, bias; without elements if unwanted. `of_rows` makes the last two."""
    dtype = _ops._arithmetic(hidden, weight)
    shapes = (hidden.shape, (rows, weight.shape[1]), (rows,))
    d_hidden, d_weight, d_bias = (
        shape if wanted >> i & 1 else (0,) for i, shape in enumerate(shapes)
    )
    return (
        hidden.new_empty(d_hidden, dtype=dtype),
        of_rows(d_weight, dtype=weight.dtype, device=weight.device),
        of_rows(d_bias, dtype=dtype, device=weight.device),
    )


def _gradient_fake(
    hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, wanted: int, sparse: bool
) -> tuple[Tensor, ...]:
    _ops._check_devices(hidden, (weight, ids, upstream), ("weight", "ids", "upstream"))
    count = torch.library.get_ctx().new_dynamic_size() if sparse else 0
    rows = count if sparse else weight.shape[0]
    d_hidden, *others = _gradients(hidden, weight, wanted, rows, torch.empty)
    return d_hidden, ids.new_empty(count, dtype=torch.int64), *others


def _gradient_cpu(
    hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, wanted: int, sparse: bool
) -> tuple[Tensor, ...]:
    rows = _named(ids, weight.shape[0])
    count, of_rows = (len(rows), torch.empty) if sparse else (weight.shape[0], _zeros)
    gradients = _gradients(hidden, weight, wanted, count, of_rows)
    d_hidden, *others = (g if wanted >> i & 1 else None for i, g in enumerate(gradients))
    threads = torch.get_num_threads()
    _core_gradient(hidden, weight, ids, upstream, d_hidden, rows, *others, threads)
    return gradients[0], rows if sparse else rows.new_empty(0), *gradients[1:]


def _named(ids: Tensor, vocabulary: int) -> Tensor:
    """Each id that is there, once, in order."""
    found = torch.zeros(vocabulary + 1, dtype=torch.bool)
    found[ids.reshape(-1).long().clamp(min=-1)] = True  # of −1, the last
    return found[:-1].nonzero().squeeze(1)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of which only the pages that are written to take memory, and time: torch.zeros writes
    to all of them, which for the gradient of a head takes longer than all the rest."""
    size = math.prod(shape) * dtype.itemsize
    if size < 1 << 20 or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


for _name, _cpu, _fake in (
    ("gathered_support", _support_cpu, _support_fake),
    ("gathered_logits", _logits_cpu, _logits_fake),
    ("gathered_gradient", _gradient_cpu, _gradient_fake),
):
    _ops._library.impl(_name, _cpu, "CPU")
    _ops._library.impl(_name, _ops._refuse_cuda, "CUDA")
    torch.library.register_fake(f"opdc::{_name}", _fake, lib=_ops._library)

torch.library.register_autograd(
    "opdc::gathered_logits", _ops._refuse_bare_operator, lib=_ops._library
)

# ----------------------------------------------------------------- derivatives


class _Support(torch.autograd.Function):
    """Ids have no derivative: a function only for the sake of vmap."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _support_operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        return _ops._vmap_by_loop(_Support, info, in_dims, inputs)


def _support(*inputs: Any) -> tuple[Tensor, ...]:
    if _ops.transforms_active() and not torch.compiler.is_compiling():
        found: tuple[Tensor, ...] = _ops._apply(_Support, *inputs)
        return found
    return _support_operator(*inputs)


class _Gradient(_ops._FirstDerivative):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _gradient_operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        return _ops._vmap_by_loop(_Gradient, info, in_dims, inputs)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, sparse: bool
    ) -> Tensor:
        logits: Any = _ops._without_derivative(_logits_operator, hidden, weight, bias, ids)
        return logits  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, weight, bias, ids, ctx.sparse = inputs
        ctx.save_for_backward(hidden, weight, ids)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * 5
        if upstream is None:
            return tuple(found)
        hidden, weight, ids = ctx.saved_tensors
        wanted = sum(ctx.needs_input_grad[i] << i for i in range(3))
        call = (hidden, weight, ids, with_dense_rows(upstream), wanted, ctx.sparse)
        if _ops._differentiable_again():
            d_hidden, rows, *others = _ops._apply(_Gradient, *call)
        else:
            d_hidden, rows, *others = _gradient_operator(*call)
        gradients = (d_hidden, *others)
        for i, dtype in enumerate((hidden.dtype, weight.dtype, ctx.bias_dtype)):
            if not wanted >> i & 1:
                continue
            found[i] = gradient = gradients[i].to(dtype)
            if ctx.sparse and i > 0:
                shape = (weight.shape[0], *gradient.shape[1:])
                found[i] = torch.sparse_coo_tensor(
                    rows[None], gradient, shape, check_invariants=False, is_coalesced=True
                )
        return tuple(found)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        return _ops._vmap_by_loop(_Logits, info, in_dims, inputs)


# ----------------------------------------------------------------- what the functions call


@torch.compiler.disable(reason="a sparse gradient cannot be compiled")  # type: ignore[untyped-decorator]
def _with_sparse_gradient(*inputs: Any) -> Any:
    return _ops._apply(_Logits, *inputs, True)


def _dots(sparse: bool, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    inputs = (with_dense_rows(hidden), weight, None if bias is None else with_dense_rows(bias), ids)
    found: Tensor = (
        _with_sparse_gradient(*inputs) if sparse else _ops._apply(_Logits, *inputs, False)
    )
    return found


class _Together(torch.autograd.Function):
    """The logits of all ranks, each of which has its own and 0 elsewhere. What is made of them is
    the same on all, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: Shard) -> Tensor:
        together = logits.clone()
        shard.add(together)
        return together

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None


def logits(projection: Projection, ids: Tensor, shard: Shard | None = None) -> Tensor:
    """Those of the ids (..., K) of each position; −inf, or what a softcap makes of it, where an id
    is below 0."""
    hidden, weight, bias, scale, softcap, adapter, sparse, _ = projection
    here = ids
    if shard is not None:
        here = ids - shard.first
        here = here.where((here >= 0) & (here < min(len(weight), shard.left)) & (ids >= 0), -1)
    found = _dots(sparse, hidden, weight, bias, here)
    if adapter is not None:
        found = found + _dots(sparse, *adapter, None, here).to(found.dtype)
    if shard is not None:
        found = _ops._apply(_Together, found.where(here >= 0, 0), shard)
        found = found.where(ids >= 0, -math.inf)
    if scale != 1:
        found = found * scale
    if softcap is not None:
        found = softcap * torch.tanh(found / softcap)
    return found


def loss(
    projection: Projection,
    method: str,
    tensors: Mapping[str, Any],
    settings: Tensor,
    integers: Mapping[str, int],
    valid_vocab: int,
    *,
    with_metrics: bool = False,
    shard: Shard | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Value and metrics of a divergence that is normalised on a sparse teacher's ids in both
    models."""
    weight = projection.weight.detach()
    if shard is not None:  # ids are those of the whole vocabulary
        weight = weight[:1].expand(shard.vocabulary, -1)
    ids, columns, places = _support(
        projection.hidden.detach(),
        weight,
        *(tensors.get(name) for name in _ops.TENSORS),
        *(settings, method),
        *(integers.get(name, 0) for name in _ops.INTEGERS),
        valid_vocab,
    )
    with_token = integers["support"] == _ops.SUPPORTS.index("teacher+token")
    on_support = {**tensors, "slot_ids": columns, "tokens": places if with_token else None}
    student = logits(projection, ids, shard)
    value, metrics = _ops.loss(
        student, method, on_support, settings, integers, 0, with_metrics=with_metrics
    )
    if not with_metrics:
        return value, None
    named = dict(zip(_ops.METRICS, metrics.unbind(), strict=True))
    return value, {name: named[name] for name in METRICS}
