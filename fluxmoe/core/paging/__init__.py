"""The page table, the event rule, the choice of victims, the pager, and what is measured of pages.

Imports every other room of the core except ``core.arbitration``.
"""
