"""The processes of both engines do not grow over many different requests and moves.

oneDNN keeps a compiled kernel for each batch shape, so that both engines would grow
(docs/concepts/memory.md). Without this cache, they must not grow; a leak would be seen.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import soak
from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.demo.model import SHIPPED, DemoModel

pytestmark = [pytest.mark.vllm, pytest.mark.full]

TURNS = 12


@pytest.fixture(autouse=True)
def _no_cache_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")


def leaks(rows: list[soak.Row]) -> bool:
    grown = soak.growth(rows)
    return grown["heap"] > 2 or grown["shmem"] > 1 or grown["objects"] > 200


def test_memory_stays_over_requests_and_moves() -> None:
    rows = soak.measure(3600, TURNS)
    assert rows["FluxMoE"][-1]["moves"] > 100 * TURNS
    for name, found in rows.items():
        assert len(found) == TURNS
        assert not leaks(found), (name, soak.growth(found))


def leak(worker: Any) -> None:
    """Make the worker leak 2 KiB in each step."""
    lost, report = [], worker._side.report

    def leaky() -> Any:
        lost.append(bytes(2048))
        return report()

    worker._side.report = leaky


def test_a_leak_of_two_kibibytes_a_step_would_be_seen() -> None:
    _, paged = soak.settings(DemoModel.read(SHIPPED))
    with ChildEngine(SHIPPED, **paged) as engine:
        engine.call("rpc", leak)
        rows = []
        for turn in range(TURNS):
            engine.generate(soak.traffic(turn), cold=False)
            rows.append(engine.call("rpc", soak.held))
    assert leaks(rows)
