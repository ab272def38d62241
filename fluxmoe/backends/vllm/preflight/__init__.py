"""Checks before a vLLM engine starts, which take seconds and do not import vLLM.

This package imports ``features``, ``settings`` and ``versions``, but neither ``server`` nor
``worker``.
"""
