"""The simulator: traces in, counters out, through the engine's own page table and event rule.

Reading order: ``events`` (a trace in memory, and its future for oracles), ``capacity`` (values of
``--capacity``), ``simulator`` (the replay). Traces themselves are in ``fluxmoe.trace``.
Imports the core, ``trace``, ``draw`` and ``plugins``.
"""
