"""numba beside vLLM."""

from __future__ import annotations

from llvmlite.binding import ffi


def tolerate_numba() -> None:
    """Let vLLM's CPU worker start although numba is loaded.

    Without Triton, vLLM 0.32 looks for kernels to override by calling ``vars()`` on everything it
    finds in any module. llvmlite's library object answers every attribute, ``__dict__`` included,
    with a function, and the start fails. Here it is given a dictionary to answer with.
    """
    ffi.lib._fntab.setdefault("__dict__", {})
