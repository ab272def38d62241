"""Copying of many pages in one call, between arrays given by their addresses."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.types import Int64s


@intrinsic
def _copy_bytes(context: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy ``count`` bytes from address ``source`` to ``target``. Compiled code only."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, pointer) for address in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), lower


@jit
def copy_pages(
    sources: Int64s,
    sizes: Int64s,
    experts: int,
    targets: Int64s,
    rows: int,
    pages: Int64s,
    slots: Int64s,
) -> int:
    """Copy page ``pages[i]`` into row ``slots[i]`` of each part's array, for all ``i``.

    Args:
        sources: Address of the array ``[experts, part bytes]`` of each layer and part, int64
            ``[layers, parts]``; 0 for a layer that does not exist.
        sizes: Bytes of each part, ``[parts]``.
        experts: Number of experts per layer.
        targets: Address of the array ``[rows, part bytes]`` of each part, int64 ``[parts]``.
        rows: Number of rows in each target array.
        pages: The pages to copy.
        slots: The row for each page.

    Returns:
        The number of pages copied; fewer than all if the next page does not exist.

    Raises:
        IndexError: A slot is not a row of the target arrays.
    """
    for i in range(pages.size):
        layer, expert = pages[i] // experts, pages[i] % experts
        if pages[i] < 0 or layer >= sources.shape[0] or sources[layer, 0] == 0:
            return i
        if slots[i] < 0 or slots[i] >= rows:
            raise IndexError("no such slot")
        for part in range(sizes.size):
            size = sizes[part]
            source = sources[layer, part] + expert * size
            _copy_bytes(targets[part] + slots[i] * size, source, size)
    return pages.size
