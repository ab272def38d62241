"""The split of memory between experts and KV cache: messages, moves, planning and control.

The package imports every other folder of the core; none of those folders imports this package.
"""
