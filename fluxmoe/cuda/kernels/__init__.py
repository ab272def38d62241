"""GPU kernels in Triton: the fused MoE over paged experts, and kernels that move and choose pages.

Importing this package needs neither Triton nor a GPU. ``tiles`` and ``choice`` are plain Python,
``align`` is plain torch; every other module imports Triton through ``language``, which says what to
install if it is missing (docs/concepts/kernels.md).
"""
