"""Code for vLLM's API server process: checks and launch, limits over HTTP, ``/metrics``.

Imports neither ``worker`` nor ``scheduler``.
"""
