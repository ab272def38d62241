"""The split between experts and KV cache while serving: messages, moves, planning, the controller.

Imports every other folder of the core; none of them imports it.
"""
