"""Decoding of the lossless code in registers.

docs/concepts/lossless-code.md defines the code byte by byte. In short: a part of a page is a
matrix in tiles of 64 × 64 weights; eight weights of a row take three 32-bit words, two with their
low bytes and one with eight nibbles. Each *segment*, 128 columns of a row, has a header with the
base of the nibbles and two escapes. Segments that do not fit this scheme are special and are marked
by flag bytes. Each 32-bit operation decodes four weights.

A *step* is ``BLOCK_K`` columns, 32 to 256.
"""

from __future__ import annotations

from fluxmoe.cuda.kernels.language import tl, triton


@triton.jit
def step_words(step, BLOCK_K: tl.constexpr):
    """Return the indices of a step's words, counted from the row's first: ``[BLOCK_K / 8]``."""
    return step * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)


@triton.jit
def next_step(step, BLOCK_K: tl.constexpr):
    """Return the number of words by which pointers into full tiles advance after ``step``."""
    if BLOCK_K == 32:  # half a tile
        return tl.where(step % 2 == 0, 4, 1532)
    else:
        return (BLOCK_K // 64) * 1536


@triton.jit
def load_headers(ptr, stride, step, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, last):
    """Load the headers of the rows at ``ptr``: one per row, or one per word if BLOCK_K > 128.

    ``stride`` is the number of words from one segment to the next; ``last`` is the last segment.
    """
    segment = step * BLOCK_K // 128
    if BLOCK_K <= 128:
        return tl.load(ptr + segment * stride).to(tl.uint32, bitcast=True)
    else:
        segments = tl.minimum(segment + tl.arange(0, BLOCK_K // 128), last)
        each = tl.load(ptr[:, None] + (segments * stride)[None, :]).to(tl.uint32, bitcast=True)
        wide = tl.broadcast_to(each[:, :, None], (BLOCK_N, BLOCK_K // 128, 16))
        return tl.reshape(wide, (BLOCK_N, BLOCK_K // 8))


@triton.jit
def load_flags(ptr, segments, step, tile, tiles, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a step's flags: nonzero if a segment in the row tiles from ``tile`` on is special."""
    rows = tile + tl.arange(0, (BLOCK_N + 63) // 64)[:, None]
    columns = step * BLOCK_K // 128 + tl.arange(0, (BLOCK_K + 127) // 128)[None, :]
    there = (rows < tiles) & (columns < segments)
    flags = tl.load(ptr + rows * segments + columns, mask=there, other=0)
    return tl.max(tl.max(flags.to(tl.int32), 1), 0)


@triton.jit
def decode(
    ptr, offset, plane, mask, header, pool_ptr, special, step,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Decode the weights of one step of a block of rows.

    Args:
        ptr: Scalar pointer to the words of the step; the only value that advances.
        offset: ``[BLOCK_N, BLOCK_K / 8]``, offsets of plane A's words from ``ptr``.
        plane: Number of words from one plane to the next.
        mask: Mask of the words that exist, or None.
        header: Result of ``load_headers``.
        pool_ptr: Pointer to the part's pool.
        special: Result of ``load_flags``; applies to all rows.
        step: Index of the step.

    Returns:
        ``[BLOCK_N, BLOCK_K]`` bfloat16; words that do not exist give arbitrary finite values.
    """
    low_a = _load(ptr + offset, mask)
    low_b = _load(ptr + plane + offset, mask)
    nibbles = _load(ptr + 2 * plane + offset, mask)
    word = step_words(step, BLOCK_K)[None, :] % 16  # within the segment
    if BLOCK_K > 128:
        own = header
        half = word // 8
        escape = header >> (8 + 10 * half).to(tl.uint32)
        place, change = _place(escape), _change(escape)
    else:
        own = header[:, None]
        if BLOCK_K == 128:
            half = word // 8
            first, second = header >> 8, header >> 18
            place = tl.where(half == 0, _place(first)[:, None], _place(second)[:, None])
            change = tl.where(half == 0, _change(first)[:, None], _change(second)[:, None])
        else:
            half = step * BLOCK_K // 64 % 2
            escape = header >> (8 + 10 * half).to(tl.uint32)
            place, change = _place(escape)[:, None], _change(escape)[:, None]
    base = (own & 127) * 0x01010101
    offset_a, offset_b = (nibbles >> 4) & 0x07070707, nibbles & 0x07070707
    high_a, high_b = offset_a + base, offset_b + base
    in_a = place == (word % 8 * 2).to(tl.uint32)
    in_b = place == (word % 8 * 2 + 1).to(tl.uint32)
    if special != 0:
        zero_coded = ((own >> 7) & 1) != 0
        if BLOCK_K == 128:
            byte = tl.where(half == 0, ((header >> 8) & 3)[:, None], ((header >> 18) & 3)[:, None])
        elif BLOCK_K > 128:
            byte = escape & 3
        else:
            byte = (escape & 3)[:, None]
        escaped = ((own >> (28 + half).to(tl.uint32)) & 1) << (byte * 8)  # bit 0 of that byte
        high_a = tl.where(zero_coded, high_a & _kept(offset_a, in_a, escaped), high_a)
        high_b = tl.where(zero_coded, high_b & _kept(offset_b, in_b, escaped), high_b)
    high_a = tl.where(in_a, high_a ^ change, high_a) | (nibbles & 0x80808080)
    high_b = tl.where(in_b, high_b ^ change, high_b) | ((nibbles << 4) & 0x80808080)
    if special != 0:
        raw = (own >> 31) != 0
        row = (own & 0x7FFFFFFF).to(tl.int32) * 32 + word
        there = raw & (word >= 0)
        high_a = tl.where(there, _load(pool_ptr + row, there), high_a)
        high_b = tl.where(there, _load(pool_ptr + 16 + row, there), high_b)
    return _weave(low_a, low_b, high_a, high_b, BLOCK_N, BLOCK_K)


@triton.jit
def _load(ptr, mask):
    if mask is None:
        return tl.load(ptr).to(tl.uint32, bitcast=True)
    else:
        return tl.load(ptr, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _place(escape):
    """Return the index of the escape's word among the 16 of its half (plane A even, B odd)."""
    return (escape >> 2) & 15


@triton.jit
def _change(escape):
    """Return the value to XOR with the high bytes of the escape's word."""
    return ((escape >> 3) & 0x78) << ((escape & 3) * 8)


@triton.jit
def _kept(offset, here, escaped):
    """Return masks for the zero code: all bits of bytes whose offset is not 0, and of escapes."""
    bits = ((offset + 0x07070707) >> 3) & 0x01010101
    bits = tl.where(here, bits | escaped, bits)
    return (bits << 7) - bits


@triton.jit
def _weave(low_a, low_b, high_a, high_b, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Combine low and high bytes, stored as 0, 2, 1, 3 in each word, into bfloat16 in order."""
    a01 = (low_a & 0x00FF00FF) | ((high_a & 0x00FF00FF) << 8)
    a23 = ((low_a >> 8) & 0x00FF00FF) | (high_a & 0xFF00FF00)
    b01 = (low_b & 0x00FF00FF) | ((high_b & 0x00FF00FF) << 8)
    b23 = ((low_b >> 8) & 0x00FF00FF) | (high_b & 0xFF00FF00)
    pairs = tl.join(tl.join(a01, b01), tl.join(a23, b23))  # [..., a | b, 01 | 23]
    both = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return tl.reshape(both, (BLOCK_N, BLOCK_K)).to(tl.bfloat16, bitcast=True)
