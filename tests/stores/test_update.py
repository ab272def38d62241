"""Replaced pages: either all or none are replaced, and a page file never changes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fluxmoe.errors import ConfigError, PageFileError, StoreError
from fluxmoe.stores.disk import overlay
from tests.stores.test_tiers import GEOMETRY, PAGE_CLASS, PAGES, filled, layers, rows, store_of

KINDS = {
    "host": [{"kind": "host"}],
    "coded": [{"kind": "host", "codec": "fixed4"}],
    "file": [{"kind": "file"}],
    "coded file": [{"kind": "file", "codec": "fixed4"}],
    "slow file": [{"kind": "file", "direct": False}],
    "both": [{"kind": "host", "limit": "200KiB", "codec": "fixed4"}, {"kind": "file"}],
}


def made(kind: str, folder: Path):
    stores = [
        {**store, "path": str(folder)} if store["kind"] == "file" else store
        for store in KINDS[kind]
    ]
    return store_of(stores)


def page_of(page: int, seed: int) -> list[np.ndarray]:
    layer, expert = divmod(page, GEOMETRY.experts_per_layer)
    return [part[expert] for part in layers(seed)[layer]]


def seeds_of(store) -> list[int]:
    """Find the seed of each page from the page's bytes."""
    found = []
    for page in range(PAGES):
        store.read_into(page, target := rows())
        seeds = [
            seed
            for seed in range(4)
            if all((a == b).all() for a, b in zip(target, page_of(page, seed), strict=True))
        ]
        found += seeds
    return found


def replace(store, pages, seed: int) -> None:
    with store.update() as put:
        for page in pages:
            parts = [part.copy() for part in page_of(page, seed)]
            put(page, parts)
            for part in parts:
                part[:] = 0xAA  # parts may change after ``put``


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


def test_pages_are_replaced_and_the_page_file_is_not_changed(kind: str, tmp_path: Path) -> None:
    store = filled(made(kind, tmp_path))
    before = digests(tmp_path)
    replace(store, range(0, PAGES, 2), 1)
    assert seeds_of(store) == [1, 0] * (PAGES // 2)
    replace(store, range(4), 2)  # replaced pages, and others
    assert seeds_of(store) == [2, 2, 2, 2] + [1, 0] * (PAGES // 2 - 2)
    for seed in (3, 1, 2):  # each place of the overlay is used again
        replace(store, range(PAGES), seed)
        assert seeds_of(store) == [seed] * PAGES
    assert digests(tmp_path) == before
    assert len(before) == ("file" in kind or kind == "both")
    # Another start or another process with the same folder has the pages of the checkpoint.
    other = filled(made(kind, tmp_path))
    assert seeds_of(other) == [0] * PAGES
    assert seeds_of(store) == [2] * PAGES
    assert digests(tmp_path) == before
    other.close()
    store.close()
    assert store.nbytes == 0


def test_a_failed_update_replaces_nothing(kind: str, tmp_path: Path) -> None:
    store = filled(made(kind, tmp_path))
    replace(store, [1], 3)
    before, size = seeds_of(store), store.nbytes
    with pytest.raises(RuntimeError, match="midway"), store.update() as put:
        for page in range(PAGES - 1):
            put(page, page_of(page, 1))
        raise RuntimeError("midway")
    wrong = page_of(0, 1)
    for page, parts, message in (
        (PAGES, wrong, f"there is no page {PAGES}"),
        (0, wrong[:2], "page 0 has parts"),
        (0, [wrong[0][:-1], *wrong[1:]], "page 0 has parts"),
        (0, [wrong[0].view(np.int8), *wrong[1:]], "page 0 has parts"),
        (2, wrong, "page 2 is put twice"),
    ):
        with pytest.raises(StoreError, match=message), store.update() as put:
            put(2, wrong)
            put(page, parts)
    assert seeds_of(store) == before
    assert store.nbytes == size
    replace(store, range(PAGES), 2)
    assert seeds_of(store) == [2] * PAGES


def test_a_page_that_no_longer_fits_its_store_moves(tmp_path: Path) -> None:
    """Random bytes cannot be compressed, so they take more room than weights."""
    host = {"kind": "host", "codec": "fixed4", "limit": "200KiB"}
    file = {"kind": "file", "path": str(tmp_path)}
    noise = np.random.default_rng(5).integers(0, 256, PAGE_CLASS.nbytes, np.uint8)
    ends = np.cumsum([part.nbytes for part in PAGE_CLASS.parts])[:-1]
    parts = np.split(noise, ends)
    for stores, fits in (([host, file], True), ([host, {**file, "limit": "550KiB"}], False)):
        store = filled(store_of(stores))
        try:
            with store.update() as put:
                for page in range(PAGES):
                    put(page, parts)
        except ConfigError as error:
            assert "no store has room for page" in error.what
            assert not fits
            assert seeds_of(store) == [0] * PAGES
            continue
        assert fits
        assert store._tiers[0].nbytes <= 200 << 10
        for page in range(PAGES):
            store.read_into(page, target := rows())
            assert all((a == b).all() for a, b in zip(target, parts, strict=True))
        replace(store, range(PAGES), 1)
        assert seeds_of(store) == [1] * PAGES


def test_a_file_system_without_nameless_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(overlay.os, "O_TMPFILE", os.O_DIRECTORY)  # fails for a folder
    store = filled(made("file", tmp_path))
    replace(store, [3], 1)
    assert seeds_of(store) == [0, 0, 0, 1] + [0] * (PAGES - 4)
    assert [file.suffix for file in tmp_path.iterdir()] == [".pages"]


def test_a_full_disk_leaves_the_old_pages(tmp_path: Path, monkeypatch) -> None:
    store = filled(made("file", tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(PageFileError, match="No space left") as caught, store.update() as put:
        put(0, page_of(0, 1))
        monkeypatch.setattr(overlay, "write", full)
        put(1, page_of(1, 1))
    assert "free some space" in caught.value.fix
    assert seeds_of(store) == [0] * PAGES


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.stores.test_tiers import PAGES, filled
from tests.stores.test_update import made, page_of, replace
store = filled(made("file", Path(sys.argv[1])))
replace(store, range(PAGES), 1)
with store.update() as put:
    put(0, page_of(0, 2))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_within_an_update_leaves_only_the_page_file(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert [file.suffix for file in tmp_path.iterdir()] == [".pages"]
    before = digests(tmp_path)
    assert seeds_of(filled(made("file", tmp_path))) == [0] * PAGES
    assert digests(tmp_path) == before
