"""Numba as the core uses it: compiling, arrays handed over as one, low scores, score kernels.

Imports ``core.types`` only.
"""
