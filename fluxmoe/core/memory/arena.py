"""The class ``Arena``: a fixed range of addresses in which frames are mapped and unmapped."""

from __future__ import annotations

import weakref

import numpy as np

from fluxmoe.core.memory.dlpack import Exported
from fluxmoe.core.memory.substrate import Substrate
from fluxmoe.core.types import Bytes, Int64s
from fluxmoe.errors import InvariantError

ABSENT = -1


class Addresses:
    """A range of addresses; every array that views the range keeps a reference to this object.

    Args:
        start: Start of the range.
        nbytes: Size of the range in bytes.
    """

    def __init__(self, start: int, nbytes: int) -> None:
        self.__array_interface__ = {
            "data": (start, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


class Arena:
    """Reserved address space for at most ``nbytes`` bytes (rounded up to whole frames).

    Kernels keep the arena's address, so the address never changes. The arena records which frame is
    mapped where; ``FramePool`` records which tenant owns which frame.
    """

    def __init__(self, substrate: Substrate, nbytes: int) -> None:
        self._substrate = substrate
        frames = -(-nbytes // substrate.frame_bytes)
        self.frame_at = np.full(frames, ABSENT, np.int64)
        self.address = substrate.reserve(frames * substrate.frame_bytes)
        self._addresses: Addresses | None = Addresses(self.address, frames * substrate.frame_bytes)

    @property
    def committed(self) -> int:
        """Number of mapped frames."""
        return int(np.count_nonzero(self.frame_at != ABSENT))

    def commit(self, first: int, frames: Int64s) -> None:
        """Map ``frames`` at positions ``first, first + 1, …``, which must be uncommitted."""
        place = slice(first, first + len(frames))
        if len(self.frame_at[place]) != len(frames) or np.any(self.frame_at[place] != ABSENT):
            raise InvariantError(f"not all positions {first}…{first + len(frames) - 1} are free")
        if len(frames):
            self._substrate.commit(self.address + first * self._substrate.frame_bytes, frames)
            self.frame_at[place] = frames

    def decommit(self, first: int, count: int) -> Int64s:
        """Unmap ``count`` positions, starting at ``first``; return the frames that were there."""
        place = slice(first, first + count)
        frames = self.frame_at[place].copy()
        if len(frames) != count or np.any(frames == ABSENT):
            raise InvariantError(f"not all positions {first}…{first + count - 1} are committed")
        self._substrate.decommit(self.address + first * self._substrate.frame_bytes, count)
        self.frame_at[place] = ABSENT
        return frames

    def rows(self, count: int, nbytes: int) -> Bytes:
        """Return a view of the arena as a uint8 array ``[count, nbytes]``; for host memory only.

        Only committed rows may be read or written. After ``close``, all rows are zero.
        """
        self._require(count, nbytes)
        every: Bytes = np.asarray(self._addresses)
        return every[: count * nbytes].reshape(count, nbytes)

    def export(self, count: int, nbytes: int) -> Exported:
        """Return the rows for ``torch.from_dlpack``, on the frames' device."""
        self._require(count, nbytes)
        return Exported(self.address, count, nbytes, self._substrate.device)

    def _require(self, count: int, nbytes: int) -> None:
        if count * nbytes > len(self.frame_at) * self._substrate.frame_bytes:
            raise InvariantError(f"{count} rows of {nbytes} bytes do not fit the arena")

    def close(self) -> Int64s:
        """Unmap everything and release the address range.

        If arrays from ``rows`` exist, the address range is released with the last of these arrays.

        Returns:
            The frames that were committed, int64.
        """
        frames: Int64s = self.frame_at[self.frame_at != ABSENT]
        viewed = weakref.ref(self._addresses) if self._addresses is not None else lambda: None
        self._addresses = None
        nbytes = len(self.frame_at) * self._substrate.frame_bytes
        self._substrate.unreserve(self.address, nbytes, viewed())
        self.frame_at = np.full(0, ABSENT, np.int64)
        return frames

    def check(self) -> None:
        """Raise InvariantError if a frame is mapped twice in this arena."""
        mapped = self.frame_at[self.frame_at != ABSENT]
        if len(np.unique(mapped)) != len(mapped):
            raise InvariantError("a frame is mapped at two positions of one arena")
