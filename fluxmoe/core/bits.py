"""Walking the set bits of a word: compiled code has no other cheap way to visit a sparse set."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def lowest_bit(context: Any, word: Any) -> Any:
    """Position of the lowest set bit of a uint64 that is not 0, as int64. Compiled code only."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), lower
