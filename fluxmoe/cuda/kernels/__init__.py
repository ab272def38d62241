"""GPU kernels in Triton: the fused MoE over paged experts, and what moves and chooses pages.

Importing this package needs neither Triton nor a GPU. ``tiles`` and ``choice`` are plain Python,
``align`` is plain torch; every other module imports Triton through ``language``, which says what to
install where it is missing (docs/kernels.md).
"""
