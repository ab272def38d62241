"""The demo: stock vLLM and FluxMoE at the same memory budget, side by side.

Imports ``backends`` and the packages below it.
"""
