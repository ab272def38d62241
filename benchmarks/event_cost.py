"""Bookkeeping cost of an event whose pages are all resident: µs by number of slots and tokens.

    python -m benchmarks event_cost [--json] [--save FILE]

Each event routes to all 64 experts of a layer (to 8 of them with a single token), and all pages are
resident, so the times are pure overhead: applying the event rule, and looking up the slot of every
routed expert. ``rule`` is ``EventRule.open`` alone; ``pager`` is ``ExpertPager.acquire``, which
engines call. Pages are tiny because timed events copy nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from fluxmoe import plugins
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.memory.host import CpuSubstrate
from fluxmoe.core.memory.worker import WorkerMemory
from fluxmoe.core.paging.event import Slots
from fluxmoe.core.paging.pager import ExpertPager
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.guards import EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import PageView
from fluxmoe.core.transfer.engine import TransferEngine
from fluxmoe.core.transfer.host import HostCopier
from fluxmoe.core.types import Geometry, PageClass, Part
from fluxmoe.policies.prefetch.none import NoPrefetch
from fluxmoe.stores.host import HostStore

EXPERTS, TOP_K = 64, 8
SLOTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
TOKENS = (1, 8, 64)
REPEATS, EVENTS = 15, 2000
PAGE_CLASS = PageClass((Part("w13", 128, 64), Part("w2", 64, 32)))
FRAME = 4096


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("event_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write results as JSON")
    arguments = parser.parse_args(argv)
    rows = [row for slots in SLOTS for row in measure(slots)]
    if arguments.save:
        machine.save(arguments.save, rows)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)


def measure(slots: int) -> list[dict[str, float]]:
    """Measure the cost at all token counts with one number of slots, each of which holds a page."""
    geometry = Geometry(slots // EXPERTS, EXPERTS)
    substrate = CpuSubstrate(frames_for(PAGE_CLASS, slots, FRAME), FRAME)
    memory = WorkerMemory(substrate, PAGE_CLASS, [slots])
    tenant = memory.experts
    tenant.resize(0, slots)
    store = HostStore(geometry, PAGE_CLASS)
    for _ in range(geometry.num_layers):
        store.adopt([np.zeros((EXPERTS, part.nbytes), np.uint8) for part in PAGE_CLASS.parts])
    table = PageTable(geometry, [slots])
    view = PageView(table)
    policy = plugins.load().create("eviction", "lru")
    rule = EventRule(
        table,
        EvictionGuard(policy, view, name="lru", strict=True),
        PrefetchGuard(NoPrefetch(), view, name="none"),
    )
    copier = HostCopier(store, [tenant.rows(0)], threads=0)
    pager = ExpertPager(rule, tenant, TransferEngine(copier, PAGE_CLASS.nbytes))
    everyone = np.arange(EXPERTS, dtype=np.int32)
    for layer in range(geometry.num_layers):
        pager.acquire(layer, everyone, np.zeros(EXPERTS, np.int32))
    cold = pager.counters().misses

    rows = []
    for tokens in TOKENS:
        ids = np.resize(everyone, tokens * TOP_K)
        rows.append(
            {
                "slots": slots,
                "tokens": tokens,
                "experts": len(np.unique(ids)),
                "rule_us": per_event(geometry, ids, lambda *event: rule.open(0, *event)),
                "pager_us": per_event(geometry, ids, pager.acquire),
            }
        )
    assert pager.counters().misses == cold, "a timed event missed"
    pager.close()
    memory.close()
    return rows


def per_event(
    geometry: Geometry, ids: Slots, event: Callable[[int, Slots, Slots], object]
) -> float:
    """Measure the time of an event in µs: the median over repeats of the mean over the layers."""
    layers = [i % geometry.num_layers for i in range(EVENTS)]
    out = np.zeros(len(ids), np.int32)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for layer in layers:
            event(layer, ids, out)
        times.append((time.perf_counter() - started) / EVENTS * 1e6)
    return round(statistics.median(times), 2)


def show(rows: list[dict[str, float]]) -> None:
    table = Table(title="one event, all hits: µs, median of repeats", title_justify="left")
    for column in ("slots", *(f"batch {t} {w}" for t in TOKENS for w in ("rule", "pager"))):
        table.add_column(column, justify="right")
    for slots in SLOTS:
        mine = [row for row in rows if row["slots"] == slots]
        cells = [f"{row[w]:.1f}" for row in mine for w in ("rule_us", "pager_us")]
        table.add_row(str(slots), *cells)
    Console(width=100).print(table)
