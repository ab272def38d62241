"""Frames, stable addresses, and the two tenants that share a worker's budget.

The package imports only ``core.types`` and ``core.owner``.
"""
