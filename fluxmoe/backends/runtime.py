"""The runtime of one worker: its budget, arenas, policies and pager, built from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import numpy as np

from fluxmoe import sizes
from fluxmoe.backends.budget import KVNeed, require_free
from fluxmoe.backends.partition import least_experts, partition
from fluxmoe.config import Resolved
from fluxmoe.core.arbitration.messages import Inventory
from fluxmoe.core.memory.host import CpuSubstrate
from fluxmoe.core.memory.kv import KVLayout, KVTenant
from fluxmoe.core.memory.worker import WorkerMemory
from fluxmoe.core.paging.measures import PageAges
from fluxmoe.core.paging.pager import ExpertPager
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.guards import EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import PageView, Policies
from fluxmoe.core.transfer.engine import TransferEngine
from fluxmoe.core.transfer.host import HostCopier
from fluxmoe.core.transfer.store import ChangingStore, Put
from fluxmoe.core.types import Geometry, PageClass, Phase
from fluxmoe.errors import BudgetTooSmallError, InvariantError
from fluxmoe.stores.tiers import TieredStore
from fluxmoe.trace import TraceMeta


class Runtime:
    """All components between the engine's MoE layers and the memory of one worker.

    Args:
        config: Configuration with the budget in bytes.
        policies: Paging policies.
        geometry: Numbers of layers and experts.
        page_class: Layout of an expert page.
        store: Store of the pages.
        kv: Memory needed by the KV cache.
        dynamic: True if the split may change while the engine serves.
        bank_limit: Maximum number of slots that one kernel call can address; None if unlimited.
        top_k: Number of experts per token if layers can run in waves; None if they cannot.
        phase: Function that returns the phase of a step, called at the beginning of the step.
        ceiling: Maximum budget in bytes for ``resize``; 0 means the initial budget.

    Raises:
        BudgetTooSmallError: The minimums of the experts and the KV cache exceed the budget.
        UnsupportedError: The kernel cannot address the minimum number of slots of a bank.
    """

    def __init__(
        self,
        config: Resolved,
        policies: Policies,
        geometry: Geometry,
        page_class: PageClass,
        store: ChangingStore,
        kv: KVNeed,
        *,
        dynamic: bool = False,
        bank_limit: int | None = None,
        top_k: int | None = None,
        phase: Callable[[], Phase] = lambda: Phase.DECODE,
        ceiling: int = 0,
    ) -> None:
        self.config, self.store, self.dynamic = config, store, dynamic
        self.geometry, self.page_class = geometry, page_class
        self.partition = part = partition(
            config.memory,
            geometry,
            page_class,
            kv,
            dynamic=dynamic,
            bank_limit=bank_limit,
            top_k=top_k,
            ceiling=ceiling,
        )
        substrate = CpuSubstrate(part.most, part.frame_bytes)
        self.memory = WorkerMemory(substrate, page_class, part.reserved, limit=part.frames)
        with ExitStack() as undo:
            undo.callback(self.memory.close)
            for bank, count in enumerate(part.slots):
                self.memory.experts.resize(bank, count)
            table = PageTable(
                geometry,
                part.slots,
                reserved=max(part.reserved),
                bank_of=part.bank_of,
                minimum=part.minimum,
            )
            view = PageView(table, seed=config.seed)
            strict, limits = config.strict_policies, config.policy_limits.limits()
            self.eviction = EvictionGuard(
                policies.eviction, view, name=policies.eviction_name, strict=strict, limits=limits
            )
            self.prefetch = PrefetchGuard(
                policies.prefetch, view, name=policies.prefetch_name, strict=strict, limits=limits
            )
            rows = [self.memory.experts.rows(bank) for bank in range(part.banks)]
            transfer = TransferEngine(
                HostCopier(store, rows, threads=config.copy_threads), page_class.nbytes
            )
            undo.callback(transfer.close)
            rule = EventRule(table, self.eviction, self.prefetch)
            self.ages = rule.ages = PageAges(table.books)
            self.pager = ExpertPager(rule, self.memory.experts, transfer, phase=phase)
            undo.pop_all()

    @property
    def kv_reserved_bytes(self) -> int:
        """Maximum size in bytes of the KV cache, which the engine divides into blocks."""
        kv = self.partition.kv
        return (kv.max if self.dynamic else kv.target) * self.partition.frame_bytes

    def place_kv(self, blocks: int, block_bytes: int) -> KVTenant:
        """Reserve the buffer for the engine's KV blocks and commit its initial part.

        Raises:
            OutOfFramesError, SubstrateError: There is not enough memory; nothing is reserved.
        """
        layout = KVLayout(blocks, block_bytes, self.partition.frame_bytes)
        groups = layout.groups_within(self.partition.kv.target)
        return self.memory.place_kv(layout, range(groups))

    def inventory(self) -> Inventory:
        """Return the inventory that the scheduler's side needs to change the split."""
        kv, part = self.memory.kv, self.partition
        if kv is None:
            raise InvariantError("the KV cache has not been placed yet")
        return Inventory(
            frames=self.memory.pool.count,
            geometry=self.geometry,
            page_class=self.page_class,
            bank_limit=part.bank_limit,
            minimum=part.minimum,
            slots=tuple(self.pager.table.slots),
            experts=part.experts,
            kv=part.kv,
            layout=kv.layout,
            groups=int(np.count_nonzero(kv.committed)),
        )

    def resize(self, budget: int) -> None:
        """Raise or lower the budget to ``budget`` bytes; only the experts gain or lose memory.

        This method is called between steps. The number of banks does not change. If the budget is
        lowered, pages are evicted and the last slots are removed.

        Raises:
            BudgetTooSmallError: A bank cannot hold the experts of one layer or, with waves, of one
                token.
            ConfigError: The difference exceeds the free memory.
            OutOfFramesError: ``budget`` is above the ceiling.
            SubstrateError: A system call failed. As after every error, nothing has changed.
        """
        pool, part = self.memory.pool, self.partition
        frames = budget // part.frame_bytes
        slots = part.slots_for(frames - self.memory.frames()[KVTenant.NAME])
        if slots is None:
            raise BudgetTooSmallError(
                f"{sizes.shown(budget)} cannot hold {least_experts(part.geometry, part.minimum)}, "
                f"{sizes.shown(part.page_class.nbytes)} each, in each of {part.banks} banks",
                fix="set a larger budget or fewer banks",
            )
        require_free(budget, held=pool.nbytes)
        before = pool.limit
        pool.set_limit(max(frames, before))
        try:
            self.pager.resize_all(slots)
        except BaseException:
            pool.set_limit(before)
            raise
        pool.set_limit(frames)

    @contextmanager
    def update(self) -> Iterator[Put]:
        """Replace, at the end of the ``with`` block, all pages put within it; none after an error.

        No page is resident afterwards. This method may only be called between forward passes.

        Raises:
            StoreError: A page cannot be stored; nothing has changed.
        """
        self.pager.owner.require()
        with self.store.update() as put:
            yield put
            self.pager.drop()

    def arenas(self, layer: int) -> list[np.ndarray[tuple[int, int], np.dtype[np.uint8]]]:
        """Return the layer's bank: for each part, one uint8 array ``[slots, part bytes]``.

        The arrays include all slots that the bank may ever have, because their shape, on which
        kernels rely, must not change with the split.
        """
        return self.memory.experts.rows(self.pager.table.bank(layer))

    def stats(self) -> dict[str, int | float]:
        """Return the event rule's counters, sizes in bytes, faults, and seconds spent waiting."""
        counters, transfer = self.pager.counters(), self.pager.transfer
        return {
            **asdict(counters),
            "hit_rate": counters.hit_rate,
            "slots": sum(self.pager.table.slots),
            "banks": self.pager.table.num_banks,
            "pages": self.geometry.num_pages,
            "page_bytes": self.page_class.nbytes,
            "budget_bytes": self.memory.budget_bytes,
            "committed_bytes": self.memory.committed_bytes,
            "allocated_bytes": self.memory.substrate.allocated(),
            "expert_bytes": self.memory.experts.nbytes,
            "kv_bytes": self.memory.kv_bytes,
            "store_bytes": self.store.nbytes,
            "bytes_demand": transfer.bytes_demand,
            "bytes_prefetch": transfer.bytes_prefetch,
            "stall_seconds": transfer.stall_seconds,
            **self._disk(),
            "policy_faults": self.eviction.faults + self.prefetch.faults,
            "policy_slow": self.eviction.slow + self.prefetch.slow,
        }

    def _disk(self) -> dict[str, int | float]:
        if not isinstance(self.store, TieredStore):
            return {"disk_bytes": 0, "disk_seconds": 0.0, "disk_depth": 0}
        meters = self.store.meters
        return {
            "disk_bytes": sum(meter.nbytes for meter in meters),
            "disk_seconds": sum(meter.seconds for meter in meters),
            "disk_depth": self.store.depth,
        }

    def reset(self) -> None:
        """Start cold: drop all pages, and set the counters of ``stats`` to zero.

        The counters ``policy_faults`` and ``policy_slow`` are kept.
        """
        self.pager.reset()
        if isinstance(self.store, TieredStore):
            for meter in self.store.meters:
                meter.reset()

    def trace_meta(self, *, model: str, top_k: int, source: str) -> TraceMeta:
        """Return the metadata for traces of this model."""
        return TraceMeta(
            model=model,
            num_layers=self.geometry.num_layers,
            experts_per_layer=self.geometry.experts_per_layer,
            top_k=top_k,
            page_bytes=self.page_class.nbytes,
            source=source,
        )

    def check(self) -> None:
        """Raise InvariantError unless all books are consistent."""
        self.pager.check()
        self.memory.check()

    def close(self) -> None:
        """Release all memory; the arenas must not be read afterwards.

        A forked child releases nothing, because the memory belongs to its parent.
        """
        if not self.pager.owner.here:
            return
        with ExitStack() as each:  # runs all callbacks even if one fails
            each.callback(self.store.close)
            each.callback(self.memory.close)
            each.callback(self.pager.close)
