"""Stores of clean copies of expert pages: host memory and page files, both with optional codec.

Imports the core, ``checkpoint`` and ``hookspecs``.
"""
