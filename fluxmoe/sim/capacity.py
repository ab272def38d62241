"""What a simulated capacity may be written as: pages, a share of all pages, or bytes."""

from __future__ import annotations

from fractions import Fraction

from pydantic import ByteSize, TypeAdapter, ValidationError

from fluxmoe.errors import ConfigError
from fluxmoe.trace import TraceMeta

_SIZE: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)


def pages_of(capacity: int | str, meta: TraceMeta) -> int:
    """A capacity in pages.

    Args:
        capacity: A number of pages (``96``), a share of all pages (``"25%"``) or bytes
            (``"2GiB"``); the last two are rounded down.
        meta: The trace the capacity is meant for.

    Raises:
        ConfigError: It is none of these, or bytes for a trace that does not know its page size.
    """
    text = str(capacity).strip()
    if text.isdecimal():
        return int(text)
    try:
        if text.endswith("%"):
            # A fraction, because 29 % of 100 pages in floating point is 28.
            return int(_share(text[:-1]) * meta.geometry.num_pages)
        if not text[-1:].isalpha():
            raise ValueError("neither whole pages nor a size with a unit")
        size = _SIZE.validate_python(text)
    except (ValueError, ZeroDivisionError, ValidationError) as error:
        raise ConfigError(
            f"{text!r} is no capacity",
            where="--capacity",
            fix="write pages (96), a share of all pages (25%) or bytes (2GiB)",
        ) from error
    if meta.page_bytes is None:
        raise ConfigError(
            f"{text!r} is in bytes, but the trace does not tell the size of a page",
            where="--capacity",
            fix="write pages (96) or a share of all pages (25%)",
        )
    return int(size) // meta.page_bytes


def _share(percent: str) -> Fraction:
    share = Fraction(percent) / 100
    if share < 0:
        raise ValueError("a share is not negative")
    return share
