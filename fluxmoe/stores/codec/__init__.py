"""Lossless codes for expert pages."""

from fluxmoe.stores.codec.fixed4 import Fixed4

__all__ = ["Fixed4"]
