"""What student and teacher read while a sampler writes, and how each reads only what is new."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class Transcript:
    """The slots that both models read, in the order of their caches.

    Padding on the left and rejected drafts are slots that nothing may see. So positions are not
    the numbers of the slots: they count the tokens of a row that are seen.
    """

    ids: Tensor  # (B, slots)
    seen: Tensor  # (B, slots), 1 where the slot may be attended to
    positions: Tensor  # (B, slots)

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None, room: int) -> None:
        self.length = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen = (mask != 0).long()
        self.whole = bool(seen.all())
        # Where nothing is seen, the id may be one that a model does not have.
        self.ids = functional.pad(input_ids * seen, (0, room))
        self.seen = functional.pad(seen, (0, room), value=1)
        self.positions = functional.pad((seen.cumsum(-1) - 1).clamp(min=0), (0, room))

    @property
    def last_position(self) -> Tensor:
        return self.positions[:, self.length - 1]  # (B,)

    def append(self, ids: Tensor, positions: Tensor) -> None:
        if self.length == self.ids.shape[1]:
            room = self.length
            self.ids = functional.pad(self.ids, (0, room))
            self.seen = functional.pad(self.seen, (0, room), value=1)
            self.positions = functional.pad(self.positions, (0, room))
        self.ids[:, self.length] = ids
        self.seen[:, self.length] = 1
        self.positions[:, self.length] = positions
        self.length += 1

    def hide(self, rejected: Tensor) -> None:
        """Hide some of the last slots: `rejected` is `(B, their number)`."""
        self.seen[:, self.length - rejected.shape[1] : self.length] = ~rejected
        self.whole = False

    def drop(self, count: int) -> None:
        """Forget the last slots, which the caches have to forget too."""
        self.length -= count


class Reader:
    """A model with the cache of what it has read.

    Gradient checkpointing makes a model in train mode drop its cache without a word. Fed one
    token, it would then see nothing else. So what the cache holds is compared with what was read;
    a model without a cache reads everything at each call.
    """

    def __init__(self, model: Any, role: str, *, needs_cache: bool = False) -> None:
        self.model = model
        self.role = role
        self.needs_cache = needs_cache
        self.forwards = 0
        self.seconds = 0.0
        self.read = 0
        self._parameters = inspect.signature(unwrapped(model).forward).parameters
        self._cache: Any = None
        if "past_key_values" in self._parameters:
            self._cache = DynamicCache(config=config_of(model))
        elif needs_cache:
            self._refuse_without_cache()

    def require_holes(self) -> None:
        """Slots that nothing sees are right only if attention goes by the mask, to all of them, and
        positions are what they are said to be."""
        layers = [] if self._cache is None else self._cache.layers
        if not {"position_ids", "attention_mask"} <= self._parameters.keys() or any(
            type(layer) is not DynamicLayer for layer in layers
        ):
            raise ValueError(
                f"the {self.role} {_name(self.model)} has a sliding window, a recurrent state or "
                "positions of its own: its cache cannot skip rejected drafts; use draft_length=0"
            )

    @torch.no_grad()
    def logits(self, transcript: Transcript, count: int) -> Tensor:
        """The logits `(B, count, V)` at the last `count` slots."""
        start = time.perf_counter()
        cache = self._cache
        new = slice(0 if cache is None else self.read, transcript.length)
        arguments = {
            "input_ids": transcript.ids[:, new],
            # With nothing hidden the models need not make a mask of their own from it.
            "attention_mask": None if transcript.whole else transcript.seen[:, : transcript.length],
            "position_ids": transcript.positions[:, new],
            "logits_to_keep": count,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        known = {name: value for name, value in arguments.items() if name in self._parameters}
        logits: Tensor = self.model(**known, return_dict=True).logits[:, -count:]
        self.read = transcript.length
        if cache is not None and not _holds(cache, self.read):
            if self.needs_cache:
                self._refuse_without_cache()
            self._cache = None
        self.forwards += 1
        self.seconds += time.perf_counter() - start
        return logits

    def forget(self, count: int) -> None:
        self.read -= count
        if self._cache is not None:
            self._cache.crop(-count)

    @torch.no_grad()
    def idle(self, transcript: Transcript) -> None:
        """A forward whose result nobody wants: parts of the model are on other processes, which
        still need this one."""
        self.model(input_ids=transcript.ids[:, :1])
        self.forwards += 1

    def _refuse_without_cache(self) -> None:
        raise ValueError(
            f"the {self.role} {_name(self.model)} does not keep what it has read in a DynamicCache "
            "given as past_key_values: it cannot be read token by token"
        )


def unwrapped(model: Any) -> Any:
    """The model that says what its forward takes, inside of PEFT or a parallel wrapper."""
    if hasattr(model, "get_base_model"):
        return unwrapped(model.get_base_model())
    for name in ("module", "_orig_mod"):  # of parallel wrappers, and of torch.compile
        inner = getattr(model, name, None)
        if isinstance(inner, torch.nn.Module):
            return unwrapped(inner)
    return model


def config_of(model: Any) -> Any:
    return getattr(unwrapped(model), "config", None)


def vocabulary_size(model: Any) -> int | None:
    config = config_of(model)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode, afterwards each part of it in the mode that it had."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _holds(cache: Any, count: int) -> bool:
    try:
        return bool(cache.get_seq_length() == count)
    except ValueError:  # nothing but recurrent states, which do not say how much they have read
        return False


def _name(model: Any) -> str:
    return type(unwrapped(model)).__name__
