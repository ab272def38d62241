"""The notations for a simulated capacity: pages, a share of all pages, or bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from fluxmoe import sizes
from fluxmoe.errors import ConfigError
from fluxmoe.trace import TraceMeta
from fluxmoe.words import line

_PAGES = re.compile(r"[0-9]{1,18}")
_SHARE = re.compile(r"([0-9]{1,9}|[0-9]{0,9}\.[0-9]{1,9})\s*%")


def pages_of(capacity: int | str, meta: TraceMeta) -> int:
    """Convert a capacity to pages.

    Args:
        capacity: A number of pages (``96``), a share of all pages (``"25%"``) or bytes
            (``"2GiB"``); shares and bytes are rounded down.
        meta: Metadata of the trace.

    Raises:
        ConfigError: The capacity is invalid or a share above 100%, or it is in bytes and the trace
            has no page size.
    """
    text = line(capacity).strip()
    if _PAGES.fullmatch(text):
        return int(text)
    if share := _SHARE.fullmatch(text):
        if Fraction(share[1]) > 100:
            raise ConfigError(
                f"{text} is more than all pages", where="--capacity", fix="write at most 100%"
            )
        # A Fraction, because in floating point, 29% of 100 pages is rounded down to 28.
        return int(Fraction(share[1]) / 100 * meta.geometry.num_pages)
    try:
        if not text[-1:].isalpha():
            raise ValueError("neither whole pages nor a size with a unit")
        size = sizes.parse(text)
    except ValueError as error:
        raise ConfigError(
            f"not a valid capacity: {line(text, repr, limit=80)}",
            where="--capacity",
            fix="write pages (96), a share of all pages (25%) or bytes (2GiB)",
        ) from error
    if meta.page_bytes is None:
        raise ConfigError(
            f"{text!r} is in bytes, but the trace has no page size",
            where="--capacity",
            fix="write pages (96) or a share of all pages (25%)",
        )
    return size // meta.page_bytes
