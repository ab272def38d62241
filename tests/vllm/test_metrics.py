"""FluxMoE's counters in vLLM's metrics are complete, correct and monotonic."""

from __future__ import annotations

import logging
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from prometheus_client import Counter, Gauge, Histogram

from fluxmoe import __version__, sizes
from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.backends.vllm.metrics import (
    DECISION,
    LIMIT,
    METRICS,
    PASSING,
    REPLACED,
    Meter,
    Readings,
    Samples,
    Series,
    add,
    summary,
)
from fluxmoe.backends.vllm.sources import split_reader
from fluxmoe.core.arbitration.controller import REMEMBERED, Decision
from fluxmoe.errors import EngineError
from tests.vllm.conftest import EAGER, KV_BYTES, config, prompts

#: Metrics shown with a fixed split, which has neither decisions nor operator limits.
PLAIN = {m.name for m in METRICS if m.kind != "histogram"} - PASSING
HITS, FRAMES = "fluxmoe_expert_hits_total", "fluxmoe_tenant_frames"


def flat(samples: Samples) -> Readings:
    every = [((name, labels), v) for name, of in samples.items() for labels, v in of.items()]
    return [series for series, _ in every], [value for _, value in every]


def test_the_changes_of_a_meter_add_up() -> None:
    rng = random.Random(0)
    now: Samples = {HITS: {(): 0}, FRAMES: {("kv", "committed"): 90, ("experts", "committed"): 10}}
    meter = Meter(lambda: flat(now))
    shown: Samples = {}
    hits = 0
    for step in range(200):
        add(shown, meter.take())
        assert shown == {**now, HITS: {(): hits}}
        if step % 50 == 49:  # the metrics must not show a reset of the source
            now[HITS][()] = 0
            meter.restarted()
        more, moved = rng.randrange(3), rng.randrange(-5, 6)
        now[HITS][()] += more
        hits += more
        now[FRAMES]["kv", "committed"] += moved
        now[FRAMES]["experts", "committed"] -= moved
    add(shown, meter.take())
    assert meter.take() == {}


def test_series_that_are_gone_are_taken_back_and_rare_ones_wait() -> None:
    now: Samples = {DECISION: {("1", "p", "to_kv", "why"): 1}}
    meter = Meter(lambda: flat(now))
    assert meter.take() == now
    now = {DECISION: {("2", "p", "to_kv", "why"): 1}}
    assert meter.take() == {
        DECISION: {("1", "p", "to_kv", "why"): -1, ("2", "p", "to_kv", "why"): 1}
    }
    hits = 0
    series: list[Series] = [(HITS, ())]  # the same list each time
    rare = Meter(lambda: (series, [hits]), every=3)
    assert rare.take() == {HITS: {(): 0}}
    hits = 5
    assert [rare.take() for _ in range(3)] == [{}, {}, {HITS: {(): 5}}]


def test_the_last_decisions_are_shown_and_older_ones_taken_back() -> None:
    decided = [
        Decision(n, "marginal", "to_kv", f"reason {n}", 1000 + n) for n in range(1, REMEMBERED + 2)
    ]
    policy = SimpleNamespace(name="marginal", faults=0, slow=0, replaced="")
    arbiter: Any = SimpleNamespace(policy=policy, changes={"to_kv": 0, "to_experts": 0}, failures=0)
    arbiter.decisions = deque(maxlen=REMEMBERED)
    meter = Meter(split_reader(arbiter))
    first = meter.take()
    assert first["fluxmoe_policy_faults_total"] == {("arbitration", "marginal"): 0}
    assert DECISION not in first
    assert meter.take() == {}
    for decision in decided:
        arbiter.changes["to_kv"] += 2
        arbiter.decisions.append(decision)
        changes = meter.take()
        assert changes["fluxmoe_split_changes_total"] == {("to_kv",): 2}
        labels = (str(decision.number), "marginal", "to_kv", decision.reason)
        assert changes[DECISION].pop(labels) == decision.time
    assert changes[DECISION] == {("1", "marginal", "to_kv", "reason 1"): -1001}
    arbiter.failures += 1
    assert meter.take() == {"fluxmoe_split_failures_total": {(): 1}}
    policy.replaced = "split gave NaN"
    labels = ("arbitration", "marginal", policy.replaced)
    assert meter.take() == {REPLACED: {labels: 1}}


def test_a_fixed_split_shows_zeros_once() -> None:
    meter = Meter(split_reader(None))
    assert meter.take() == {
        "fluxmoe_split_changes_total": {("to_kv",): 0, ("to_experts",): 0},
        "fluxmoe_split_failures_total": {(): 0},
    }
    assert meter.take() == {}


