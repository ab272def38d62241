"""The lossless code of docs/concepts/lossless-code.md in plain numpy, independent of the product.

The encoder and the decoder process the whole matrix at once and are slow. Tests compare their
results with the product's, byte by byte.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]

#: Byte of a word → column among the word's four columns.
COLUMN = np.array([0, 2, 1, 3])
TRAILER = np.dtype(
    [
        ("magic", "S4"),
        ("version", "<u2"),
        ("zero", "<u2"),
        ("rows", "<u4"),
        ("cols", "<u4"),
        ("raw", "<u4"),
        ("tail", "<u4"),
        ("escapes", "<u4"),
        ("zero_coded", "<u4"),
        ("nbytes", "<u8"),
        ("reserved", "V16"),
        ("checksum", "<u8"),
    ]
)
assert TRAILER.itemsize == 64


def checksum(block: U8) -> int:
    words = block.view("<u4").astype(object)
    return int((words * (2 * np.arange(len(words), dtype=object) + 1)).sum()) % 2**64


def section(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 16)


def choose(high: U8) -> tuple[str, int]:
    """Choose the kind and the base of a segment of exponents, ``[halves, 64]``.

    If possible, the highest exponents fit, and lower exponents out of range are escapes or, with
    the zero code, zeros.
    """
    base = max(int(high.max()) - 7, 0)
    low = high < base
    if (low.sum(axis=1) <= 1).all():
        return "plain", base
    if base and (((high < base + 1) & (high > 0)).sum(axis=1) <= 1).all():
        return "zero", base
    for lower in range(base - 1, -1, -1):  # make the few largest weights escapes instead
        outside = (high < lower) | (high > lower + 7)
        if (outside.sum(axis=1) <= 1).all():
            return "plain", lower
    return "raw", 0


def encode(weights: U16, tail: bytes = b"") -> U8:
    """Encode ``[rows, cols]`` bf16 patterns as a block."""
    rows, cols = weights.shape
    assert cols % 64 == 0 and len(tail) < 2 * cols
    row_tiles, col_tiles = -(-rows // 64), cols // 64
    segments = -(-col_tiles // 2)
    low, high, sign = weights & 255, (weights >> 8) & 127, weights >> 15
    nibbles = np.zeros((rows, cols), np.uint32)
    headers = np.zeros((segments, rows), "<u4")
    flags = np.zeros((row_tiles, segments), np.uint8)
    pool: list[bytes] = []
    escapes = zero_coded = 0
    for rt, s in np.ndindex(row_tiles, segments):
        for r in range(64 * rt, min(64 * rt + 64, rows)):
            span = slice(128 * s, min(128 * s + 128, cols))
            h = high[r, span].reshape(-1, 64).astype(np.int64)
            kind, base = choose(h)
            if kind == "raw":
                headers[s, r] = 1 << 31 | len(pool)
                flags[rt, s] |= 1
                byte = np.zeros(128, np.uint8)
                byte[: h.size] = weights[r, span] >> 8
                words = byte.reshape(16, 2, 4)[:, :, COLUMN]  # word, plane, byte
                pool.append(words.transpose(1, 0, 2).tobytes())
                continue
            o = (h - base) % 8
            if kind == "zero":
                flags[rt, s] |= 2
                zero_coded += 1
                o = np.where(h == 0, 0, o)
                got = np.where(o == 0, 0, base + o)
            else:
                got = base + o
            header = base | (kind == "zero") << 7
            for half, at in np.argwhere(got != h):
                word, place = divmod(int(at), 8)
                plane, column = divmod(place, 4)
                x = int((base + o[half, at]) ^ h[half, at])
                assert x % 8 == 0
                byte = int(np.flatnonzero(column == COLUMN)[0])
                header |= (byte | (2 * word + plane) << 2 | x >> 3 << 6) << (8 + 10 * int(half))
                header |= 1 << (28 + int(half))
                escapes += 1
            headers[s, r] = header
            nibbles[r, span] = (o | (sign[r, span].reshape(-1, 64) << 3)).reshape(-1)
    tiles = []
    for rt in range(row_tiles):
        for ct in range(col_tiles):
            at = np.s_[64 * rt : 64 * rt + 64, 64 * ct : 64 * ct + 64]
            lows = low[at].reshape(-1, 8, 2, 4)[..., COLUMN].astype(np.uint8)
            nibs = nibbles[at].reshape(-1, 8, 2, 4)[..., COLUMN].astype(np.uint8)
            for plane in (lows[:, :, 0], lows[:, :, 1], nibs[:, :, 0] << 4 | nibs[:, :, 1]):
                tiles.append(plane.tobytes())
    body = b"".join(
        section(part)
        for part in (b"".join(tiles), headers.tobytes(), flags.tobytes(), b"".join(pool), tail)
    )
    trailer = np.zeros(1, TRAILER)
    trailer["magic"], trailer["version"] = b"FXM4", 1
    trailer["rows"], trailer["cols"] = rows, cols
    trailer["raw"], trailer["tail"] = len(pool), len(tail)
    trailer["escapes"], trailer["zero_coded"] = escapes, zero_coded
    trailer["nbytes"] = len(body) + 64
    block = np.frombuffer(body + trailer.tobytes(), np.uint8).copy()
    block[-8:].view("<u8")[0] = checksum(block[:-8])
    return block


def decode(block: U8) -> tuple[U16, bytes]:
    """Decode the weights and the tail of an undamaged block."""
    trailer = block[-64:].view(TRAILER)[0]
    rows, cols = int(trailer["rows"]), int(trailer["cols"])
    assert trailer["magic"] == b"FXM4" and trailer["nbytes"] == len(block)
    assert trailer["checksum"] == checksum(block[:-8])
    row_tiles, col_tiles = -(-rows // 64), cols // 64
    segments = -(-col_tiles // 2)
    at = 0

    def take(nbytes: int) -> U8:
        nonlocal at
        part = block[at : at + nbytes]
        at += -(-nbytes // 16) * 16
        return part

    tiles = take(96 * rows * col_tiles)
    headers = take(4 * segments * rows).view("<u4").reshape(segments, rows)
    take(row_tiles * segments)
    pool = take(128 * int(trailer["raw"])).reshape(-1, 2, 16, 4)
    tail = take(int(trailer["tail"])).tobytes()
    assert at + 64 == len(block)
    out = np.zeros((rows, cols), np.uint16)
    back = np.argsort(COLUMN)
    for rt in range(row_tiles):
        height = min(64, rows - 64 * rt)
        for ct in range(col_tiles):
            begin = 96 * (64 * rt * col_tiles + height * ct)
            planes = tiles[begin : begin + 96 * height].reshape(3, height, 8, 4)
            for r in range(height):
                row, (s, half) = 64 * rt + r, divmod(ct, 2)
                header = int(headers[s, row])
                a, b, n = planes[:, r]
                high = np.stack([n >> 4, n & 15], axis=1).astype(np.int64)  # word, plane, byte
                if header >> 31:
                    words = pool[header & 0x7FFFFFFF][:, 8 * half : 8 * half + 8]
                    high = words.transpose(1, 0, 2).astype(np.int64)
                else:
                    o = high & 7
                    h = (header & 127) + o
                    if header >> 7 & 1:
                        h[o == 0] = 0
                    if header >> (28 + half) & 1:
                        slot = header >> (8 + 10 * half)
                        where = (*divmod(slot >> 2 & 15, 2), slot & 3)
                        h[where] = ((header & 127) + o[where]) ^ (slot >> 6 & 15) << 3
                    high = h | (high >> 3) << 7
                both = (np.stack([a, b], axis=1) | high << 8)[..., back]
                out[row, 64 * ct : 64 * ct + 64] = both.reshape(-1)
    return out, tail
