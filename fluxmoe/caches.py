"""Cache folders: the default folder of page files, and folders without a writable home folder.

Without a home folder, vLLM and numba write to a folder called ``~``. With a read-only home folder,
vLLM logs tracebacks, and numba compiles again in each process.
"""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from fluxmoe.errors import ConfigError

#: The package's folder, where numba keeps its cache beside the sources if the folder is writable.
PACKAGE = Path(__file__).parent


def folders(given: Mapping[str, str]) -> dict[str, str]:
    """Make environment variables for the caches that cannot be in their default folders.

    Args:
        given: Environment of a process, which takes precedence. Folders chosen by an earlier call
            are returned again.

    Raises:
        ConfigError: There is no folder for the caches.
    """
    own, home = _own(), _home(given)
    caches = _base(given, "XDG_CACHE_HOME", home, ".cache")
    settings = _base(given, "XDG_CONFIG_HOME", home, ".config")
    defaults = {
        "VLLM_CACHE_ROOT": caches and caches / "vllm",
        "VLLM_CONFIG_ROOT": settings and settings / "vllm",
        "HF_HOME": caches and caches / "huggingface",
        "NUMBA_CACHE_DIR": caches and caches / "numba",
    }
    lacking = [
        name
        for name, folder in defaults.items()
        if given.get(name, str(own / name)) == str(own / name)
        and not _writable(folder)
        # For models, an existing folder suffices, because they can be read from it.
        and not (name == "HF_HOME" and folder is not None and folder.is_dir())
        and not (name == "NUMBA_CACHE_DIR" and _writable(PACKAGE))
    ]
    if not lacking:
        return {}
    own = _safe(own)
    return {name: str(own / name) for name in lacking}


def own(name: str) -> Path:
    """Return a folder in FluxMoE's part of the user's caches; the folder need not exist.

    Raises:
        ConfigError: The user has no home folder.
    """
    with _home_is_known("XDG_CACHE_HOME"):
        return platformdirs.user_cache_path("fluxmoe") / name


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder in place of ``~`` or ``~user``.

    Raises:
        ConfigError: There is no such user, or the user has no home folder.
    """
    with _home_is_known(str(path)):
        return Path(path).expanduser()


@contextmanager
def _home_is_known(where: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(
            "no such user, or a user without a home folder",
            where=where,
            fix="give an absolute path, or set HOME",
        ) from error


def _home(given: Mapping[str, str]) -> Path | None:
    if "HOME" in given:
        return Path(given["HOME"])
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def _base(given: Mapping[str, str], variable: str, home: Path | None, name: str) -> Path | None:
    if given.get(variable):
        return Path(given[variable])
    return None if home is None else home / name


def _writable(folder: Path | None) -> bool:
    """Return True if files can be created in a folder, or in its nearest existing parent."""
    if folder is None or not folder.is_absolute():
        return False
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _own() -> Path:
    """Return this user's folder for temporary caches, which need not exist."""
    try:
        folder = tempfile.gettempdir()
    except OSError:
        folder = os.sep  # nothing can be written anywhere
    return Path(folder) / f"fluxmoe-{os.getuid()}"


def _safe(folder: Path) -> Path:
    """Create the folder, or another if other users may access it, since caches contain code."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
            folder = Path(tempfile.mkdtemp(prefix="fluxmoe-"))
    except OSError as error:
        raise ConfigError(
            f"no folder for caches: {error.strerror or error}",
            where="VLLM_CACHE_ROOT",
            fix="set TMPDIR or HOME to a writable folder",
        ) from error
    return folder
