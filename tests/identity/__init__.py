"""The identity matrix: whatever FluxMoE pages must answer what the unpaged engine answers.

``cells`` says which combinations there are, ``requests`` what is asked, ``vllm_cells`` and
``torch_cells`` run one cell, ``limits`` tries what vLLM does not run on a CPU, ``report`` writes it
down. ``python -m benchmarks identity`` runs all cells, the tests a selection that covers them.
"""
