"""A12: caches of a server whose user has no home folder or a read-only one."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from fluxmoe import caches
from fluxmoe.backends.vllm.server import launch
from fluxmoe.errors import ConfigError
from tests.commandline import succeeds

ALL = {"VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "HF_HOME", "NUMBA_CACHE_DIR"}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folder for temporary files; the installation of FluxMoE is read-only."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    (tmp_path / "file").touch()  # nothing can be created below a file
    monkeypatch.setattr(caches, "PACKAGE", tmp_path / "file")
    return folder


def test_a12_a_home_folder_that_can_be_written_is_used(tmp_path: Path, temporary: Path) -> None:
    assert caches.folders({"HOME": str(tmp_path)}) == {}
    assert caches.folders({"HOME": str(tmp_path / "not" / "there" / "yet")}) == {}
    assert list(temporary.iterdir()) == []


def test_a12_a_user_without_a_home_folder(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    found = caches.folders({})
    own = temporary / f"fluxmoe-{os.getuid()}"
    assert found == {
        "VLLM_CACHE_ROOT": str(own / "VLLM_CACHE_ROOT"),
        "VLLM_CONFIG_ROOT": str(own / "VLLM_CONFIG_ROOT"),
        "HF_HOME": str(own / "HF_HOME"),
        "NUMBA_CACHE_DIR": str(own / "NUMBA_CACHE_DIR"),
    }
    assert own.stat().st_mode & 0o777 == 0o700
    assert caches.folders({}) == found  # the same at the next startup
    assert caches.folders(found) == found  # and in a process with these variables
    # A server is started with these folders; existing settings are kept.
    assert launch.environment({}).items() >= found.items()
    given = {"HF_HOME": "/models", "VLLM_CACHE_ROOT": "/x"}
    assert set(caches.folders(given)) == ALL - set(given)


def test_a12_a_home_folder_that_cannot_be_written(tmp_path: Path, temporary: Path) -> None:
    home = {"HOME": str(tmp_path / "file" / "home")}
    assert set(caches.folders(home)) == ALL
    folders = {"XDG_CACHE_HOME": str(tmp_path / "caches"), "XDG_CONFIG_HOME": str(tmp_path)}
    assert caches.folders(home | folders) == {}


def test_a12_what_can_be_read_or_written_where_it_is_stays_there(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setattr(os, "access", lambda path, mode: not path.is_relative_to(home))
    (home / ".cache" / "huggingface").mkdir(parents=True)
    assert set(caches.folders({"HOME": str(home)})) == ALL - {"HF_HOME"}
    monkeypatch.setattr(caches, "PACKAGE", tmp_path / "fluxmoe")
    assert "NUMBA_CACHE_DIR" not in caches.folders({"HOME": str(home)})


def test_a12_a_folder_of_another_user_is_not_trusted(tmp_path: Path, temporary: Path) -> None:
    own = temporary / f"fluxmoe-{os.getuid()}"
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    found = caches.folders({"HOME": str(tmp_path / "file")})
    assert found and not any(Path(folder).is_relative_to(own) for folder in found.values())


def test_a12_nowhere_to_write(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"no folder for caches: Not a directory.*TMPDIR"):
        caches.folders({"HOME": str(tmp_path / "file")})


def test_a12_a_command_uses_them_too(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALL:
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    succeeds("--version")
    assert os.environ["NUMBA_CACHE_DIR"] == str(
        temporary / f"fluxmoe-{os.getuid()}/NUMBA_CACHE_DIR"
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    succeeds("--version")  # having nowhere to write is an error only for a server


def test_folders_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for refused in (lambda: caches.own("pages"), lambda: caches.expanded("~/pages")):
        with pytest.raises(ConfigError, match=r"user without a home folder; .*set HOME"):
            refused()
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert caches.own("pages") == Path("/x/fluxmoe/pages")
