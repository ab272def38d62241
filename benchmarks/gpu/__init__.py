"""Kit for a GPU machine without a network: transfer of packages, checks and measurements.

``bring`` collects the packages that such a machine lacks into transferable pieces, and checks and
unpacks them on that machine. Each experiment is one command that prints one table; ``python -m
benchmarks gpu --help`` lists the commands.
"""
