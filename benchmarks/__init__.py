"""Benchmarks: ratios measured side by side in one run, by commands that anyone can repeat."""