def test_histograms_add_up_what_was_counted_elsewhere() -> None:
    metric = next(metric for metric in METRICS if metric.kind == "histogram")
    from fluxmoe.backends.vllm.server.prometheus import Histograms  # imports vLLM

    shown = Histograms([metric], ["model_name", "engine"])
    shown.add(metric.name, ["m", "0"], {("1",): 2, ("8",): 1, ("sum",): 10})
    shown.add(metric.name, ["m", "0"], {("8",): 4, ("+Inf",): 1, ("sum",): 5})
    (family,) = shown.collect()
    assert family.type == "histogram"
    values = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    bucket = f"{metric.name}_bucket"
    assert [values[bucket, le] for le in ("1", "4", "8", "1024", "+Inf")] == [2, 2, 7, 7, 8]
    assert values[f"{metric.name}_count", None] == 8
    assert values[f"{metric.name}_sum", None] == 15
    assert family.samples[0].labels["engine"] == "0"


def test_series_that_are_over_disappear_and_smaller_values_do_not() -> None:
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    from fluxmoe.backends.vllm.server.prometheus import PagingProm

    unregister_vllm_metrics()
    types = {kind: kind for kind in (Counter, Gauge, Histogram)}
    shown = PagingProm(SimpleNamespace(kv_transfer_config=None), types, ["engine"], {0: ["0"]})

    def series(name: str) -> dict[tuple[str, ...], float]:
        samples = [s for f in prometheus_client.REGISTRY.collect() for s in f.samples]
        return {(s.labels["tenant"],): s.value for s in samples if s.name == name}

    for change, left in ((8.0, 8.0), (-3.0, 5.0), (-5.0, None), (4.0, 4.0)):
        shown.observe({LIMIT: {("kv", "max"): change}, FRAMES: {("kv", "max"): change}})
        assert series(LIMIT) == ({} if left is None else {("kv",): left})
        assert series(FRAMES) == {("kv",): left or 0}


def test_an_interval_in_words() -> None:
    changes: Samples = {
        HITS: {(): 3},
        "fluxmoe_expert_misses_total": {("cold",): 1},
        "fluxmoe_transfer_bytes_total": {
            ("host", "demand"): 1 << 20,
            ("host", "prefetch"): 1 << 19,
        },
        "fluxmoe_stall_seconds_total": {(): 0.25},
    }
    assert summary(changes) == {
        "expert hit rate": "75.0%",
        "expert pages loaded": "1.5 MiB",
        "waited for them": "0.25 s",
    }
    assert "expert hit rate" not in summary({FRAMES: {("kv", "committed"): 1}})


def scrape(worker: object) -> dict[str, dict[tuple[str, ...], float]]:
    """Read every FluxMoE series by its own labels. Runs in the engine's process."""
    own = {metric.name: metric.labels for metric in METRICS if metric.kind != "histogram"}
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in prometheus_client.REGISTRY.collect():
        for sample in family.samples:
            if sample.name in own:
                labels = tuple(sample.labels[label] for label in own[sample.name])
                found.setdefault(sample.name, {})[labels] = sample.value
    return found


def count_lifetimes(worker: object) -> float:
    name = "fluxmoe_page_lifetime_events_count"
    return sum(
        sample.value
        for family in prometheus_client.REGISTRY.collect()
        for sample in family.samples
        if sample.name == name
    )


def lifetimes(engine: ChildEngine) -> float:
    count: float = engine.call("rpc", count_lifetimes)
    return count


def shown(engine: ChildEngine) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = engine.call("rpc", scrape)
    return found


@pytest.mark.vllm
def test_metrics_are_the_statistics(eager: ChildEngine) -> None:
    for attempt in range(2):  # the second engine of a process replaces the metrics of the first
        settings = config(24, prefetch="next-layer", eviction="lru")
        eager.restart(fluxmoe=settings, disable_log_stats=False, **EAGER)
        run = eager.generate(prompts(8, seed=attempt))
        found, stats = shown(eager), run.stats
        assert set(found) == PLAIN
        one = {name: samples[()] for name, samples in found.items() if () in samples}
        assert one[HITS] == stats["hits"] > 0
        assert one["fluxmoe_prefetch_hits_total"] == stats["prefetch_hits"] > 0
        assert one["fluxmoe_stall_seconds_total"] == pytest.approx(stats["stall_seconds"])
        assert one["fluxmoe_budget_bytes"] == stats["budget_bytes"]
        assert one["fluxmoe_expert_slots"] == stats["slots"]
        assert one["fluxmoe_expert_pages"] == stats["pages"]
        assert found["fluxmoe_expert_misses_total"] == {
            ("cold",): stats["cold"],
            ("capacity",): stats["misses"] - stats["cold"],
        }
        assert 0 < stats["cold"] < stats["misses"]
        assert one["fluxmoe_expert_reloads_total"] == stats["reloads"] == 0
        assert found["fluxmoe_expert_evictions_total"] == {
            ("victim",): stats["evictions"],
            ("released",): stats["released"],
            ("resized",): stats["resized"],
        }
        assert found["fluxmoe_transfer_bytes_total"] == {
            ("host", "demand"): stats["bytes_demand"],
            ("host", "prefetch"): stats["bytes_prefetch"],
        }
        assert found["fluxmoe_policy_faults_total"] == {
            ("eviction", "lru"): 0,
            ("prefetch", "next-layer"): 0,
        }
        frame = one["fluxmoe_budget_bytes"] / one["fluxmoe_budget_frames"]
        frames = found[FRAMES]
        # C14: the metrics in bytes, and the description of the server.
        in_bytes = {series: count * frame for series, count in frames.items()}
        assert found["fluxmoe_tenant_bytes"] == in_bytes
        assert found["fluxmoe_info"] == {(__version__, "lru", "next-layer", "fixed", "host"): 1}
        assert frames["experts", "committed"] * frame == stats["expert_bytes"]
        assert frames["kv", "committed"] * frame == stats["kv_bytes"]
        for tenant in ("experts", "kv"):
            low, high = frames[tenant, "min"], frames[tenant, "max"]
            assert low <= frames[tenant, "committed"] <= frames[tenant, "target"] <= high
        # The histogram is updated every 32 steps, so it may lag.
        evicted = sum(found["fluxmoe_expert_evictions_total"].values())
        assert 0 < lifetimes(eager) <= evicted
    # A second run resets the statistics, but not the metrics.
    again = eager.generate(prompts(8, seed=1)).stats
    assert shown(eager)[HITS][()] == stats["hits"] + again["hits"]


