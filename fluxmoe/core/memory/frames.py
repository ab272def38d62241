"""The class ``FramePool``: the authoritative record of which tenant owns which frame of memory.

The pool is the ledger of the budget; it does not depend on addresses or mappings (see ``arena``).
Committed memory never exceeds the budget, because the pool assigns no more frames than the budget
has. More frames may exist than the budget currently allows: frames without an owner cost nothing,
so the budget can be raised while the engine serves.
"""

from __future__ import annotations

import numpy as np

from fluxmoe import sizes
from fluxmoe.core.types import Int64s
from fluxmoe.errors import InvariantError, OutOfFramesError

FREE = -1


class FramePool:
    """A pool of ``count`` frames of ``frame_bytes`` bytes; each is free or belongs to one tenant.

    Attributes:
        count: Maximum to which the budget can be raised, in frames.
        limit: The budget: the maximum number of frames that all tenants may own together; initially
            ``count``.
    """

    def __init__(self, count: int, frame_bytes: int) -> None:
        self.count = self.limit = count
        self.frame_bytes = frame_bytes
        self._owner = np.full(count, FREE, np.int16)
        self._tenants: list[str] = []
        #: Number of frames per tenant, kept so that no step needs to count them.
        self._held: list[int] = []

    @property
    def nbytes(self) -> int:
        """The budget in bytes."""
        return self.limit * self.frame_bytes

    @property
    def owned(self) -> int:
        """Number of frames that have an owner."""
        return sum(self._held)

    @property
    def free(self) -> int:
        """Number of frames that ``take`` can still assign."""
        return self.limit - self.owned

    def set_limit(self, frames: int) -> None:
        """Raise or lower the budget.

        Raises:
            OutOfFramesError: Tenants own more than ``frames`` frames, or fewer exist; the budget is
                unchanged.
        """
        if not self.owned <= frames <= self.count:
            raise OutOfFramesError(
                f"a budget of {frames} frames of {sizes.exact(self.frame_bytes)} is not within "
                f"{self.owned} (owned now) … {self.count} (total)"
            )
        self.limit = frames

    def owned_by(self, tenant: str) -> int:
        """Return the number of frames that ``tenant`` owns."""
        if tenant not in self._tenants:
            return 0
        return self._held[self._tenants.index(tenant)]

    def take(self, tenant: str, count: int) -> Int64s:
        """Assign ``count`` free frames to ``tenant``, the lowest first so that runs stay long.

        Raises:
            OutOfFramesError: Fewer than ``count`` frames are free; none was taken.
        """
        if count < 0:
            raise InvariantError(f"{tenant} asked for {count} frames")
        if self.free < count:
            raise OutOfFramesError(
                f"{tenant} asked for {count} frames of {sizes.exact(self.frame_bytes)}, "
                f"but only {self.free} of {self.limit} are free"
            )
        frames = np.flatnonzero(self._owner == FREE)[:count].astype(np.int64)
        if tenant not in self._tenants:
            self._tenants.append(tenant)
            self._held.append(0)
        owner = self._tenants.index(tenant)
        self._owner[frames] = owner
        self._held[owner] += count
        return frames

    def give(self, tenant: str, frames: Int64s) -> None:
        """Take ``frames`` back from ``tenant``.

        Raises:
            InvariantError: Not all the frames belong to the tenant; none was taken back.
        """
        if len(frames) == 0:
            return
        if tenant not in self._tenants or len(np.unique(frames)) != len(frames):
            raise InvariantError(f"{tenant} never owned frames or returns one of them twice")
        if np.any((frames < 0) | (frames >= self.count)):
            raise InvariantError(f"{tenant} returns frames outside 0…{self.count - 1}")
        if np.any(self._owner[frames] != self._tenants.index(tenant)):
            raise InvariantError(f"{tenant} returns frames that it does not own")
        self._owner[frames] = FREE
        self._held[self._tenants.index(tenant)] -= len(frames)

    def check(self) -> None:
        """Raise InvariantError unless every frame is free or has a known owner."""
        if np.any((self._owner < FREE) | (self._owner >= len(self._tenants))):
            raise InvariantError("a frame is owned by an unknown tenant")
        for owner, held in enumerate(self._held):
            if held != np.count_nonzero(self._owner == owner):
                raise InvariantError(f"frames of {self._tenants[owner]} were lost")
        if not self.owned <= self.limit <= self.count:
            raise InvariantError(f"{self.owned} frames are owned, but the budget has {self.limit}")
