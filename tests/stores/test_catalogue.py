"""Page files whose headers describe shapes that no file can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxmoe.stores.disk import catalogue, pagefile
from tests.stores.test_tiers import filled, in_file


@pytest.mark.parametrize(
    "shape",
    [
        {"num_layers": 10**15},
        {"num_layers": 10**30},
        {"num_layers": -1},
        {"num_layers": float("inf")},
        {"parts": []},
        {"parts": [["a", -1], ["b", 1]]},
        {"parts": [["a", 10**30], ["b", 1]]},
    ],
    ids=str,
)
def test_absurd_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict) -> None:
    filled(in_file(tmp_path)).close()
    read = pagefile.read_head

    def changed(fd: int, path: Path) -> pagefile.Head:
        head = read(fd, path)
        return head.model_copy(update={"about": {**head.about, **shape}})

    monkeypatch.setattr(catalogue, "read_head", changed)
    (entry,) = catalogue.entries(tmp_path)
    assert entry.state in ("the header is damaged", "the index is damaged") and entry.useless
