"""Checks before an engine of vLLM starts, in seconds and without importing vLLM."""
