"""Selection of the lowest few of many scores, and sparse sets as the bits of a word.

A single pass over the scores mostly compares with the worst one kept so far. Bits are the cheapest
way to find and visit a sparse set.
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
    """Position of the lowest set bit of a nonzero uint64, as int64. Compiled code only."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), lower


@intrinsic
def bits_not_above(context: Any, array: Any, first: Any, limit: Any) -> Any:
    """One bit for each of ``array[first : first + 64]``, set if not above ``limit`` or if NaN.

    ``limit`` has the dtype of the contiguous array. Compiled code only.
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
        pages: Page ids; ties go to the lowest.
        count: Number of pages to select, from 1 to the number of scores.
        kept: Filled with the scores; dtype of ``scores``, same length as ``out``.
        out: Filled with the pages.
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
    """One bit each for ``scores[first : first + 64]`` before ``end``: not above ``limit``, or NaN.

    Nearly always 0: few scores are as low as the lowest ones so far.
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
    """True if (score, page) comes before (limit, limit_page)."""
    return bool(score < limit or (score == limit and page < limit_page))


@jit
def offer(kept: Numbers, out: Int64s, found: int, count: int, score: float, page: int) -> int:
    """Keep (score, page), replacing the worst if ``count`` are held; return the number held.

    ``kept`` and ``out`` form a heap with the worst on top.
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
        if child + 1 < size and not_above(kept[child], out[child], kept[child + 1], out[child + 1]):
            child += 1
        if not not_above(kept[i], out[i], kept[child], out[child]):
            return
        _swap(kept, out, i, child)
        i = child
