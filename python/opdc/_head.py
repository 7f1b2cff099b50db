"""The matrix products of a loss from hidden states: to the logits of a chunk of positions, and from
their gradient to those of the hidden states and of the head.

A chunk is a stretch `[start, stop)` of the active positions, which are packed. Logits that are
given have the same interface as those that a head makes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _ops

# Of a head that is worked on at a time, in the dtype of the arithmetic: what a CPU's cache holds,
# and what keeps a GPU busy.
BLOCK_BYTES = 8 << 20
BLOCK_BYTES_ON_GPU = 32 << 20


class Positions:
    """The active positions of a call, in order: what they are among all of them.

    On a GPU all of them are taken for active: the host would have to wait to know how many are.
    Those that are not, `idle`, have zeros in the place of hidden states, which may be anything.
    """

    def __init__(self, shape: Sequence[int], mask: Tensor | None) -> None:
        self.shape = tuple(shape)
        self.total = math.prod(self.shape)
        self.idle: Tensor | None = None  # (N, 1)
        index = None
        if mask is not None and _ops.is_on_gpu(mask):
            self.idle = mask.reshape(self.total, 1).logical_not()
        elif mask is not None:
            index = mask.reshape(-1).nonzero().squeeze(1)
        self.index = None if index is None or len(index) == self.total else index  # None: all
        self.count = self.total if self.index is None else len(self.index)

    def _flat(self, tensor: Tensor) -> Tensor | None:
        """(..., n) as (N, n) if that is a view."""
        try:
            return tensor.view(self.total, *tensor.shape[len(self.shape) :])
        except RuntimeError:
            return None

    def copies(self, tensor: Tensor) -> bool:
        """Whether the rows of a chunk are a copy."""
        return self.index is not None or self._flat(tensor) is None

    def rows(self, tensor: Tensor, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Those of a chunk, as a view or, in `buffer`, as a copy."""
        flat = self._flat(tensor)
        out = None if buffer is None else buffer[: stop - start]
        if flat is not None:
            if self.index is None:
                return flat[start:stop]
            index = self.index[start:stop]
            if out is None:
                return flat.index_select(0, index)
            return torch.index_select(flat, 0, index, out=out)
        # Never the whole tensor, which is as large as all logits.
        if self.index is None:
            index = torch.arange(start, stop, device=tensor.device)
        else:
            index = self.index[start:stop]
        places: list[Tensor] = []
        for size in reversed(self.shape):  # torch.unravel_index copies numbers from the host
            places.insert(0, index % size)
            index = index // size
        if out is None:
            return tensor[tuple(places)]
        return torch.ops.aten.index.Tensor_out(tensor, places, out=out)  # type: ignore[no-any-return]

    def clear(self, rows: Tensor, start: int) -> None:
        """Zeroes the idle ones of a chunk."""
        if self.idle is not None:
            rows.masked_fill_(self.idle[start : start + len(rows)], 0)

    def put(self, output: Tensor, start: int, rows: Tensor) -> None:
        """Writes the rows of a chunk into a contiguous (..., n)."""
        flat = output.view(self.total, *output.shape[len(self.shape) :])
        stop = start + len(rows)
        if self.index is None:
            flat[start:stop] = rows
        else:
            flat.index_copy_(0, self.index[start:stop], rows)


