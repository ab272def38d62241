"""The memory manager itself: knows no model, no engine and no plugin system.

Read it in this order: ``types`` (words), ``frames`` (the ledger), ``substrate`` and ``arena``
(memory behind stable addresses), ``pages`` (who lies where), ``policy`` and ``guard`` (who decides,
and what if they are wrong), ``order`` and ``event`` (the event rule), ``transfer`` (copies),
``pager`` (all of that for one layer), ``tenants``, ``planner`` and ``arbiter`` (one budget).
"""
