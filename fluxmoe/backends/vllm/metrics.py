"""FluxMoE's metrics on vLLM's ``/metrics``, and their transport (docs/reference/metrics.md).

A worker reads its sizes and counters after each step and sends the *changes*. Changes, even those
of gauges, can be summed over steps and workers without regard to their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fluxmoe import sizes
from fluxmoe.core.types import AGES

#: Metric → values of its own labels → value. These are plain data, because they cross processes.
Samples = dict[str, dict[tuple[str, ...], float]]
#: A metric's name and the values of its own labels.
Series = tuple[str, tuple[str, ...]]
#: Values in the order of their series. A source that is read in every step returns the same list
#: object until its series change: building a dictionary with such keys would dominate the cost.
Readings = tuple[list[Series], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: name, kind, help text, and its own labels, to which vLLM adds model and engine.

    The samples of a histogram are its buckets, labelled by upper bound, and its ``sum``.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


DECISION = "fluxmoe_split_decision"
REPLACED = "fluxmoe_policy_replaced"
LIMIT = "fluxmoe_limit_bytes"
#: Metrics whose series are removed once they no longer apply.
PASSING = frozenset({DECISION, REPLACED, LIMIT})

METRICS = (
    Metric(
        "fluxmoe_info",
        "gauge",
        "FluxMoE's version and the configured policies and stores, as labels; always 1.",
        ("version", "eviction", "prefetch", "arbitration", "stores"),
    ),
    Metric(
        "fluxmoe_expert_hits_total",
        "counter",
        "Distinct experts per MoE layer execution that were resident.",
    ),
    Metric(
        "fluxmoe_expert_misses_total",
        "counter",
        "Distinct experts per MoE layer execution that were loaded; cold means the first time.",
        ("cause",),
    ),
    Metric(
        "fluxmoe_expert_reloads_total",
        "counter",
        "Loads of an expert beyond the first within one MoE layer execution that runs in waves.",
    ),
    Metric(
        "fluxmoe_prefetch_hits_total",
        "counter",
        "Hits on prefetched pages that had not been used since they were loaded.",
    ),
    Metric(
        "fluxmoe_expert_evictions_total",
        "counter",
        "Expert pages evicted for other pages, released by the policy after use, or dropped "
        "because slots were removed or weights changed.",
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
        "Policy faults that were contained.",
        ("kind", "policy"),
    ),
    Metric(
        "fluxmoe_policy_slow_calls_total",
        "counter",
        "Calls to policies that took longer than the soft limit.",
        ("kind", "policy"),
    ),
    Metric(
        REPLACED,
        "gauge",
        "Workers that have replaced a policy after too many faults; reason is the last fault.",
        ("kind", "policy", "reason"),
    ),
    Metric(
        "fluxmoe_tenant_frames",
        "gauge",
        "Frames committed to a tenant of the budget, and the tenant's bounds.",
        ("tenant", "kind"),
    ),
    Metric(
        "fluxmoe_tenant_bytes",
        "gauge",
        "Bytes committed to a tenant of the budget, and the tenant's bounds.",
        ("tenant", "kind"),
    ),
    Metric(
        LIMIT,
        "gauge",
        "Operator limits on a tenant or on the whole budget.",
        ("tenant", "kind"),
    ),
    Metric(
        "fluxmoe_split_changes_total",
        "counter",
        "Moves of memory between the experts and the KV cache that took effect.",
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
        "Unix time of the last decisions to move memory, with direction and reason as labels.",
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
        "Executions of MoE layers from one use of an expert page to the next, sampled.",
    ),
    Metric("fluxmoe_budget_frames", "gauge", "Frames of the whole budget."),
    Metric("fluxmoe_budget_bytes", "gauge", "Bytes of the whole budget."),
    Metric("fluxmoe_expert_slots", "gauge", "Slots for expert pages."),
    Metric("fluxmoe_expert_pages", "gauge", "Expert pages of the model."),
)

#: Metrics whose sources restart from zero when the pager is reset.
_COUNTERS = frozenset(metric.name for metric in METRICS if metric.kind != "gauge")
#: Upper bounds of the age buckets, in events.
BUCKETS = (*(str(1 << n) for n in range(AGES - 1)), "+Inf")


class Meter:
    """A meter for the changes to samples since the last call.

    Args:
        source: Function that returns the current samples.
        every: Read the source only on every N-th call.
    """

    def __init__(self, source: Callable[[], Readings], *, every: int = 1) -> None:
        self._source, self._every = source, every
        self._series: list[Series] = []
        self._values: Sequence[float] = []
        self._asked = 0

    def take(self) -> Samples:
        """Return the changes; the first call returns all samples, so that every series exists."""
        self._asked += 1
        if (self._asked - 1) % self._every:
            return {}
        series, values = self._source()
        changes: Samples = {}
        if series is self._series:
            if values == self._values:  # true in most steps on the scheduler's side
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
        """Continue the exported values although the source's counters were reset to zero."""
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
