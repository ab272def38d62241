"""Where the sections of a block of the lossless code begin (docs/code.md)."""

from __future__ import annotations

from typing import NamedTuple


class Sections(NamedTuple):
    """Offsets in bytes from the block's beginning."""

    headers: int
    flags: int
    pool: int


def layout(rows: int, cols: int) -> Sections:
    """The sections of the block of a ``rows × cols`` matrix; ``cols`` is a multiple of 64."""
    segments = -(-cols // 128)
    headers = _next(96 * rows * (cols // 64))
    flags = _next(headers + 4 * segments * rows)
    return Sections(headers, flags, _next(flags + -(-rows // 64) * segments))


def _next(offset: int) -> int:
    return -(-offset // 16) * 16
