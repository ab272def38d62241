"""Frames, stable addresses, and the two tenants that share a worker's budget.

Imports ``core.types``, ``core.owner``, ``core.compiled`` and ``core.transfer``.
"""
