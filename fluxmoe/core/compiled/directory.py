"""Directories, which pass many arrays to compiled code as one array.

On every call from Python, numba unpacks a named tuple array by array. For the arrays of the books,
this costs more than the entire event rule, particularly in an engine, where other work flushes the
CPU caches between events. A *directory* is one array with the address and shape of each of the
arrays; compiled code rebuilds the tuple from the directory and reads only the entries that it uses.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from fluxmoe.core.types import Int64s

_DIMENSIONS = 2  # maximum; the directory holds the address and this many lengths of each array
_ENTRY = 1 + _DIMENSIONS


def directory(arrays: tuple[np.ndarray[Any, Any], ...]) -> Int64s:
    """Make a directory, int64 ``[3 n]``, of n arrays, each C-contiguous and at most 2-D.

    The arrays must stay alive at the same addresses for as long as the directory is in use.
    """
    entries = np.zeros((len(arrays), _ENTRY), np.int64)
    for entry, array in zip(entries, arrays, strict=True):
        entry[: 1 + array.ndim] = array.ctypes.data, *array.shape
    return entries.reshape(-1)


def opener(example: tuple[np.ndarray[Any, Any], ...]) -> Any:
    """Make a compiled function that turns the directory of a tuple like ``example`` into the tuple.

    The function returns tuples unchanged, so that the same code serves both Python callers, which
    pass the directory, and compiled callers, which have the tuple.
    """
    tuple_type = numba.typeof(example)

    @intrinsic
    def open_directory(typing: Any, where: Any) -> Any:
        if isinstance(where, types.BaseTuple):
            return where(where), lambda context, builder, signature, args: args[0]

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words = make_array(signature.args[0])(context, builder, args[0]).data

            def word(index: int) -> Any:
                return builder.load(cgutils.gep_inbounds(builder, words, index))

            arrays = []
            for number, array_type in enumerate(tuple_type):
                array = make_array(array_type)(context, builder)
                first = number * _ENTRY
                itemsize = array_type.dtype.bitwidth // 8 if array_type.dtype != types.bool_ else 1
                shape = [word(first + 1 + axis) for axis in range(array_type.ndim)]
                stride = ir.Constant(ir.IntType(64), itemsize)
                strides = [stride]
                for length in shape[:0:-1]:
                    strides.insert(0, builder.mul(strides[0], length))
                populate_array(
                    array,
                    data=builder.inttoptr(word(first), array.data.type),
                    shape=shape,
                    strides=strides,
                    itemsize=stride,
                    meminfo=None,
                )
                arrays.append(array._getvalue())
            return context.make_tuple(builder, tuple_type, arrays)

        return tuple_type(where), generate

    return open_directory
