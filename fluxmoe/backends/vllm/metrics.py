"""FluxMoE's metrics on vLLM's ``/metrics``, and their transport (docs/reference/metrics.md).

A worker reads its sizes and counters after each step and sends the *changes*. Changes, even of
gauges, can be summed over steps and workers without knowing their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fluxmoe import sizes
from fluxmoe.core.types import AGES, IDLE, LIFETIME, REUSE

if TYPE_CHECKING:
    from fluxmoe.backends.runtime import Runtime
    from fluxmoe.core.arbitration.controller import Arbiter

#: Metric → values of its own labels → value. Plain data: it crosses processes.
Samples = dict[str, dict[tuple[str, ...], float]]
#: A metric's name and the values of its own labels.
Series = tuple[str, tuple[str, ...]]
#: Values in the order of their series. A source that is read in every step always returns the same
#: list of series, because building a dictionary with such keys would dominate the cost.
Readings = tuple[list[Series], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: name, kind, help text, and its own labels (vLLM adds those of model and engine).

    The samples of a histogram are its buckets, labelled by upper bound, and its ``sum``.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


#: A metric with text labels; a series is removed once it is no longer among the last decisions.
DECISION = "fluxmoe_split_decision"

METRICS = (
    Metric(
        "fluxmoe_expert_hits_total",
        "counter",
        "Distinct experts per MoE layer execution that were resident.",
    ),
    Metric(
        "fluxmoe_expert_misses_total",
        "counter",
        "Distinct experts per MoE layer execution that had to be loaded; cold: for the first time.",
        ("cause",),
    ),
    Metric(
        "fluxmoe_prefetch_hits_total",
        "counter",
        "Hits on pages that were prefetched and had not been used before.",
    ),
    Metric(
        "fluxmoe_expert_evictions_total",
        "counter",
        "Expert pages evicted: for others, by the policy after use, or because slots were removed.",
        ("cause",),
    ),
    Metric(
        "fluxmoe_transfer_bytes_total",
        "counter",
        "Bytes of expert pages copied from a store into slots.",
        ("store", "cause"),
    ),
    Metric(
        "fluxmoe_stall_seconds_total",
        "counter",
        "Seconds that MoE layers waited for expert pages.",
    ),
    Metric(
        "fluxmoe_policy_faults_total",
        "counter",
        "Faults of policies that were contained.",
        ("kind", "policy"),
    ),
    Metric(
        "fluxmoe_policy_slow_calls_total",
        "counter",
        "Calls of policies that took longer than the soft limit.",
        ("kind", "policy"),
    ),
    Metric(
        "fluxmoe_tenant_frames",
        "gauge",
        "Frames that a tenant of the budget has (committed), and its bounds.",
        ("tenant", "kind"),
    ),
    Metric(
        "fluxmoe_split_changes_total",
        "counter",
        "Moves of memory between experts and KV cache that took effect.",
        ("direction",),
    ),
    Metric(
        "fluxmoe_split_failures_total",
        "counter",
        "Moves of memory that were rolled back, or left their frames free.",
    ),
    Metric(
        DECISION,
        "gauge",
        "The last decisions to move memory, 1 each: direction, and the numbers behind it.",
        ("number", "policy", "direction", "reason"),
    ),
    Metric(
        "fluxmoe_page_lifetime_events",
        "histogram",
        "Executions of MoE layers from the loading of an expert page to its eviction.",
    ),
    Metric(
        "fluxmoe_page_idle_before_evict_events",
        "histogram",
        "Executions of MoE layers from the last use of an expert page to its eviction.",
    ),
    Metric(
        "fluxmoe_page_reuse_gap_events",
        "histogram",
        "Executions of MoE layers from one use of an expert page to the next; a sample.",
    ),
    Metric("fluxmoe_budget_frames", "gauge", "Frames of the whole budget."),
    Metric("fluxmoe_budget_bytes", "gauge", "Bytes of the whole budget."),
    Metric("fluxmoe_expert_slots", "gauge", "Slots for expert pages."),
    Metric("fluxmoe_expert_pages", "gauge", "Expert pages of the model."),
)

#: Metrics whose sources restart from zero when the pager is reset.
_COUNTERS = frozenset(metric.name for metric in METRICS if metric.kind != "gauge")
_AGES = (
    ("fluxmoe_page_lifetime_events", LIFETIME),
    ("fluxmoe_page_idle_before_evict_events", IDLE),
    ("fluxmoe_page_reuse_gap_events", REUSE),
)
#: Upper bounds of the age buckets, in events.
BUCKETS = (*(str(1 << n) for n in range(AGES - 1)), "+Inf")
_AGE_SERIES: list[Series] = [(name, (end,)) for name, _ in _AGES for end in (*BUCKETS, "sum")]
_BOUNDS = ("min", "target", "max")


def reader(runtime: Runtime) -> Callable[[], Readings]:
    """Make a fast function that reads all metrics of one worker except the histograms."""
    # Imported here because it needs numba, which processes without a worker do not.
    from fluxmoe.core.paging.books import (
        C_COLD,
        C_EVICTIONS,
        C_HITS,
        C_MISSES,
        C_PREFETCH_HITS,
        C_RELEASED,
        C_RESIZED,
    )

    store = "+".join(store.kind for store in runtime.config.stores)
    policies = [("eviction", runtime.eviction.name), ("prefetch", runtime.prefetch.name)]
    tenants = ("experts", runtime.partition.experts), ("kv", runtime.partition.kv)
    pager, pool = runtime.pager, runtime.memory.pool
    counts, transfer = pager.table.books.counts, pager.transfer
    bounds = [getattr(budget, kind) for _, budget in tenants for kind in _BOUNDS]
    pages = pager.table.geometry.num_pages
    series = [
        *(("fluxmoe_tenant_frames", (tenant, "committed")) for tenant, _ in tenants),
        ("fluxmoe_expert_slots", ()),
        ("fluxmoe_budget_frames", ()),
        ("fluxmoe_budget_bytes", ()),
        ("fluxmoe_expert_hits_total", ()),
        ("fluxmoe_expert_misses_total", ("cold",)),
        ("fluxmoe_expert_misses_total", ("capacity",)),
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
        ("fluxmoe_expert_pages", ()),
    ]

    def read() -> Readings:
        count = counts.tolist()
        return series, (
            pool.owned_by("experts"),
            pool.owned_by("kv"),
            sum(pager.table.slots),
            pool.limit,
            pool.nbytes,
            count[C_HITS],
            count[C_COLD],
            count[C_MISSES] - count[C_COLD],
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
            *bounds,
            pages,
        )

    return read


def read_ages(runtime: Runtime) -> Readings:
    """Read the histograms of one worker."""
    ages = runtime.ages
    return _AGE_SERIES, [
        n for _, kind in _AGES for n in (*ages.counts[kind].tolist(), int(ages.sums[kind]))
    ]


def split_reader(arbiter: Arbiter | None) -> Callable[[], Readings]:
    """Make a function that reads the scheduler's metrics; zeros if the split is fixed."""
    always: list[Series] = [
        ("fluxmoe_split_changes_total", ("to_kv",)),
        ("fluxmoe_split_changes_total", ("to_experts",)),
        ("fluxmoe_split_failures_total", ()),
    ]
    if arbiter is None:
        return lambda: (always, (0, 0, 0))
    policy = arbiter.policy
    always.append(("fluxmoe_policy_faults_total", ("arbitration", policy)))
    always.append(("fluxmoe_policy_slow_calls_total", ("arbitration", policy)))
    series, newest = always, 0

    def read() -> Readings:
        nonlocal series, newest
        changes, decisions = arbiter.changes, arbiter.decisions
        if decisions and decisions[-1].number != newest:
            newest = decisions[-1].number
            labels = [(str(d.number), d.policy, d.direction, d.reason) for d in decisions]
            series = [*always, *((DECISION, label) for label in labels)]
        return series, (
            changes["to_kv"],
            changes["to_experts"],
            arbiter.failures,
            arbiter.faults,
            arbiter.slow,
            *(1 for _ in decisions),
        )

    return read


