"""The values of the metrics, read from a worker's memory and from the scheduler's arbiter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fluxmoe.backends.vllm.metrics import BUCKETS, DECISION, LIMIT, REPLACED, Readings, Series
from fluxmoe.core.types import IDLE, LIFETIME, REUSE
from fluxmoe.version import __version__

if TYPE_CHECKING:
    from fluxmoe.backends.runtime import Runtime
    from fluxmoe.core.arbitration.controller import Arbiter
    from fluxmoe.core.arbitration.messages import OperatorLimits
    from fluxmoe.core.policy.faults import PolicyGuard

_AGES = (
    ("fluxmoe_page_lifetime_events", LIFETIME),
    ("fluxmoe_page_idle_before_evict_events", IDLE),
    ("fluxmoe_page_reuse_gap_events", REUSE),
)
_AGE_SERIES: list[Series] = [(name, (end,)) for name, _ in _AGES for end in (*BUCKETS, "sum")]
_BOUNDS = ("min", "target", "max")


def reader(
    runtime: Runtime, rank: int, limits: Callable[[], OperatorLimits | None]
) -> Callable[[], Readings]:
    """Make a fast function that reads all metrics of one worker except the histograms.

    Args:
        runtime: The worker's memory.
        rank: The worker's rank. Only the worker of rank 0 reports the configuration.
        limits: Function that returns the last operator limits, or None if there are none.
    """
    # Imported here, because this module needs numba, which processes without a worker do not need.
    from fluxmoe.core.paging.books import (
        C_COLD,
        C_EVICTIONS,
        C_HITS,
        C_MISSES,
        C_PREFETCH_HITS,
        C_RELEASED,
        C_RELOADS,
        C_RESIZED,
    )

    store = "+".join(store.kind for store in runtime.config.stores)
    guards = ("eviction", runtime.eviction), ("prefetch", runtime.prefetch)
    policies = [(kind, guard.name) for kind, guard in guards]
    names = *(name for _, name in policies), runtime.config.arbitration["kind"]
    tenants = ("experts", runtime.partition.experts), ("kv", runtime.partition.kv)
    pager, pool = runtime.pager, runtime.memory.pool
    counts, transfer = pager.table.books.counts, pager.transfer
    frame = pool.frame_bytes
    bounds = [getattr(budget, kind) for _, budget in tenants for kind in _BOUNDS]
    constant = [*bounds, *(count * frame for count in bounds), pager.table.geometry.num_pages]
    always: list[Series] = [
        *(("fluxmoe_tenant_frames", (tenant, "committed")) for tenant, _ in tenants),
        *(("fluxmoe_tenant_bytes", (tenant, "committed")) for tenant, _ in tenants),
        ("fluxmoe_expert_slots", ()),
        ("fluxmoe_budget_frames", ()),
        ("fluxmoe_budget_bytes", ()),
        ("fluxmoe_expert_hits_total", ()),
        ("fluxmoe_expert_misses_total", ("cold",)),
        ("fluxmoe_expert_misses_total", ("capacity",)),
        ("fluxmoe_expert_reloads_total", ()),
        ("fluxmoe_prefetch_hits_total", ()),
        ("fluxmoe_expert_evictions_total", ("victim",)),
        ("fluxmoe_expert_evictions_total", ("released",)),
        ("fluxmoe_expert_evictions_total", ("resized",)),
        ("fluxmoe_transfer_bytes_total", (store, "demand")),
        ("fluxmoe_transfer_bytes_total", (store, "prefetch")),
        ("fluxmoe_stall_seconds_total", ()),
        *(("fluxmoe_policy_faults_total", policy) for policy in policies),
        *(("fluxmoe_policy_slow_calls_total", policy) for policy in policies),
        *(("fluxmoe_tenant_frames", (name, kind)) for name, _ in tenants for kind in _BOUNDS),
        *(("fluxmoe_tenant_bytes", (name, kind)) for name, _ in tenants for kind in _BOUNDS),
        ("fluxmoe_expert_pages", ()),
    ]
    if rank == 0:
        always.append(("fluxmoe_info", (__version__, *names, store)))
        constant.append(1)
    passing = Passing(always)

    def read() -> Readings:
        count, given = counts.tolist(), limits()
        experts, kv = pool.owned_by("experts"), pool.owned_by("kv")
        more = _replaced(guards)
        if given is not None:
            more += _limits(given, frame)
        return passing.series(more), (
            experts,
            kv,
            experts * frame,
            kv * frame,
            sum(pager.table.slots),
            pool.limit,
            pool.nbytes,
            count[C_HITS],
            count[C_COLD],
            count[C_MISSES] - count[C_COLD],
            count[C_RELOADS],
            count[C_PREFETCH_HITS],
            count[C_EVICTIONS],
            count[C_RELEASED],
            count[C_RESIZED],
            transfer.bytes_demand,
            transfer.bytes_prefetch,
            transfer.stall_seconds,
            runtime.eviction.faults,
            runtime.prefetch.faults,
            runtime.eviction.slow,
            runtime.prefetch.slow,
            *constant,
            *(value for _, value in more),
        )

    return read


def read_ages(runtime: Runtime) -> Readings:
    """Read the histograms of one worker."""
    ages = runtime.ages
    return _AGE_SERIES, [
        n for _, kind in _AGES for n in (*ages.counts[kind].tolist(), int(ages.sums[kind]))
    ]


def split_reader(arbiter: Arbiter | None) -> Callable[[], Readings]:
    """Make a function that reads the scheduler's metrics, which are zero if the split is fixed."""
    always: list[Series] = [
        ("fluxmoe_split_changes_total", ("to_kv",)),
        ("fluxmoe_split_changes_total", ("to_experts",)),
        ("fluxmoe_split_failures_total", ()),
    ]
    if arbiter is None:
        return lambda: (always, (0, 0, 0))
    policy = arbiter.policy
    guards = (("arbitration", policy),)
    always.append(("fluxmoe_policy_faults_total", ("arbitration", policy.name)))
    always.append(("fluxmoe_policy_slow_calls_total", ("arbitration", policy.name)))
    passing = Passing(always)

    def read() -> Readings:
        changes = arbiter.changes
        more = [
            *_replaced(guards),
            *(
                ((DECISION, (str(d.number), d.policy, d.direction, d.reason)), d.time)
                for d in arbiter.decisions
            ),
        ]
        return passing.series(more), (
            changes["to_kv"],
            changes["to_experts"],
            arbiter.failures,
            policy.faults,
            policy.slow,
            *(value for _, value in more),
        )

    return read


class Passing:
    """A list of series that remains the same object while the temporary series do not change.

    Args:
        always: The permanent series.
    """

    def __init__(self, always: list[Series]) -> None:
        self._always = self._series = always
        self._more: list[Series] = []

    def series(self, more: Sequence[tuple[Series, float]]) -> list[Series]:
        """List all series: the permanent series, then those of ``more``."""
        now = [series for series, _ in more]
        if now != self._more:
            self._more, self._series = now, [*self._always, *now]
        return self._series


def _replaced(guards: Iterable[tuple[str, PolicyGuard]]) -> list[tuple[Series, float]]:
    return [
        ((REPLACED, (kind, guard.name, guard.replaced)), 1.0)
        for kind, guard in guards
        if guard.replaced
    ]


def _limits(limits: OperatorLimits, frame_bytes: int) -> list[tuple[Series, float]]:
    given = (
        (("budget", "max"), limits.total),
        (("experts", "min"), limits.experts_min),
        (("experts", "max"), limits.experts_max),
        (("kv", "min"), limits.kv_min),
        (("kv", "max"), limits.kv_max),
    )
    return [((LIMIT, name), count * frame_bytes) for name, count in given if count is not None]
