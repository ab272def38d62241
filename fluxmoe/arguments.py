"""Validation of the arguments of the Python API and of the user's files."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from fluxmoe.errors import ConfigError
from fluxmoe.words import line

_Kind = TypeVar("_Kind")


def instance(value: object, kind: type[_Kind], name: str, *, where: str, fix: str = "") -> _Kind:
    """Return ``value`` if it is an instance of ``kind``; otherwise raise ConfigError."""
    if not isinstance(value, kind):
        raise wrong(
            name, f"a {kind.__module__.partition('.')[0]}.{kind.__name__}", value, where, fix
        )
    return value


def path(value: object, name: str, *, where: str, fix: str = "") -> Path:
    """Return a path given as text or ``os.PathLike``; raise ConfigError for any other value."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise wrong(name, "a path", value, where, fix)
    return Path(text)


def whole(value: object, name: str, *, where: str, least: int = 1) -> int:
    """Return a whole number of at least ``least``; raise ConfigError for any other value."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least:
        raise wrong(name, f"a whole number of at least {least}", value, where)
    return number


def wrong(name: str, valid: str, value: object, where: str, fix: str = "") -> ConfigError:
    """Make the error for an invalid argument."""
    return ConfigError(
        f"{name} must be {valid}, not {line(value, repr, limit=80)}", where=where, fix=fix
    )


def require_new(file: Path, *, replace: bool, by: str = "replace=True") -> None:
    """Raise ConfigError if the file exists and ``replace`` is false, or its folder is missing.

    Args:
        file: The file to be written.
        replace: True if an existing file may be replaced.
        by: Option or argument that allows replacement, for the error message.
    """
    if not file.parent.is_dir():
        raise ConfigError(
            "there is no such folder to write to",
            where=str(file.parent),
            fix="create it, or name a file in another folder",
        )
    if not replace and file.exists():
        raise ConfigError(
            "the file already exists",
            where=str(file),
            fix=f"name another file, or replace this one ({by})",
        )


def reason(problem: Mapping[str, Any]) -> str:
    """Return the message of an error from pydantic, without the prefix that names the exception."""
    return re.sub("^(Value error|Assertion failed), ", "", problem["msg"])
