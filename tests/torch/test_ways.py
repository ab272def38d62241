"""Every way to use a paged model or its handle gives the right result or is refused with a code.

``ways/table.csv`` lists the ways, each with the function in the package ``ways`` that tries it.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import fluxmoe
from tests.torch.conftest import Load
from tests.torch.ways import calls, graphs, processes, sharing, weights
from tests.torch.ways.use import Use, Way

MODULES = (calls, sharing, processes, weights, graphs)
ROWS = [*csv.DictReader((Path(__file__).parent / "ways/table.csv").open())]
PAGE = Path(__file__).parents[2] / "docs/guides/ways.md"


def function(row: dict[str, str]) -> Way:
    (found,) = [way for module in MODULES for name, way in vars(module).items()
                if name == row["test"] and way.__module__ == module.__name__]  # fmt: skip
    return found


def cases() -> list[Any]:
    """List the rows for a paged model, and the refusals also for a loaded model."""
    found = []
    for row in ROWS:
        way = function(row)
        marks = [pytest.mark.slow] * hasattr(way, "slow")
        if not hasattr(way, "of_a_loaded_model"):
            found.append(pytest.param(row, "page", id=f"{row['test']}-page", marks=marks))
        if row["outcome"] == "refused" and not hasattr(way, "pages_itself"):
            found.append(pytest.param(row, "load", id=f"{row['test']}-load", marks=marks))
    return found


@pytest.fixture(scope="module")
def template(load: Load) -> Callable[..., Any]:
    return cache(lambda **settings: load(**settings))


@pytest.mark.parametrize(("row", "kind"), cases())
def test_a_way(
    row: dict[str, str],
    kind: str,
    template: Callable[..., Any],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    way = function(row)
    implementation = getattr(way, "implementation", "grouped_mm")
    stock = template(dtype=getattr(way, "dtype", "auto"), implementation=implementation)

    def use(name: str, **settings: Any) -> Use:
        (tmp_path / name).mkdir()
        model = copy.deepcopy(stock)
        return Use(model, stock, tmp_path / name, checkpoint(), row["code"], **settings)

    wanted = way(use("unpaged", stays_unpaged=True)) if row["outcome"] == "right" else None
    tried = use("paged")
    if kind == "load":
        tried.handle = fluxmoe.load(checkpoint(), "1MiB")
        tried.model = tried.handle.model
    elif not hasattr(way, "pages_itself"):
        tried.page()
    try:
        found = way(tried)
        if row["outcome"] == "right":
            assert equal(found, wanted)
        else:
            assert tried.refused > 0
            if tried.handle is not None and not tried.handle.closed:
                unharmed(tried)
        if tried.handle is not None and not tried.handle.closed:
            tried.handle.check()
    finally:
        tried.close()


def unharmed(tried: Use) -> None:
    """Assert that a refusal has changed nothing."""
    right = tried.run(tried.stock)
    assert torch.equal(tried.run(), right)
    if tried.handle._loaded:
        return
    tried.handle.close()
    assert torch.equal(tried.run(), right)
    own, stock = tried.model.state_dict(), tried.stock.state_dict()
    assert own.keys() == stock.keys()
    assert all(torch.equal(own[name], stock[name]) for name in stock)


def equal(found: Any, wanted: Any) -> bool:
    """Return True if nested tuples, lists and dictionaries are equal; tensors also in dtype."""
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(equal(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(equal, found, wanted))
    return bool(found == wanted)


def test_the_table_is_whole() -> None:
    assert len(ROWS) >= 60
    assert len({row["test"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert (row["outcome"], row["code"][:2]) in {("right", ""), ("refused", "FM")}
        assert callable(function(row))


def test_the_page_shows_the_table() -> None:
    lines = [f"| {row['way']} | {row['outcome']} {row['code']}".rstrip() + " |" for row in ROWS]
    assert "\n".join(["| way | outcome |", "|---|---|", *lines, ""]) in PAGE.read_text()
