"""Sizes in bytes as text: ``parse`` reads user input, and the other functions format sizes.

YAML, the command line, Python and HTTP all use ``parse``, so that all accept and reject the same
text. Messages and tables show sizes with units, formatted by ``shown``; ``exact`` and ``at_least``
make text that users can copy.
"""

from __future__ import annotations

import operator
import re
from fractions import Fraction

from fluxmoe.words import line

#: Pattern of a size as text, anchored at both ends. The pattern has no flags, because the JSON
#: schema uses it too.
PATTERN = (
    r"^\s*([0-9]*\.?[0-9]+)\s*"
    r"(([kKmMgGtTpPeE])([iI]?)([bB]([iI][tT])?)?|[bB]([iI][tT])?)?\s*$"
)
VALID = "bytes, or a number with a unit such as 24GiB, 512MiB, 24Gi"
#: Largest size, which exceeds any machine's memory and fits in 64 bits.
LARGEST = 2**63 - 1

_SIZE = re.compile(PATTERN)
_LONGEST = 64
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
#: Maximum number of characters in a size shown without rounding.
_SHORT = 7


def parse(value: object) -> int:
    """Parse a size: whole bytes, or text such as ``8192``, ``24GiB``, ``1.5 GB`` or ``24Gi``.

    ``KB`` and ``k`` are 1000 bytes, and ``KiB`` and ``Ki`` are 1024 bytes, in upper or lower case.
    If the text has such a unit, fractions of a byte are dropped.

    Raises:
        ValueError: The value is not a valid size; the message is one line.
    """
    size = _text(value) if isinstance(value, str) else _number(value)
    if size is None or size < 0:
        raise _invalid(value)
    if size > LARGEST:
        raise _invalid(value, ", which exceeds 8EiB")
    return size


def shown(size: float, decimals: int = 1) -> str:
    """Format a size for display: 1536 → ``1.5 KiB``."""
    power = min(max(int(size), 1).bit_length() - 1, 49) // 10
    return f"{size / 1024**power:.{decimals}f} {_UNITS[power]}" if power else f"{size:.0f} B"


def apart(one: int, other: int) -> tuple[str, str]:
    """Format two sizes for display, with enough decimals to distinguish them."""
    for decimals in range(1, 4):
        texts = shown(one, decimals), shown(other, decimals)
        if texts[0] != texts[1]:
            return texts
    return f"{one} B", f"{other} B"


def exact(size: int) -> int | str:
    """Format an exact size for a configuration: 1536 → ``1536``, 2048 → ``2KiB``."""
    for power in range(4, 0, -1):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{_UNITS[power]}"
    return int(size)


def at_least(size: int) -> int | str:
    """Format a size like ``exact``, but round a long one up, to two decimals: ``12.35MiB``."""
    found = exact(size)
    power = (max(size, 1).bit_length() - 1) // 10
    if not power or len(str(found)) <= _SHORT:
        return found
    hundredths = -(-size * 100 // 1024 ** min(power, 4))
    return f"{hundredths / 100:.2f}{_UNITS[min(power, 4)]}"


def _number(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():  # 1e9 in JSON
        return int(value)
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _text(text: str) -> int | None:
    if text.rstrip().endswith("%"):
        raise _invalid(text, ", a percentage")
    found = _SIZE.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        return None
    number, _, prefix, binary, _, *bits = found.groups()
    power = "kmgtpe".index(prefix.lower()) + 1 if prefix else 0
    size = Fraction(number) * (1024 if binary else 1000) ** power / (8 if any(bits) else 1)
    if size.denominator > 1 and not prefix:
        raise _invalid(text, ", a fraction of a byte")
    return int(size)


def _invalid(value: object, detail: str = "") -> ValueError:
    return ValueError(f"not a valid size: {line(value, repr, limit=80)}{detail} (valid: {VALID})")
