"""Integrations of the pager with inference engines: ``torch`` and ``vllm``.

``runtime`` assembles one worker, ``budget`` divides the worker's memory, ``stores`` creates the
configured stores, ``op`` is the paging operator, ``selfcheck`` tests kernels, and ``names`` asserts
that libraries have the names used here. This package imports plugins, traces and the packages below
them, but never the simulator.
"""
