"""Tensors at an address of a device: views that begin anywhere in another tensor.

TVM's own views keep the offset beside the address, which compiled functions refuse; through DLPack (dlpack.h, version 0.8)
the address itself is given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from llmc.runtime.library import ffi

_CUDA = 2  # kDLCUDA
_CODES = {"int32": (0, 32), "float32": (2, 32), "float64": (2, 64)}  # DLDataTypeCode, bits


class _ManagedTensor(ctypes.Structure):
    """DLManagedTensor, with its DLTensor in place."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_alive: dict[int, tuple[_ManagedTensor, Any]] = {}  # by address, until the tensor is given up


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address: int) -> None:
    _alive.pop(address, None)


class _Exporter:
    """An object that numpy's protocol for DLPack takes for a tensor."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0


def tensor_at(address: int, shape: Sequence[int], dtype: str) -> Any:
    """A dense tensor of the first GPU; the memory must outlive it."""
    extents = (ctypes.c_int64 * len(shape))(*shape)
    code, bits = _CODES[dtype]
    made = _ManagedTensor(
        data=address,
        device_type=_CUDA,
        ndim=len(shape),
        code=code,
        bits=bits,
        lanes=1,
        shape=extents,
        deleter=ctypes.cast(_delete, ctypes.c_void_p),
    )
    at = ctypes.addressof(made)
    _alive[at] = (made, extents)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return ffi().from_dlpack(_Exporter(new(at, b"dltensor", None)))
