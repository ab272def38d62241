"""Runtime: budget, arenas, policies and pager of one worker, put together from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil

from fluxmoe import plugins
from fluxmoe.config import Config, Share
from fluxmoe.core import planner
from fluxmoe.core.arbiter import MemoryArbiter
from fluxmoe.core.banks import banks_needed, spread
from fluxmoe.core.event import EventRule
from fluxmoe.core.guard import EvictionGuard, PrefetchGuard
from fluxmoe.core.pager import ExpertPager
from fluxmoe.core.pages import PageTable
from fluxmoe.core.policy import EvictionPolicy, PageView
from fluxmoe.core.store import Store
from fluxmoe.core.substrate.cpu import CpuSubstrate, frame_bytes_for
from fluxmoe.core.tenants import ExpertTenant, frames_for, slots_within
from fluxmoe.core.transfer import TransferEngine
from fluxmoe.core.types import Budget, Geometry, PageClass, Phase
from fluxmoe.errors import ConfigError, NeedsFutureError


@dataclass(frozen=True, slots=True)
class KVNeed:
    """What the engine's KV cache needs, in bytes."""

    min: int
    max: int
    reason: str


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

    Raises:
        BudgetTooSmallError: The minimums do not fit.
        UnknownPolicyError, PluginLoadError, NeedsFutureError: The policies cannot be had.
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
    ) -> None:
        self.config, self.geometry, self.page_class, self.store = (
            config,
            geometry,
            page_class,
            store,
        )
        # Policies first: a misspelt name must not cost the time to reserve memory.
        registry = plugins.load(config.plugins)
        eviction: EvictionPolicy = registry.create("eviction", config.eviction)
        if eviction.needs_future:
            raise NeedsFutureError(
                f"eviction policy {config.eviction['kind']!r} needs to know the future",
                where="eviction",
                fix="it works in `fluxmoe simulate` only; choose another one to serve with",
            )
        prefetch = registry.create("prefetch", config.prefetch)
        registry.create("arbitration", config.arbitration)

        budget = int(config.memory.budget)
        available = psutil.virtual_memory().available
        if budget > available:
            raise ConfigError(
                f"a budget of {budget} bytes is more than the {available} bytes that are free",
                where="memory.budget",
                fix="lower it",
            )
        frame_bytes = int(config.memory.frame or frame_bytes_for(budget))
        self.experts_budget, self.kv_budget = self._split(budget // frame_bytes, frame_bytes, kv)
        slots, bank_of = _banks(
            geometry,
            page_class,
            self.experts_budget.target,
            frame_bytes,
            bank_limit,
            config.memory.banks,
        )

        self.arbiter = MemoryArbiter(CpuSubstrate(budget // frame_bytes, frame_bytes))
        self._tenant = ExpertTenant(
            self.arbiter.pool, self.arbiter.substrate, page_class, reserved=slots
        )
        for bank, count in enumerate(slots):
            self._tenant.resize(bank, count)
        self.arbiter.kv.hold(self.kv_budget.target)

        table = PageTable(geometry, slots, bank_of=bank_of)
        view = PageView(table, seed=config.seed)
        strict = config.strict_policies
        self.eviction = EvictionGuard(eviction, view, name=config.eviction["kind"], strict=strict)
        self.prefetch = PrefetchGuard(prefetch, view, name=config.prefetch["kind"], strict=strict)
        rows = [self._tenant.rows(bank) for bank in range(len(slots))]
        transfer = TransferEngine(store, rows, page_class.nbytes, threads=config.copy_threads)
        rule = EventRule(table, self.eviction, self.prefetch)
        self.pager = ExpertPager(rule, self._tenant, transfer, phase=phase)

    @property
    def kv_bytes(self) -> int:
        """What the engine may allocate for its KV cache."""
        return self.arbiter.kv.nbytes

    @property
    def expert_bytes(self) -> int:
        """Committed bytes of the expert arenas."""
        return self._tenant.nbytes

    def arenas(self, layer: int) -> list[np.ndarray[tuple[int, int], np.dtype[np.uint8]]]:
        """Per part, the layer's bank as uint8 ``[slots, part bytes]``: what its kernel reads."""
        bank = self.pager.table.bank(layer)
        slots = self.pager.table.slots[bank]
        return [rows[:slots] for rows in self._tenant.rows(bank)]

    def check(self) -> None:
        """Raise InvariantError unless all books agree."""
        self.pager.check()
        self.arbiter.check()

    def close(self) -> None:
        """Give all memory back. Nothing may read the arenas any more."""
        self.pager.close()
        self.arbiter.close()
        self.store.close()

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
) -> tuple[list[int], list[int]]:
    """Slots per bank and the bank of each layer, within ``frames`` frames."""
    total = min(slots_within(page_class, frames, frame_bytes), geometry.num_pages)
    # A bank holds at least one layer's experts, so a small budget cannot have many banks.
    most = min(geometry.num_layers, total // geometry.experts_per_layer)
    while True:
        banks = max(1, min(max(banks_needed(total, limit), wanted), most))
        slots, bank_of = spread(geometry, total, banks)
        slots = [min(share, limit or share) for share in slots]
        # Each bank fills whole frames of its own, so several may need a little more than one.
        if sum(frames_for(page_class, share, frame_bytes) for share in slots) <= frames:
            return slots, bank_of
        total -= 1
