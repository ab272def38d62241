"""Copies of pages into slots: the contract of stores, the order of copies, and copy threads.

Imports ``core.types`` and ``core.owner``.
"""
