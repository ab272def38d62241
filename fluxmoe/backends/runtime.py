"""Runtime: budget, arenas, policies and pager of one worker, put together from a configuration."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import numpy as np

from fluxmoe import plugins
from fluxmoe.backends.machine import require_free
from fluxmoe.config import Config, Share
from fluxmoe.core import planner
from fluxmoe.core.ages import PageAges
from fluxmoe.core.arbiter import MemoryArbiter
from fluxmoe.core.banks import sizes, spread
from fluxmoe.core.carrier import HostCarrier
from fluxmoe.core.controller import Inventory
from fluxmoe.core.event import EventRule
from fluxmoe.core.guard import EvictionGuard, PrefetchGuard
from fluxmoe.core.kv import KVLayout, KVTenant
from fluxmoe.core.pager import ExpertPager
from fluxmoe.core.pages import PageTable
from fluxmoe.core.policy import PageView
from fluxmoe.core.protocol import Action, SetSlots
from fluxmoe.core.store import Store
from fluxmoe.core.substrate.cpu import CpuSubstrate, frame_bytes_for
from fluxmoe.core.tenants import ExpertTenant, frames_for, slots_within
from fluxmoe.core.transfer import TransferEngine
from fluxmoe.core.types import Budget, Geometry, PageClass, Phase
from fluxmoe.errors import BudgetTooSmallError, ConfigError, InvariantError, UnsupportedError
from fluxmoe.sim.trace import TraceMeta


@dataclass(frozen=True, slots=True)
class KVNeed:
    """What the engine's KV cache needs, in bytes.

    Attributes:
        min: It cannot serve with less, for the ``reason`` that is shown where that does not fit.
        max: All that can ever run at once.
        block: One KV block, all layers; 0 if unknown. Frames are chosen to suit it.
    """

    min: int
    max: int
    reason: str
    block: int = 0


class Runtime:
    """Everything between the engine's MoE layers and the memory of one worker.

    Args:
        config: Validated configuration.
        geometry: Layers and experts.
        page_class: Layout of an expert page.
        store: Where the pages lie.
        kv: What the KV cache needs.
        bank_limit: Most slots one kernel call can address; None if there is no limit.
        phase: Tells, at the beginning of a step, what the step does.
        ceiling: Bytes that ``resize`` may raise the budget to; 0 = not above the first one.

    Raises:
        BudgetTooSmallError: The minimums do not fit.
        UnknownPolicyError, PluginLoadError, NeedsFutureError: The policies cannot be had.
        UnsupportedError: The kernel cannot address one layer's experts.
    """

    def __init__(
        self,
        config: Config,
        geometry: Geometry,
        page_class: PageClass,
        store: Store,
        kv: KVNeed,
        *,
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
        eviction, prefetch, arbitration = plugins.load(config.plugins).serving(config)
        #: Whether the split may change while serving.
        self.dynamic = not arbitration.fixed or config.control
        budget = config.memory.size
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
        self.experts_budget, self.kv_budget = self._split(frames, frame_bytes, kv)
        if self.dynamic:
            self._widen(frames)
        reserved, bank_of = _banks(
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
                eviction, view, name=config.eviction["kind"], strict=strict, limits=limits
            )
            self.prefetch = PrefetchGuard(
                prefetch, view, name=config.prefetch["kind"], strict=strict, limits=limits
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
        """What the KV cache may grow to: the engine makes as many blocks as fit in."""
        budget = self.kv_budget
        return (budget.max if self.dynamic else budget.target) * self.arbiter.pool.frame_bytes

    def place_kv(self, blocks: int, block_bytes: int) -> KVTenant:
        """Reserve the buffer for the engine's KV blocks and commit what the first split says.

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
        """What the scheduler's side must know to change the split."""
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
        """Between steps: carry out one action of a move. Raises what ``MemoryArbiter`` does."""
        self.arbiter.execute(self.pager, action)

    def resize(self, budget: int) -> None:
        """Between steps: raise or lower the budget, in bytes; the difference is the experts'.

        The number of banks stays. A smaller budget loses the pages in the last slots.

        Raises:
            BudgetTooSmallError: A bank could not hold one layer's experts.
            ConfigError: The difference is more than is free.
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
        """Per part, the layer's bank as uint8 ``[slots, part bytes]``: what its kernel reads.

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
        """What a trace of this model says about itself."""
        return TraceMeta(
            model=model,
            num_layers=self.geometry.num_layers,
            experts_per_layer=self.geometry.experts_per_layer,
            top_k=top_k,
            page_bytes=self.page_class.nbytes,
            source=source,
        )

    def check(self) -> None:
        """Raise InvariantError unless all books agree."""
        self.pager.check()
        self.arbiter.check()

    def close(self) -> None:
        """Give all memory back. Nothing may read the arenas any more.

        A forked child gives nothing back: it is its parent's.
        """
        if not self.pager.owner.here:
            return
        with ExitStack() as each:  # goes on if one fails
            each.callback(self.store.close)
            each.callback(self.arbiter.close)
            each.callback(self.pager.close)

    def _widen(self, frames: int) -> None:
        """Let each tenant have all that the other can do without, but for what the user forbids."""
        experts, kv, memory = self.experts_budget, self.kv_budget, self.config.memory
        cap = frames if memory.kv.max is None else kv.max
        self.experts_budget = replace(experts, max=min(experts.max, frames - kv.min))
        self.kv_budget = replace(kv, max=min(cap, frames - experts.min))

    def _split(self, frames: int, frame_bytes: int, kv: KVNeed) -> tuple[Budget, Budget]:
        experts, pages = self.geometry.experts_per_layer, self.geometry.num_pages
        least = frames_for(self.page_class, experts, frame_bytes)
        most = frames_for(self.page_class, pages, frame_bytes)
        memory = self.config.memory
        return planner.first_split(
            frames,
            frame_bytes,
            _wish(
                memory.experts,
                planner.Wish(
                    least,
                    most,
                    reason=f"one layer of {experts} experts, {self.page_class.nbytes} bytes each",
                ),
                frame_bytes,
                "experts",
            ),
            _wish(
                memory.kv,
                planner.Wish(
                    -(-kv.min // frame_bytes), -(-kv.max // frame_bytes), reason=kv.reason
                ),
                frame_bytes,
                "kv",
            ),
        )


def _wish(share: Share, need: planner.Wish, frame_bytes: int, name: str) -> planner.Wish:
    """The need of a tenant, tightened by what the configuration says."""
    least = need.min if share.min is None else -(-int(share.min) // frame_bytes)
    if least < need.min:
        raise ConfigError(
            f"{share.min} bytes are less than the minimum of {need.min * frame_bytes} "
            f"({need.reason})",
            where=f"memory.{name}.min",
            fix="raise it, or set it to auto",
        )
    cap = None if share.max is None else int(share.max) // frame_bytes
    if cap is not None and cap < least:
        raise ConfigError(
            f"{share.max} bytes are less than the minimum of {least * frame_bytes} ({need.reason})",
            where=f"memory.{name}.max",
            fix="raise it, or set it to auto",
        )
    target = None if share.target is None else int(share.target) // frame_bytes
    most = need.max if cap is None else min(need.max, cap)
    return planner.Wish(least, most, target, need.reason, cap)


def _banks(
    geometry: Geometry,
    page_class: PageClass,
    frames: int,
    frame_bytes: int,
    limit: int | None,
    wanted: int,
    *,
    least: int,
) -> tuple[list[int], list[int]]:
    """The most slots per bank within ``frames`` frames, and the bank of each layer.

    The fewest banks that waste no slot, but ``wanted`` if there can be so many: within ``least``
    frames, too, each must hold one layer's experts, so a small budget cannot have many.
    """
    layers, experts = geometry.num_layers, geometry.experts_per_layer
    if limit is not None and limit < experts:
        raise UnsupportedError(
            f"the kernel can address {limit} slots of this size, a layer has {experts} experts"
        )
    total = min(slots_within(page_class, frames, frame_bytes), geometry.num_pages)
    needed = 1
    while limit is not None and max(spread(geometry, total, needed)[0]) > limit:
        needed += 1
    for banks in range(min(max(needed, wanted), layers), 0, -1):
        small, slots = (
            sizes(geometry, page_class, count, frame_bytes, banks=banks, limit=limit)
            for count in (least, frames)
        )
        if small is not None and slots is not None:
            return slots, spread(geometry, total, banks)[1]
    raise InvariantError("the minimum of the experts does not hold one layer")
