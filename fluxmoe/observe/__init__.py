"""Observation of a running server from outside, through its ``/metrics``."""
