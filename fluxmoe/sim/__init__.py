"""The simulator: traces in, counters out, through the engine's own page table and event rule.

Read it in this order: ``events`` (a trace in memory, and its future for oracles), ``capacity``
(what ``--capacity`` may say), ``simulator`` (the replay). Traces themselves are in
``fluxmoe.trace``.
"""
