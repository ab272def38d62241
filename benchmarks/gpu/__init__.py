"""Kit for a GPU machine without a network: required files, and measurements.

``bring`` collects the packages that such a machine lacks into transferable pieces, and checks and
unpacks them there. Each experiment is one command with one table: ``python -m benchmarks gpu
--help``.
"""
