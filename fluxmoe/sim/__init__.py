"""The simulator, which replays traces through the engine's own page table and event rule.

Reading order: ``events`` (a trace in memory, with the future for oracles), ``capacity`` (values of
``--capacity``) and ``simulator`` (the replay). Trace files are handled by ``fluxmoe.trace``.
The package imports the core, ``trace``, ``draw``, ``config`` and ``plugins``.
"""
