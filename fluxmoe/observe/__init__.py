"""Observation of a running server through its ``/metrics`` endpoint.

The package imports the core, but no engine.
"""
