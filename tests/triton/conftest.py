"""Tests of the kernels, for `make test-triton`: interpreted, and compiled for absent GPUs."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# `make test` has no Triton, because vLLM behaves differently if it can import Triton.
collect_ignore_glob: list[str] = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("test_*.py")
elif not INTERPRETED:
    collect_ignore_glob.append("test_interpreted_*.py")
else:
    collect_ignore_glob.append("test_compiled*.py")


@pytest.fixture(autouse=True, scope="session")
def _bf16_products() -> None:
    """Work around Triton 3.9's interpreter, which multiplies bf16 bit patterns (triton#11584)."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def floats(handle: Any) -> Any:
        # BLAS sums a transposed operand in another order; a GPU does not.
        data = np.ascontiguousarray(handle.data)
        if handle.dtype.scalar == tl.bfloat16:
            return (data.astype(np.uint32) << 16).view(np.float32)
        return data

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        with np.errstate(all="ignore"):
            product = np.matmul(floats(a), floats(b), dtype=d.data.dtype)
            return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Get vLLM's module with the fused MoE kernel, from which vLLM hides Triton without a GPU."""
    fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")
    import triton
    import vllm.triton_utils

    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", True)
    monkeypatch.setattr(fused_moe, "triton", triton)
    monkeypatch.setattr(fused_moe, "tl", triton.language)
    for name in ("write_zeros_to_output", "fused_moe_kernel"):
        monkeypatch.setattr(fused_moe, name, triton.jit(getattr(fused_moe, name)))
    return fused_moe
