"""Splitting memory between experts and KV cache while serving: messages, moves, planning, control.

Imports every other folder of the core; none of them imports it.
"""
