"""Selection of the lowest few of many scores, and sparse sets as the bits of a word.

A single pass over the scores mostly compares each score with the worst score kept so far. Bits are
the cheapest way to find and visit a sparse set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.types import Int64s

Numbers = npt.NDArray[np.generic]

_i32 = ir.IntType(32)


@intrinsic
def lowest_bit(context: Any, word: Any) -> Any:
    """Return the position of the lowest set bit of a nonzero uint64. Compiled code only."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), lower


@intrinsic
def bits_not_above(context: Any, array: Any, first: Any, limit: Any) -> Any:
    """Return one bit per value in ``array[first : first + 64]``: 1 unless above ``limit``.

    The bit of a NaN is 1 as well. ``limit`` has the dtype of the array, which is contiguous.
    Compiled code only.
    """

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = make_array(array)(context, builder, args[0]).data
        many = ir.VectorType(data.type.pointee, 64)
        start = builder.bitcast(builder.gep(data, [args[1]]), many.as_pointer())
        values = builder.load(start, align=array.dtype.bitwidth // 8)
        zero, zeros = (ir.Constant(kind, None) for kind in (_i32, ir.VectorType(_i32, 64)))
        one = builder.insert_element(ir.Constant(many, ir.Undefined), args[2], zero)
        limits = builder.shuffle_vector(one, one, zeros)
        compare = builder.fcmp_unordered
        if isinstance(array.dtype, types.Integer):
            compare = builder.icmp_signed if array.dtype.signed else builder.icmp_unsigned
        return builder.bitcast(compare("<=", values, limits), ir.IntType(64))

    return types.uint64(array, types.int64, array.dtype), lower


@jit
def lowest(scores: Numbers, pages: Int64s, count: int, kept: Numbers, out: Int64s) -> None:
    """Write the ``count`` pages with the lowest scores into ``out``, lowest first.

    Args:
        scores: One number per page, of any integer or float dtype that numba supports; no NaN.
        pages: Page ids; on ties, the lowest id comes first.
        count: Number of pages to select, from 1 to the number of scores.
        kept: Array to fill with the selected scores; it has the dtype of ``scores`` and the length
            of ``out``.
        out: Array to fill with the selected pages.
    """
    found = 0
    for i in range(count):
        found = offer(kept, out, found, count, scores[i], pages[i])
    for first in range(count, scores.size, 64):
        low = low_bits(scores, first, scores.size, kept[0])
        while low != 0:
            i = first + lowest_bit(low)
            low &= low - np.uint64(1)
            if before(scores[i], pages[i], kept[0], out[0]):
                offer(kept, out, found, count, scores[i], pages[i])
    ascending(kept, out, found)


@jit
def low_bits(scores: Numbers, first: int, end: int, limit: float) -> np.uint64:
    """Return one bit per value in ``scores[first : first + 64]`` before ``end``.

    A bit is 1 if the score is NaN or not above ``limit``. The result is nearly always 0, since few
    scores are as low as the lowest scores so far.
    """
    bits = np.uint64(0)
    if first + 64 <= end:
        bits |= bits_not_above(scores, first, limit)
    else:
        for i in range(first, end):
            bits |= np.uint64(not scores[i] > limit) << np.uint64(i - first)
    return bits


@jit
def before(score: float, page: int, limit: float, limit_page: int) -> bool:
    """Return True if (score, page) comes before (limit, limit_page)."""
    return bool(score < limit or (score == limit and page < limit_page))


@jit
def offer(kept: Numbers, out: Int64s, found: int, count: int, score: float, page: int) -> int:
    """Keep (score, page), replacing the worst pair if ``count`` are held; return the number held.

    ``kept`` and ``out`` form a heap with the worst pair on top.
    """
    if found < count:
        i = found
        kept[i], out[i] = score, page
        while i > 0 and before(kept[(i - 1) // 2], out[(i - 1) // 2], kept[i], out[i]):
            _swap(kept, out, i, (i - 1) // 2)
            i = (i - 1) // 2
        return found + 1
    kept[0], out[0] = score, page
    _sift_down(kept, out, found)
    return found


@jit
def ascending(kept: Numbers, out: Int64s, found: int) -> None:
    """Sort the heap in place, lowest first."""
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
        if child + 1 < size and before(kept[child], out[child], kept[child + 1], out[child + 1]):
            child += 1
        if not before(kept[i], out[i], kept[child], out[child]):
            return
        _swap(kept, out, i, child)
        i = child
