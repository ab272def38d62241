"""Sparse sets as the bits of a word: no other way to find and visit them is as cheap."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

_i32 = ir.IntType(32)


@intrinsic
def lowest_bit(context: Any, word: Any) -> Any:
    """Position of the lowest set bit of a uint64 that is not 0, as int64. Compiled code only."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), lower


@intrinsic
def bits_not_above(context: Any, array: Any, first: Any, limit: Any) -> Any:
    """A bit for each of ``array[first : first + 64]``: not above ``limit``. NaN is not.

    ``limit`` has the dtype of the array, which is contiguous. Compiled code only.
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
