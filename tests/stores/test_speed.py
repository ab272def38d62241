"""Measurement of a disk: reads that bypass the page cache, the model fitted to them, and errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fluxmoe.errors import ConfigError
from fluxmoe.stores.disk import speed


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_FILE", 32 << 20)


def test_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, flags = os.open, []
    monkeypatch.setattr(os, "open", lambda *given: flags.append(given[1]) or opened(*given))
    found = speed.measure(tmp_path / "not" / "yet", 1 << 20)
    assert 1e6 < found.nbytes_per_s < 1e11
    assert 0 <= found.seconds < 1
    assert 1 <= found.depth <= 8
    assert flags[-1] & os.O_DIRECT
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([5e8, 4e8, 6e8, 1e6, 9e9])
    best = iter([(4, 1e9), (8, 2e9), (2, 3e9), (1, 4e7), (1, 9e9)])
    monkeypatch.setattr(speed, "rate", lambda read, depth: (next(rates), 0.0))
    monkeypatch.setattr(speed, "choose", lambda read: next(best))
    found = speed.measure(tmp_path, 1_000_000)
    nbytes = 245 * 4096
    assert (found.nbytes_per_s, found.depth) == (2e9, 8)
    assert found.seconds == pytest.approx(nbytes / 5e8 - nbytes / 2e9)


def test_a_disk_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ConfigError, match=r"FM101: the disk cannot be measured: No space .*256 MiB"
    ):
        speed.measure(tmp_path, 1 << 20)
    assert list(tmp_path.iterdir()) == []
