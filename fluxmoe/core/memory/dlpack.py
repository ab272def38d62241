"""Zero-copy export of memory at an address, as a tensor of any library that accepts DLPack.

Torch cannot wrap a pointer that it did not allocate, but it accepts DLPack from any source, and
does not query the driver about the addresses, some of which may not be committed yet.
https://dmlc.github.io/dlpack/latest/c_api.html defines the structures; this is version 0.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

#: DLPack's device types.
CPU, CUDA = 1, 2
_UINT = 1
_NAME = b"dltensor"


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


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


#: Address → structure that a consumer may still use.
_lent: dict[int, _Managed] = {}

# Not `ctypes.pythonapi`: other libraries set different argument types on its functions.
_python = ctypes.PyDLL(None)
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_python.PyCapsule_IsValid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(managed: int) -> None:
    _lent.pop(managed, None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _drop(capsule: int) -> None:
    """Destroy a capsule; call ``_delete`` unless a consumer, which renames its capsule, does so."""
    if _python.PyCapsule_IsValid(capsule, _NAME):
        _delete(_python.PyCapsule_GetPointer(capsule, _NAME))


@dataclass(frozen=True, slots=True)
class Exported:
    """The bytes at an address as uint8 ``[rows, nbytes]``, for ``torch.from_dlpack``.

    The tensor does not keep the memory alive, and only committed rows may be accessed.

    Attributes:
        device: DLPack device type and device number.
    """

    address: int
    rows: int
    nbytes: int
    device: tuple[int, int]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        """Make a capsule. ``stream`` is ignored, because no writes to the memory are pending."""
        shape = (ctypes.c_int64 * 2)(self.rows, self.nbytes)
        strides = (ctypes.c_int64 * 2)(self.nbytes, 1)
        tensor = _Tensor(self.address, *self.device, 2, _UINT, 8, 1, shape, strides, 0)
        managed = _Managed(tensor, None, ctypes.cast(_delete, ctypes.c_void_p))
        address = ctypes.addressof(managed)
        _lent[address] = managed
        return _python.PyCapsule_New(address, _NAME, ctypes.cast(_drop, ctypes.c_void_p))
