"""The memory manager itself, independent of any model, engine or plugin system.

Reading order: ``types`` and ``owner``, ``compiled`` (numba), ``transfer`` (stores and
copies), ``memory`` (frames, stable addresses, the tenants of one budget), ``policy`` (contracts of
policies, guards against faulty ones), ``paging`` (page table, event rule, pager), ``arbitration``
(the split while serving). Each imports only those before it.
"""
