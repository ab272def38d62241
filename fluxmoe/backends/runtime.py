"""Runtime: budget, arenas, policies and pager of one worker, composed from a configuration."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

import numpy as np

from fluxmoe.backends.budget import KVNeed, require_free, split, widened
from fluxmoe.config import Resolved
from fluxmoe.core.arbitration.messages import Action, Inventory, SetSlots
from fluxmoe.core.arbitration.moves import execute
from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.memory.host import CpuSubstrate, frame_bytes_for
from fluxmoe.core.memory.kv import KVLayout, KVTenant
from fluxmoe.core.memory.sizing import fewest_banks, sizes, spread
from fluxmoe.core.memory.worker import MemoryArbiter
from fluxmoe.core.paging.measures import PageAges
from fluxmoe.core.paging.pager import ExpertPager
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.guards import EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import PageView, Policies
from fluxmoe.core.transfer.engine import TransferEngine
from fluxmoe.core.transfer.host import HostCarrier
from fluxmoe.core.transfer.store import Store
from fluxmoe.core.types import Geometry, PageClass, Phase
from fluxmoe.errors import BudgetTooSmallError, ConfigError, InvariantError
from fluxmoe.trace import TraceMeta


class Runtime:
    """Everything between the engine's MoE layers and the memory of one worker.

    Args:
        config: Configuration, its budget in bytes.
        policies: Paging policies.
        geometry: Layers and experts.
        page_class: Layout of an expert page.
        store: Store of the pages.
        kv: Memory needed by the KV cache.
        dynamic: True if the split may change while serving.
        bank_limit: Maximum slots that one kernel call can address; None if there is no limit.
        phase: Returns the phase of a step, at its beginning.
        ceiling: Maximum bytes for ``resize``; 0: not above the initial budget.

    Raises:
        BudgetTooSmallError: The minimums do not fit.
        UnsupportedError: The kernel cannot address one layer's experts.
    """

    def __init__(
        self,
        config: Resolved,
        policies: Policies,
        geometry: Geometry,
        page_class: PageClass,
        store: Store,
        kv: KVNeed,
        *,
        dynamic: bool = False,
        bank_limit: int | None = None,
        phase: Callable[[], Phase] = lambda: Phase.DECODE,
        ceiling: int = 0,
    ) -> None:
        self.config, self.geometry, self.page_class, self.store = (
            config,
            geometry,
            page_class,
            store,
        )
        self.dynamic = dynamic
        budget = config.memory.budget
        require_free(budget)
        unit = kv.block if self.dynamic else 0
        frame_bytes = int(config.memory.frame or frame_bytes_for(budget, unit))
        if frame_bytes % mmap.PAGESIZE:
            raise ConfigError(
                f"{frame_bytes} bytes are not a multiple of {mmap.PAGESIZE}",
                where="memory.frame",
                fix="use a power of two, or auto",
            )
        frames = budget // frame_bytes
        self.experts_budget, self.kv_budget = split(
            config.memory, geometry, page_class, frames, frame_bytes, kv
        )
        if self.dynamic:
            self.experts_budget, self.kv_budget = widened(
                config.memory, frames, self.experts_budget, self.kv_budget
            )
        reserved, bank_of = fewest_banks(
            geometry,
            page_class,
            self.experts_budget.max if self.dynamic else self.experts_budget.target,
            frame_bytes,
            bank_limit,
            config.memory.banks,
            least=self.experts_budget.target,
        )
        self.bank_limit = bank_limit
        slots = self.slots_for(self.experts_budget.target, frame_bytes, len(reserved))
        assert slots is not None  # or there would be fewer banks

        if ceiling > budget:
            pages, _ = spread(geometry, geometry.num_pages, len(reserved))
            reserved = [min(count, bank_limit or count) for count in pages]

        most = max(frames, ceiling // frame_bytes)
        self.arbiter = MemoryArbiter(CpuSubstrate(most, frame_bytes))
        self.arbiter.pool.set_limit(frames)
        with ExitStack() as undo:
            undo.callback(self.arbiter.substrate.close)
            self._tenant = ExpertTenant(
                self.arbiter.pool, self.arbiter.substrate, page_class, reserved=reserved
            )
            for bank, count in enumerate(slots):
                self._tenant.resize(bank, count)

            table = PageTable(geometry, slots, reserved=max(reserved), bank_of=bank_of)
            view = PageView(table, seed=config.seed)
            strict, limits = config.strict_policies, config.policy_limits.limits()
            self.eviction = EvictionGuard(
                policies.eviction, view, name=policies.eviction_name, strict=strict, limits=limits
            )
            self.prefetch = PrefetchGuard(
                policies.prefetch, view, name=policies.prefetch_name, strict=strict, limits=limits
            )
            rows = [self._tenant.rows(bank) for bank in range(len(slots))]
            transfer = TransferEngine(
                HostCarrier(store, rows, threads=config.copy_threads), page_class.nbytes
            )
            undo.callback(transfer.close)
            rule = EventRule(table, self.eviction, self.prefetch)
            self.ages = rule.ages = PageAges()
            self.pager = ExpertPager(rule, self._tenant, transfer, phase=phase)
            undo.pop_all()

    @property
    def kv_bytes(self) -> int:
        """Committed bytes of the KV cache."""
        return 0 if self.arbiter.kv is None else self.arbiter.kv.nbytes

    @property
    def kv_reserved_bytes(self) -> int:
        """Bytes that the KV cache may grow to; the engine makes as many blocks as fit."""
        budget = self.kv_budget
        return (budget.max if self.dynamic else budget.target) * self.arbiter.pool.frame_bytes

    def place_kv(self, blocks: int, block_bytes: int) -> KVTenant:
        """Reserve the buffer for the engine's KV blocks and commit it as the first split says.

        Raises:
            OutOfFramesError, SubstrateError: There is no room; nothing is reserved.
        """
        layout = KVLayout(blocks, block_bytes, self.arbiter.pool.frame_bytes)
        groups = layout.groups_within(self.kv_budget.target)
        return self.arbiter.place_kv(layout, range(groups))

    @property
    def expert_bytes(self) -> int:
        """Committed bytes of the expert arenas."""
        return self._tenant.nbytes

    def inventory(self) -> Inventory:
        """The state that the scheduler's side needs to change the split."""
        kv, table = self.arbiter.kv, self.pager.table
        if kv is None:
            raise InvariantError("the KV cache has no place yet")
        return Inventory(
            frames=self.arbiter.pool.count,
            geometry=self.geometry,
            page_class=self.page_class,
            bank_limit=self.bank_limit,
            slots=tuple(table.slots),
            experts=self.experts_budget,
            kv=self.kv_budget,
            layout=kv.layout,
            groups=int(np.count_nonzero(kv.committed)),
        )

    def execute(self, action: Action) -> None:
        """Carry out one action of a move, between steps. Raises the errors of ``moves.execute``."""
        execute(self.arbiter, self.pager, action)

    def resize(self, budget: int) -> None:
        """Raise or lower the budget, in bytes, between steps; the experts get the difference.

        The number of banks stays. A smaller budget drops the pages in the last slots.

        Raises:
            BudgetTooSmallError: A bank could not hold one layer's experts.
            ConfigError: The difference exceeds the free memory.
            OutOfFramesError: ``budget`` is above the ceiling.
            SubstrateError: The system refused. As after every error, nothing has changed.
        """
        pool, banks = self.arbiter.pool, self.pager.table.num_banks
        frames = budget // pool.frame_bytes
        kv = pool.owned_by(KVTenant.NAME)
        slots = self.slots_for(frames - kv, pool.frame_bytes, banks)
        if slots is None:
            raise BudgetTooSmallError(
                f"{budget} bytes cannot hold one layer of {self.geometry.experts_per_layer} "
                f"experts, {self.page_class.nbytes} bytes each, in each of {banks} banks",
                fix="give more, or make fewer banks",
            )
        require_free(budget, held=pool.nbytes)
        before = pool.limit
        pool.set_limit(max(frames, before))
        try:
            self.execute(SetSlots(tuple(slots)))
        except BaseException:
            pool.set_limit(before)
            raise
        pool.set_limit(frames)

    def arenas(self, layer: int) -> list[np.ndarray[tuple[int, int], np.dtype[np.uint8]]]:
        """Per part, the layer's bank as uint8 ``[slots, part bytes]``, as its kernel reads it.

        All slots that the bank may ever have: kernels keep the shape while the split changes.
        """
        return self._tenant.rows(self.pager.table.bank(layer))

    def slots_for(self, frames: int, frame_bytes: int, banks: int) -> list[int] | None:
        """The most slots per bank in ``frames`` frames; None below the banks' minimum."""
        return sizes(
            self.geometry,
            self.page_class,
            frames,
            frame_bytes,
            banks=banks,
            limit=self.bank_limit,
        )

    def stats(self) -> dict[str, int | float]:
        """Counters of the event rule, sizes in bytes, faults, and seconds waited for pages."""
        counters, transfer = self.pager.counters(), self.pager.transfer
        return {
            **asdict(counters),
            "hit_rate": counters.hit_rate,
            "slots": sum(self.pager.table.slots),
            "banks": self.pager.table.num_banks,
            "pages": self.geometry.num_pages,
            "page_bytes": self.page_class.nbytes,
            "budget_bytes": self.arbiter.budget_bytes,
            "committed_bytes": self.arbiter.committed_bytes,
            "allocated_bytes": self.arbiter.substrate.allocated(),
            "expert_bytes": self.expert_bytes,
            "kv_bytes": self.kv_bytes,
            "store_bytes": self.store.nbytes,
            "bytes_demand": transfer.bytes_demand,
            "bytes_prefetch": transfer.bytes_prefetch,
            "stall_seconds": transfer.stall_seconds,
            "policy_faults": self.eviction.faults + self.prefetch.faults,
            "policy_slow": self.eviction.slow + self.prefetch.slow,
        }

    def trace_meta(self, *, model: str, top_k: int, source: str) -> TraceMeta:
        """Metadata of a trace of this model."""
        return TraceMeta(
            model=model,
            num_layers=self.geometry.num_layers,
            experts_per_layer=self.geometry.experts_per_layer,
            top_k=top_k,
            page_bytes=self.page_class.nbytes,
            source=source,
        )

    def check(self) -> None:
        """Raise InvariantError unless all accounts agree."""
        self.pager.check()
        self.arbiter.check()

    def close(self) -> None:
        """Release all memory. Nothing may read the arenas any more.

        A forked child releases nothing: the memory is its parent's.
        """
        if not self.pager.owner.here:
            return
        with ExitStack() as each:  # goes on if one fails
            each.callback(self.store.close)
            each.callback(self.arbiter.close)
            each.callback(self.pager.close)
