"""Copies of pages into slots: the store contract, the order of copies, and thread pools.

The package imports only ``core.types`` and ``core.owner``.
"""
