"""Copies of pages into slots: the store contract, the order of copies, and thread pools.

Imports ``core.types`` and ``core.owner``.
"""
