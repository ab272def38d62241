"""Checks before an engine of vLLM starts, in seconds and without importing vLLM.

Imports ``features``, ``settings`` and ``versions``; neither ``server`` nor ``worker``.
"""
