"""Compressed pages of one layout in device memory, and their decoding into raw slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fluxmoe.core.types import Bytes
from fluxmoe.cuda.kernels.decode import decode, load_flags, load_headers
from fluxmoe.cuda.kernels.language import tl, triton
from fluxmoe.errors import CodecError, UnsupportedError
from fluxmoe.stores.codec.fixed4 import Layout, inspect
from fluxmoe.stores.codec.kernel import checksum


@dataclass(frozen=True, slots=True)
class RawSlots:
    """An arena of uncompressed matrices: ``weights`` ``[slots, N, K]`` bfloat16, dense."""

    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class CompressedPages:
    """Compressed matrices of one shape, at arbitrary multiples of 128 bytes in one buffer.

    Args:
        data: 1-D uint8, 16-byte aligned; one block of the fixed4 code per page
            (docs/concepts/lossless-code.md).
        offsets: ``[pages]`` int32, start of each block in units of 128 bytes.
        rows: Number of rows, N; must be a multiple of 64 for reading in place.
        cols: Number of columns, K, a multiple of 64.
    """

    data: torch.Tensor
    offsets: torch.Tensor
    rows: int
    cols: int


def pack_pages(
    blocks: Sequence[Bytes], rows: int, cols: int, device: torch.device | str
) -> CompressedPages:
    """Validate blocks of the fixed4 code, one per page, and concatenate them on a device.

    Kernels do not check their input: a damaged header could make them read out of bounds.

    Args:
        blocks: At least one result of ``Fixed4(cols).encode`` for a matrix of ``rows × cols``.
        rows: Number of rows, N.
        cols: Number of columns, K.
        device: Target device.

    Raises:
        CodecError: A block is damaged, or its matrix has another shape.
    """
    sizes = [-(-len(block) // 128) for block in blocks]
    starts = np.cumsum([0, *sizes])
    data = np.zeros(int(starts[-1]) * 128, np.uint8)
    for block, start in zip(blocks, starts[:-1].tolist(), strict=True):
        facts = inspect(block)
        found = facts.layout
        if (found.rows, found.cols, found.tail) != (rows, cols, 0):
            raise CodecError(f"a block is {found.rows} × {found.cols}, not {rows} × {cols}")
        place = data[start * 128 : start * 128 + len(block)]
        place[:] = block
        words = place.view(np.uint32)
        if int(checksum(words, 0, len(words) - 2)) != facts.checksum:
            raise CodecError("a block is damaged: checksum mismatch")
    offsets = torch.from_numpy(starts[:-1].astype(np.int32)).to(device)
    return CompressedPages(torch.from_numpy(data).to(device), offsets, rows, cols)


def decode_to_slots(
    source: CompressedPages,
    pages: torch.Tensor,
    slots: torch.Tensor,
    count: torch.Tensor,
    target: RawSlots,
) -> None:
    """Write the matrices of ``pages`` into ``slots``, bit for bit.

    Args:
        source: The compressed pages.
        pages: ``[n]`` int32, page numbers, of which the first ``count`` are decoded.
        slots: ``[n]`` int32, target slot of each page.
        count: ``[1]`` int32, at most n; on the device, because a host number would require
            synchronisation.
        target: The arena, with slots of the same size as the pages.

    Raises:
        UnsupportedError: The arena's slots have a different size or are not dense.
    """
    size = source.rows * source.cols
    weights = target.weights
    if weights[0].numel() != size or not weights[0].is_contiguous() or source.cols % 64:
        raise UnsupportedError(
            f"pages of {source.rows} × {source.cols} do not fit slots of {tuple(weights[0].shape)}"
        )
    place = Layout(source.rows, source.cols)
    grid = (pages.numel(), triton.cdiv(source.rows, 64), source.cols // 64)
    decode_to_slots_kernel[grid](
        source.data.view(torch.int32), source.data, source.offsets, weights.view(torch.int16),
        pages, slots, count,
        source.rows, source.cols // 64, place.headers, place.flags, place.pool, weights.stride(0),
    )  # fmt: skip


@triton.jit
def decode_to_slots_kernel(
    words_ptr, bytes_ptr, offsets_ptr, out_ptr, pages_ptr, slots_ptr, count_ptr,
    rows, column_tiles, headers_at, flags_at, pool_at, stride_out,
):  # fmt: skip
    """Decode one tile of one page; ``words_ptr`` and ``bytes_ptr`` point to the same memory."""
    item = tl.program_id(0)
    if item >= tl.load(count_ptr):
        return
    row_tile, step = tl.program_id(1), tl.program_id(2)
    start = tl.load(offsets_ptr + tl.load(pages_ptr + item)).to(tl.int64)  # in units of 32 words
    page = words_ptr + start * 32
    flags = bytes_ptr + start * 128 + flags_at
    height = tl.minimum(rows - row_tile * 64, 64)
    segments = (column_tiles + 1) // 2

    row = tl.arange(0, 64)
    inside = tl.minimum(row, height - 1)
    tile = page + (row_tile.to(tl.int64) * column_tiles * 64 + step * height) * 24
    offset = (inside * 8)[:, None] + tl.arange(0, 8)[None, :]
    header_ptr = page + headers_at // 4 + row_tile * 64 + inside
    header = load_headers(header_ptr, rows, step, 64, 64, segments - 1)
    special = load_flags(flags, segments, step, row_tile, row_tile + 1, 64, 64)
    weights = decode(
        tile, offset, height * 8, None, header, page + pool_at // 4, special, step, 64, 64
    )

    out = out_ptr + tl.load(slots_ptr + item).to(tl.int64) * stride_out
    at = (row_tile * 64 + row).to(tl.int64)[:, None] * (column_tiles * 64)
    column = step * 64 + tl.arange(0, 64)
    there = (row < height)[:, None] & (column >= 0)[None, :]
    tl.store(out + at + column[None, :], weights.to(tl.int16, bitcast=True), mask=there)
