"""The memory manager, independent of any model, engine or plugin system.

Reading order: ``types`` and ``owner``, ``compiled`` (numba), ``transfer`` (stores and copies),
``memory`` (frames, stable addresses, and the tenants of a budget), ``policy`` (policy contracts and
guards against faults), ``paging`` (page table, event rule and pager), and ``arbitration`` (changes
to the split while serving). Each module or package imports only those listed before it.
``compiled`` and ``transfer`` do not import each other, and neither do ``memory`` and ``policy``.
"""
