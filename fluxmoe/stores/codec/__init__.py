"""Lossless codes for expert pages. They come in by the same door as those of plugins."""

from __future__ import annotations

import numpy as np

from fluxmoe.core.types import Bytes
from fluxmoe.errors import CodecError
from fluxmoe.hookspecs import RegisterCodec, hookimpl
from fluxmoe.stores.codec.base import Codec


class NoCodec(Codec):
    """Keeps pages as they are."""

    def encode(self, raw: Bytes) -> Bytes:
        """Nothing: ``raw`` itself is to be kept."""
        return np.empty(0, np.uint8)

    def decode(self, coded: Bytes, out: Bytes) -> None:
        """There is nothing that could be decoded."""
        raise CodecError(f"{len(coded)} bytes are no code")


def make_fixed4() -> Codec:
    """Fixed-width code of the exponents of bf16 weights: 0.77 of the size, as fast as a copy."""
    from fluxmoe.stores.codec.fixed4 import Fixed4  # numba and LLVM, which take half a second

    return Fixed4()


@hookimpl
def fluxmoe_register_codecs(register: RegisterCodec) -> None:
    """Register the built-in codecs."""
    from fluxmoe.stores.codec.zipnn import ZipNN, ZipNNOptions  # pydantic; Codec comes without it

    register("none", NoCodec)
    register("fixed4", make_fixed4)
    register("zipnn", ZipNN, ZipNNOptions)
