"""The page table, the event rule, victim selection, the pager, and page statistics.

Imports every other folder of the core except ``core.arbitration``.
"""
