"""Zstandard compression of byte planes.

A bf16 weight consists of a byte with the sign and most of the exponent, and a byte with the rest.
Exponents are similar; the rest is noise. The two kinds of bytes are therefore separated into byte
planes: the first plane is compressed to a fraction of its size, and the second is kept unchanged.
Splitting into planes is an old idea; for weights, see Hershcovitch et al., "ZipNN: Lossless
Compression for AI Models", arXiv 2411.05239. Zstandard (RFC 8878) is part of pyarrow, which FluxMoE
requires anyway.

The result is smaller than that of FluxMoE's `fixed4`, but decoding is more than ten times slower,
so the codec suits rarely needed pages.
"""

import struct
import zlib

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

import fluxmoe

__version__ = "0.1.0"
fluxmoe_plugin_api = 1

# Size of the part, size of the coded first plane, and CRC-32 of everything that follows.
_HEAD = struct.Struct("<QQI4x")


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    level: int = Field(default=3, ge=1, le=19, description="Of Zstandard: higher is smaller.")


class Zstd(fluxmoe.Codec):
    """Zstandard on the bytes with the exponents; the other bytes are kept unchanged."""

    def __init__(self, level=3):
        # Many threads share one codec; pyarrow's object keeps no state between calls.
        self._zstd = pa.Codec("zstd", compression_level=level)

    def encode(self, raw):
        high, low = raw[1::2], raw[0::2]
        coded = np.frombuffer(self._zstd.compress(high.tobytes(), asbytes=True), np.uint8)
        if len(coded) >= len(high):
            return np.zeros(0, np.uint8)  # no gain
        rest = np.concatenate([coded, low])
        head = _HEAD.pack(len(raw), len(coded), zlib.crc32(rest))
        return np.concatenate([np.frombuffer(head, np.uint8), rest])

    def decode(self, coded, out):
        if len(coded) < _HEAD.size:
            raise fluxmoe.CodecError(f"{len(coded)} bytes are too few")
        size, plane, checksum = _HEAD.unpack_from(coded[: _HEAD.size].tobytes())
        rest = coded[_HEAD.size :]
        if size != len(out) or len(rest) != plane + (size + 1) // 2:
            raise fluxmoe.CodecError(f"it holds {size} bytes in {len(coded)}, not {len(out)}")
        if zlib.crc32(np.ascontiguousarray(rest)) != checksum:
            raise fluxmoe.CodecError("the checksum is wrong")
        try:
            high = self._zstd.decompress(rest[:plane].tobytes(), size // 2, asbytes=True)
        except (pa.ArrowException, OSError) as error:
            raise fluxmoe.CodecError(f"zstd cannot read it: {error}") from error
        out[0::2] = rest[plane:]
        out[1::2] = np.frombuffer(high, np.uint8)


@fluxmoe.hookimpl
def fluxmoe_register_codecs(register):
    register("zstd", Zstd, Options)
