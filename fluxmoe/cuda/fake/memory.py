"""The fake driver's memory: ranges, physical memory, mappings and page-locked host memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluxmoe.core.memory.host import CpuSubstrate
from fluxmoe.cuda.fake import names
from fluxmoe.cuda.fake.calls import driver_call, require
from fluxmoe.cuda.fake.names import CUresult, Refused
from fluxmoe.cuda.fake.timeline import Pace, Timeline, Work
from fluxmoe.testing.faults import FaultPlan


@dataclass(slots=True, eq=False)
class _Memory:
    """A physical allocation: pieces, bytes, number of mappings, and a flag for a freed handle."""

    pieces: list[int]
    nbytes: int
    mapped: int = 0
    released: bool = False


@dataclass(slots=True)
class _Mapping:
    memory: _Memory
    accessible: bool = False


class FakeMemory:
    """The driver's memory functions; ``FakeDriver`` adds the others and documents the arguments."""

    def __init__(
        self, pieces: int, piece: int, version: int, pace: Pace, seed: int, plan: FaultPlan | None
    ) -> None:
        self.CUDA_VERSION = version
        self.plan = plan or FaultPlan()
        self.lost: CUresult | None = None
        self.piece = piece
        self.timeline = Timeline(pace, seed)
        self._ground = CpuSubstrate(pieces, piece)
        self._free = list(range(pieces))
        self._reserved: dict[int, int] = {}
        self._memory: dict[int, _Memory] = {}
        self._maps: dict[int, _Mapping] = {}
        self._pinned: dict[int, Any] = {}
        self._numbers = 0
        self._threads = threading.local()
        self._lock = threading.RLock()

    @driver_call(1, context=False)
    def cuMemGetAllocationGranularity(
        self, prop: names.CUmemAllocationProp, option: names.CUmemAllocationGranularity_flags
    ) -> int:
        self._require_here(prop.location)
        return self.piece

    @driver_call(2)
    def cuMemGetInfo(self) -> tuple[int, int]:
        return len(self._free) * self.piece, self._ground.count * self.piece

    @driver_call(1, context=False)
    def cuMemAddressReserve(self, size: int, alignment: int, addr: Any, flags: int) -> Any:
        require(size > 0 and size % self.piece == 0 and not alignment and not int(addr))
        address = self._ground.reserve(size)
        self._reserved[address] = size
        return names.CUdeviceptr(address)

    @driver_call(context=False)
    def cuMemAddressFree(self, ptr: Any, size: int) -> None:
        require(self._reserved.get(int(ptr)) == size)
        require(not any(int(ptr) <= at < int(ptr) + size for at in self._maps))
        self._ground.unreserve(int(ptr), size)
        del self._reserved[int(ptr)]

    @driver_call(1, context=False)
    def cuMemCreate(self, size: int, prop: names.CUmemAllocationProp, flags: int) -> Any:
        require(size > 0 and size % self.piece == 0 and not flags)
        require(prop.type == names.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED)
        self._require_here(prop.location)
        count = size // self.piece
        require(count <= len(self._free), CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        pieces, self._free = self._free[:count], self._free[count:]
        number = self._number()
        self._memory[number] = _Memory(pieces, size)
        return names.CUmemGenericAllocationHandle(number)

    @driver_call(context=False)
    def cuMemRelease(self, handle: Any) -> None:
        memory = self._memory.pop(int(handle), None)
        require(memory is not None)
        assert memory is not None
        memory.released = True
        self._reclaim(memory)

    @driver_call(context=False)
    def cuMemMap(self, ptr: Any, size: int, offset: int, handle: Any, flags: int) -> None:
        memory, address = self._memory.get(int(handle)), int(ptr)
        require(memory is not None)
        assert memory is not None
        require(size == memory.nbytes and not offset and not flags)
        require(any(at <= address <= at + n - size for at, n in self._reserved.items()))
        taken = [at for at, other in self._maps.items() if at < address + size]
        free = all(at + self._maps[at].memory.nbytes <= address for at in taken)
        require(free, CUresult.CUDA_ERROR_ALREADY_MAPPED)
        self._maps[address] = _Mapping(memory)
        memory.mapped += 1

    @driver_call(context=False)
    def cuMemSetAccess(
        self, ptr: Any, size: int, desc: list[names.CUmemAccessDesc], count: int
    ) -> None:
        require(len(desc) == count == 1)
        self._require_here(desc[0].location)
        require(desc[0].flags == names.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        for address, mapping in list(self._mapped(int(ptr), size)):
            if not mapping.accessible:
                self._ground.commit(address, np.array(mapping.memory.pieces, np.int64))
                mapping.accessible = True

    @driver_call(context=False)
    def cuMemUnmap(self, ptr: Any, size: int) -> None:
        found = list(self._mapped(int(ptr), size))
        if self.timeline.pending:  # a kernel or a copy may be using the memory
            self.lost = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
            return
        self._ground.decommit(int(ptr), size // self.piece)
        for address, mapping in found:
            del self._maps[address]
            mapping.memory.mapped -= 1
            self._reclaim(mapping.memory)

    @driver_call()
    def cuMemsetD8Async(self, dstDevice: Any, uc: int, N: int, hStream: Any) -> None:
        def work() -> float:
            if self._accessible(int(dstDevice), N):
                ctypes.memset(int(dstDevice), uc, N)
            return N / 1e6

        self.timeline.give(self._stream(hStream), Work(work))

    @driver_call(1)
    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> int:
        require(bytesize > 0)
        buffer = np.full(bytesize, 0xDD, np.uint8)
        self._pinned[buffer.ctypes.data] = buffer
        return int(buffer.ctypes.data)

    @driver_call()
    def cuMemFreeHost(self, p: int) -> None:
        require(p in self._pinned and not self.timeline.copying)
        del self._pinned[p]

    # --- inside ---------------------------------------------------------------------------------

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _require_alive(self) -> None:
        if self.lost is not None:
            raise Refused(self.lost)

    def _require_here(self, location: names.CUmemLocation) -> None:
        require(location.type == names.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE)
        require(location.id == 0, CUresult.CUDA_ERROR_INVALID_DEVICE)

    def _reclaim(self, memory: _Memory) -> None:
        if memory.released and not memory.mapped:
            self._ground.release(np.array(memory.pieces, np.int64))
            self._free = sorted(self._free + memory.pieces)

    def _mapped(self, address: int, size: int) -> Iterator[tuple[int, _Mapping]]:
        """Yield the mappings that fill a range exactly, in order; refuse the call otherwise."""
        at = address
        while at < address + size:
            mapping = self._maps.get(at)
            require(mapping is not None and at + mapping.memory.nbytes <= address + size)
            assert mapping is not None
            yield at, mapping
            at += mapping.memory.nbytes

    def _accessible(self, address: int, nbytes: int) -> bool:
        """Return True if a stream may access a range; otherwise mark the context as lost."""
        covered = self._covered(address, nbytes)
        if not covered:
            self.lost = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
        return covered

    def _covered(self, address: int, nbytes: int) -> bool:
        """Return True if the entire range is mapped and accessible."""
        last, found = address + nbytes, 0
        for at, mapping in self._maps.items():
            if mapping.accessible:
                found += max(0, min(at + mapping.memory.nbytes, last) - max(at, address))
        return found == nbytes

    def _is_pinned(self, address: int, nbytes: int) -> bool:
        return any(at <= address <= at + len(b) - nbytes for at, b in self._pinned.items())

    def _contexts(self) -> list[Any]:
        if not hasattr(self._threads, "stack"):
            self._threads.stack = []
        stack: list[Any] = self._threads.stack
        return stack

    def _stream(self, stream: Any) -> int:
        require(self.timeline.exists(int(stream)), CUresult.CUDA_ERROR_INVALID_HANDLE)
        return int(stream)
