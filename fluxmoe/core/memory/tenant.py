"""The class ``Tenant``: an owner of frames of the budget, which are mapped in its arenas."""

from __future__ import annotations

from fluxmoe.core.memory.arena import Arena
from fluxmoe.core.memory.frames import FramePool
from fluxmoe.core.memory.substrate import Substrate
from fluxmoe.core.types import Int64s


class Tenant:
    """An owner of frames of a pool, whose memory is in a substrate."""

    NAME: str

    def __init__(self, pool: FramePool, substrate: Substrate) -> None:
        self._pool, self._substrate = pool, substrate

    @property
    def frames(self) -> int:
        return self._pool.owned_by(self.NAME)

    @property
    def nbytes(self) -> int:
        """The committed bytes, in whole frames."""
        return self.frames * self._pool.frame_bytes

    def _commit(self, arena: Arena, first: int, count: int) -> None:
        """Take frames and map them; after an error, nothing has changed."""
        frames = self._pool.take(self.NAME, count)
        try:
            arena.commit(first, frames)
        except BaseException:
            self._give_up(frames)
            raise

    def _give_up(self, frames: Int64s) -> None:
        self._pool.give(self.NAME, frames)
        self._substrate.release(frames)
