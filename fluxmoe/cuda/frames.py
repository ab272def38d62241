"""Frames of device memory, managed with CUDA's virtual memory calls.

Frame ``i`` is one driver allocation (``cuMemCreate``), made when the frame is first committed and
kept for later commits, because allocating takes a hundred times as long as mapping (kvcached on an
A100: 193 µs and 1.45 µs). Committing maps each frame and enables access to the whole range at once.
Frames that are new or were released read as zero after a commit. Accesses to addresses without a
frame fault: the device's context is lost, and every later call reports the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from fluxmoe import sizes
from fluxmoe.core.memory import dlpack
from fluxmoe.core.memory.substrate import runs
from fluxmoe.core.types import Int64s
from fluxmoe.cuda.driver import CudaDriver
from fluxmoe.errors import DeviceMemoryError, SubstrateError

#: Bytes of a frame on CUDA: the mapping granularity of its devices.
FRAME_BYTES = 2 << 20


class CudaSubstrate:
    """Frames of a CUDA device. Implements ``Substrate``. Not thread-safe.

    Args:
        cuda: The device; not closed with the substrate.
        count: Number of frames in the budget.
        frame_bytes: Bytes of a frame, a multiple of the device's mapping granularity.
        recycle: Keep the memory of released frames for the next commit instead of returning it to
            the system.

    Raises:
        SubstrateError: The device lacks virtual memory calls or has a larger mapping granularity.
    """

    def __init__(
        self, cuda: CudaDriver, count: int, frame_bytes: int = FRAME_BYTES, *, recycle: bool = True
    ) -> None:
        self.count, self.frame_bytes = count, frame_bytes
        self.device = (dlpack.CUDA, cuda.ordinal)
        self._cuda, self._recycle = cuda, recycle
        self._handles: list[Any] = [None] * count
        self._dirty = np.ones(count, np.bool_)
        self._ranges: dict[int, int] = {}
        #: Addresses at which a frame is mapped, including those that failed to unmap.
        self._mapped: set[int] = set()
        self._stale: set[int] = set()
        self._stream: Any = None
        if not cuda.attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"):
            raise SubstrateError(f"{cuda.name} does not support virtual memory management")
        api = cuda.api
        self._memory = api.CUmemAllocationProp()
        self._memory.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._memory.location = self._location()
        self._access = api.CUmemAccessDesc()
        self._access.location = self._location()
        self._access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        piece = int(cuda.call("cuMemGetAllocationGranularity", self._memory, least))
        if frame_bytes <= 0 or frame_bytes % piece:
            raise SubstrateError(
                f"a frame of {sizes.exact(frame_bytes)} is not a multiple of {sizes.exact(piece)}, "
                f"which {cuda.name} maps as one piece",
                where="frame_bytes",
            )
        with cuda.current():
            flag = int(api.CUstream_flags.CU_STREAM_NON_BLOCKING)
            self._stream = cuda.call("cuStreamCreate", flag)

    def _location(self) -> Any:
        location = self._cuda.api.CUmemLocation()
        location.type = self._cuda.api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self._cuda.ordinal
        return location

    def reserve(self, nbytes: int) -> int:
        address = int(self._cuda.call("cuMemAddressReserve", nbytes, 0, 0, 0))
        self._ranges[address] = nbytes
        return address

    def unreserve(self, address: int, nbytes: int, viewed: object | None = None) -> None:
        """Release a reserved range. If the driver call fails, ``close`` tries again.

        Host memory has no views of device memory, so ``viewed`` is not used.
        """
        if self._ranges.get(address) != nbytes:
            raise SubstrateError(f"no range of {sizes.exact(nbytes)} was reserved at {address:#x}")
        self._stale |= self._mapped.intersection(self._places(address, nbytes // self.frame_bytes))
        with suppress(SubstrateError):
            self._unreserve(address)

    def commit(self, address: int, frames: Int64s) -> None:
        if not len(frames):
            return
        nbytes = len(frames) * self.frame_bytes
        places = self._places(address, len(frames))
        with self._cuda.current():
            self._unmap(self._stale.intersection(places))
            made: list[int] = []
            mapped: list[int] = []
            try:
                for at, frame in zip(places, frames.tolist(), strict=True):
                    if self._handles[frame] is None:
                        self._handles[frame] = self._create(frame)
                        made.append(frame)
                    handle = self._handles[frame]
                    self._cuda.call("cuMemMap", at, self.frame_bytes, 0, handle, 0)
                    mapped.append(at)
                self._cuda.call("cuMemSetAccess", address, nbytes, [self._access], 1)
                self._clear(address, frames)
            except BaseException:
                self._mapped |= set(mapped)
                self._stale |= set(mapped)
                with suppress(SubstrateError):  # on failure, the next commit or close tries again
                    self._unmap(set(mapped))
                    self._free(made)
                raise
        self._mapped |= set(mapped)
        self._dirty[frames] = False

    def decommit(self, address: int, count: int) -> None:
        """Unmap ``count`` frames at ``address`` once the device has finished all earlier work."""
        if count:
            with self._cuda.current():
                self._unmap(self._mapped.intersection(self._places(address, count)))

    def release(self, frames: Int64s) -> None:
        self._dirty[frames] = True
        if not self._recycle:
            with self._cuda.current():
                self._free(frames.tolist())

    def allocated(self) -> int:
        return sum(handle is not None for handle in self._handles) * self.frame_bytes

    def close(self) -> None:
        """Release everything. Idempotent.

        Raises:
            SubstrateError: Some memory could not be released, but the rest was; a further call
                tries again.
        """
        if not self._ranges and not self.allocated() and self._stream is None:
            return
        # The callbacks run in reverse order, all of them even if one fails.
        with self._cuda.current(), ExitStack() as each:
            each.callback(self._end_stream)
            each.callback(self._free, range(self.count))
            for address in list(self._ranges):
                each.callback(self._unreserve, address)

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._cuda.call("cuStreamDestroy", self._stream)
            self._stream = None

    def _places(self, address: int, count: int) -> range:
        return range(address, address + count * self.frame_bytes, self.frame_bytes)

    def _create(self, frame: int) -> Any:
        try:
            return self._cuda.call("cuMemCreate", self.frame_bytes, self._memory, 0)
        except DeviceMemoryError as error:
            free, total = self._cuda.memory()
            raise DeviceMemoryError(
                f"the GPU has no memory for another frame of {sizes.exact(self.frame_bytes)} "
                f"in addition to frames of {sizes.shown(self.allocated())}: {sizes.shown(free)} of "
                f"{sizes.shown(total)} is free",
                where=error.where,
                fix=error.fix,
            ) from error

    def _clear(self, address: int, frames: Int64s) -> None:
        """Fill with zeros the frames that are new or were released."""
        zero = np.flatnonzero(self._dirty[frames])
        for first, count in runs(zero):
            place = address + first * self.frame_bytes
            nbytes = count * self.frame_bytes
            self._cuda.call("cuMemsetD8Async", place, 0, nbytes, self._stream)
        if len(zero):
            self._cuda.call("cuStreamSynchronize", self._stream)

    def _unmap(self, addresses: set[int]) -> None:
        """Unmap frames, with one call for each run of adjacent frames."""
        if not addresses:
            return
        self._cuda.call("cuCtxSynchronize")  # unmapping does not wait for running kernels
        for address, count in runs(np.array(sorted(addresses), np.int64), self.frame_bytes):
            self._cuda.call("cuMemUnmap", address, count * self.frame_bytes)
            done = set(self._places(address, count))
            self._mapped -= done
            self._stale -= done

    def _unreserve(self, address: int) -> None:
        nbytes = self._ranges[address]
        with self._cuda.current():
            places = self._places(address, nbytes // self.frame_bytes)
            self._unmap(self._mapped.intersection(places))
            self._cuda.call("cuMemAddressFree", address, nbytes)
        del self._ranges[address]

    def _free(self, frames: Iterable[int]) -> None:
        with ExitStack() as each:
            for frame in frames:
                each.callback(self._free_one, frame)

    def _free_one(self, frame: int) -> None:
        if self._handles[frame] is not None:
            self._cuda.call("cuMemRelease", self._handles[frame])
            self._handles[frame] = None
            self._dirty[frame] = True
