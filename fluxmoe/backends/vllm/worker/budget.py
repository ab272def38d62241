"""The budget of a worker, which may have been started without ``fluxmoe serve``."""

from __future__ import annotations

from fluxmoe import sizes
from fluxmoe.backends import budget
from fluxmoe.backends.vllm.compat.plugin import VllmConfig
from fluxmoe.config import Config, Resolved
from fluxmoe.errors import ConfigError


def automatic(config: Config, vllm_config: VllmConfig) -> int:
    """Compute ``memory.budget: auto`` in bytes."""
    workers = vllm_config.parallel_config.world_size
    if workers > 1:
        # Each worker would measure less free memory than the workers started before it.
        raise ConfigError(
            f"auto is not supported for {workers} workers that start separately",
            where="memory.budget",
            fix="set a size, or start with `fluxmoe serve`",
        )
    return budget.automatic(config, vllm_config.model_config.model, workers)


def with_kv_target(config: Resolved, kv_bytes: int | None) -> Resolved:
    """Set the KV cache target of a configuration to --kv-cache-memory-bytes, if it is given."""
    target = config.memory.kv.target
    if kv_bytes is None or target == kv_bytes:
        return config
    if target is not None:
        raise ConfigError(
            f"memory.kv.target is {sizes.exact(target)}, but "
            f"--kv-cache-memory-bytes is {sizes.exact(kv_bytes)}",
            where="additional_config.fluxmoe",
            fix="set only one of them",
        )
    kv = config.memory.kv.model_copy(update={"target": kv_bytes})
    memory = config.memory.model_copy(update={"kv": kv})
    return config.model_copy(update={"memory": memory})
