"""MemoryArbiter: one budget of frames, and the tenants that share it.

It owns the pool and the substrate, gives each tenant what the first split says, and can tell at
any moment that what is committed stays within the budget. The split is fixed while serving.
"""

from __future__ import annotations

from fluxmoe.core.frames import FramePool
from fluxmoe.core.substrate import Substrate
from fluxmoe.core.tenants import ExpertTenant, KVTenant
from fluxmoe.errors import InvariantError


class MemoryArbiter:
    """The budget of one worker.

    Args:
        substrate: All frames of the budget; closed with the arbiter.
    """

    def __init__(self, substrate: Substrate) -> None:
        self.substrate = substrate
        self.pool = FramePool(substrate.count, substrate.frame_bytes)
        self.kv = KVTenant(self.pool)

    @property
    def budget_bytes(self) -> int:
        return self.pool.nbytes

    @property
    def committed_bytes(self) -> int:
        """Bytes of all frames that a tenant holds now."""
        return (self.pool.count - self.pool.free) * self.pool.frame_bytes

    def frames(self) -> dict[str, int]:
        """The present split: tenant → frames."""
        return {name: self.pool.owned_by(name) for name in (ExpertTenant.NAME, KVTenant.NAME)}

    def check(self) -> None:
        """Raise InvariantError unless the books add up and stay within the budget."""
        self.pool.check()
        if sum(self.frames().values()) + self.pool.free != self.pool.count:
            raise InvariantError("somebody else holds frames of the budget")

    def close(self) -> None:
        """Give everything back to the system. Idempotent.

        Raises:
            InvariantError: The expert tenant has not been closed: its arenas would lose their
                memory while it still answers for them.
        """
        self.kv.close()
        self.check()
        if self.pool.free != self.pool.count:
            raise InvariantError(f"tenants still hold frames: {self.frames()}")
        self.substrate.close()
