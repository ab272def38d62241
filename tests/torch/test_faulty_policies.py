"""Policy faults of every kind, in every method, do not change one bit of the model's output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import fluxmoe
from tests.plugins.faulty import EVICTION, HOOKS, IN_A_HOOK, IN_AN_ANSWER
from tests.torch.conftest import Load, answer, same

PLUGIN = str(Path(__file__).parents[1] / "plugins" / "faulty.py")

CASES = [
    *(("eviction", m, f) for m in EVICTION for f in (IN_A_HOOK if m in HOOKS else IN_AN_ANSWER)),
    *(("prefetch", "propose", fault) for fault in IN_AN_ANSWER),
    *(("prefetch", "reset", fault) for fault in ("raise", "exit")),
]
#: ``CASES`` without writing faults in ``reset``, which gets no inputs.
CASES = [c for c in CASES if not (c[1] == "reset" and c[2] in ("write", "flag", "set", "delete"))]


def selected() -> Iterator[object]:
    """Select cases so that ``make test`` runs every method and every fault at least once."""
    seen: set[str] = set()
    for case in CASES:
        yield pytest.param(*case, marks=[pytest.mark.full] if seen >= {*case} else [])
        seen |= {*case}


@pytest.fixture(scope="module")
def model(load: Load):
    model = load("qwen3-moe", "eager")
    return model, answer(model)


@pytest.mark.parametrize(("kind", "method", "fault"), list(selected()))
def test_a_fault_is_contained_and_counted(model, kind: str, method: str, fault: str) -> None:
    paged, stock = model
    policy = {kind: {"kind": "faulty", "method": method, "fault": fault}}
    with fluxmoe.page(paged, "1MiB", plugins=[PLUGIN], **policy) as handle:
        assert same(answer(paged), stock)
        handle.reset()
        assert same(answer(paged), stock)
        assert handle.stats()["policy_faults"] > 0
        assert handle.stats()["misses"] > 0
