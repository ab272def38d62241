"""The memory manager, independent of any model, engine or plugin system.

Reading order: ``types`` and ``owner``, ``compiled`` (numba), ``transfer`` (stores and copies),
``memory`` (frames, stable addresses, the tenants of a budget), ``policy`` (policy contracts,
guards against faults), ``paging`` (page table, event rule, pager), ``arbitration`` (the split
while serving). Each imports only the ones before it; ``compiled`` and ``transfer``, and ``memory``
and ``policy``, do not import each other.
"""
