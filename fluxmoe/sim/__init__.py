"""The simulator: traces in, counters out, through the engine's own page table and event rule.

Read it in this order: ``trace`` (the file format), ``events`` (a trace in memory, and its future
for oracles), ``synth`` (traces without a model), ``capacity`` (what ``--capacity`` may say),
``simulator`` (the replay).
"""
