"""Losses that read the student's logits on the ids of a sparse teacher only, from hidden states:
the operators `torch.ops.opdc.gathered_*` and their derivatives.

The logits of those ids are dot products with the rows of the head that they name. The C core then
takes them for the logits of a vocabulary as small as the support: a loss that is normalised on it
in both models cannot tell the difference.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def _support_kernel(hidden: Tensor, weight: Tensor, *call: Any) -> tuple[Tensor, ...]:
    """The ids that are read of each position, and where a loss finds the teacher's slots among
    them, and the token."""
    no_others = (None,) * (len(_projected._HEADS) - 1)
    checked = _projected.Call(hidden, (*call, weight, *no_others, None, 0, 0))
    value, rows, _ = checked.outputs(False)
    checked.check(value, rows, None)
    tensors = checked.tensors
    slot_ids, logprobs = _given(tensors["slot_ids"]).long(), _given(tensors["slot_logprobs"])
    # Out of range, which on a GPU is seen here first: an id that no head has.
    vocabulary, beyond = checked.valid_vocab or weight.shape[0], weight.shape[0]
    slot_ids = slot_ids.where(slot_ids < vocabulary, beyond)
    slots = slot_ids.shape[-1]
    columns = torch.arange(slots, device=slot_ids.device).where(slot_ids >= 0, -1)
    active = tensors["mask"]
    if active is None:
        active = slot_ids.new_ones(slot_ids.shape[:-1], dtype=torch.bool)
    if checked.num_items == 0:  # nothing is evaluated
        active = torch.zeros_like(active)
    enters = (slot_ids >= 0) & (logprobs != -math.inf) & active.unsqueeze(-1)
    ids = slot_ids.where(enters, -1)
    if checked.integers["support"] != _ops.SUPPORTS.index("teacher+token"):
        return ids, columns, ids.new_empty(0)
    tokens = _given(tensors["tokens"]).long()
    tokens = tokens.where((tokens >= 0) & (tokens < vocabulary), beyond)
    is_token = enters & (slot_ids == tokens.unsqueeze(-1))
    is_slot = is_token.any(-1)
    places = is_token.int().argmax(-1).where(is_slot, slots)
    is_added = active & ~is_slot & (_given(tensors["teacher_logprobs"]) != -math.inf)
    added = tokens.where(is_added, -1).unsqueeze(-1)
    return torch.cat([ids, added], -1), columns, places


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # the check has refused a call without it
    return tensor


def _support_fake(hidden: Tensor, weight: Tensor, *call: Any) -> tuple[Tensor, ...]:
    _ops.check_devices(hidden, (weight, *call), ("weight", *_ops.TENSORS))
    tensors = dict(zip(_ops.TENSORS, call, strict=False))
    integers = dict(zip(_ops.INTEGERS, call[_ops._REDUCTION :], strict=False))
    slot_ids = tensors["slot_ids"]
    *positions, slots = slot_ids.shape
    columns = slot_ids.new_empty((*positions, slots), dtype=torch.int64)
    if integers["support"] != _ops.SUPPORTS.index("teacher+token"):
        return torch.empty_like(columns), columns, columns.new_empty(0)
    return columns.new_empty((*positions, slots + 1)), columns, columns.new_empty(positions)


def _logits_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    _ops.check_devices(hidden, (weight, bias, ids), ("weight", "bias", "ids"))
    return hidden.new_empty(ids.shape, dtype=_ops._arithmetic(hidden, weight))


def _logits_kernel(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    if _ops.is_on_gpu(hidden):
        by_torch: Tensor = _logits_by_torch(hidden, weight, bias, ids)
        return by_torch
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
    _ops.check_devices(hidden, (weight, ids, upstream), ("weight", "ids", "upstream"))
    count = torch.library.get_ctx().new_dynamic_size() if sparse else 0
    rows = count if sparse else weight.shape[0]
    d_hidden, *others = _gradients(hidden, weight, wanted, rows, torch.empty)
    return d_hidden, ids.new_empty(count, dtype=torch.int64), *others


def _gradient_kernel(
    hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, wanted: int, sparse: bool
) -> tuple[Tensor, ...]:
    if _ops.is_on_gpu(hidden):
        by_torch: tuple[Tensor, ...] = _gradient_by_torch(
            hidden, weight, ids, upstream, wanted, sparse
        )
        return by_torch
    rows = _named(ids, weight.shape[0])
    count, of_rows = (len(rows), torch.empty) if sparse else (weight.shape[0], _zeros)
    gradients = _gradients(hidden, weight, wanted, count, of_rows)
    d_hidden, *others = (g if wanted >> i & 1 else None for i, g in enumerate(gradients))
    threads = torch.get_num_threads()
    _core_gradient(hidden, weight, ids, upstream, d_hidden, rows, *others, threads)
    return gradients[0], rows if sparse else rows.new_empty(0), *gradients[1:]


def _named(ids: Tensor, vocabulary: int) -> Tensor:
    """Each id that is there, once, in order."""
    found = torch.zeros(vocabulary + 1, dtype=torch.bool, device=ids.device)
    ids = ids.reshape(-1).long()
    found[ids.where((ids >= 0) & (ids < vocabulary), vocabulary)] = True
    return found[:-1].nonzero().squeeze(1)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of which only the pages that are written to take memory, and time: torch.zeros writes
    to all of them, which for the gradient of a head takes longer than all the rest."""
    size = math.prod(shape) * dtype.itemsize
    if size < 1 << 20 or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


