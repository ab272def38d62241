"""The page table, the event rule, the choice of victims, the pager, and page statistics.

Imports all other folders of the core except ``core.arbitration``.
"""
