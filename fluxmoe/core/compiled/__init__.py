"""Numba utilities of the core: compilation, array directories, lowest scores, score kernels.

Imports ``core.types`` only.
"""
