"""Encoding and decoding of fixed4 blocks: numba loops that call the steps in ``vector``.

All arrays belong to the caller. Except for scratch and results, they are views of one block
(docs/concepts/lossless-code.md) or of its weights. ``decode`` validates everything that it reads
from a block.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.types import Bytes, Int64s
from fluxmoe.stores.codec.vector import (
    decode_past_caches,
    decode_plain,
    decode_raw,
    decode_zero,
    encode_plain,
    encode_zero,
    fence,
    high_bytes,
    highest,
    lowest_bit,
    prefetch,
)

U16s: TypeAlias = npt.NDArray[np.uint16]
U32s: TypeAlias = npt.NDArray[np.uint32]
#: Integers and bools: numba's types differ from those of Python and numpy.
Int: TypeAlias = Any
Bool: TypeAlias = Any

#: Return values of ``decode`` on failure.
MISFIT, WRONG_SUM, NO_POOL_ROW = -1, -2, -3

#: The trailer's number of words, and the values of its first two words.
TRAILER, MAGIC, VERSION = 16, 0x344D5846, 1

_RAW = 1 << 31
_ESCAPES = 3 << 28
_ZERO = 1 << 7
_TILE = 24  # words per row of a tile
_AHEAD = 1536  # distance of prefetching ahead of decoding, in words


@jit
def checksum(words: U32s, first: Int, end: Int) -> Int:
    """Compute the contribution of words ``first … end - 1`` to a block's checksum, uint64."""
    total = np.uint64(0)
    part = words[first:end]  # with indices from 0 to the size, numba omits the wraparound check
    for i in range(part.size):
        total += np.uint64(part[i]) * np.uint64(np.uint32(2 * (first + i) + 1))
    return total


@jit
def _column(place: Int) -> Int:
    """Return the column, from 0 to 63, of byte ``place`` in tile order."""
    byte = place & 3
    return 8 * (place >> 2 & 7) + 4 * (place >> 5) + ((byte & 1) << 1 | byte >> 1)


@jit
def _escape(weights: U16s, at: Int, half: Int, base: Int, mask: Int) -> Int:
    """Return the header bits for the only out-of-range weight in ``mask``."""
    place = lowest_bit(mask)
    h = np.int64(weights[at + 64 * half + _column(place)] >> 8 & 127)
    x = ((base + ((h - base) & 7)) ^ h) >> 3
    word = (place >> 2 & 7) << 1 | place >> 5
    return (place & 3 | word << 2 | x << 6) << (8 + 10 * half) | 1 << (28 + half)


@jit
def _lower_base(weights: U16s, at: Int, halves: Int, base: Int, counts: Int64s) -> Int:
    """Find the highest base below ``base`` with at most one escape per half.

    The result is −1 if there is none.

    Args:
        counts: Scratch for ``[2, 128]`` numbers.
    """
    counts[:] = 0
    for i in range(64 * halves):
        counts[(i >> 6) * 128 + np.int64(weights[at + i] >> 8 & 127)] += 1
    inside = np.int64(0)
    other = np.int64(0)
    for h in range(base, base + 8):
        inside += counts[h]
        other += counts[128 + h]
    for lower in range(base - 1, -1, -1):
        inside += counts[lower] - counts[lower + 8]
        other += counts[128 + lower] - counts[128 + lower + 8]
        if inside >= 63 and (other >= 63 or halves == 1):
            return lower
    return -1


@jit
def _several(mask: Int) -> Bool:
    return mask & (mask - np.uint64(1)) != 0


