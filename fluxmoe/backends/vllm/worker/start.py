"""The log of a worker's start: the paged model, its budget, and the size of the KV cache."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import numpy as np

from fluxmoe.backends import summary
from fluxmoe.backends.runtime import Runtime
from fluxmoe.backends.vllm.compat.plugin import VllmConfig
from fluxmoe.backends.vllm.compat.worker import max_memory_usage_bytes
from fluxmoe.backends.vllm.settings import LIMITS_PATH
from fluxmoe.core.memory.kv import KVTenant
from fluxmoe.errors import InvariantError
from fluxmoe.plugins import Registry

logger = logging.getLogger("fluxmoe")


def log(
    runtime: Runtime,
    registry: Registry,
    vllm_config: VllmConfig,
    specs: Collection[Any],
    top_k: int,
) -> None:
    """Log the summary after the KV cache has been placed.

    Args:
        runtime: The worker's memory.
        registry: The registry that created the policies.
        vllm_config: vLLM's configuration.
        specs: vLLM's ``KVCacheSpec`` of each layer.
        top_k: Number of experts per token.
    """
    cache, config = runtime.memory.kv, runtime.config
    if cache is None:
        raise InvariantError("the KV cache has not been placed yet")
    more = [("KV cache", _kv(cache, vllm_config, specs))]
    if config.control:
        more.append(("control", f"{LIMITS_PATH} on this server; see fluxmoe limit --help"))
    logger.info(
        summary.start_block(
            runtime.partition,
            config,
            model=vllm_config.model_config.model,
            top_k=top_k,
            dynamic=runtime.dynamic,
            registry=registry,
            store_bytes=runtime.store.nbytes,
            more=more,
        )
    )


def _kv(cache: KVTenant, vllm_config: VllmConfig, specs: Collection[Any]) -> str:
    layout, longest = cache.layout, vllm_config.model_config.max_model_len
    one = max_memory_usage_bytes(vllm_config, specs)
    now = sum(len(layout.blocks_of(group)) for group in np.flatnonzero(cache.committed).tolist())

    def tokens(blocks: int) -> int:
        return int(blocks * layout.block_bytes / one * longest)

    said = f"{now} blocks, which hold {tokens(now):,} tokens"
    if layout.blocks > now:
        said += f"; up to {layout.blocks} blocks, {tokens(layout.blocks):,} tokens"
    return f"{said}; a request has at most {longest:,}"
