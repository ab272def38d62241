"""The identity matrix: paged models must give the same outputs as the unpaged engine.

``cells`` defines the combinations, ``requests`` the requests, ``vllm_cells`` and ``torch_cells``
run one cell, ``limits`` tries features that vLLM does not support on a CPU, and ``report`` formats
the results. ``python -m benchmarks identity`` runs all cells; the tests run a covering selection.
"""
