"""The replay of a trace through the engine's page table, event rule and policy guards.

Hits and misses are not defined here: a run builds the same objects as an engine's pager, feeds the
events to these objects in order, and reads their counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path

import numpy as np

from fluxmoe import arguments, plugins
from fluxmoe.core.memory.sizing import spread
from fluxmoe.core.paging.replay import replay
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.guards import EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import EvictionPolicy, PageView, PrefetchPolicy
from fluxmoe.core.policy.watchdog import DEFAULT_LIMITS
from fluxmoe.errors import CapacityError, ConfigError
from fluxmoe.plugins import PolicySpec, Registry, name_of
from fluxmoe.sim.capacity import pages_of
from fluxmoe.sim.clock import Clock, Timing
from fluxmoe.sim.events import Events
from fluxmoe.sim.hardware import Profile, load
from fluxmoe.trace import TraceMeta

#: Number of events between progress updates and checks for Ctrl-C.
_CHUNK = 1 << 16
#: No engine waits for the policy here, so no call counts as slow.
_LIMITS = replace(DEFAULT_LIMITS, soft_s=math.inf)
#: In strict mode only endless calls are faults, so that a busy machine does not end a simulation.
_PATIENT = replace(_LIMITS, hard_s=60.0)


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """Counters of one run, as the event rule defines them.

    Attributes:
        policy, prefetch: Labels of the policies as requested.
        capacity_pages: Total number of slots.
        accesses, hits, misses: Numbers of distinct experts, counted once per event; ``accesses =
            hits + misses``.
        hit_rate: hits / accesses.
        prefetch_hits: Number of ``hits`` on pages that a prefetch had loaded.
        evictions: Number of pages evicted to make room for demanded or prefetched pages.
        released: Number of pages released because the policy did not retain them.
        reloads: Number of loads of a page beyond the first within one event. An event with more
            pages than its bank has slots runs in waves, which may load a page several times.
        bytes_demand, bytes_prefetch: Bytes loaded on demand, including reloads, and by prefetch;
            None if the page size is unknown.
        policy_faults: Number of calls to a policy that failed and were answered by the fallback.
        timing: Simulated times; None without a hardware profile.
    """

    policy: str
    prefetch: str
    capacity_pages: int
    events: int
    accesses: int
    hits: int
    misses: int
    hit_rate: float
    prefetch_hits: int
    evictions: int
    released: int
    loads_demand: int
    loads_prefetch: int
    reloads: int
    bytes_demand: int | None
    bytes_prefetch: int | None
    policy_faults: int
    timing: Timing | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.policy}, prefetch={self.prefetch}, "
            f"slots={self.capacity_pages}, hit_rate={self.hit_rate:.1%}, misses={self.misses})"
        )

    def _repr_html_(self) -> str:
        """Return the result as an HTML table, for notebooks."""
        shown = self.to_json() | {"hit_rate": f"{self.hit_rate:.1%}"}
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name.replace('_', ' '))}</th>"
            f"<td>{escape(f'{value:,.4g}' if isinstance(value, float) else str(value))}</td></tr>"
            for name, value in shown.items()
            if value is not None
        )
        return f"<table>{rows}</table>"

    def to_json(self) -> dict[str, str | int | float | None]:
        """Return a flat dictionary that includes the fields of ``timing``, if any."""
        fields = asdict(self)
        timing = fields.pop("timing")
        return {**fields, **(timing or {})}


class Simulation:
    """One run, validated and ready to start. The arguments and errors are those of ``simulate``.

    Attributes:
        policy: Label of the eviction policy as requested.
        oracle: True if the policy needs the future, so no engine can run it.
        missed, reloaded: Number of misses and of reloads in each event, int32 ``[N]``; filled by
            ``run``.
    """

    def __init__(
        self,
        events: Events,
        policy: PolicySpec,
        capacity: int | str,
        prefetch: PolicySpec = "none",
        *,
        registry: Registry,
        banks: int = 1,
        strict: bool = True,
        hardware: Profile | None = None,
    ) -> None:
        self._events = events
        self._clock = None if hardware is None else Clock(hardware, events)
        self.missed, self.reloaded = (np.zeros(len(events), np.int32) for _ in range(2))
        self.policy, self._prefetch = label(policy), label(prefetch)
        self._capacity = pages_of(capacity, events.meta)
        evictor: EvictionPolicy = registry.create("eviction", policy)
        fetcher: PrefetchPolicy = registry.create("prefetch", prefetch)
        self.oracle = evictor.needs_future
        table = _table(events, self._capacity, banks, f"capacity {capacity}")
        future = events.future.first.copy() if self.oracle else None
        view = PageView(table, next_use=future)
        limits = _PATIENT if strict else _LIMITS
        self._eviction = EvictionGuard(
            evictor, view, name=self.policy, strict=strict, limits=limits
        )
        self._fetching = PrefetchGuard(
            fetcher, view, name=self._prefetch, strict=strict, limits=limits
        )
        self._rule = EventRule(table, self._eviction, self._fetching)

    def run(self, progress: Callable[[int], None] = lambda events: None) -> Result:
        """Replay the trace from a cold start.

        Args:
            progress: Called periodically with the number of events run since the last call.

        Raises:
            PolicyFaultError: A policy failed in strict mode.
        """
        events = self._events.foreseen if self.oracle else self._events.block
        count = len(self._events)
        clock = self._clock
        prefetching = clock is not None and self._rule.prefetches
        watch = clock.watch if clock is not None and prefetching else None
        for begin in range(0, count, _CHUNK):
            end = min(begin + _CHUNK, count)
            replay(self._rule, events, begin, end, self.missed, watch, reloaded=self.reloaded)
            progress(end - begin)
        if clock is not None and not prefetching:
            clock.demand_only(self.missed + self.reloaded)
        return self._result(self._events.meta)

    def _result(self, meta: TraceMeta) -> Result:
        counted, size = self._rule.table.counters(), meta.page_bytes
        loads = counted.loads_demand + counted.reloads
        return Result(
            policy=self.policy,
            prefetch=self._prefetch,
            capacity_pages=self._capacity,
            events=counted.events,
            accesses=counted.accesses,
            hits=counted.hits,
            misses=counted.misses,
            hit_rate=counted.hit_rate,
            prefetch_hits=counted.prefetch_hits,
            evictions=counted.evictions,
            released=counted.released,
            loads_demand=counted.loads_demand,
            loads_prefetch=counted.loads_prefetch,
            reloads=counted.reloads,
            bytes_demand=None if size is None else loads * size,
            bytes_prefetch=None if size is None else counted.loads_prefetch * size,
            policy_faults=self._eviction.faults + self._fetching.faults,
            timing=None if self._clock is None else self._clock.timing(),
        )


def simulate(
    trace: Events | str | Path,
    policy: PolicySpec,
    capacity: int | str,
    prefetch: PolicySpec = "none",
    banks: int = 1,
    registry: Registry | None = None,
    strict: bool = True,
    hardware: Profile | str | Path | None = None,
) -> Result:
    """Replay a trace at one capacity.

    Args:
        trace: A trace file, or its events, loaded once for several runs.
        policy: Eviction policy: ``name``, ``{kind: name, option: value}``, or a class or instance
            of ``fluxmoe.EvictionPolicy``, which need not be registered.
        capacity: Pages, a share of all pages ("25%") or bytes ("2GiB"), for all banks together.
        prefetch: Prefetch policy, given in the same way.
        banks: Number of banks over which layers are spread; each bank gets a share of the capacity.
        registry: Known policies; by default the built-in and installed ones.
        strict: False to contain a policy's faults, as an engine does: LRU answers the failed calls,
            so the counts no longer reflect the policy alone.
        hardware: A profile, its name or its file; the result then has a ``timing``.

    Raises:
        TraceError: The trace is invalid or cannot be read.
        UnknownPolicyError, ConfigError: A policy, option, capacity, number of banks or profile is
            invalid.
        CapacityError: A bank cannot hold the experts of one token.
        PolicyFaultError: A policy failed in strict mode.
    """
    where = "simulate"
    if not isinstance(trace, Events):
        trace = Events.load(arguments.path(trace, "trace", where=where))
    if not isinstance(hardware, Profile | None):
        hardware = load(arguments.path(hardware, "hardware", where=where))
    known = plugins.load() if registry is None else registry
    return Simulation(
        trace,
        policy,
        capacity,
        prefetch,
        registry=arguments.instance(
            known, Registry, "registry", where=where, fix="make it with fluxmoe.plugins.load"
        ),
        banks=banks,
        strict=strict,
        hardware=hardware,
    ).run()


def label(spec: PolicySpec) -> str:
    """Format a policy in the notation of the command line: ``name`` or ``name:option=value:…``."""
    options = spec.items() if isinstance(spec, Mapping) else ()
    return ":".join([name_of(spec), *(f"{key}={value}" for key, value in options if key != "kind")])


def _table(events: Events, capacity: int, banks: int, where: str) -> PageTable:
    geometry = events.meta.geometry
    if arguments.whole(banks, "banks", where="--banks") > geometry.num_layers:
        raise ConfigError(
            f"{banks} banks for {geometry.num_layers} layers",
            where="--banks",
            fix="use at most one bank per layer",
        )
    slots, bank_of = spread(geometry, capacity, banks)
    try:
        return PageTable(geometry, slots, bank_of=bank_of, minimum=events.widest)
    except CapacityError as error:
        more = f" in each of {banks} banks" if banks > 1 else ""
        raise CapacityError(error.what, where=where, fix=f"{error.fix}{more}") from error
