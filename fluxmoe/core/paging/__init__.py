"""The page table, the event rule, the choice of victims, the pager, and page statistics.

The package imports all other folders of the core except ``core.arbitration``.
"""
