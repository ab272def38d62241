"""Access to vLLM engines: in this process, or through the server's client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxmoe.backends.vllm.names import NAMES

NAMES.require("engine")  # the imports below would raise an error without a remedy

from vllm import SamplingParams

if TYPE_CHECKING:
    from vllm import LLM


def scheduler_of(llm: LLM) -> Any:
    """Return the scheduler, whose ``running`` lists requests; None if it is in another process."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return None if core is None else core.scheduler


def engine_info(llm: LLM) -> dict[str, int]:
    """Return the KV cache's sizes and the features in use; ``kv_bytes`` only if in-process."""
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


def client_of(state: Any) -> Any:
    """Return the engine client in the ``app.state`` of vLLM's server."""
    NAMES.require_on("app.state", state)
    return state.engine_client


async def collective_rpc(client: Any, method: str, argument: object) -> list[Any]:
    """Call a method of each worker, and return the workers' answers."""
    NAMES.require_on("AsyncLLM", client)
    answers: list[Any] = await client.collective_rpc(method, args=(argument,))
    return answers


def is_idle(client: Any) -> bool:
    """Return True if no request is in flight."""
    return not client.output_processor.has_unfinished_requests()


async def run_a_step(client: Any, name: str) -> None:
    """Make an idle engine take a few steps by requesting two tokens, and discard the tokens."""
    params = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
    async for _ in client.generate({"prompt_token_ids": [0]}, params, name):
        pass
