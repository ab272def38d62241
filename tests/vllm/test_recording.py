"""Traces recorded from vLLM have each token's request; the simulator's counts equal vLLM's."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest

from fluxmoe import errors
from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from fluxmoe.backends.vllm.child.traces import record
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace import TraceReader
from tests.recorded import COUNTERS, POLICIES, table
from tests.vllm.conftest import EAGER, PAGE, PAGES, config, prompts

pytestmark = pytest.mark.vllm

LAYERS = 4


@pytest.mark.parametrize(
    ("policy", "prefetch"),
    [
        # In ``make test``, every policy runs once, with alternating prefetchers.
        pytest.param(policy, prefetch, marks=[pytest.mark.full] if (row + column) % 2 else [])
        for row, policy in enumerate(POLICIES)
        for column, prefetch in enumerate(["none", "next-layer"])
    ],
)
def test_the_simulator_counts_what_the_engine_counted(
    eager: ChildEngine, tmp_path: Path, policy: str, prefetch: str
) -> None:
    slots, trace = 25, tmp_path / "t.parquet"
    eager.restart(fluxmoe=config(slots, eviction=policy, prefetch=prefetch), **EAGER)
    eager.generate(prompts(3, seed=5))  # neither recorded nor counted
    stats = record(eager, prompts(24, seed=3), trace, batch=64)
    result = simulate(trace, policy, slots, prefetch).to_json()
    assert {c: result[c] for c in COUNTERS} == {c: stats[c] for c in COUNTERS}
    assert stats["misses"] > 100


def test_every_policy_is_compared() -> None:
    assert {"immediate", "lru", "lfu", "lfru", "next-use"} <= set(POLICIES)


def test_tokens_requests_and_phases(eager: ChildEngine, tmp_path: Path) -> None:
    """In each layer, a request has a row for each token of its prompt and answer but the last."""
    trace = tmp_path / "t.parquet"
    requests = [Prompt([5] * length, 2 + length % 4) for length in (1, 30, 7, 90, 2)]
    eager.restart(fluxmoe=config(PAGES), **{**EAGER, "max_num_seqs": 3,
                  "max_num_batched_tokens": 64, "enable_chunked_prefill": True})  # fmt: skip
    record(eager, requests, trace, batch=64)
    rows = table(trace)
    meta = TraceReader(trace).meta
    assert (meta.source, meta.top_k, meta.num_layers) == ("vllm", 4, LAYERS)
    assert meta.page_bytes == PAGE
    for layer in range(LAYERS):
        mine = Counter(row["request"] for row in rows if row["layer"] == layer)
        assert mine == {i: len(r.tokens) + r.max_tokens - 1 for i, r in enumerate(requests)}
    for _, event in groupby(rows, lambda row: (row["step"], row["layer"])):
        tokens = list(event)
        assert [row["token"] for row in tokens] == list(range(len(tokens)))
        lengths = Counter(row["request"] for row in tokens)
        assert all((row["phase"] == 0) == (lengths[row["request"]] > 1) for row in tokens)
        assert len(tokens) <= 64
    steps = {row["step"] for row in rows}
    assert steps == set(range(len(steps)))
    assert {row["phase"] for row in rows} == {0, 1}
    mixed = [step for step in steps if {r["phase"] for r in rows if r["step"] == step} == {0, 1}]
    assert mixed, "no step that mixes prefill and decode"


def test_weights_are_recorded_and_change_nothing(eager: ChildEngine, tmp_path: Path) -> None:
    eager.restart(fluxmoe=config(PAGES), **EAGER)
    batch = prompts(4, seed=1)
    record(eager, batch, tmp_path / "plain", batch=64)
    record(eager, batch, tmp_path / "weights", weights=True, batch=64)
    plain, rows = table(tmp_path / "plain"), table(tmp_path / "weights")
    assert [row.pop("weights") and row for row in [dict(row) for row in rows]] == plain
    assert all(len(row["weights"]) == len(row["experts"]) == 4 for row in rows)
    # This model normalises the weights of a token's experts.
    assert all(abs(sum(row["weights"]) - 1) < 0.01 for row in rows)
    assert len({tuple(row["weights"]) for row in rows}) > len(rows) // 2
    record(eager, batch, tmp_path / "again", batch=64)
    assert table(tmp_path / "again") == plain


def test_max_steps_and_an_existing_file(eager: ChildEngine, tmp_path: Path) -> None:
    trace = tmp_path / "t.parquet"
    eager.restart(fluxmoe=config(PAGES), **EAGER)
    record(eager, prompts(12, seed=2), trace, max_steps=5, batch=2)
    assert {row["step"] for row in table(trace)} == set(range(5))
    before = trace.read_bytes()
    with pytest.raises(errors.ConfigError, match="already exists"):
        record(eager, prompts(6, seed=2), trace, batch=64)
    assert trace.read_bytes() == before


def test_recording_ends_with_the_engine(eager: ChildEngine, tmp_path: Path) -> None:
    trace = tmp_path / "t.parquet"
    eager.restart(fluxmoe=config(PAGES), **EAGER)
    eager.call("rpc", "fluxmoe_record", str(trace))
    eager.generate(prompts(2, seed=2))
    eager.restart(fluxmoe=config(PAGES), **EAGER)
    assert TraceReader(trace).num_rows > 0
