"""Engines that run in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM


def scheduler_of(llm: LLM) -> Any:
    """The scheduler of an engine that runs in this process; ``running`` are its requests."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def kv_info(llm: LLM) -> dict[str, int]:
    """Blocks and block size of the KV cache, in-process engines only."""
    config = scheduler_of(llm).kv_cache_config
    return {
        "kv_blocks": config.num_blocks,
        "kv_bytes": max((tensor.size for tensor in config.kv_cache_tensors), default=0),
        "block_size": scheduler_of(llm).block_size,
    }
