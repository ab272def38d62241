"""Numba utilities of the core: compilation, array directories, lowest scores and score kernels.

The package imports only ``core.types``.
"""
