"""A workaround for numba in vLLM's processes."""

from __future__ import annotations

from llvmlite.binding import ffi


def tolerate_numba() -> None:
    """Let vLLM's CPU worker start with numba loaded.

    Without Triton, vLLM 0.32 searches for kernels to override by calling ``vars()`` on every object
    in every module. llvmlite's library object returns a function for every attribute, including
    ``__dict__``, so the worker would fail to start. This function makes the object return a
    dictionary.
    """
    ffi.lib._fntab.setdefault("__dict__", {})
