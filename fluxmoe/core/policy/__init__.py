"""Contracts of policies, and the guards that call them, validate answers and contain faults.

Imports ``core.types``, ``core.compiled`` and ``core.transfer``. Built-in policies import only the
contracts.
"""
