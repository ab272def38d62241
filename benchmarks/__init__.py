"""Benchmarks: repeatable commands that measure ratios side by side in one run."""
