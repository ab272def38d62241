"""The memory manager itself: knows no model, no engine and no plugin system.

Read it in this order: ``types``, ``owner`` and ``words``, ``compiled`` (numba), ``transfer``
(stores and copies), ``memory`` (frames, stable addresses, the tenants of one budget), ``policy``
(who decides, and what if they are wrong), ``paging`` (who lies where, the event rule, the pager),
``arbitration`` (the split while serving). Each imports those before it only.
"""