def block(worker: Any) -> list[str]:
    """Log the engine's start again and return the lines. Runs in the engine's process."""
    from fluxmoe.backends.vllm.worker import start

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.extend(record.getMessage().splitlines())  # type: ignore[method-assign]
    start.logger.addHandler(handler)
    specs = worker.get_kv_cache_spec().values()
    start.log(worker._runtime, worker._registry, worker.vllm_config, specs, worker._top_k)
    start.logger.removeHandler(handler)
    return told


@pytest.mark.vllm
def test_c4_an_engine_tells_what_it_pages(eager: ChildEngine) -> None:
    few = config(16, eviction="lru", control=True)
    eager.restart(fluxmoe=few, **EAGER)
    stats, blocks = eager.call("stats"), eager.info["kv_blocks"]
    headline, *lines = eager.call("rpc", block)
    assert "4 layers of 16, 48.0 KiB each" in headline
    said = {line[2:14].strip(): line[15:] for line in lines}
    assert said["budget"].startswith(f"{sizes.shown(stats['budget_bytes'])} per worker: experts ")
    assert "; while serving, experts 768.0 KiB to " in said["budget"]
    assert said["slots"] == f"{stats['slots']} of 64 pages, in 1 bank"
    assert said["eviction"] == f"lru (FluxMoE {__version__})"
    assert said["arbitration"] == f"fixed (FluxMoE {__version__})"
    assert f"{blocks} blocks, which hold {blocks * 32:,} tokens; a request " in said["KV cache"]
    assert said["stores"] == "host: 3.0 MiB"
    assert said["control"].startswith("/v1/fluxmoe/limits on this server")
    assert "note" not in said  # one token uses as many pages


@pytest.mark.vllm
def test_the_connector_switches_nothing_off(eager: ChildEngine) -> None:
    eager.restart(fluxmoe=config(24), **EAGER)
    assert eager.call("rpc", switches) == {"prefix": True, "chunked": True, "hybrid off": False}
    eager.restart(**{**EAGER, "kv_cache_memory_bytes": KV_BYTES})
    assert eager.call("rpc", switches) == {"prefix": True, "chunked": True, "hybrid off": False}


def switches(worker: Any) -> dict[str, bool]:
    scheduler = worker.vllm_config.scheduler_config
    return {
        "prefix": worker.vllm_config.cache_config.enable_prefix_caching,
        "chunked": scheduler.enable_chunked_prefill,
        "hybrid off": scheduler.disable_hybrid_kv_cache_manager,
    }


class FailingScheduler:
    """A scheduler that fails when the engine creates it, after the worker is ready."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no scheduler today")


@pytest.mark.vllm
def test_a_start_that_fails_late_leaves_no_connector(eager: ChildEngine) -> None:
    """vLLM keeps a process's connector until the worker's shutdown, which here never happens."""
    name = f"{FailingScheduler.__module__}.FailingScheduler"
    with pytest.raises(EngineError, match="no scheduler today"):
        eager.restart(fluxmoe=config(24), scheduler_cls=name, **EAGER)
    eager.restart(kv_cache_memory_bytes=KV_BYTES, **EAGER)
    assert len(eager.generate(prompts(1)).tokens) == 1
    eager.restart(fluxmoe=config(24), disable_log_stats=False, **EAGER)
    stats = eager.generate(prompts(1)).stats
    assert shown(eager)[HITS][()] == stats["hits"]
