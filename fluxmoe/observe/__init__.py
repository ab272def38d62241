"""Observation of a running server through its ``/metrics``.

Imports the core; no engine.
"""