@jit
def encode(
    weights: U16s,
    rows: Int,
    cols: Int,
    block: Bytes,
    words: U32s,
    headers: Int,
    flags: Int,
    pool: Int,
    pool_rows: Int,
    counts: Int64s,
    found: Int64s,
) -> Int:
    """Write the tiles, headers, flags and pool of ``weights``, a flat array of rows × cols.

    Args:
        words: ``block``, viewed as words.
        headers, flags, pool: Offsets of these sections, in bytes.
        pool_rows: Maximum number of raw segments.
        counts: Scratch for 256 numbers.
        found: Filled with the numbers of escapes and zero-coded segments.

    Returns:
        The number of raw segments, or −1 if there are more than ``pool_rows``.
    """
    tiles, segments = cols // 64, (cols + 127) // 128
    headers, pool = headers // 4, pool // 4
    raw = escapes = zero_coded = 0
    for rt in range((rows + 63) // 64):
        height = min(64, rows - 64 * rt)
        for s in range(segments):
            halves = min(2, tiles - 2 * s)
            special = 0
            for r in range(height):
                row = 64 * rt + r
                at = row * cols + 128 * s
                a0 = _TILE * (64 * rt * tiles + height * 2 * s) + 8 * r
                b0, n0 = a0 + 8 * height, a0 + 16 * height
                next_tile = _TILE * height if halves == 2 else 0
                a1, b1, n1 = a0 + next_tile, b0 + next_tile, n0 + next_tile
                second = at + 64 * (halves - 1)  # equals ``at`` if there is only one half
                top = max(highest(weights, at), highest(weights, second))
                base = max(np.int64(top) - 7, np.int64(0))
                low = encode_plain(weights, at, np.uint8(base), words, a0, b0, n0)
                high = encode_plain(weights, second, np.uint8(base), words, a1, b1, n1)
                header = np.int64(0)
                if (_several(low) or _several(high)) and base > 0:
                    low = encode_zero(weights, at, np.uint8(base), words, a0, b0, n0)
                    high = encode_zero(weights, second, np.uint8(base), words, a1, b1, n1)
                    header = np.int64(_ZERO)
                    if _several(low) or _several(high):
                        header = np.int64(0)
                        base = _lower_base(weights, at, halves, base, counts)
                        if base >= 0:
                            low = encode_plain(weights, at, np.uint8(base), words, a0, b0, n0)
                            high = encode_plain(weights, second, np.uint8(base), words, a1, b1, n1)
                if base < 0:
                    if raw == pool_rows:
                        return -1
                    to = pool + 32 * raw
                    words[to : to + 32] = 0
                    words[n0 : n0 + 8] = 0
                    words[n1 : n1 + 8] = 0
                    high_bytes(weights, at, words, to, to + 16)
                    if halves == 2:
                        high_bytes(weights, second, words, to + 8, to + 24)
                    words[headers + s * rows + row] = np.uint32(_RAW | raw)
                    raw += 1
                    special |= 1
                    continue
                if header != 0:
                    zero_coded += 1
                    special |= 2
                header |= base
                if low != 0:
                    header |= _escape(weights, at, 0, base, low)
                    escapes += 1
                if high != 0 and halves == 2:
                    header |= _escape(weights, at, 1, base, high)
                    escapes += 1
                words[headers + s * rows + row] = np.uint32(header)
            block[flags + rt * segments + s] = special
    found[0], found[1] = escapes, zero_coded
    return raw


@jit
def _whole(nbytes: Int) -> Int:
    return (nbytes + 15) // 16 * 16


@jit
def decode(words: U32s, nbytes: Int, out: U16s, past_caches: bool) -> Int:
    """Decode a block and validate it in the same pass.

    Args:
        words: The block, at least 16 words.
        nbytes: Expected size of the decoded data, in bytes.
        out: Filled with the weights; also has room for the complete 16-bit words of the tail.
        past_caches: Bypass the caches when writing; ``out`` must then be aligned to 64 bytes.

    Returns:
        The size in bytes of the tail, which is not copied, or MISFIT, WRONG_SUM or NO_POOL_ROW.
    """
    trailer = words.size - TRAILER
    if words[trailer] != np.uint32(MAGIC) or words[trailer + 1] != np.uint32(VERSION):
        return MISFIT
    rows: Int = np.int64(words[trailer + 2])
    cols: Int = np.int64(words[trailer + 3])
    pool_rows: Int = np.int64(words[trailer + 4])
    tail: Int = np.int64(words[trailer + 5])
    if cols == 0 or cols % 64 != 0 or rows > nbytes // (2 * cols):  # so that no product overflows
        return MISFIT
    if 2 * rows * cols + tail != nbytes:
        return MISFIT
    segments = (cols + 127) // 128
    headers = 96 * rows * (cols // 64)
    flags = headers + _whole(4 * segments * rows)
    pool = flags + _whole((rows + 63) // 64 * segments)
    if pool + 128 * pool_rows + _whole(tail) != 4 * trailer:
        return MISFIT
    expected = np.uint64(words[trailer + 15]) << np.uint64(32) | np.uint64(words[trailer + 14])
    tiles, headers, pool = cols // 64, headers // 4, pool // 4
    for at in range(0, min(_AHEAD, headers), 16):
        prefetch(words, at)
    total = checksum(words, headers, trailer + 14)
    for rt in range((rows + 63) // 64):
        height = min(64, rows - 64 * rt)
        for s in range(segments):
            halves = min(2, tiles - 2 * s)
            begin = _TILE * (64 * rt * tiles + height * 2 * s)
            total += checksum(words, begin, begin + _TILE * height * halves)
            for r in range(height):
                row = 64 * rt + r
                header = words[headers + s * rows + row]
                base = header & np.uint32(127)
                plain = header & np.uint32(_RAW | _ESCAPES | _ZERO) == 0
                for half in range(halves):
                    ahead = begin + _TILE * (halves * r + half) + _AHEAD
                    prefetch(words, ahead)
                    prefetch(words, ahead + 16)
                    a = begin + _TILE * height * half + 8 * r
                    b, n = a + 8 * height, a + 16 * height
                    at = row * cols + 128 * s + 64 * half
                    if plain and past_caches:
                        decode_past_caches(words, a, b, n, base, out, at)
                    elif plain:
                        decode_plain(words, a, b, n, base, out, at)
                    elif header & np.uint32(_RAW):
                        index = np.int64(header & np.uint32(_RAW - 1))
                        if index >= pool_rows:
                            return NO_POOL_ROW
                        high = pool + 32 * index + 8 * half
                        decode_raw(words, a, b, high, high + 16, out, at)
                    else:
                        if header & np.uint32(_ZERO):
                            decode_zero(words, a, b, n, base, out, at)
                        else:
                            decode_plain(words, a, b, n, base, out, at)
                        if header >> np.uint32(28 + half) & np.uint32(1):
                            _put_escape(words, n, np.int64(header), half, out, at)
    if past_caches:
        fence()
    return tail if total == expected else WRONG_SUM


@jit
def _put_escape(words: U32s, n: Int, header: Int, half: Int, out: U16s, at: Int) -> None:
    slot = header >> (8 + 10 * half)
    byte, word, side = slot & 3, slot >> 3 & 7, slot >> 2 & 1
    o = np.int64(words[n + word]) >> (8 * byte + 4 * (1 - side)) & 7
    h = (((header & 127) + o) ^ (slot >> 6 & 15) << 3) & 127
    to = at + _column(byte | word << 2 | side << 5)
    out[to] = np.uint16(np.int64(out[to]) & 0x80FF | h << 8)
