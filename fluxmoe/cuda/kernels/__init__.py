"""GPU kernels in Triton: fused MoE over paged experts, and kernels that copy and choose pages.

Importing this package requires neither Triton nor a GPU. ``tiles`` and ``choice`` are plain Python,
and ``align`` is plain torch; all other modules import Triton through ``language``, which raises an
error with installation instructions if Triton is missing (docs/concepts/kernels.md).
"""
