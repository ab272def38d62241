"""The committed selection of the identity matrix covers the demanded pairs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product

import pytest

from tests.identity import cells, selection
from tests.identity.cells import HYBRID, RANDOM, SHIPPED, TORCH_MODES, VLLM_MODES, Cell

EVERY_MODEL = [SHIPPED, *RANDOM]
SELECTED = selection.read()
FIELDS = ("eviction", "prefetch", "slots", "banks", "prefix_caching", "chunked_prefill")


def values(chosen, *names):
    return {tuple(getattr(cell, name) for name in names) for cell in chosen}


def test_the_table_is_what_the_command_writes() -> None:
    """After adding a policy or model, run ``python -m benchmarks identity --select``."""
    assert selection.choose() == SELECTED
    assert set(SELECTED) <= set(cells.product_of(EVERY_MODEL, VLLM_MODES + TORCH_MODES))


@pytest.mark.parametrize(("one", "other"), list(combinations(FIELDS, 2)))
def test_all_pairs_of_the_matrix(one: str, other: str) -> None:
    """Check eager mode, in which every pair of values must occur."""
    everything = cells.product_of(EVERY_MODEL, ["vllm eager"])
    mine = [cell for cell in SELECTED if cell.mode == "vllm eager"]
    assert values(mine, one, other) == values(everything, one, other)


def test_models_and_modes() -> None:
    evictions = cells.policies()[0]
    assert values(SELECTED, "model", "mode") >= set(product(EVERY_MODEL, TORCH_MODES[:3]))
    assert values(SELECTED, "mode", "eviction") >= set(product(VLLM_MODES[:2], evictions))
    plain = set(EVERY_MODEL) - set(HYBRID)
    assert values(SELECTED, "model", "eviction") >= set(product(plain, evictions))
    for mode in VLLM_MODES:
        assert {cell.model for cell in SELECTED if cell.mode == mode} & set(HYBRID)


def covered(chosen: Iterable[Cell]) -> set[selection.Pair]:
    return set().union(*map(selection.demanded, chosen))


def test_nothing_is_missing_and_nothing_superfluous() -> None:
    for backend in VLLM_MODES, TORCH_MODES:
        needed = covered(cell for cell in selection.candidates() if cell.mode in backend)
        mine = [cell for cell in SELECTED if cell.mode in backend]
        assert covered(mine) == needed
        for cell in mine:
            assert covered(other for other in mine if other != cell) != needed, cell


@pytest.mark.parametrize("field", FIELDS)
def test_a_selection_that_lacks_a_value_is_noticed(field: str) -> None:
    needed = covered(selection.candidates())
    for (value,) in values(SELECTED, field) - {(None,)}:
        assert covered(cell for cell in SELECTED if getattr(cell, field) != value) != needed
