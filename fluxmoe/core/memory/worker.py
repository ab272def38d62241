"""MemoryArbiter: one worker's budget of frames, the tenants that share it, and moves between them.

It owns the pool and the substrate and can tell at any moment that what is committed stays within
the budget. It carries out what the scheduler's side has decided (``controller``, ``protocol``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fluxmoe.core.arbitration.messages import Action, FreeKV, SetSlots, TakeKV
from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.memory.frames import FramePool
from fluxmoe.core.memory.kv import KVLayout, KVTenant
from fluxmoe.core.memory.substrate import Substrate
from fluxmoe.core.paging.pager import ExpertPager
from fluxmoe.errors import InvariantError


class MemoryArbiter:
    """The budget of one worker.

    Args:
        substrate: All frames of the budget; closed with the arbiter.
    """

    def __init__(self, substrate: Substrate) -> None:
        self.substrate = substrate
        self.pool = FramePool(substrate.count, substrate.frame_bytes)
        #: The KV cache, once its layout is known; None where the engine's is not in the budget.
        self.kv: KVTenant | None = None

    @property
    def budget_bytes(self) -> int:
        return self.pool.nbytes

    @property
    def committed_bytes(self) -> int:
        """Bytes of all frames that a tenant holds now."""
        return self.pool.owned * self.pool.frame_bytes

    def frames(self) -> dict[str, int]:
        """The present split: tenant → frames."""
        return {name: self.pool.owned_by(name) for name in (ExpertTenant.NAME, KVTenant.NAME)}

    def place_kv(self, layout: KVLayout, groups: Iterable[int]) -> KVTenant:
        """Reserve the KV cache's buffer and commit ``groups`` of it.

        Raises:
            OutOfFramesError, SubstrateError: There is no room; nothing is reserved.
        """
        if self.kv is not None:
            raise InvariantError("the KV cache has its place already")
        kv = KVTenant(self.pool, self.substrate, layout)
        try:
            kv.commit(groups)
        except BaseException:
            kv.close()
            raise
        self.kv = kv
        return kv

    def execute(self, pager: ExpertPager, action: Action) -> None:
        """Between steps: carry out one action of a move, all of it or nothing.

        Raises:
            OutOfFramesError, SubstrateError: It cannot grow, or the system refused.
            CapacityError: Slots that a bank cannot have.
            InvariantError: KV groups that do not exist.
        """
        if isinstance(action, SetSlots):
            _set_slots(pager, action.slots)
            return
        if self.kv is None:
            raise InvariantError("there is no KV cache in this budget")
        if isinstance(action, TakeKV):
            self.kv.commit(action.groups)
        elif isinstance(action, FreeKV):
            self.kv.free(action.groups)

    def check(self) -> None:
        """Raise InvariantError unless the books add up and stay within the budget."""
        self.pool.check()
        if self.kv is not None:
            self.kv.check()
        if sum(self.frames().values()) != self.pool.owned:
            raise InvariantError("somebody else holds frames of the budget")

    def close(self) -> None:
        """Give everything back to the system. Idempotent.

        Raises:
            InvariantError: The expert tenant has not been closed: its arenas would lose their
                memory while it still answers for them.
        """
        try:
            if self.kv is not None:
                self.kv.close()
        finally:
            self.pool.check()
            if self.pool.owned:
                raise InvariantError(f"tenants still hold frames: {self.frames()}")
            self.substrate.close()


def _set_slots(pager: ExpertPager, slots: Sequence[int]) -> None:
    """Resize all banks, those that shrink first. What was done is undone if a bank cannot."""
    before = list(pager.table.slots)
    if len(slots) != len(before):
        raise InvariantError(f"{len(slots)} sizes for {len(before)} banks")
    order = sorted(range(len(before)), key=lambda bank: slots[bank] - before[bank])
    done = []
    try:
        for bank in order:
            if slots[bank] != before[bank]:
                pager.resize(bank, slots[bank])
                done.append(bank)
    except BaseException:
        for bank in reversed(done):  # those that grew are the last, and give their frames back
            pager.resize(bank, before[bank])
        raise
