"""Observation of a running server through its ``/metrics``."""
