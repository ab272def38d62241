"""MemoryArbiter: one worker's budget of frames and the tenants that share it.

It owns the pool and the substrate, and can check at any time that committed memory stays within
the budget.
"""

from __future__ import annotations

from collections.abc import Iterable

from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.memory.frames import FramePool
from fluxmoe.core.memory.kv import KVLayout, KVTenant
from fluxmoe.core.memory.substrate import Substrate
from fluxmoe.errors import InvariantError


class MemoryArbiter:
    """The budget of one worker.

    Args:
        substrate: Frames of the budget; closed with the arbiter.
    """

    def __init__(self, substrate: Substrate) -> None:
        self.substrate = substrate
        self.pool = FramePool(substrate.count, substrate.frame_bytes)
        #: The KV cache, once its layout is known; None if the engine's is not in the budget.
        self.kv: KVTenant | None = None

    @property
    def budget_bytes(self) -> int:
        return self.pool.nbytes

    @property
    def committed_bytes(self) -> int:
        """Bytes of all frames that a tenant holds now."""
        return self.pool.owned * self.pool.frame_bytes

    def frames(self) -> dict[str, int]:
        """The current split: tenant → frames."""
        return {name: self.pool.owned_by(name) for name in (ExpertTenant.NAME, KVTenant.NAME)}

    def place_kv(self, layout: KVLayout, groups: Iterable[int]) -> KVTenant:
        """Reserve the KV cache's buffer and commit ``groups`` of it.

        Raises:
            OutOfFramesError, SubstrateError: There is no room; nothing is reserved.
        """
        if self.kv is not None:
            raise InvariantError("the KV cache is already placed")
        kv = KVTenant(self.pool, self.substrate, layout)
        try:
            kv.commit(groups)
        except BaseException:
            kv.close()
            raise
        self.kv = kv
        return kv

    def check(self) -> None:
        """Raise InvariantError unless the books are consistent and within the budget."""
        self.pool.check()
        if self.kv is not None:
            self.kv.check()
        if sum(self.frames().values()) != self.pool.owned:
            raise InvariantError("an unknown tenant owns frames of the budget")

    def close(self) -> None:
        """Release everything. Idempotent.

        Raises:
            InvariantError: The expert tenant has not been closed: its arenas would lose their
                memory while still in use.
        """
        try:
            if self.kv is not None:
                self.kv.close()
        finally:
            self.pool.check()
            if self.pool.owned:
                raise InvariantError(f"tenants still hold frames: {self.frames()}")
            self.substrate.close()
