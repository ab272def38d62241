"""The simulator: replays traces through the engine's own page table and event rule.

Reading order: ``events`` (a trace in memory, with the future for oracles), ``capacity`` (values of
``--capacity``), ``simulator`` (the replay). Traces are in ``fluxmoe.trace``.
Imports the core, ``trace``, ``draw`` and ``plugins``.
"""
