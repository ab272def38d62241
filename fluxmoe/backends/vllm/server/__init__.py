"""Code for vLLM's API server process: its launch, limits over HTTP, and ``/metrics``.

This package imports neither ``worker`` nor ``scheduler``.
"""
