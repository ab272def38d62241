"""Contracts of policies, and the guards that call them: answers checked, faults contained.

Imports ``core.types``, ``core.compiled`` and ``core.transfer``. Built-in policies import only the
contracts.
"""
