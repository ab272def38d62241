"""Import of Triton for the kernel modules; if Triton is missing, the error names the remedy."""

from __future__ import annotations

from fluxmoe.errors import MissingDependencyError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingDependencyError(
        "the GPU kernels need Triton, which is not installed",
        fix="pip install triton (a CUDA build of torch brings a matching version)",
    ) from error

__all__ = ["tl", "triton"]
