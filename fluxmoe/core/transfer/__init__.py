"""Copies of pages into slots: the contract of stores, the order of copies, threads that copy.

Imports ``core.types`` only.
"""
