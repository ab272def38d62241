"""The user's budget on this machine: the size of ``auto``, and checks of the free memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fluxmoe import machine, sizes
from fluxmoe.checkpoint import headers, weight_bytes
from fluxmoe.config import Config, FileStoreConfig, Resolved
from fluxmoe.errors import ConfigError
from fluxmoe.inventory import expert_tensor

#: ``memory.budget: auto`` as a fraction of the memory that the model's weights leave free.
SHARE = 0.5


@dataclass(frozen=True, slots=True)
class KVNeed:
    """Memory needed by the engine's KV cache, in bytes.

    Attributes:
        min: Minimum with which the engine can serve.
        max: Size that holds all requests that can run at once.
        reason: Explanation of ``min``, shown in errors.
        block: Size of one KV block, summed over all layers; 0 if unknown. The frame size is chosen
            to match this size.
    """

    min: int
    max: int
    reason: str
    block: int = 0


def require_free(budget: int, *, held: int = 0) -> None:
    """Reject a budget in bytes that exceeds the free memory plus the bytes already held.

    Raises:
        ConfigError: The budget exceeds this memory.
    """
    memory = machine.memory()
    available = memory.available + held
    if budget > available:
        given, free = sizes.apart(budget, available)
        raise ConfigError(
            f"a budget of {given} exceeds the {free} of free memory{_limited(memory)}",
            where="memory.budget",
            fix="lower it",
        )


def require_for_weights(config: Resolved, *, experts: int, others: int, workers: int = 1) -> None:
    """Reject a start whose weights and budgets together exceed the free memory.

    This function is called before the weights are loaded. A host store with neither a limit nor a
    codec keeps all experts as they were loaded.

    Args:
        config: The configuration, with the budget of one worker.
        experts, others: Bytes of the experts and of all other weights.
        workers: Number of workers that share the machine.

    Raises:
        ConfigError: The machine does not have enough free memory.
    """
    plain = config.stores[0].plain
    parts = {
        "the budget" if workers == 1 else f"{workers} budgets": config.memory.budget * workers,
        "experts in the host store": experts if plain else 0,
        "other weights": others,
    }
    memory, need = machine.memory(), sum(parts.values())
    if need > memory.available:
        needed, free = sizes.apart(need, memory.available)
        each = ", ".join(f"{sizes.shown(size)} for {name}" for name, size in parts.items() if size)
        raise ConfigError(
            f"{needed} is needed ({each}), but only {free} is free{_limited(memory)}",
            where="memory.budget, stores",
            fix="lower the budget" + (", or use a store of kind: file" if plain else ""),
        )


def _limited(memory: machine.MemoryRoom) -> str:
    return f" within the limit of {memory.limit}" if memory.limit else ""


def automatic(config: Config, model: str | None, workers: int) -> int:
    """Compute ``memory.budget: auto`` in bytes, in whole MiB.

    The workers share the machine. Weights count as used even before they are loaded, except the
    experts that the configured stores keep on disk.

    Args:
        config: The configuration.
        model: The model's folder.
        workers: Number of workers on this machine.

    Raises:
        ConfigError: The size of the model's weights is unknown, or the weights leave no memory
            free.
    """
    if model is None:
        raise ConfigError(
            "auto needs the model's path", where="memory.budget", fix="add model: FOLDER"
        )
    kept, free = weight_bytes(model) - _on_disk(config, model), machine.memory().available
    budget = int((free - kept) * SHARE / workers) >> 20 << 20
    if budget <= 0:
        in_memory = any(store.kind == "host" for store in config.stores)
        raise ConfigError(
            f"the weights of {model} need {sizes.shown(kept)}, and leave none of the "
            f"{sizes.shown(free)} of free memory",
            where="memory.budget",
            fix="use a store of kind: file" if in_memory else "free some memory",
        )
    return budget


def _on_disk(config: Config, model: str) -> int:
    """Return the bytes of a model's experts in file stores, assuming no compression."""
    rest = sum(
        tensor.nbytes
        for name, tensor in headers(Path(model))
        if expert_tensor(name, len(tensor.shape))
    )
    kept = 0
    for store in config.stores:
        share = rest if store.limit is None else min(rest, int(store.limit))
        rest -= share
        kept += share if isinstance(store, FileStoreConfig) else 0
    return kept
