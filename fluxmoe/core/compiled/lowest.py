"""The few lowest of many scores: one pass, which mostly compares with the worst kept so far."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.bits import bits_not_above, lowest_bit
from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.types import Int64s

Numbers = npt.NDArray[np.generic]


@jit
def lowest(scores: Numbers, pages: Int64s, count: int, kept: Numbers, out: Int64s) -> None:
    """Write the ``count`` pages of lowest score into ``out``, lowest first.

    Args:
        scores: One number per page, any integer or float dtype that numba knows, no NaN.
        pages: Ties go to the lowest page id.
        count: How many are wanted, at least 1 and at most as many as there are.
        kept: As long as ``out``, dtype of ``scores``; filled with the scores.
        out: Filled.
    """
    found = 0
    for i in range(count):
        found = offer(kept, out, found, count, scores[i], pages[i])
    for first in range(count, scores.size, 64):
        low = low_bits(scores, first, scores.size, kept[0])
        while low != 0:
            i = first + lowest_bit(low)
            low &= low - np.uint64(1)
            if not_above(scores[i], pages[i], kept[0], out[0]):
                offer(kept, out, found, count, scores[i], pages[i])
    ascending(kept, out, found)


@jit
def low_bits(scores: Numbers, first: int, end: int, limit: float) -> np.uint64:
    """A bit for each of ``scores[first : first + 64]`` before ``end``: not above ``limit``, or NaN.

    Nearly always none: of many scores, few are as low as the few lowest so far.
    """
    bits = np.uint64(0)
    if first + 64 <= end:
        bits |= bits_not_above(scores, first, limit)
    else:
        for i in range(first, end):
            bits |= np.uint64(not scores[i] > limit) << np.uint64(i - first)
    return bits


@jit
def not_above(score: float, page: int, limit: float, limit_page: int) -> bool:
    """Whether (score, page) comes before (limit, limit_page)."""
    return bool(score < limit or (score == limit and page < limit_page))


@jit
def offer(kept: Numbers, out: Int64s, found: int, count: int, score: float, page: int) -> int:
    """Keep (score, page), in place of the worst if ``count`` are kept; how many are kept now.

    ``kept`` and ``out`` are a heap with the worst on top.
    """
    if found < count:
        i = found
        kept[i], out[i] = score, page
        while i > 0 and not_above(kept[(i - 1) // 2], out[(i - 1) // 2], kept[i], out[i]):
            _swap(kept, out, i, (i - 1) // 2)
            i = (i - 1) // 2
        return found + 1
    kept[0], out[0] = score, page
    _sift_down(kept, out, found)
    return found


@jit
def ascending(kept: Numbers, out: Int64s, found: int) -> None:
    """Turn the heap into a list, lowest first."""
    for size in range(found - 1, 0, -1):
        _swap(kept, out, 0, size)
        _sift_down(kept, out, size)


@jit
def _swap(kept: Numbers, out: Int64s, i: int, j: int) -> None:
    kept[i], kept[j] = kept[j], kept[i]
    out[i], out[j] = out[j], out[i]


@jit
def _sift_down(kept: Numbers, out: Int64s, size: int) -> None:
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            return
        if child + 1 < size and not_above(kept[child], out[child], kept[child + 1], out[child + 1]):
            child += 1
        if not not_above(kept[i], out[i], kept[child], out[child]):
            return
        _swap(kept, out, i, child)
        i = child
