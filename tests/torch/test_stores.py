"""With every store and codec, the output equals the stock model's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fluxmoe
from fluxmoe import errors
from fluxmoe.backends.torch import layout
from fluxmoe.backends.torch.weights import loading
from fluxmoe.stores.tiers import TieredStore
from fluxmoe.testing import checkpoints
from tests.torch.conftest import Load, answer, same, sizes

CODED = {"kind": "host", "codec": "fixed4"}


def stores(folder: Path, page_bytes: int) -> dict[str, list[dict[str, Any]]]:
    file = {"kind": "file", "path": str(folder)}
    return {
        "coded": [CODED],
        "file": [file],
        "coded file": [{**file, "codec": "fixed4", "direct": False}],
        "some of each": [
            {"kind": "host", "limit": 5 * page_bytes},
            {**CODED, "limit": 5 * page_bytes},
            {**file, "codec": {"kind": "fixed4"}},
        ],
    }


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("name", ["coded", "file", "coded file", "some of each"])
def test_a_loaded_model_answers_what_stock_answers(
    load: Load, checkpoint: Callable[..., Path], tmp_path: Path, name: str, threads: int
) -> None:
    stock = load()
    experts, pages, page_bytes = sizes(stock)
    for _ in range(2):  # the second time, the page file exists
        with fluxmoe.load(
            checkpoint(),
            (experts + 2) * page_bytes,
            stores=stores(tmp_path, page_bytes)[name],
            copy_threads=threads,
            prefetch="next-layer" if threads else "none",
        ) as paged:
            assert same(answer(paged.model), answer(stock))
            stats = paged.stats()
            paged.check()
        assert stats["misses"] > 0
        if "coded" in name:
            assert stats["store_bytes"] < 0.95 * pages * page_bytes  # sectors are padded
    assert bool(list(tmp_path.iterdir())) == (name != "coded")


@pytest.mark.parametrize("architecture", [a for a in checkpoints.ARCHITECTURES if "dense" not in a])
def test_experts_are_stored_one_by_one_and_not_read_again(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
) -> None:
    """Storing experts only after loading would need memory for all experts."""
    nbytes: list[int] = [0]  # bytes read before each page is put, and after the last
    read, put = loading._read, TieredStore.put

    def counted(tensor: Any, *settings: Any) -> Any:
        found = read(tensor, *settings)
        nbytes[-1] += found.nbytes
        return found

    def noted(self: Any, *args: Any) -> None:
        nbytes.append(0)
        put(self, *args)

    monkeypatch.setattr(loading, "_read", counted)
    monkeypatch.setattr(TieredStore, "put", noted)
    store = [{"kind": "file", "path": str(tmp_path)}]
    with fluxmoe.load(checkpoint(architecture), "1MiB", stores=store) as paged:
        stats, first, model = paged.stats(), list(nbytes), paged.model
        experts = layout.describe(layout.experts_of(model))[0].experts_per_layer
        whole = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        answers = answer(model)
    assert len(first) == 1 + stats["pages"]
    # Other weights are read between the layers.
    assert sum(each != stats["page_bytes"] for each in first[:-1]) <= stats["pages"] // experts
    others = whole - stats["pages"] * stats["page_bytes"]
    assert whole - 1000 < sum(first) <= whole
    nbytes[:] = [0]
    with fluxmoe.load(checkpoint(architecture), "1MiB", stores=store) as paged:
        assert same(answer(paged.model), answers)
    assert len(nbytes) == 1 and nbytes[0] <= others


def test_an_error_of_a_store_is_not_taken_for_one_of_the_checkpoint(
    checkpoint: Callable[..., Path],
) -> None:
    with pytest.raises(errors.ConfigError, match="no store has room for page 16 of 64"):
        fluxmoe.load(checkpoint(), "1MiB", stores=[{"kind": "host", "limit": 16 * 49_152}])


def test_a_paged_model_answers_what_it_did(load: Load) -> None:
    model = load("mixtral")
    before = answer(model)
    with fluxmoe.page(model, "1MiB", stores=[CODED]) as paged:
        assert same(answer(paged.model), before)
    assert same(answer(model), before)


@pytest.mark.parametrize(
    ("stores", "kind", "message"),
    [
        ([{"kind": "host", "codec": "zip"}], errors.UnknownCodecError, "unknown codec 'zip'"),
        ([{"kind": "host", "limit": 1000}], errors.ConfigError, "no store has room for page 0"),
        ([{"kind": "file", "path": 5}], errors.ConfigError, r"stores\.0\.path"),
        ([{"kind": "file", "path": "/proc/nowhere"}], errors.ConfigError, "cannot write"),
        ([], errors.ConfigError, r"stores: .*at least 1"),
    ],
)
def test_stores_that_cannot_be_had(load: Load, stores: Any, kind: type, message: str) -> None:
    model = load()
    with pytest.raises(kind, match=message):
        fluxmoe.page(model, "1MiB", stores=stores)
    answer(model)  # the model is unchanged
