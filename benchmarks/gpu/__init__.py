"""The kit for a GPU machine without a network: what to bring there, and what to measure there.

``bring`` collects what such a machine lacks into pieces that can be carried, and unpacks and checks
them there. Every experiment is one command with one table: ``python -m benchmarks gpu --help``.
"""
