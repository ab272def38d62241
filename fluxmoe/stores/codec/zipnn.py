"""The codec ``zipnn``: the entropy coder of the package ``zipnn``, for rarely needed pages.

Its blocks are smaller than those of ``fixed4``, but decoding is much slower. The decoder is C code
that does not validate its input. Therefore this module puts 16 bytes before the package's output:
the length of that output (u64), its CRC-32 (u32), and a zero (u32).
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from fluxmoe.core.types import Bytes
from fluxmoe.errors import CodecError, MissingDependencyError
from fluxmoe.stores.codec.base import Codec

_HEAD = struct.Struct("<QIxxxx")


class ZipNNOptions(BaseModel):
    """Options of ``zipnn``."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights; data of other types is encoded too, but hardly gets smaller."""


class ZipNN(Codec):
    """Huffman code of the exponents: 0.67 of the size, decoded at a quarter of a copy's speed.

    Args:
        dtype: Type of the weights.

    Raises:
        MissingDependencyError: The package ``zipnn`` is not installed.
    """

    def __init__(self, dtype: str = "bfloat16") -> None:
        try:
            import zipnn
        except ImportError as error:
            raise MissingDependencyError(
                f"the codec zipnn needs the package zipnn: {error}",
                where="codec",
                fix="pip install 'fluxmoe[zipnn]' or use the codec fixed4",
            ) from error
        self._package, self._dtype = zipnn, dtype

    def encode(self, raw: Bytes) -> Bytes:
        """Encode ``raw`` as a block; the result is empty if ``raw`` is."""
        if not len(raw):
            return np.empty(0, np.uint8)
        coded = self._coder().compress(bytearray(raw))  # a copy, because zipnn modifies its input
        head = _HEAD.pack(len(coded), zlib.crc32(coded))
        return np.frombuffer(head + coded, np.uint8)

    def decode(self, coded: Bytes, out: Bytes) -> None:
        """Decode a block made by ``encode``.

        Raises:
            CodecError: The block is damaged, or its data does not have the size of ``out``.
        """
        if len(coded) < _HEAD.size:
            raise CodecError(f"{len(coded)} bytes are too short for a block")
        length, checksum = _HEAD.unpack_from(coded.data)
        rest = coded[_HEAD.size :]
        if coded[12 : _HEAD.size].any() or length != len(rest) or checksum != zlib.crc32(rest.data):
            raise CodecError("the block is damaged: wrong length or checksum")
        raw = self._coder().decompress(rest.tobytes())
        if len(raw) != len(out):
            raise CodecError(f"the block holds {len(raw)} bytes, not {len(out)}")
        out[:] = np.frombuffer(raw, np.uint8)

    def _coder(self) -> Any:
        # Each call gets a new coder: coders keep state per array, so threads must not share one.
        return self._package.ZipNN(input_format="byte", bytearray_dtype=self._dtype)
