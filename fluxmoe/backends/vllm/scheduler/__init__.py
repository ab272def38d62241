"""Code for vLLM's engine process, next to its scheduler: arbitration, KV blocks, requests.

Imports the core, ``config``, ``compat`` and ``names``; not ``worker`` or ``server``.
"""
