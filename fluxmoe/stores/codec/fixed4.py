"""The codec ``fixed4``: lossless bf16 in about three quarters of the size, for CPUs and GPUs.

docs/concepts/lossless-code.md defines the format byte by byte and uses the same names for sections
and fields.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxmoe.core.types import Bytes
from fluxmoe.errors import CodecError
from fluxmoe.stores.codec import kernel
from fluxmoe.stores.codec.base import Codec

# The trailer of a block: magic, version, rows, cols, raw segments, tail bytes, escapes,
# zero-coded segments, block bytes, checksum.
_TRAILER = struct.Struct("<4sHxx6IQ16xQ")
_MAGIC, _VERSION = struct.pack("<I", kernel.MAGIC), kernel.VERSION

# At or above this size in bytes, decoded weights bypass the caches: the event's other experts would
# evict the weights before a kernel reads them, and non-temporal stores are faster.
_PAST_CACHES = 1 << 18
_LINE = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets of a block's sections, in bytes.

    Attributes:
        rows, cols: Shape of the matrix.
        raw: Number of raw segments.
        tail: Number of bytes in the tail.
    """

    rows: int
    cols: int
    raw: int = 0
    tail: int = 0

    @property
    def headers(self) -> int:
        return 96 * self.rows * (self.cols // 64)

    @property
    def flags(self) -> int:
        return self.headers + _whole(4 * self.segments * self.rows)

    @property
    def pool(self) -> int:
        return self.flags + _whole(-(-self.rows // 64) * self.segments)

    @property
    def tail_at(self) -> int:
        return self.pool + 128 * self.raw

    @property
    def trailer(self) -> int:
        return self.tail_at + _whole(self.tail)

    @property
    def nbytes(self) -> int:
        return self.trailer + _TRAILER.size

    @property
    def segments(self) -> int:
        """Number of segments per row."""
        return -(-self.cols // 128)


@dataclass(frozen=True, slots=True)
class Facts:
    """Fields of a block's trailer."""

    layout: Layout
    escapes: int
    zero_coded: int
    checksum: int

    @property
    def segments(self) -> int:
        """Number of segments in the block."""
        return self.layout.rows * self.layout.segments


class Fixed4(Codec):
    """Fixed-width code for bf16 exponents: 0.77 of the size, decoded as fast as a copy.

    Args:
        cols: Number of columns when a part is interpreted as a matrix; a multiple of 64. 128
            always works; with the number of columns of the weight matrix, a GPU kernel can read
            the block in place.

    Raises:
        CodecError: ``cols`` is not a positive multiple of 64.
    """

    def __init__(self, cols: int = 128) -> None:
        if cols <= 0 or cols % 64:
            raise CodecError(f"columns must be a positive multiple of 64, not {cols}")
        self._cols = cols

    def encode(self, raw: Bytes) -> Bytes:
        """Encode ``raw``, uint8 of any length, as a block.

        The result is empty if the block would not be shorter than ``raw``.
        """
        rows = len(raw) // 2 // self._cols
        weights = rows * self._cols
        tail = len(raw) - 2 * weights
        least = Layout(rows, self._cols, tail=tail)
        room = (len(raw) - 1 - least.nbytes) // 128
        if room < 0 or not rows:
            return np.empty(0, np.uint8)
        block = np.empty(len(raw) // 16 * 16, np.uint8)
        block[least.headers : least.pool] = 0  # clears the padding between sections
        found = np.zeros(2, np.int64)
        segments = kernel.encode(
            _as(np.uint16, raw[: 2 * weights]),
            rows,
            self._cols,
            block,
            block.view(np.uint32),
            least.headers,
            least.flags,
            least.pool,
            room,
            np.empty(256, np.int64),
            found,
        )
        if segments < 0:
            return block[:0]
        layout = Layout(rows, self._cols, segments, tail)
        block = block[: layout.nbytes]
        block[layout.tail_at :] = 0
        block[layout.tail_at : layout.tail_at + tail] = raw[2 * weights :]
        about = (rows, self._cols, segments, tail, *found.tolist(), layout.nbytes)
        _TRAILER.pack_into(block.data, layout.trailer, _MAGIC, _VERSION, *about, 0)
        words = block.view(np.uint32)
        total = kernel.checksum(words, 0, len(words) - 2)
        _TRAILER.pack_into(block.data, layout.trailer, _MAGIC, _VERSION, *about, total)
        return block

    def decode(self, coded: Bytes, out: Bytes) -> None:
        """Decode a block, encoded with any ``cols``, to the uint8 array ``out``.

        Raises:
            CodecError: The block is damaged, or its data does not have the size of ``out``.
        """
        if len(coded) < _TRAILER.size or len(coded) % 16:
            raise CodecError(f"{len(coded)} bytes are too short for a block")
        target = out[: len(out) // 2 * 2].view(np.uint16)
        weights = target if target.flags.aligned else np.empty_like(target)
        past_caches = target.nbytes >= _PAST_CACHES and weights.ctypes.data % _LINE == 0
        tail = kernel.decode(_as(np.uint32, coded), len(out), weights, past_caches)
        if tail < 0:
            raise _problem(tail, coded, len(out))
        if weights is not target:
            target[:] = weights
        if tail:
            at = inspect(coded).layout.tail_at
            out[len(out) - tail :] = coded[at : at + tail]


def _problem(result: int, coded: Bytes, wanted: int) -> CodecError:
    """Make the error for a block that ``kernel.decode`` rejected."""
    if result == kernel.NO_POOL_ROW:
        return CodecError("the block is damaged: a header names a missing raw segment")
    if result == kernel.WRONG_SUM:
        return CodecError("the block is damaged: its checksum is wrong")
    layout = inspect(coded).layout
    return CodecError(
        f"the block holds {2 * layout.rows * layout.cols + layout.tail} bytes, not {wanted}"
    )


def inspect(block: Bytes) -> Facts:
    """Read only a block's trailer.

    Raises:
        CodecError: ``block`` is not a complete block of this format.
    """
    size = len(block)
    if size < _TRAILER.size or size % 16:
        raise CodecError(f"{size} bytes are too short for a block")
    magic, version, rows, cols, raw, tail, escapes, zero_coded, nbytes, total = (
        _TRAILER.unpack_from(block.data, size - _TRAILER.size)
    )
    if magic != _MAGIC:
        raise CodecError("not a fixed4 block, or its trailer is damaged")
    if version != _VERSION:
        raise CodecError(f"the block has version {version}; supported: {_VERSION}")
    layout = Layout(rows, cols, raw, tail)
    if not cols or cols % 64 or nbytes != size or layout.nbytes != size:
        raise CodecError(f"the block's trailer is damaged: it does not match {size} bytes")
    return Facts(layout, escapes, zero_coded, total)


def _whole(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def _as(dtype: type[np.generic], array: Bytes) -> npt.NDArray[Any]:
    """View ``array`` as ``dtype``; copy ``array`` first if its memory is not aligned for numba."""
    numbers = array.view(dtype)
    return numbers if numbers.flags.aligned else array.copy().view(dtype)
