"""Numba utilities of the core: compiling, directories of arrays, lowest scores, score kernels.

Imports ``core.types`` only.
"""
