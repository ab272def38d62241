"""The experts as a tenant of the budget: arenas whose slots hold pages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from fluxmoe.core.memory.arena import Arena
from fluxmoe.core.memory.dlpack import Exported
from fluxmoe.core.memory.frames import FramePool
from fluxmoe.core.memory.substrate import Substrate
from fluxmoe.core.memory.tenant import Tenant
from fluxmoe.core.types import Bytes, PageClass
from fluxmoe.errors import CapacityError, InvariantError


def frames_for(page_class: PageClass, slots: int, frame_bytes: int) -> int:
    """Return the frames that ``slots`` slots of one bank need; each part fills whole frames."""
    return sum(-(-slots * part.nbytes // frame_bytes) for part in page_class.parts)


def slots_within(page_class: PageClass, frames: int, frame_bytes: int) -> int:
    """Return the maximum number of slots of one bank that need at most ``frames`` frames."""
    slots = frames * frame_bytes // page_class.nbytes
    while slots and frames_for(page_class, slots, frame_bytes) > frames:
        slots -= 1
    return slots


class ExpertTenant(Tenant):
    """The arenas of all banks: one dense array ``[slots, part bytes]`` per bank and part.

    The committed slots are a bank's first slots, so a bank grows and shrinks at its end.

    Args:
        pool: Ledger of the budget.
        substrate: Physical memory of the frames.
        page_class: Layout of a page.
        reserved: Number of slots for which to reserve address space, per bank.
    """

    NAME = "experts"

    def __init__(
        self,
        pool: FramePool,
        substrate: Substrate,
        page_class: PageClass,
        reserved: Sequence[int],
    ) -> None:
        super().__init__(pool, substrate)
        self._page_class, self._reserved = page_class, list(reserved)
        self.slots = [0] * len(self._reserved)
        self._arenas: list[list[Arena]] = [[] for _ in self._reserved]
        try:
            for slots, arenas in zip(self._reserved, self._arenas, strict=True):
                for part in page_class.parts:
                    arenas.append(Arena(substrate, slots * part.nbytes))
        except BaseException:
            self.close()
            raise

    def rows(self, bank: int) -> list[Bytes]:
        """Return a bank's arenas, one uint8 array ``[reserved slots, part bytes]`` per part."""
        return [
            arena.rows(self._reserved[bank], part.nbytes)
            for arena, part in zip(self._arenas[bank], self._page_class.parts, strict=True)
        ]

    def export(self, bank: int) -> list[Exported]:
        """Return a bank's arenas for ``torch.from_dlpack``, on their device."""
        return [
            arena.export(self._reserved[bank], part.nbytes)
            for arena, part in zip(self._arenas[bank], self._page_class.parts, strict=True)
        ]

    def resize(self, bank: int, slots: int) -> None:
        """Commit frames for exactly ``slots`` slots of a bank.

        The memory of released frames returns to the operating system, because the next owner of the
        frames may keep its data in other memory, as an engine's own KV cache does.

        Raises:
            CapacityError: ``slots`` exceeds the number of reserved slots; nothing has changed.
            OutOfFramesError: The budget has no room; nothing has changed.
            SubstrateError: A system call failed. A bank that was to grow keeps its slots. A bank
                that was to shrink has ``slots`` slots; frames that could not be unmapped still
                belong to the tenant, and the next ``resize`` or ``close`` releases them.
        """
        if slots > self._reserved[bank]:
            raise CapacityError(
                f"{slots} slots requested, but only {self._reserved[bank]} are reserved "
                f"in bank {bank}",
                fix=f"request at most {self._reserved[bank]} slots",
            )
        wanted = [
            (arena, -(-slots * part.nbytes // self._pool.frame_bytes))
            for arena, part in zip(self._arenas[bank], self._page_class.parts, strict=True)
        ]
        with ExitStack() as stack:  # runs all callbacks even if one fails
            if slots > self.slots[bank]:
                for arena, want in wanted:
                    stack.callback(self._trim, arena, arena.committed)
                    have = arena.committed
                    self._commit(arena, have, max(0, want - have))
                stack.pop_all()
                self.slots[bank] = slots
            else:
                self.slots[bank] = slots
                for arena, want in wanted:
                    stack.callback(self._trim, arena, want)

    def _trim(self, arena: Arena, want: int) -> None:
        have = arena.committed
        if want < have:
            self._give_up(arena.decommit(want, have - want))

    def close(self) -> None:
        """Release all frames and addresses. Idempotent.

        Raises:
            SubstrateError: Some memory could not be released; the rest was.
        """
        arenas = [arena for bank in self._arenas for arena in bank]
        self._arenas, self.slots = [], []
        with ExitStack() as each:  # runs all callbacks even if one fails
            for arena in arenas:
                each.callback(lambda arena: self._give_up(arena.close()), arena)

    def check(self) -> None:
        """Raise InvariantError unless exactly the owned frames are mapped, each of them once.

        More frames may be mapped than the slots need; see ``resize``.
        """
        arenas = [arena for bank in self._arenas for arena in bank]
        for arena in arenas:
            arena.check()
        for slots, bank in zip(self.slots, self._arenas, strict=True):
            for arena, part in zip(bank, self._page_class.parts, strict=True):
                frames = -(-slots * part.nbytes // self._pool.frame_bytes)
                committed = arena.frame_at >= 0
                if np.any(committed[1:] > committed[:-1]) or arena.committed < frames:
                    raise InvariantError(f"not all {slots} slots of {part.name} are committed")
        mapped = [arena.frame_at[arena.frame_at >= 0] for arena in arenas]
        all_mapped = np.concatenate(mapped) if mapped else np.zeros(0, np.int64)
        if len(np.unique(all_mapped)) != len(all_mapped):
            raise InvariantError("a frame is mapped in two arenas")
        if len(all_mapped) != self.frames:
            raise InvariantError(
                f"{len(all_mapped)} frames are mapped, but {self.frames} are owned"
            )
