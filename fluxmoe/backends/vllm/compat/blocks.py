"""vLLM's pool of KV blocks, on the scheduler's side."""

from __future__ import annotations

from vllm.v1.core.block_pool import BlockPool

__all__ = ["BlockPool"]
