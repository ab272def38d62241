"""Numba utilities of the core: compilation, directories, lowest scores, score kernels and copies.

The package imports only ``core.types``.
"""
