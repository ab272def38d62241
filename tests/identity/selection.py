"""The cells for ``make test``: a pairwise covering selection, stored in a table.

``python -m benchmarks identity --select`` writes the table; ``make test-full`` runs all cells.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import fields
from itertools import combinations
from pathlib import Path

from tests.identity import cells
from tests.identity.cells import HYBRID, RANDOM, SHIPPED, TORCH_MODES, VLLM_MODES, Cell

TABLE = Path(__file__).with_name("selection.csv")

Pair = tuple[tuple[str, object], tuple[str, object]]

#: Models under vLLM, whose starts take long. Shared experts, a dense first layer, a router in fp32
#: and MLA are each represented. Torch runs all models.
PLAIN = (SHIPPED, "qwen2-moe", "glm4-moe", "deepseek-v3")
_EAGER, _COMPILED, _THREE = VLLM_MODES
VLLM_MODELS = {
    _EAGER: (*PLAIN, "qwen3-next"),
    _COMPILED: (SHIPPED, "glm4-moe", "lfm2-moe"),
    _THREE: ("granite-hybrid",),
}


def read() -> list[Cell]:
    """Read the selected cells."""
    with TABLE.open(newline="") as file:
        return [_cell(row) for row in csv.DictReader(file)]


def write() -> None:
    """Select the cells and write the table."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [field.name for field in fields(Cell)]
        writer.writerow(names)
        for cell in choose():
            writer.writerow(getattr(cell, name) for name in names)  # None becomes an empty field


def demanded(cell: Cell) -> set[Pair]:
    """List the pairs of the cell's values that the selection must cover.

    In eager mode, these are all pairs. In compiled mode, whose starts are slow, each value must
    occur at least once. With three processes, and for hybrids, whose steps are slow, it suffices
    that each model occurs (in eager mode, with each setting of prefix caching).
    """
    values = [(field.name, getattr(cell, field.name)) for field in fields(Cell)]
    found = set(combinations(values, 2))
    if cell.mode == _THREE or cell.model in HYBRID:
        few = ("model", "mode", "prefix_caching")[: 3 if cell.mode == _EAGER else 2]
        return {pair for pair in found if all(name in few for name, _ in pair)}
    if cell.mode == _COMPILED:
        return {pair for pair in found if ("mode", cell.mode) in pair}
    return found


def choose() -> list[Cell]:
    """Select a few cells that cover all demanded pairs of the candidates.

    The selection is greedy: the candidate with the most new pairs is next, or the first of them on
    a tie.
    """
    chosen: list[Cell] = []
    for backend in VLLM_MODES, TORCH_MODES:
        left = {cell: demanded(cell) for cell in candidates() if cell.mode in backend}
        missing = set().union(*left.values())
        while missing:
            best = max(left, key=lambda cell: len(left[cell] & missing))
            missing -= left.pop(best)
            chosen.append(best)
    modes = (*VLLM_MODES, *TORCH_MODES)
    # Cells that share a stock run are adjacent.
    return sorted(chosen, key=lambda c: (modes.index(c.mode), _MODELS.index(c.model), c.stock[2:]))


def candidates() -> Iterator[Cell]:
    """List the candidates, with two of vLLM's settings per model, as each needs a stock run."""
    for mode, models in VLLM_MODELS.items():
        for cell in cells.product_of(models, [mode]):
            settings = cells.settings(cell.model)
            kept = settings[2:] if cell.model == "qwen2-moe" else settings[:2]
            if (cell.prefix_caching, cell.chunked_prefill) in kept:
                yield cell
    yield from cells.product_of(_MODELS, TORCH_MODES[:3])


_MODELS = (SHIPPED, *RANDOM)


def _cell(row: dict[str, str]) -> Cell:
    flag = {"": None, "True": True, "False": False}
    return Cell(
        row["model"],
        row["mode"],
        row["eviction"],
        row["prefetch"],
        row["slots"],
        int(row["banks"]),
        flag[row["prefix_caching"]],
        flag[row["chunked_prefill"]],
    )