# The same by torch, for GPUs.

_BYTES = 256 << 20  # of the rows, or products, that exist at a time


def _products(hidden: Tensor, weight: Tensor, ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """By chunks of positions: the rows of the weight that their ids name, `(n, K, H)`, in the dtype
    of the arithmetic. Of ids that are none or out of range the rows are 0."""
    dtype = _ops._arithmetic(hidden, weight)
    count, slots = ids.shape
    vocabulary, width = weight.shape
    # What is gathered comes in the dtype of the weight first.
    bytes_each = slots * width * (weight.dtype.itemsize + dtype.itemsize)
    length = max(_BYTES // max(bytes_each, 1), 1)
    for start in range(0, count, length):
        chunk = slice(start, min(start + length, count))
        named = ids[chunk]
        rows = weight.index_select(0, named.reshape(-1).clamp(0, vocabulary - 1)).to(dtype)
        missing = (named < 0) | (named >= vocabulary)
        yield chunk, rows.view(*named.shape, width).masked_fill_(missing.unsqueeze(-1), 0)


@_projected._as_they_are
def _logits_by_torch(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """As the kernel, but for ids out of range, whose logits are NaN."""
    whole = _logits_fake(hidden, weight, bias, ids)
    slots, vocabulary = ids.shape[-1], weight.shape[0]
    named = ids.reshape(math.prod(ids.shape[:-1]), slots).long()
    logits = whole.view(named.shape)
    if vocabulary:
        states = hidden.reshape(len(named), hidden.shape[-1])
        for chunk, rows in _products(hidden, weight, named):
            columns = states[chunk].unsqueeze(-1).to(rows.dtype)
            torch.bmm(rows, columns, out=logits[chunk].unsqueeze(-1))
        if bias is not None:
            logits += bias.to(logits.dtype)[named.clamp(0, vocabulary - 1)]
    logits.masked_fill_(named < 0, -math.inf).masked_fill_(named >= vocabulary, math.nan)
    return whole


@_projected._as_they_are
def _gradient_by_torch(
    hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, wanted: int, sparse: bool
) -> tuple[Tensor, ...]:
    """As the kernel; ids out of range have no row to give a gradient to. A sum runs over the
    positions in order, by one thread: the same bits in every run. The host waits if it has to know
    how many rows a sparse gradient has."""
    count, slots, (vocabulary, width) = math.prod(ids.shape[:-1]), ids.shape[-1], weight.shape
    named, factors = ids.reshape(count, slots).long(), upstream.reshape(count, slots)
    states = hidden.reshape(count, width)
    rows = _named(named, vocabulary) if sparse else named.new_empty(0)
    gradients = _gradients(hidden, weight, wanted, len(rows) if sparse else vocabulary, torch.zeros)
    d_hidden, d_weight, d_bias = gradients
    if wanted & 1 and vocabulary:
        to = d_hidden.view(count, width)
        for chunk, of_ids in _products(hidden, weight, named):
            torch.bmm(factors[chunk].unsqueeze(1), of_ids, out=to[chunk].unsqueeze(1))
    elif wanted & 1:  # as the product with rows of zeros
        d_hidden.view(count, width).copy_((factors * 0).sum(-1, keepdim=True))
    if not wanted & 6 or not vocabulary:
        return gradients[0], rows, *gradients[1:]
    flat = named.reshape(-1)
    flat = flat.where((flat >= 0) & (flat < vocabulary), vocabulary)  # the last ones, and no row's
    flat, order = flat.sort(stable=True)
    ids_of_rows = rows if sparse else torch.arange(vocabulary, device=flat.device)
    lengths = torch.searchsorted(flat, ids_of_rows, right=True)
    lengths -= torch.searchsorted(flat, ids_of_rows)
    factors = factors.reshape(-1, 1)[order]
    if wanted & 4:
        d_bias.copy_(_sums(factors, lengths).squeeze(1))
    if wanted & 2:
        positions = order // max(slots, 1)
        bytes_each = (2 * len(flat) + vocabulary) * factors.dtype.itemsize
        columns = max(_BYTES // bytes_each, 1)
        for start in range(0, width, columns):
            part = states[:, start : start + columns].index_select(0, positions)
            d_weight[:, start : start + columns] = _sums(part * factors, lengths)
    return gradients[0], rows, *gradients[1:]


def _sums(numbers: Tensor, lengths: Tensor) -> Tensor:
    """Of stretches of the rows, the first ones, one after another."""
    return torch.segment_reduce(numbers, "sum", lengths=lengths, axis=0, unsafe=True)


for _name, _kernel, _fake in (
    ("gathered_support", _support_kernel, _support_fake),
    ("gathered_logits", _logits_kernel, _logits_fake),
    ("gathered_gradient", _gradient_kernel, _gradient_fake),
):
    _ops.implement(_name, _kernel, _fake)

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
