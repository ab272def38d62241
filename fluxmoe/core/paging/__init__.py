"""The page table, the event rule, the choice of victims, the pager, and measures of pages.

Imports every other folder of the core except ``core.arbitration``.
"""
