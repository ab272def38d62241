"""The page files in a folder: their contents and state, and checks for damaged pages."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.errors import PageFileError
from fluxmoe.stores.disk.pagefile import BAD, PageFile, open_file, read_head, read_index
from fluxmoe.stores.disk.pagewriter import PART
from fluxmoe.stores.disk.reader import LENGTH, OFFSET, DamagedPageError

SUFFIX = ".pages"
#: Names of page files: a key, followed in unfinished files by a suffix from ``tempfile``. The key
#: is required because other programs also use these extensions.
_NAME = re.compile(r"[0-9a-f]{16}(\.pages|(-[a-z0-9_]+)?\.damaged|-[a-z0-9_]+\.part)")


@dataclass(frozen=True, slots=True)
class Entry:
    """A page file.

    Attributes:
        path: Path of the file.
        state: ``complete``; ``incomplete`` (left by a closed store or a killed process); ``being
            written``; or the reason why the file cannot be used.
        nbytes: Bytes that the file occupies on disk.
        useless: True if no later start needs the file: it cannot be used, or is incomplete.
        held, pages: Number of pages in the file and in the model; 0 if unknown.
        codec: Name of the codec; empty if unknown.
        packing: Engine, kernel and type of the weights; empty if unknown.
        modified: Time of the last change, in seconds since 1970.
    """

    path: Path
    state: str
    nbytes: int
    useless: bool = False
    held: int = 0
    pages: int = 0
    codec: str = ""
    packing: str = ""
    modified: float = 0.0


def entries(folder: Path) -> list[Entry]:
    """List the page files in a folder, sorted by name; none if the folder does not exist.

    Raises:
        PageFileError: The folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PageFileError(f"cannot be read: {error.strerror}", where=str(folder)) from error
    found = [_entry(folder / name) for name in names if _NAME.fullmatch(name)]
    return [entry for entry in found if entry is not None]


def damage(entry: Entry) -> Iterator[str]:
    """Read all pages of a complete file and verify their checksums.

    A file with a damaged page is set aside, so that the next start rebuilds the file.

    Yields:
        For each page, a description of the damage; an empty string if the page is intact. If the
        file cannot be opened, the only item is the reason.
    """
    try:
        file = _opened(entry.path)
    except PageFileError as error:
        yield error.what
        return
    with contextlib.closing(file):
        for page in np.flatnonzero(file.index[:, 0, OFFSET]).tolist():
            targets = [np.empty(length, np.uint8) for length in file.index[page, :, LENGTH]]
            try:
                file.read(page, targets)
            except DamagedPageError as error:
                file.set_aside()
                yield error.what
            except PageFileError as error:
                yield error.what
            else:
                yield ""


def remove(entry: Entry) -> bool:
    """Remove a file unless another process is writing it; return True if the file was removed.

    Raises:
        PageFileError: The file cannot be removed.
    """
    try:
        if entry.path.suffix == PART:
            fd = open_file(entry.path, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.path.unlink()
            finally:
                os.close(fd)
        else:
            entry.path.unlink()
    except (FileNotFoundError, BlockingIOError):
        return False
    except OSError as error:
        raise PageFileError(
            f"cannot be removed: {error.strerror}", where=str(entry.path)
        ) from error
    return True


def _entry(path: Path) -> Entry | None:
    """Describe a file; None if it is a folder, or was removed or renamed in the meantime."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        return None
    nbytes, modified = status.st_blocks * 512, status.st_mtime
    try:
        fd = open_file(path, os.O_RDONLY)
    except PageFileError as error:
        return Entry(path, error.what, nbytes, modified=modified)
    try:
        if path.suffix == BAD:
            return Entry(path, "damaged", nbytes, useless=True, modified=modified)
        if path.suffix == PART and not _lockable(fd):
            return Entry(path, "being written", nbytes, modified=modified)
        about = read_head(fd, path).about
        pages, sizes = _shape(about)
        index = read_index(fd, pages, sizes)
        if index is None:
            raise PageFileError("the index is damaged")
    except PageFileError as error:
        return Entry(path, error.what, nbytes, useless=True, modified=modified)
    except OSError as error:
        return Entry(path, str(error.strerror), nbytes, modified=modified)
    finally:
        os.close(fd)
    key = about.get("key")
    return Entry(
        path,
        "incomplete" if path.suffix == PART else "complete",
        nbytes,
        useless=path.suffix == PART,
        held=int(np.count_nonzero(index[:, 0, OFFSET])),
        pages=pages,
        codec=str(about.get("codec", "")),
        packing=str(key.get("packing", "")) if isinstance(key, dict) else "",
        modified=modified,
    )


def _shape(about: dict[str, Any]) -> tuple[int, list[int]]:
    """Return the number of pages of the model, and the bytes of each part of a page."""
    try:
        sizes = [int(nbytes) for _, nbytes in about["parts"]]
        return int(about["num_layers"]) * int(about["experts_per_layer"]), sizes
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PageFileError("the header is damaged") from error


def _lockable(fd: int) -> bool:
    """Return True if no process is writing a file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _opened(path: Path) -> PageFile:
    fd = open_file(path, os.O_RDONLY)
    try:
        about = read_head(fd, path).about
    finally:
        os.close(fd)
    return PageFile(path, about, *_shape(about))
