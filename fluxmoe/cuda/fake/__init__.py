"""FakeDriver: a replacement for ``cuda.bindings.driver`` that uses host memory.

Addresses are real, memory is mapped and unmapped, and bytes are copied. The fake is stricter than
the driver: accessing memory that is not mapped or not accessible, or unmapping memory that a stream
may use, loses the context, and every later call reports the loss. Each call is a site of a
``FaultPlan``; a call armed with ``Refused`` returns the given result and does nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from fluxmoe.cuda.fake import names
from fluxmoe.cuda.fake.calls import driver_call, require
from fluxmoe.cuda.fake.memory import FakeMemory
from fluxmoe.cuda.fake.names import CUresult, Refused
from fluxmoe.cuda.fake.timeline import KERNELS, Event, Pace, Work
from fluxmoe.testing.faults import FaultPlan

__all__ = ["FakeDriver", "Refused"]

_CONTEXT = 77


class FakeDriver(FakeMemory):
    """The driver functions that FluxMoE calls, for one device.

    Args:
        pieces: Size of the device memory, in pieces.
        piece: Bytes of a piece, the mapping granularity.
        version: CUDA version of the driver and the bindings.
        pace: Order in which streams execute.
        seed: Seed for random scheduling.
        plan: Faults to inject.

    Attributes:
        lost: Result of every call since the context was lost; None before that.
    """

    CUresult = names.CUresult
    CUmemAllocationType = names.CUmemAllocationType
    CUmemLocationType = names.CUmemLocationType
    CUmemAccess_flags = names.CUmemAccess_flags
    CUmemAllocationGranularity_flags = names.CUmemAllocationGranularity_flags
    CUmemcpySrcAccessOrder = names.CUmemcpySrcAccessOrder
    CUmemcpyFlags = names.CUmemcpyFlags
    CUstream_flags = names.CUstream_flags
    CUdevice_attribute = names.CUdevice_attribute
    CUmemLocation = names.CUmemLocation
    CUmemAllocationProp = names.CUmemAllocationProp
    CUmemAccessDesc = names.CUmemAccessDesc
    CUmemcpyAttributes = names.CUmemcpyAttributes
    CUdeviceptr = names.CUdeviceptr

    def __init__(
        self,
        pieces: int = 256,
        piece: int = 4096,
        *,
        version: int = 13000,
        pace: Pace = "at once",
        seed: int = 0,
        plan: FaultPlan | None = None,
    ) -> None:
        super().__init__(pieces, piece, version, pace, seed, plan)
        self._events: dict[int, Event] = {}
        self._retained = 0

    # --- for tests -------------------------------------------------------------------------------

    def launch(self, kernel: Callable[[], None], stream: int = KERNELS) -> None:
        """Submit a kernel to a stream; ``kernel`` is called when the stream reaches it."""

        def run() -> float:
            kernel()
            return 1.0

        with self._lock:
            self.timeline.give(stream, Work(run))

    def live(self) -> dict[str, int]:
        """Count the unreleased resources of each kind."""
        found = {
            "ranges": len(self._reserved),
            "memory": len(self._memory),
            "maps": len(self._maps),
            "pinned": len(self._pinned),
            "events": len(self._events),
            "streams": len(self.timeline._streams) - 1,
            "contexts": self._retained + len(self._contexts()),
        }
        return {kind: count for kind, count in found.items() if count}

    def handle_at(self, address: int) -> int | None:
        """Return the handle of the memory mapped at an address, if any."""
        mapping = self._maps.get(address)
        numbers = [n for n, memory in self._memory.items() if mapping and memory is mapping.memory]
        return numbers[0] if numbers else None

    def close(self) -> None:
        """Release the host memory."""
        self._ground.close()

    # --- start and context -----------------------------------------------------------------------

    @driver_call(context=False)
    def cuInit(self, Flags: int) -> None:
        require(Flags == 0)

    @driver_call(1, context=False)
    def cuDriverGetVersion(self) -> int:
        return self.CUDA_VERSION

    @driver_call(1, context=False)
    def cuDeviceGetCount(self) -> int:
        return 1

    @driver_call(1, context=False)
    def cuDeviceGet(self, ordinal: int) -> names.CUdevice:
        require(ordinal == 0, CUresult.CUDA_ERROR_INVALID_DEVICE)
        return names.CUdevice(0)

    @driver_call(1, context=False)
    def cuDeviceGetName(self, length: int, dev: Any) -> bytes:
        return b"Fake GPU".ljust(length, b"\0")

    @driver_call(1, context=False)
    def cuDeviceGetAttribute(self, attrib: names.CUdevice_attribute, dev: Any) -> int:
        return 1

    @driver_call(1, context=False)
    def cuDevicePrimaryCtxRetain(self, dev: Any) -> names.CUcontext:
        self._retained += 1
        return names.CUcontext(_CONTEXT)

    @driver_call(context=False)
    def cuDevicePrimaryCtxRelease(self, dev: Any) -> None:
        require(self._retained > 0, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self._retained -= 1

    @driver_call(context=False)
    def cuCtxPushCurrent(self, ctx: Any) -> None:
        alive = self._retained > 0 and int(ctx) == _CONTEXT
        require(alive, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self._contexts().append(ctx)

    @driver_call(1)
    def cuCtxPopCurrent(self) -> Any:
        return self._contexts().pop()

    @driver_call()
    def cuCtxSynchronize(self) -> None:
        self.timeline.finish()
        self._require_alive()

    @driver_call(2)
    def cuCtxGetStreamPriorityRange(self) -> tuple[int, int]:
        return 0, -5

    # --- copies, streams, events -----------------------------------------------------------------

    @driver_call()
    def cuMemcpyHtoD(self, dstDevice: Any, srcHost: Any, ByteCount: int) -> None:
        require(self._covered(int(dstDevice), ByteCount))
        ctypes.memmove(int(dstDevice), int(srcHost), ByteCount)

    @driver_call()
    def cuMemcpyDtoH(self, dstHost: Any, srcDevice: Any, ByteCount: int) -> None:
        require(self._covered(int(srcDevice), ByteCount))
        ctypes.memmove(int(dstHost), int(srcDevice), ByteCount)

    @driver_call()
    def cuMemcpyHtoDAsync(self, dstDevice: Any, srcHost: Any, ByteCount: int, hStream: Any) -> None:
        self._copy(int(dstDevice), int(srcHost), ByteCount, hStream, pinned=True)

    @driver_call()
    def cuMemcpyDtoDAsync(
        self, dstDevice: Any, srcDevice: Any, ByteCount: int, hStream: Any
    ) -> None:
        self._copy(int(dstDevice), int(srcDevice), ByteCount, hStream, pinned=False)

    @driver_call()
    def cuMemcpyBatchAsync(
        self,
        dsts: list[Any],
        srcs: list[Any],
        sizes: list[int],
        count: int,
        attrs: list[names.CUmemcpyAttributes],
        attrsIdxs: list[int],
        numAttrs: int,
        hStream: Any,
    ) -> None:
        if not all(isinstance(each, names.CUdeviceptr) for each in (*dsts, *srcs)):
            raise TypeError("dsts and srcs must be lists of CUdeviceptr")
        require(len(dsts) == len(srcs) == len(sizes) == count > 0)
        require(len(attrs) == len(attrsIdxs) == numAttrs == 1 and attrsIdxs[0] == 0)
        stream_order = self.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        require(attrs[0].srcAccessOrder == stream_order and self._stream(hStream) != KERNELS)
        require(self.CUDA_VERSION >= 12080, CUresult.CUDA_ERROR_NOT_SUPPORTED)
        for target, source, nbytes in zip(dsts, srcs, sizes, strict=True):
            self._copy(int(target), int(source), nbytes, hStream, pinned=True)

    @driver_call(1)
    def cuStreamCreate(self, Flags: int) -> names.CUstream:
        return self._new_stream()

    @driver_call(1)
    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> names.CUstream:
        return self._new_stream()

    @driver_call()
    def cuStreamDestroy(self, hStream: Any) -> None:
        self.timeline.destroy(self._stream(hStream))

    @driver_call()
    def cuStreamSynchronize(self, hStream: Any) -> None:
        self.timeline.finish(self._stream(hStream))
        self._require_alive()

    @driver_call()
    def cuStreamWaitEvent(self, hStream: Any, hEvent: Any, Flags: int) -> None:
        self.timeline.wait(self._stream(hStream), self._event(hEvent))

    @driver_call(1)
    def cuEventCreate(self, Flags: int) -> names.CUevent:
        number = self._number()
        self._events[number] = Event()
        return names.CUevent(number)

    @driver_call()
    def cuEventDestroy(self, hEvent: Any) -> None:
        self._event(hEvent)
        del self._events[int(hEvent)]

    @driver_call()
    def cuEventRecord(self, hEvent: Any, hStream: Any) -> None:
        self.timeline.record(self._stream(hStream), self._event(hEvent))

    @driver_call()
    def cuEventQuery(self, hEvent: Any) -> None:
        event = self._event(hEvent)
        self.timeline.dawdle()
        self._require_alive()
        require(event.passed == event.recorded, CUresult.CUDA_ERROR_NOT_READY)

    @driver_call()
    def cuEventSynchronize(self, hEvent: Any) -> None:
        event = self._event(hEvent)
        self.timeline.until(lambda: event.passed == event.recorded)
        self._require_alive()

    @driver_call(1)
    def cuEventElapsedTime(self, hStart: Any, hEnd: Any) -> float:
        first, then = self._event(hStart), self._event(hEnd)
        over = first.passed == first.recorded and then.passed == then.recorded
        require(over, CUresult.CUDA_ERROR_NOT_READY)
        return then.at - first.at

    # --- inside ----------------------------------------------------------------------------------

    def _new_stream(self) -> names.CUstream:
        number = self._number()
        self.timeline.create(number)
        return names.CUstream(number)

    def _event(self, event: Any) -> Event:
        require(int(event) in self._events, CUresult.CUDA_ERROR_INVALID_HANDLE)
        return self._events[int(event)]

    def _copy(self, target: int, source: int, nbytes: int, stream: Any, *, pinned: bool) -> None:
        def work() -> float:
            readable = self._is_pinned(source, nbytes) if pinned else True
            if readable and self._accessible(target, nbytes):
                ctypes.memmove(target, source, nbytes)
            return nbytes / 1e6

        require(self._is_pinned(source, nbytes) or not pinned)
        self.timeline.give(self._stream(stream), Work(work))
