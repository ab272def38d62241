"""The class ``WorkerMemory``: one worker's budget of frames, and the two tenants that share it.

The class owns the ledger, the physical memory, the expert arenas and the KV cache. It can check at
any time that committed memory is within the budget. It does not handle pages: a pager fills the
arenas (``paging``), and ``arbitration.moves`` moves memory between the tenants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.memory.frames import FramePool
from fluxmoe.core.memory.kv import KVLayout, KVTenant
from fluxmoe.core.memory.substrate import Substrate
from fluxmoe.core.types import PageClass
from fluxmoe.errors import InvariantError


class WorkerMemory:
    """The memory of one worker.

    Args:
        substrate: Frames of the budget; closed by ``close``, or if the constructor fails.
        page_class: Layout of an expert page.
        reserved: Number of slots for which to reserve address space, per bank; the constructor
            commits none of them.
        limit: Maximum number of frames in use at once; None for all frames of the substrate.

    Raises:
        SubstrateError: A system call failed.
    """

    def __init__(
        self,
        substrate: Substrate,
        page_class: PageClass,
        reserved: Sequence[int],
        *,
        limit: int | None = None,
    ) -> None:
        self.substrate = substrate
        self.pool = FramePool(substrate.count, substrate.frame_bytes)
        if limit is not None:
            self.pool.set_limit(limit)
        with ExitStack() as undo:
            undo.callback(substrate.close)
            self.experts = ExpertTenant(self.pool, substrate, page_class, reserved)
            undo.pop_all()
        #: The KV cache, once its layout is known; None if it is outside the budget.
        self.kv: KVTenant | None = None

    @property
    def budget_bytes(self) -> int:
        return self.pool.nbytes

    @property
    def committed_bytes(self) -> int:
        """The bytes of all frames that belong to a tenant."""
        return self.pool.owned * self.pool.frame_bytes

    @property
    def kv_bytes(self) -> int:
        """The committed bytes of the KV cache."""
        return 0 if self.kv is None else self.kv.nbytes

    def frames(self) -> dict[str, int]:
        """Return the current split: tenant → number of frames."""
        return {name: self.pool.owned_by(name) for name in (ExpertTenant.NAME, KVTenant.NAME)}

    def place_kv(self, layout: KVLayout, groups: Iterable[int]) -> KVTenant:
        """Reserve the KV cache's buffer, and commit ``groups`` of the buffer.

        Raises:
            OutOfFramesError: The budget has no room; nothing is reserved.
            SubstrateError: A system call failed; nothing is reserved.
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
        """Raise InvariantError unless the books are consistent and the budget is kept."""
        self.pool.check()
        self.experts.check()
        if self.kv is not None:
            self.kv.check()
        if sum(self.frames().values()) != self.pool.owned:
            raise InvariantError("an unknown tenant owns frames of the budget")

    def close(self) -> None:
        """Release everything; the arenas and the KV cache must no longer be read. Idempotent.

        Raises:
            SubstrateError: Some memory could not be released; the rest was.
            InvariantError: A tenant still holds frames.
        """
        with ExitStack() as each:  # runs all callbacks, the last first, even if one fails
            each.callback(self.substrate.close)
            each.callback(self._require_empty)
            if self.kv is not None:
                each.callback(self.kv.close)
            each.callback(self.experts.close)

    def _require_empty(self) -> None:
        self.pool.check()
        if self.pool.owned:
            raise InvariantError(f"tenants still hold frames: {self.frames()}")
