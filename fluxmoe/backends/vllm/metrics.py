"""What FluxMoE shows on vLLM's ``/metrics``, and how it gets there (docs/metrics.md).

A worker reads its sizes and counters after every step and sends what has *changed*. Changes can be
added up over steps and over workers without anybody knowing what they mean, gauges included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fluxmoe.backends.runtime import Runtime
    from fluxmoe.core.controller import SplitController

#: Metric → values of its own labels → value. Plain data: it crosses processes.
Samples = dict[str, dict[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: its name, kind, own labels (vLLM adds the model's and the engine's), and help."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


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
        "The part of the hits that a prefetch brought in and nobody had used before.",
    ),
    Metric(
        "fluxmoe_expert_evictions_total",
        "counter",
        "Expert pages given up: to others, by the policy after use, or because slots went away.",
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
    Metric("fluxmoe_budget_frames", "gauge", "Frames of the whole budget."),
    Metric("fluxmoe_budget_bytes", "gauge", "Bytes of the whole budget."),
    Metric("fluxmoe_expert_slots", "gauge", "Slots for expert pages."),
    Metric("fluxmoe_expert_pages", "gauge", "Expert pages of the model."),
)

_COUNTERS = frozenset(metric.name for metric in METRICS if metric.kind == "counter")


def read(runtime: Runtime) -> Samples:
    """All metrics of one worker as they are now."""
    counters, transfer = runtime.pager.counters(), runtime.pager.transfer
    table, arbiter = runtime.pager.table, runtime.arbiter
    store = "+".join(store.kind for store in runtime.config.stores)
    policies = (("eviction", runtime.eviction), ("prefetch", runtime.prefetch))
    committed = arbiter.frames()
    frames: dict[tuple[str, ...], float] = {}
    for tenant, budget in (("experts", runtime.experts_budget), ("kv", runtime.kv_budget)):
        frames[tenant, "committed"] = committed[tenant]
        frames[tenant, "min"] = budget.min
        frames[tenant, "target"] = budget.target
        frames[tenant, "max"] = budget.max
    return {
        "fluxmoe_expert_hits_total": {(): counters.hits},
        "fluxmoe_expert_misses_total": {
            ("cold",): counters.cold,
            ("capacity",): counters.misses - counters.cold,
        },
        "fluxmoe_prefetch_hits_total": {(): counters.prefetch_hits},
        "fluxmoe_expert_evictions_total": {
            ("victim",): counters.evictions,
            ("released",): counters.released,
            ("resized",): counters.resized,
        },
        "fluxmoe_transfer_bytes_total": {
            (store, "demand"): transfer.bytes_demand,
            (store, "prefetch"): transfer.bytes_prefetch,
        },
        "fluxmoe_stall_seconds_total": {(): transfer.stall_seconds},
        "fluxmoe_policy_faults_total": {(k, guard.name): guard.faults for k, guard in policies},
        "fluxmoe_policy_slow_calls_total": {(k, guard.name): guard.slow for k, guard in policies},
        "fluxmoe_tenant_frames": frames,
        "fluxmoe_budget_frames": {(): arbiter.pool.count},
        "fluxmoe_budget_bytes": {(): arbiter.budget_bytes},
        "fluxmoe_expert_slots": {(): sum(table.slots)},
        "fluxmoe_expert_pages": {(): table.geometry.num_pages},
    }


def read_split(controller: SplitController | None) -> Samples:
    """Metrics of the scheduler's side; zeros if the split is fixed."""
    changes = {"to_kv": 0, "to_experts": 0} if controller is None else controller.changes
    samples: Samples = {
        "fluxmoe_split_changes_total": {(name,): count for name, count in changes.items()},
        "fluxmoe_split_failures_total": {(): 0 if controller is None else controller.failures},
    }
    if controller is not None:
        policy = ("arbitration", controller.policy)
        samples["fluxmoe_policy_faults_total"] = {policy: controller.faults}
        samples["fluxmoe_policy_slow_calls_total"] = {policy: controller.slow}
    return samples


class Meter:
    """What has changed since it was asked last.

    Args:
        source: Gives all samples as they are now.
    """

    def __init__(self, source: Callable[[], Samples]) -> None:
        self._source = source
        self._last: Samples = {}

    def take(self) -> Samples:
        """The changes; at first all samples, zeros included, so that every series exists."""
        now, last = self._source(), self._last
        self._last = now
        changes: Samples = {}
        for name, samples in now.items():
            before = last.get(name, {})
            changed = {
                labels: value - before.get(labels, 0)
                for labels, value in samples.items()
                if value != before.get(labels)
            }
            if changed:
                changes[name] = changed
        return changes

    def restarted(self) -> None:
        """The source's counters have gone back to zero; those shown go on."""
        self._last = {
            name: {labels: 0 if name in _COUNTERS else value for labels, value in samples.items()}
            for name, samples in self._last.items()
        }


def add(total: Samples, changes: Samples) -> None:
    """Add changes, of another worker or of a later step, to ``total``."""
    for name, samples in changes.items():
        mine = total.setdefault(name, {})
        for labels, change in samples.items():
            mine[labels] = mine.get(labels, 0) + change


def summary(changes: Samples) -> dict[str, str]:
    """One interval in words, for vLLM's log."""
    total = {name: sum(samples.values()) for name, samples in changes.items()}
    hits, misses = (total.get(f"fluxmoe_expert_{what}_total", 0) for what in ("hits", "misses"))
    rate = {"expert hit rate": f"{hits / (hits + misses):.1%}"} if hits + misses else {}
    return {
        **rate,
        "expert pages loaded": f"{total.get('fluxmoe_transfer_bytes_total', 0) / 2**20:.1f} MiB",
        "waited for them": f"{total.get('fluxmoe_stall_seconds_total', 0):.2f} s",
    }