def head_dtype(hidden: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of the logits of a model."""
    if weight is None:
        return hidden.dtype
    double = torch.float64 in (hidden.dtype, weight.dtype)
    return torch.float64 if double else torch.float32


class Logits:
    """Logits that are given."""

    def __init__(self, logits: Tensor, gradient: Tensor | None) -> None:
        self.given = logits
        self.gradient = gradient  # (..., V), uninitialised
        self.dtype = logits.dtype
        self.whole = logits.shape[-1]

    def reserve(self, positions: Positions) -> None:
        self.positions = positions
        self.copied = positions.copies(self.given)
        if self.gradient is not None and positions.count < positions.total:
            self.gradient.zero_()

    @property
    def fixed_bytes(self) -> int:
        return 0

    @property
    def position_bytes(self) -> int:
        return self.whole * self.dtype.itemsize if self.copied else 0

    def allocate(self, rows: int) -> None:
        self.buffer = self.given.new_empty((rows, self.whole)) if self.copied else None

    def logits(self, start: int, stop: int) -> Tensor:
        self.current = self.positions.rows(self.given, start, stop, self.buffer)
        return self.current

    def target(self, start: int, stop: int) -> Tensor:
        """Where the gradient of a chunk goes: over the logits if they are a copy."""
        if self.copied or self.gradient is None:
            return self.current
        return self.positions.rows(self.gradient, start, stop)

    def accumulate(self, start: int, stop: int, gradient: Tensor) -> None:
        if self.copied and self.gradient is not None:
            self.positions.put(self.gradient, start, gradient)

    def finish(self) -> None:
        pass


class _Factors(NamedTuple):
    """A product `inputs @ weight.T`, and where its gradients are added up."""

    inputs: Tensor
    weight: Tensor
    of_inputs: Tensor | None
    of_weight: Tensor | None


class Head:
    """Logits `c tanh(scale (h Wᵀ + b + u Aᵀ) / c)` of the ids 0 … vocabulary − 1.

    `others` are the bias `b`, and the inputs `u` and the weight `A` of the adapter; `numbers` are
    the scale and the softcap `c`, 0 for none. `gradients` holds uninitialised tensors, or None, for
    `h`, `W`, `b`, `u` and `A`; their dtype is that of the arithmetic.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        others: Sequence[Tensor | None],
        numbers: Sequence[float],
        vocabulary: int,
        gradients: Sequence[Tensor | None],
    ) -> None:
        bias, inputs, adapter = others
        scale, softcap = numbers
        self.dtype = head_dtype(hidden, weight)
        self.on_gpu = _ops.is_on_gpu(hidden)
        self.whole = weight.shape[0]
        self.vocabulary = vocabulary
        self.scale, self.softcap = scale, softcap
        self.inner = scale / (softcap or 1)  # what tanh, or nothing, is taken of: inner (h Wᵀ + …)
        self.bias = None if bias is None else bias[:vocabulary].to(self.dtype) * self.inner
        of_hidden, of_weight, self.bias_gradient, of_inputs, of_adapter = gradients
        self.factors = [_Factors(hidden, weight[:vocabulary], of_hidden, of_weight)]
        if inputs is not None and adapter is not None:
            self.factors.append(_Factors(inputs, adapter[:vocabulary], of_inputs, of_adapter))
        self.with_gradient = any(gradient is not None for gradient in gradients)
        self.started = False

    def reserve(self, positions: Positions) -> None:
        self.positions = positions
        for factors in self.factors:
            if factors.of_inputs is not None and positions.count < positions.total:
                factors.of_inputs.zero_()

    def _is_large(self, weight: Tensor) -> bool:
        """Whether a product with it is one of several blocks, each put in its place afterwards."""
        return self._block_rows(weight) < self.vocabulary and not self.on_gpu

    @property
    def _longest_product(self) -> int:
        weights = (factors.weight for factors in self.factors)
        large = (self._block_rows(weight) for weight in weights if self._is_large(weight))
        return max(large, default=0)

    def _block_rows(self, weight: Tensor) -> int:
        """How many ids are converted at a time."""
        row = max(weight.shape[1] * self.dtype.itemsize, 1)
        block = BLOCK_BYTES_ON_GPU if self.on_gpu else BLOCK_BYTES
        return min(max(block // row, 1), self.vocabulary)

    @property
    def fixed_bytes(self) -> int:
        weights = (factors.weight for factors in self.factors)
        converted = [weight for weight in weights if weight.dtype is not self.dtype]
        largest = (self._block_rows(weight) * weight.shape[1] for weight in converted)
        return max(largest, default=0) * self.dtype.itemsize

    @property
    def position_bytes(self) -> int:
        logits = 2 if self.softcap else 1  # even if no gradient is wanted in this call yet
        widths = sum(factors.inputs.shape[-1] for factors in self.factors)
        numbers = logits * self.vocabulary + 3 * widths + self._longest_product
        return numbers * self.dtype.itemsize

    def allocate(self, rows: int) -> None:
        empty = functools.partial(self.factors[0].inputs.new_empty, dtype=self.dtype)
        self.buffer = empty((rows, self.vocabulary))
        # The derivative of tanh needs the logits, which the gradient otherwise overwrites.
        separate = self.softcap and self.with_gradient
        self.gradient_buffer = torch.empty_like(self.buffer) if separate else self.buffer
        self.block = empty(self.fixed_bytes // self.dtype.itemsize)
        self.products = empty(self._longest_product * rows)

    def _whole(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """A weight in the dtype of the arithmetic: as it is, or by blocks."""
        if weight.dtype is self.dtype:
            yield slice(None), weight
        else:
            yield from self._blocks(weight)

    def _blocks(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The rows of a weight in the dtype of the arithmetic, some at a time."""
        length = self._block_rows(weight)
        for start in range(0, max(self.vocabulary, 1), max(length, 1)):  # none is one empty block
            ids = slice(start, min(start + length, self.vocabulary))
            rows = weight[ids]
            if rows.dtype is not self.dtype:
                rows = self.block[: rows.numel()].view(rows.shape).copy_(rows)
            yield ids, rows

    def _scaled_rows(self, inputs: Tensor, start: int, stop: int, scale: float) -> Tensor:
        has_idle = self.positions.idle is not None
        rows = self.positions.rows(inputs, start, stop).to(self.dtype, copy=has_idle)
        self.positions.clear(rows, start)
        return rows if scale == 1 else rows * scale

    def logits(self, start: int, stop: int) -> Tensor:
        logits = self.buffer[: stop - start]
        add = self.bias is not None
        if self.bias is not None:
            logits.copy_(self.bias)
        for inputs, weight, _, _ in self.factors:
            rows = self._scaled_rows(inputs, start, stop, self.inner)
            columns = rows.T.contiguous()
            for ids, block in self._whole(weight) if self.on_gpu else self._blocks(weight):
                to = logits[:, ids]
                if not self._is_large(weight):
                    to.addmm_(rows, block.T, beta=add)
                    continue
                # W hᵀ, not h Wᵀ: of few positions and many ids the product would rearrange all of W
                # first on a CPU, which takes a third of its time.
                product = self.products[: len(block) * len(rows)].view(len(block), len(rows))
                torch.mm(block, columns, out=product)
                (to.add_ if add else to.copy_)(product.T)
            add = True
        return logits.tanh_().mul_(self.softcap) if self.softcap else logits

    def target(self, start: int, stop: int) -> Tensor:
        """Where the gradient of the logits of a chunk goes."""
        return self.gradient_buffer[: stop - start]

    def accumulate(self, start: int, stop: int, gradient: Tensor) -> None:
        """Adds what the gradient of the logits of a chunk contributes. Spends the logits."""
        if self.softcap:  # the derivative of tanh is 1 − tanh²
            logits = self.buffer[: stop - start]
            gradient.addcmul_(gradient, logits.square_(), value=-1 / self.softcap**2)
            self.positions.clear(gradient, start)  # 0, if the head makes NaN of 0 too
        for inputs, weight, of_inputs, of_weight in self.factors:
            if of_inputs is not None:
                in_place = self.positions.index is None
                rows = (
                    self.positions.rows(of_inputs, start, stop)
                    if in_place
                    else of_inputs.new_empty((stop - start, inputs.shape[-1]))
                )
                for ids, block in self._whole(weight):
                    rows.addmm_(gradient[:, ids], block, beta=bool(ids.start))
                if self.scale != 1:
                    rows.mul_(self.scale)
                self.positions.clear(rows, start)
                if not in_place:
                    self.positions.put(of_inputs, start, rows)
            if of_weight is not None:
                rows = self._scaled_rows(inputs, start, stop, self.scale)
                of_weight[: self.vocabulary].addmm_(gradient.T, rows, beta=self.started)
        if self.bias_gradient is not None:
            total = gradient.sum(0).mul_(self.scale)
            to = self.bias_gradient[: self.vocabulary]
            if self.started:
                to.add_(total)
            else:
                to.copy_(total)
        self.started = True

    def finish(self) -> None:
        """Zeroes what no chunk wrote: ids that do not exist, and all without any position."""
        start = self.vocabulary if self.started else 0
        for factors in self.factors:
            if factors.of_weight is not None:
                factors.of_weight[start:] = 0
        if self.bias_gradient is not None:
            self.bias_gradient[start:] = 0