class Meter:
    """Changes of samples since the last call.

    Args:
        source: Returns the current samples.
        every: Read the source only on every N-th call.
    """

    def __init__(self, source: Callable[[], Readings], *, every: int = 1) -> None:
        self._source, self._every = source, every
        self._series: list[Series] = []
        self._values: Sequence[float] = []
        self._asked = 0

    def take(self) -> Samples:
        """Return the changes; first all samples, including zeros, so that every series exists."""
        self._asked += 1
        if (self._asked - 1) % self._every:
            return {}
        series, values = self._source()
        changes: Samples = {}
        if series is self._series:
            if values == self._values:  # the case on the scheduler's side in most steps
                return changes
            for (name, labels), value, before in zip(series, values, self._values, strict=True):
                if value != before:
                    changes.setdefault(name, {})[labels] = value - before
        else:
            last = dict(zip(self._series, self._values, strict=True))
            for (name, labels), value in zip(series, values, strict=True):
                known = (name, labels) in last
                before = last.pop((name, labels), 0.0)
                if value != before or not known:
                    changes.setdefault(name, {})[labels] = value - before
            for (name, labels), before in last.items():  # removed series
                changes.setdefault(name, {})[labels] = -before
        self._series, self._values = series, values
        return changes

    def restarted(self) -> None:
        """Account for a reset of the source's counters to zero; exported values continue."""
        self._values = [
            0 if name in _COUNTERS else value
            for (name, _), value in zip(self._series, self._values, strict=True)
        ]


def add(total: Samples, changes: Samples) -> None:
    """Add changes from another worker or a later step to ``total``."""
    for name, samples in changes.items():
        mine = total.setdefault(name, {})
        for labels, change in samples.items():
            mine[labels] = mine.get(labels, 0) + change


def summary(changes: Samples) -> dict[str, str]:
    """Format one interval as text for vLLM's log."""
    total = {name: sum(samples.values()) for name, samples in changes.items()}
    hits, misses = (total.get(f"fluxmoe_expert_{what}_total", 0) for what in ("hits", "misses"))
    rate = {"expert hit rate": f"{hits / (hits + misses):.1%}"} if hits + misses else {}
    return {
        **rate,
        "expert pages loaded": sizes.shown(total.get("fluxmoe_transfer_bytes_total", 0)),
        "waited for them": f"{total.get('fluxmoe_stall_seconds_total', 0):.2f} s",
    }
