"""The split of memory between experts and KV cache: messages, moves, planning and control.

The package imports ``core.memory``, ``core.policy`` and ``core.paging``. No other folder of the
core imports this package.
"""
