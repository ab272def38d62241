"""A trace's file: checks of its path, writes by a single process, and all-or-nothing output."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from fluxmoe import arguments
from fluxmoe.core.owner import Owner
from fluxmoe.errors import TraceError


class OwnFile(io.FileIO):
    """A file that only the process that opened it writes to.

    In a forked process, pyarrow would otherwise write when it closes a garbage-collected writer.
    """

    def __init__(self, path: Path) -> None:
        self._owner = Owner()
        super().__init__(path, "wb")

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        nbytes = len(left)
        while left and self._owner.here:
            left = left[super().write(left) :]
        return nbytes


class AllOrNothing(ABC):
    """A context manager that discards its file if an exception is raised inside it."""

    @abstractmethod
    def close(self) -> None:
        """Complete the file."""

    @abstractmethod
    def discard(self) -> None:
        """Leave no file behind."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def require_place(path: Path, *, replace: bool, by: str = "replace=True") -> None:
    """Reject a path at which no trace can be written. For ``by``, see ``arguments.require_new``.

    Raises:
        TraceError: The path is a folder, or its folder does not exist.
        ConfigError: The file already exists and ``replace`` is false.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "the path is a folder" if path.is_dir() else "the folder does not exist"
        fix = "name a file in an existing folder"
        raise TraceError(f"cannot write a trace: {what}", where=str(path), fix=fix)
    arguments.require_new(path, replace=replace, by=by)
