"""Calls of the C functions themselves, without PyTorch's part."""

from __future__ import annotations

from typing import Any

from opdc import _ops

SETTINGS = _ops.settings({"mixture": 0.3}, None)
MEAN = _ops.REDUCTIONS.index("mean")


def core_call(method: Any, student: Any, teacher: Any, **changes: Any) -> dict[str, Any]:
    """The arguments that `_C.loss` and `_C.gradient` share, by name and in order."""
    arguments = {
        "method": method,
        "student": student,
        **dict.fromkeys(_ops.TENSORS),
        "settings": SETTINGS,
        **dict.fromkeys(_ops.INTEGERS, 0),
        "valid_vocab": 0,
    }
    changes = {"teacher": teacher, "reduction": MEAN} | changes
    assert set(changes) <= set(arguments)
    return arguments | changes
