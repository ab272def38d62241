"""A paged model gives the same output as the unpaged model, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fluxmoe
from tests.identity import cells, models, record, selection
from tests.identity.torch_cells import Models
from tests.torch.conftest import Load, answer, same, sizes

SELECTED = [
    cell
    for cell in selection.read()
    if cell.mode in cells.TORCH_MODES and cell.model in models.names()
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("identity"))


@pytest.mark.parametrize(("model", "mode"), dict.fromkeys((c.model, c.mode) for c in SELECTED))
def test_cells(
    running: Models, model: str, mode: str, record_property: Callable[[str, object], None]
) -> None:
    """Run the selected cells of the identity matrix; ``make test-full`` runs all cells."""
    for cell in (c for c in SELECTED if (c.model, c.mode) == (model, mode)):
        outcome = running.run(cell)
        row = {"cell": record.as_row(cell), "outcome": record.as_row(outcome)}
        record_property("identity", row)
        assert outcome.ok, (cell, outcome)
        stats = outcome.stats
        assert (stats["slots"] == stats["pages"]) == (cell.slots == "all")
        assert stats["banks"] == cell.banks
        assert stats["misses"] > 0
        freed = stats["evictions"] + stats["released"]
        assert (freed > 0) == (cell.slots != "all" or cell.eviction == "immediate")
        if cell.prefetch != "markov" or cell.slots != "all":  # else all proposals are resident
            assert (stats["prefetch_hits"] > 0) == (cell.prefetch != "none")
    tokens = running.stock[0]
    assert len({tuple(row) for row in tokens.tolist()}) == len(tokens)


@pytest.mark.parametrize("threads", [0, 2])
def test_other_numbers_of_copy_threads(load: Load, threads: int) -> None:
    model = load()
    stock = answer(model)
    _, pages, page_bytes = sizes(model)
    with fluxmoe.page(
        model,
        pages * 3 // 4 * page_bytes,
        prefetch={"kind": "next-layer", "depth": 2},
        banks=2,
        copy_threads=threads,
    ) as paged:
        assert same(answer(model), stock)
        stats = paged.stats()
    assert stats["banks"] == 2
    assert stats["prefetch_hits"] > 0


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_of_numbers(load: Load, implementation: str, dtype: torch.dtype) -> None:
    model = load("mixtral", implementation, dtype=dtype)
    stock = answer(model)
    experts, _, page_bytes = sizes(model)
    with fluxmoe.page(model, (experts + 3) * page_bytes):
        assert same(answer(model), stock)


def test_several_threads(load: Load) -> None:
    torch.set_num_threads(2)
    try:
        model = load("qwen3-moe")
        stock = answer(model)
        experts, _, page_bytes = sizes(model)
        with fluxmoe.page(model, experts * page_bytes):
            assert same(answer(model), stock)
    finally:
        torch.set_num_threads(1)


def test_more_slots_than_grouped_mm_can_count(load: Load) -> None:
    """From 4098 slots on, grouped_mm's float32 histogram counts some tokens for the wrong slots."""
    model = load(
        "qwen3-moe",
        num_hidden_layers=34,
        num_experts=128,
        num_experts_per_tok=128,
        hidden_size=32,
        head_dim=16,
        moe_intermediate_size=32,
        intermediate_size=32,
    )
    ids = torch.randint(3, 1000, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        stock = model(ids).logits
        with fluxmoe.page(model) as paged:
            assert torch.equal(model(ids).logits, stock)
            stats = paged.stats()
    assert (stats["slots"], stats["pages"], stats["banks"]) == (4352, 4352, 2)
    assert stats["misses"] == 4352  # every slot was used
