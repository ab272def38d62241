"""The identity matrix under vLLM (A1): selected cells, or all cells with ``make test-full``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest

from tests.identity import cells, models, record, requests, selection
from tests.identity.cells import Cell
from tests.identity.vllm_cells import Engines, engines

pytestmark = pytest.mark.vllm

SELECTED = [
    cell
    for cell in selection.read()
    if cell.mode in cells.VLLM_MODES and cell.model in models.names()
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with engines(tmp_path_factory.mktemp("identity")) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("cell", SELECTED, ids=str)
def test_cell(running: Engines, cell: Cell, record_property: Callable[[str, object], None]) -> None:
    outcome = running.run(cell)
    record_property("identity", {"cell": record.as_row(cell), "outcome": record.as_row(outcome)})
    assert outcome.ok, outcome
    assert outcome.sequences == 73
    stats = outcome.stats
    assert stats["banks"] == cell.banks
    # The cell's features were in use: paging, reuse of prefixes, and split prefills.
    assert (stats["slots"] == stats["pages"]) == (cell.slots == "all")
    assert stats["misses"] > 0
    freed = stats["evictions"] + stats["released"]
    assert (freed > 0) == (cell.slots != "all" or cell.eviction == "immediate")
    if cell.prefetch != "markov" or cell.slots != "all":  # otherwise all proposals are resident
        assert (stats["prefetch_hits"] > 0) == (cell.prefetch != "none")
    assert (stats["cached_prompt_tokens"] > 0) == cell.prefix_caching
    assert stats["cached_prompt_tokens"] == stats["stock_cached_prompt_tokens"]
    if cell.mode != "vllm three-process":
        first = requests.waves(1000, seeded=False)[0][0]
        chunks = -(-len(first.tokens) // requests.CHUNK) if cell.chunked_prefill else 1
        # vLLM also ends a chunk where it keeps a hybrid model's state for the prefix cache.
        kept = int(cell.model in cells.HYBRID and bool(cell.prefix_caching))
        steps = stats["steps_of_the_long_prompt"] - (first.max_tokens + chunks - 1)
        assert 0 <= steps <= kept
    answers = running.stock(cell)
    assert not isinstance(answers, str)
    # Stock's answers are meaningful: they have all log-probabilities, and most of them differ.
    assert [len(row) for row in answers.logprobs] == [len(row) for row in answers.tokens]
    assert len({tuple(tokens) for tokens in answers.tokens}) > 73 // 2
    assert len({token for tokens in answers.tokens for token in tokens}) > 30
    values = [value for row in answers.logprobs for value in row]
    assert all(-20 < value <= 0 for value in values)
    assert len(set(values)) > len(values) // 2


def test_the_matrix_has_every_combination() -> None:
    names = models.names()
    evictions, prefetches = cells.policies()
    for model, mode in product(names, cells.VLLM_MODES):
        mine = list(cells.full([model], [mode]))
        assert {(c.eviction, c.prefix_caching, c.chunked_prefill) for c in mine} == {
            (eviction, *setting) for eviction, setting in product(evictions, cells.settings(model))
        }
        assert {(c.prefetch, (c.slots, c.banks)) for c in mine} == set(
            product(prefetches, cells.SIZES)
        )
