"""Contracts of policies, and the guards that call policies, validate answers and contain faults.

The package imports ``core.types`` and ``core.compiled``. Built-in policies import only the
contracts.
"""
