"""Lossless codes for expert pages. They come in by the same door as those of plugins."""

from __future__ import annotations

from fluxmoe.core.codec import Codec
from fluxmoe.hookspecs import RegisterCodec, hookimpl
from fluxmoe.stores.codec.zipnn import ZipNN, ZipNNOptions


def make_fixed4() -> Codec:
    """Fixed-width code of the exponents of bf16 weights: 0.77 of the size, as fast as a copy."""
    from fluxmoe.stores.codec.fixed4 import Fixed4  # numba and LLVM, which take half a second

    return Fixed4()


@hookimpl
def fluxmoe_register_codecs(register: RegisterCodec) -> None:
    """Register the built-in codecs."""
    register("fixed4", make_fixed4)
    register("zipnn", ZipNN, ZipNNOptions)
