"""FramePool: who owns which frame of device memory, written down exactly once.

The pool knows nothing of addresses or mappings (see ``arena``): it is the ledger behind the
budget. Committed memory can never exceed the budget because there are no more frames than that.
"""

from __future__ import annotations

import numpy as np

from fluxmoe.core.types import Int64s
from fluxmoe.errors import InvariantError, OutOfFramesError

FREE = -1


class FramePool:
    """``count`` frames of ``frame_bytes`` bytes, each owned by one tenant or free."""

    def __init__(self, count: int, frame_bytes: int) -> None:
        self.count = count
        self.frame_bytes = frame_bytes
        self._owner = np.full(count, FREE, np.int16)
        self._tenants: list[str] = []

    @property
    def nbytes(self) -> int:
        return self.count * self.frame_bytes

    @property
    def free(self) -> int:
        return int(np.count_nonzero(self._owner == FREE))

    def owned_by(self, tenant: str) -> int:
        """How many frames ``tenant`` has now."""
        if tenant not in self._tenants:
            return 0
        return int(np.count_nonzero(self._owner == self._tenants.index(tenant)))

    def take(self, tenant: str, count: int) -> Int64s:
        """Give ``count`` free frames to ``tenant``, lowest first, so that runs stay contiguous.

        Raises:
            OutOfFramesError: Fewer are free; nothing was taken.
        """
        if count < 0:
            raise InvariantError(f"{tenant} asked for {count} frames")
        free = np.flatnonzero(self._owner == FREE)
        if len(free) < count:
            raise OutOfFramesError(
                f"{tenant} asked for {count} frames of {self.frame_bytes} bytes, "
                f"{len(free)} of {self.count} are free"
            )
        frames = free[:count].astype(np.int64)
        if tenant not in self._tenants:
            self._tenants.append(tenant)
        self._owner[frames] = self._tenants.index(tenant)
        return frames

    def give(self, tenant: str, frames: Int64s) -> None:
        """Take ``frames`` back from ``tenant``.

        Raises:
            InvariantError: One of them is not the tenant's; nothing was given back.
        """
        if len(frames) == 0:
            return
        if tenant not in self._tenants or len(np.unique(frames)) != len(frames):
            raise InvariantError(f"{tenant} gives back frames that it never had, or one twice")
        if np.any((frames < 0) | (frames >= self.count)):
            raise InvariantError(f"{tenant} gives back frames that do not exist")
        if np.any(self._owner[frames] != self._tenants.index(tenant)):
            raise InvariantError(f"{tenant} gives back frames of somebody else")
        self._owner[frames] = FREE

    def check(self) -> None:
        """Raise InvariantError unless every frame is free or has a known owner."""
        if np.any((self._owner < FREE) | (self._owner >= len(self._tenants))):
            raise InvariantError("a frame is owned by an unknown tenant")
        if sum(map(self.owned_by, self._tenants)) + self.free != self.count:
            raise InvariantError("frames were lost")
