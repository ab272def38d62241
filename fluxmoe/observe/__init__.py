"""Observation of a running server through its ``/metrics``.

The package imports the core, but no engine.
"""
