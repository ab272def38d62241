"""Checks before any engine starts: notes on the machine, names in libraries, and versions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fluxmoe
from fluxmoe import config, machine
from fluxmoe.backends import preflight, versions
from fluxmoe.errors import CheckpointError, MissingDependencyError, UnsupportedVersionError
from fluxmoe.findings import Findings
from fluxmoe.testing import checkpoints


@pytest.mark.parametrize(
    ("shown", "budget", "notes"),
    [
        ("always within_size advise [never] deny force", "16GiB", 1),
        ("always within_size advise [never] deny force", "16MiB", 0),  # the frames are small
        ("always within_size [advise] never deny force", "16GiB", 0),
        (None, "16GiB", 1),
    ],
)
def test_no_huge_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: str | None, budget: str, notes: int
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    if shown is not None:
        folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
        folder.mkdir(parents=True)
        (folder / "shmem_enabled").write_text(f"{shown}\n")
    parsed = config.parse({"memory": {"budget": budget}}, where="")
    found = Findings()
    preflight.check_machine(parsed.resolved(parsed.memory.budget or 0), 1, found)
    assert len(found.notes) == notes, found.notes
    assert not found.errors


def test_a_model_whose_path_engines_cannot_open(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "model", "qwen3-moe")
    strange = tmp_path / "model\udcff"
    shutil.copytree(model, strange)
    with pytest.raises(CheckpointError, match=r"not UTF-8; .*model.*; rename the path"):
        fluxmoe.load(strange, "1MiB")
    found = Findings()
    assert preflight.folder_of(str(model), {}, found) == model
    assert preflight.folder_of("some/model", {}, found) is None
    assert not found.errors
    assert "looked up on the Hub" in found.notes[0]


def test_versions_of_packages() -> None:
    versions.require({"numpy": (1, 0)}, "")
    with pytest.raises(UnsupportedVersionError, match=r"numpy [\d.]+ is too old; install it"):
        versions.require({"numpy": (1000, 0)}, "install it")
    with pytest.raises(MissingDependencyError, match="no-such-thing is not installed; install it"):
        versions.require({"numpy": (1, 0), "no-such-thing": (1, 0)}, "install it")
