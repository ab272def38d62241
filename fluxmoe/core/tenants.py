"""The experts as a tenant of the budget: arenas whose slots hold pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxmoe.core.arena import Arena
from fluxmoe.core.frames import FramePool
from fluxmoe.core.substrate import Substrate
from fluxmoe.core.types import Bytes, Int64s, PageClass
from fluxmoe.errors import InvariantError


def frames_for(page_class: PageClass, slots: int, frame_bytes: int) -> int:
    """Frames that ``slots`` slots of one bank commit: each part fills whole frames of its own."""
    return sum(-(-slots * part.nbytes // frame_bytes) for part in page_class.parts)


def slots_within(page_class: PageClass, frames: int, frame_bytes: int) -> int:
    """The most slots of one bank that commit at most ``frames`` frames."""
    slots = frames * frame_bytes // page_class.nbytes
    while slots and frames_for(page_class, slots, frame_bytes) > frames:
        slots -= 1
    return slots


class ExpertTenant:
    """The arenas of all banks: per bank and part a dense array ``[slots, part bytes]``.

    Slots are committed as a prefix, so a bank grows and shrinks at its end.

    Args:
        pool: Ledger of the budget.
        substrate: Where the frames live.
        page_class: Layout of a page.
        reserved: Slots per bank that address space is reserved for.
    """

    NAME = "experts"

    def __init__(
        self,
        pool: FramePool,
        substrate: Substrate,
        page_class: PageClass,
        reserved: Sequence[int],
    ) -> None:
        self._pool, self._substrate, self._page_class = pool, substrate, page_class
        self._reserved = list(reserved)
        self.slots = [0] * len(self._reserved)
        self._arenas = [
            [Arena(substrate, slots * part.nbytes) for part in page_class.parts]
            for slots in self._reserved
        ]

    @property
    def frames(self) -> int:
        return self._pool.owned_by(self.NAME)

    @property
    def nbytes(self) -> int:
        """Committed bytes, whole frames."""
        return self.frames * self._pool.frame_bytes

    def rows(self, bank: int) -> list[Bytes]:
        """Per part, the bank's arena as a uint8 array ``[reserved slots, part bytes]``."""
        return [
            arena.rows(self._reserved[bank], part.nbytes)
            for arena, part in zip(self._arenas[bank], self._page_class.parts, strict=True)
        ]

    def resize(self, bank: int, slots: int) -> None:
        """Commit frames for exactly ``slots`` slots of a bank. On failure nothing has changed.

        The memory of frames that are given up goes back to the system: whoever takes them next may
        keep his bytes elsewhere, as the engine's KV cache does.

        Raises:
            OutOfFramesError: The budget has no room.
            SubstrateError: The system refused.
        """
        grown: list[tuple[Arena, int, int]] = []
        try:
            for arena, part in zip(self._arenas[bank], self._page_class.parts, strict=True):
                have = arena.committed
                want = -(-slots * part.nbytes // self._pool.frame_bytes)
                if want > have:
                    self._grow(arena, have, want - have)
                    grown.append((arena, have, want - have))
                elif want < have:
                    self._give_up(arena.decommit(want, have - want))
        except BaseException:
            for arena, first, count in grown:
                self._give_up(arena.decommit(first, count))
            raise
        self.slots[bank] = slots

    def _grow(self, arena: Arena, first: int, count: int) -> None:
        frames = self._pool.take(self.NAME, count)
        try:
            arena.commit(first, frames)
        except BaseException:
            self._give_up(frames)
            raise

    def _give_up(self, frames: Int64s) -> None:
        self._pool.give(self.NAME, frames)
        self._substrate.release(frames)

    def close(self) -> None:
        """Give back all frames and addresses. Idempotent."""
        for bank in self._arenas:
            for arena in bank:
                self._give_up(arena.close())
        self._arenas = []
        self.slots = []

    def check(self) -> None:
        """Raise InvariantError unless the mapped frames are exactly those owned, each once."""
        arenas = [arena for bank in self._arenas for arena in bank]
        for arena in arenas:
            arena.check()
        for slots, bank in zip(self.slots, self._arenas, strict=True):
            for arena, part in zip(bank, self._page_class.parts, strict=True):
                frames = -(-slots * part.nbytes // self._pool.frame_bytes)
                if np.any((arena.frame_at >= 0) != (np.arange(len(arena.frame_at)) < frames)):
                    raise InvariantError(f"not exactly {slots} slots of {part.name} are committed")
        mapped = [arena.frame_at[arena.frame_at >= 0] for arena in arenas]
        all_mapped = np.concatenate(mapped) if mapped else np.zeros(0, np.int64)
        if len(np.unique(all_mapped)) != len(all_mapped):
            raise InvariantError("a frame is mapped in two arenas")
        if len(all_mapped) != self.frames:
            raise InvariantError(f"{len(all_mapped)} frames are mapped, {self.frames} are owned")
