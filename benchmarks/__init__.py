"""Benchmarks: ratios measured side by side in one run, by repeatable commands."""
