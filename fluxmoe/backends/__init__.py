"""Integrations of the pager with inference engines: ``torch`` and ``vllm``.

``runtime`` assembles one worker, ``budget`` divides its memory, ``stores`` creates the configured
stores, ``op`` is the paging operator, ``selfcheck`` tests kernels, ``names`` asserts the names of
libraries. Imports plugins, traces and the packages below them; never the simulator.
"""
