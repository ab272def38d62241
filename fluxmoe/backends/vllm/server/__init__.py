"""Code for vLLM's API server process: launch, limits over HTTP, ``/metrics``.

Imports neither ``worker`` nor ``scheduler``.
"""
