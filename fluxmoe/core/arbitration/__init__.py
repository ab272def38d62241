"""The split between experts and KV cache while serving: messages, moves, planning, the controller.

Imports every other room of the core, and none of them imports it.
"""
