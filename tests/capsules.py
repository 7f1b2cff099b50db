"""A hand-made DLPack producer: exports what the test describes, right or absurd, and counts what
becomes of it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

FLOAT, INT, BFLOAT, BOOL = 2, 0, 4, 6
CPU, CUDA = 1, 2
READ_ONLY = 1


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


class _Unversioned(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Producer:
    """An object with `__dlpack__`. `exported` and `deleted` count the tensors it gave away."""

    def __init__(
        self,
        address: int | None,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        *,
        code: int = FLOAT,
        bits: int = 32,
        lanes: int = 1,
        device: int = CPU,
        flags: int = 0,
        version: tuple[int, int] = (1, 3),
        byte_offset: int = 0,
        unversioned: bool = False,
        axes: int | None = None,
    ) -> None:
        self.exported = self.deleted = 0
        self._unversioned = unversioned
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        tensor = _Tensor(
            *(address, device, 0, len(shape) if axes is None else axes, code, bits, lanes),
            self._shape,
            self._strides,
            byte_offset,
        )
        self._deleter = _DELETER(self._delete)
        if unversioned:
            self._managed: Any = _Unversioned(tensor, None, self._deleter)
        else:
            self._managed = _Versioned(*version, None, self._deleter, flags, tensor)

    def _delete(self, _: int) -> None:
        self.deleted += 1

    def __dlpack__(self, **_: Any) -> Any:
        self.exported += 1
        name = b"dltensor" if self._unversioned else b"dltensor_versioned"
        return _new_capsule(ctypes.addressof(self._managed), name, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0
