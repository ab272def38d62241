"""Every way to page a model processes the plugins, the policies and the memory size only once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import fluxmoe
from fluxmoe import sizes
from fluxmoe.cli import main
from tests.plugins.counted import PAGING, PLUGIN, SETTINGS, counts
from tests.torch.conftest import Load

CHOSEN = {key: SETTINGS[key] for key in ("eviction", "prefetch", "stores", "plugins")}


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    return tmp_path / "counted"


@pytest.fixture
def sizes_read(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list of the sizes with units that were parsed."""
    found: list[object] = []
    parse = sizes.parse

    def noted(value: object) -> int:
        if isinstance(value, str):
            found.append(value)
        return parse(value)

    monkeypatch.setattr(sizes, "parse", noted)
    return found


def test_page(counted: Path, sizes_read: list[object], load: Load) -> None:
    with fluxmoe.page(load(), "1MiB", **CHOSEN) as paged:
        assert sizes_read == ["1MiB"]
        paged.resize("2MiB")
        paged.reset()
        assert counts(counted) == {os.getpid(): PAGING}


def test_load(counted: Path, sizes_read: list[object], checkpoint: Callable[..., Path]) -> None:
    with fluxmoe.load(checkpoint(), "1MiB", **CHOSEN):
        assert sizes_read == ["1MiB"]
        assert counts(counted) == {os.getpid(): PAGING}


def test_generate(counted: Path, sizes_read: list[object], checkpoint: Callable[..., Path]) -> None:
    chosen = ["--plugin", PLUGIN, "--eviction", "counted", "--prefetch", "counted"]
    with pytest.raises(SystemExit) as exit_:
        main(["generate", str(checkpoint()), "--prompt-ids", "5,6", "--max-new-tokens", "2",
              "--memory", "1MiB", *chosen])  # fmt: skip
    assert not exit_.value.code
    assert counts(counted) == {os.getpid(): PAGING - Counter(codec=1)}
    assert sizes_read == ["1MiB"]
