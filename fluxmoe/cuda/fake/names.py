"""Constants, structures and handles of ``cuda.bindings.driver`` that FluxMoE uses.

``tests/cuda/test_bindings.py`` compares them with the real bindings if those are installed.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class CUresult(IntEnum):
    """Result of a call."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ALREADY_MAPPED = 208
    CUDA_ERROR_ECC_UNCORRECTABLE = 214
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803
    CUDA_ERROR_UNKNOWN = 999


class CUmemAllocationType(IntEnum):
    """Kinds of physical memory."""

    CU_MEM_ALLOCATION_TYPE_INVALID = 0
    CU_MEM_ALLOCATION_TYPE_PINNED = 1


class CUmemLocationType(IntEnum):
    """Kinds of locations that hold or access memory."""

    CU_MEM_LOCATION_TYPE_INVALID = 0
    CU_MEM_LOCATION_TYPE_DEVICE = 1


class CUmemAccess_flags(IntEnum):
    """Permitted access to memory."""

    CU_MEM_ACCESS_FLAGS_PROT_NONE = 0
    CU_MEM_ACCESS_FLAGS_PROT_READ = 1
    CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3


class CUmemAllocationGranularity_flags(IntEnum):
    """Granularities to query."""

    CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0
    CU_MEM_ALLOC_GRANULARITY_RECOMMENDED = 1


class CUmemcpySrcAccessOrder(IntEnum):
    """Orders in which a batch reads its sources."""

    CU_MEMCPY_SRC_ACCESS_ORDER_INVALID = 0
    CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1


class CUmemcpyFlags(IntEnum):
    """Hints for a batch of copies."""

    CU_MEMCPY_FLAG_DEFAULT = 0
    CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE = 1


class CUstream_flags(IntEnum):
    """Kinds of streams."""

    CU_STREAM_DEFAULT = 0
    CU_STREAM_NON_BLOCKING = 1


class CUdevice_attribute(IntEnum):
    """Properties of a device."""

    CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT = 40
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102


class CUmemLocation:
    """Location of memory: a device."""

    def __init__(self) -> None:
        self.type = CUmemLocationType.CU_MEM_LOCATION_TYPE_INVALID
        self.id = 0


class CUmemAllocationProp:
    """Kind and location of memory to create."""

    def __init__(self) -> None:
        self.type = CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_INVALID
        self.location = CUmemLocation()


class CUmemAccessDesc:
    """Access rights of a location to memory."""

    def __init__(self) -> None:
        self.location = CUmemLocation()
        self.flags = CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_NONE


class CUmemcpyAttributes:
    """Attributes of the copies of a batch."""

    def __init__(self) -> None:
        self.srcAccessOrder = CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_INVALID
        self.flags = 0


class Handle:
    """A driver object, represented by a number."""

    def __init__(self, init_value: Any = 0) -> None:
        self._number = int(init_value)

    def __int__(self) -> int:
        return self._number


class CUdeviceptr(Handle):
    """An address."""


class CUdevice(Handle):
    """A device."""


class CUcontext(Handle):
    """A context."""


class CUmemGenericAllocationHandle(Handle):
    """Physical memory."""


class CUstream(Handle):
    """A stream."""


class CUevent(Handle):
    """An event."""


class Refused(Exception):
    """A result to inject into a fake call: ``plan.arm("cuMemMap", Refused(result))``."""

    def __init__(self, result: CUresult) -> None:
        super().__init__(result.name)
        self.result = result
