"""Frames of host memory: one memfd, mapped piece by piece into reserved address space.

The whole budget is one anonymous file; frame ``i`` is the file's range
``[i, i + 1) * frame_bytes``. Committing maps a run of frames with
``MAP_FIXED | MAP_SHARED | MAP_POPULATE``: populating at once costs half as much as page faults on
first access, which would be in the engine's critical path. Uncommitted addresses read as NaN, from
a read-only poison file, so that an error in the books shows up in the output instead of looking
like a weight of zero; with ``debug=True``, such a read is a segmentation fault.

A forked child process shares the file. The child may remove its own mappings, but cannot map
frames, and frames that the child releases keep their bytes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np

from fluxmoe import machine, sizes
from fluxmoe.core.memory import dlpack
from fluxmoe.core.memory.substrate import runs
from fluxmoe.core.owner import Owner
from fluxmoe.core.types import Int64s
from fluxmoe.errors import SubstrateError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)

_MAP_FIXED, _MAP_NORESERVE, _MAP_POPULATE = 0x10, 0x4000, 0x8000
_PROT_NONE = 0
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_MAP_FAILED = ctypes.c_void_p(-1).value
HUGE_PAGE = 2 << 20
_POISON_BYTES = 4 << 20
# Each frame may need a separate mapping, and the system allows 65,530 (vm.max_map_count).
_MOST_FRAMES = 24 << 10


def frame_bytes_for(budget: int, unit: int = 0) -> int:
    """Choose the frame size on a CPU: budget/8192, rounded up to a power of two, 4 KiB … 2 MiB.

    Args:
        budget: Budget in bytes.
        unit: Size in bytes of a unit that is committed and released separately, such as a KV block.
            If ``unit`` is not a multiple of the frame size, smaller frames are tried, as long as
            the system can map the resulting number of frames.
    """
    wanted = max(1, -(-budget // 8192))
    frame = min(max(1 << (wanted - 1).bit_length(), 4096), 2 << 20)
    while unit % frame and frame > 4096 and budget // (frame // 2) <= _MOST_FRAMES:
        frame //= 2
    return frame


class CpuSubstrate:
    """A substrate whose frames are in a memfd.

    Args:
        count: Number of frames in the budget.
        frame_bytes: Size of a frame, a multiple of the system's page size.
        debug: Make uncommitted addresses inaccessible, so that they do not read as NaN.
    """

    device = (dlpack.CPU, 0)

    def __init__(self, count: int, frame_bytes: int, *, debug: bool = False) -> None:
        if frame_bytes <= 0 or frame_bytes % mmap.PAGESIZE:
            raise SubstrateError(
                f"a frame of {sizes.exact(frame_bytes)} is not a multiple of "
                f"{sizes.exact(mmap.PAGESIZE)}",
                where="frame_bytes",
            )
        self.count, self.frame_bytes = count, frame_bytes
        self._debug, self._owner = debug, Owner()
        self._huge = frame_bytes >= HUGE_PAGE and machine.huge_pages()
        self._ranges: dict[int, int] = {}
        self._fd = self._poison = -1
        try:
            self._fd = os.memfd_create("fluxmoe-frames")
            os.ftruncate(self._fd, count * frame_bytes)
            self._poison = os.memfd_create("fluxmoe-poison")
            # All bits set is a NaN in every floating-point format down to bf16.
            os.write(self._poison, b"\xff" * _POISON_BYTES)
        except (OSError, OverflowError) as error:
            self.close()
            raise SubstrateError(
                f"cannot create {count} frames of {sizes.exact(frame_bytes)}: {error}"
            ) from error

    def reserve(self, nbytes: int) -> int:
        self._owner.require()
        address = self._map(
            0, nbytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0
        )
        self._ranges[address] = nbytes
        try:
            self._forbid(address, nbytes)
        except BaseException:
            self.unreserve(address, nbytes)
            raise
        return address

    def unreserve(self, address: int, nbytes: int, viewed: object | None = None) -> None:
        if self._ranges.pop(address, None) != nbytes:
            raise SubstrateError(f"no range of {sizes.exact(nbytes)} was reserved at {address:#x}")
        if viewed is None:
            _libc.munmap(address, nbytes)
            return
        # A single mapping without memory: mapping the poison for each piece could exceed the
        # system's limit on the number of mappings if many views are kept.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        self._map(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        weakref.finalize(viewed, _libc.munmap, address, nbytes).atexit = False

    def commit(self, address: int, frames: Int64s) -> None:
        self._owner.require()
        done = 0
        for first, count in runs(frames):
            try:
                self._commit_run(address + done * self.frame_bytes, first, count)
            except SubstrateError:
                # A failed MAP_FIXED may have left a hole at its target: fill the hole as well.
                self.decommit(address, done + count)
                raise
            done += count

    def _commit_run(self, address: int, first: int, count: int) -> None:
        nbytes = count * self.frame_bytes
        flags = mmap.MAP_SHARED | _MAP_FIXED | (0 if self._huge else _MAP_POPULATE)
        self._map(
            address,
            nbytes,
            mmap.PROT_READ | mmap.PROT_WRITE,
            flags,
            self._fd,
            first * self.frame_bytes,
        )
        if self._huge:  # give the advice before populating, which would otherwise use small pages
            _libc.madvise(address, nbytes, _MADV_HUGEPAGE)
            _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE)

    def decommit(self, address: int, count: int) -> None:
        if count:
            self._forbid(address, count * self.frame_bytes)

    def release(self, frames: Int64s) -> None:
        if not self._owner.here:
            return
        for first, count in runs(np.sort(frames)):
            offset, nbytes = first * self.frame_bytes, count * self.frame_bytes
            if _libc.fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, nbytes):
                raise SubstrateError(
                    f"cannot release {count} frames: {os.strerror(ctypes.get_errno())}"
                )

    def allocated(self) -> int:
        return os.fstat(self._fd).st_blocks * 512 if self._fd >= 0 else 0

    def close(self) -> None:
        for address, nbytes in list(self._ranges.items()):
            self.unreserve(address, nbytes)
        for fd in (self._fd, self._poison):
            if fd >= 0:
                os.close(fd)
        self._fd = self._poison = -1

    def _forbid(self, address: int, nbytes: int) -> None:
        if self._debug:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
            self._map(address, nbytes, _PROT_NONE, flags, -1, 0)
            return
        # Map one small file many times instead of a large file once: the poison takes only 4 MiB.
        for offset in range(0, nbytes, _POISON_BYTES):
            size = min(_POISON_BYTES, nbytes - offset)
            self._map(
                address + offset,
                size,
                mmap.PROT_READ,
                mmap.MAP_SHARED | _MAP_FIXED,
                self._poison,
                0,
            )

    def _map(self, address: int, nbytes: int, prot: int, flags: int, fd: int, offset: int) -> int:
        got = _libc.mmap(address or None, nbytes, prot, flags, fd, offset)
        if got is None or got == _MAP_FAILED:
            errno = ctypes.get_errno()
            hint = " (vm.max_map_count may be too low)" if errno == 12 else ""
            raise SubstrateError(f"cannot map {sizes.shown(nbytes)}: {os.strerror(errno)}{hint}")
        return int(got)
