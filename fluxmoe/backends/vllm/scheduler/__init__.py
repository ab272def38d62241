"""Code that runs beside vLLM's scheduler in the engine process: arbitration, blocks and requests.

This package imports the core, ``config``, ``compat`` and ``names``, but not ``worker`` or
``server``.
"""
