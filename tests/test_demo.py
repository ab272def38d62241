"""``fluxmoe demo`` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: Five engines start one after the other, which takes minutes on a slow machine.
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("fluxmoe"), "demo", *options],
        capture_output=True,
        text=True,
        timeout=1200,
    )


ENGINES = ("stock", "fluxmoe", "stock_at_total", "stock_unlimited", "fluxmoe_page_file")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    small = ("--requests", "8", "--rounds", "1", "--output-tokens", "8")
    process = demo("--json", *small)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    answer: dict[str, Any] = json.loads(process.stdout)  # and nothing else on standard output
    return answer


@pytest.mark.slow
def test_keys(result: dict[str, Any]) -> None:
    engine = {"tokens_per_s", "kv_blocks", "kv_bytes", "peak_running"}
    assert result.keys() >= {
        "requests",
        "budget_bytes",
        "experts_total_bytes",
        "tokens_identical",
        "stock",
        "fluxmoe",
        "speedup",
    }
    memory = {"expert_bytes", "store_bytes", "total_bytes", "pss_bytes"}
    for name in ENGINES:
        assert result[name].keys() >= engine | memory
    assert result["fluxmoe"].keys() >= {"expert_hit_rate", "disk_bytes"}


@pytest.mark.slow
def test_outcome(result: dict[str, Any]) -> None:
    stock, fluxmoe = result["stock"], result["fluxmoe"]
    assert result["tokens_identical"] is True
    assert result["requests"] == 8
    # Within the budget, stock runs few requests at once, and FluxMoE runs all.
    assert 2 <= stock["peak_running"] <= 4
    assert fluxmoe["peak_running"] == 8
    assert result["speedup"] == pytest.approx(
        fluxmoe["tokens_per_s"] / stock["tokens_per_s"], rel=0.01
    )
    assert 0 < fluxmoe["expert_hit_rate"] < 1
    for name in ("stock_at_total", "stock_unlimited", "fluxmoe_page_file"):
        assert result[name]["peak_running"] == 8
    # The pages are the same, wherever the store keeps them.
    assert result["fluxmoe_page_file"]["expert_hit_rate"] == fluxmoe["expert_hit_rate"]


@pytest.mark.slow
def test_one_budget(result: dict[str, Any]) -> None:
    stock, fluxmoe, budget = result["stock"], result["fluxmoe"], result["budget_bytes"]
    experts, block = 6 * 64 * 3 * 160 * 64 * 2, 6 * 128 * 2 * 2 * 32 * 2
    assert result["experts_total_bytes"] == experts
    assert budget == experts + 4 * block
    for engine in (stock, fluxmoe):
        assert engine["kv_bytes"] == engine["kv_blocks"] * block
        # Neither engine exceeds the budget or leaves a notable part of it unused.
        assert 0.95 * budget < engine["expert_bytes"] + engine["kv_bytes"] <= budget
    assert stock["expert_bytes"] == experts
    assert fluxmoe["expert_bytes"] < experts


@pytest.mark.slow
def test_memory_is_told_whole(result: dict[str, Any]) -> None:
    budget, experts = result["budget_bytes"], result["experts_total_bytes"]
    block = 6 * 128 * 2 * 2 * 32 * 2
    totals = {name: result[name]["total_bytes"] for name in ENGINES}
    assert totals == {
        "stock": budget,
        "fluxmoe": budget + experts,  # all experts are in its page store as well
        "stock_at_total": budget + experts,
        "stock_unlimited": experts + 9 * block,
        "fluxmoe_page_file": budget,
    }
    for name in ENGINES:
        side = result[name]
        assert side["store_bytes"] == (experts if name == "fluxmoe" else 0)
        assert 0.95 * side["budget_bytes"] < side["expert_bytes"] + side["kv_bytes"]
        assert side["expert_bytes"] + side["kv_bytes"] <= side["budget_bytes"]
        # The system counts at least the experts and the store, which have all been written.
        assert side["pss_bytes"] > side["expert_bytes"] + side["store_bytes"]
    assert result["fluxmoe_page_file"]["disk_bytes"] >= experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--eviction", "nonsense"), "error[FM201]: unknown eviction policy 'nonsense'"),
        (("--eviction", "belady"), "error[FM204]: eviction policy 'belady' needs to know"),
        (("--prefetch", "nonsense"), "error[FM201]: unknown prefetch policy 'nonsense'"),
        (("--requests", "0"), "Invalid value for '--requests'"),
        (("--rounds", "0"), "Invalid value for '--rounds'"),
        (("--output-tokens", "101"), "Invalid value for '--output-tokens'"),
    ],
)
def test_wrong_options(options: tuple[str, ...], message: str) -> None:
    process = demo("--json", *options)
    assert process.returncode == 2
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
