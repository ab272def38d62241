"""What the machine has, and what a budget of ``auto`` is on it."""

from __future__ import annotations

import psutil

from fluxmoe.checkpoint import weight_bytes
from fluxmoe.config import Config
from fluxmoe.errors import ConfigError

#: ``memory.budget: auto`` is this part of the memory that is free beside the model's weights.
SHARE = 0.5


def require_free(budget: int, *, held: int = 0) -> None:
    """Refuse a budget, in bytes, beyond the memory that is free, or that it holds already.

    Raises:
        ConfigError: Names both.
    """
    available = psutil.virtual_memory().available + held
    if budget > available:
        raise ConfigError(
            f"a budget of {budget} bytes is more than the {available} bytes that are free",
            where="memory.budget",
            fix="lower it",
        )


def resolved(config: Config, *, model: str | None, workers: int) -> Config:
    """The configuration with a budget in bytes, whole MiB, where it was ``auto``.

    Workers share the machine. Weights that are not loaded yet are counted as used, all of them:
    vLLM loads them before the stores take the experts over.

    Args:
        config: As the user wrote it.
        model: The model's folder.
        workers: How many there are on this machine.

    Raises:
        ConfigError: The size of the model's weights is not known, or nothing is left beside them.
    """
    if config.memory.budget is not None:
        return config
    if model is None:
        raise ConfigError(
            "auto needs to know the model", where="memory.budget", fix="add model: FOLDER"
        )
    weights, free = weight_bytes(model), psutil.virtual_memory().available
    budget = int((free - weights) * SHARE / workers) >> 20 << 20
    if budget <= 0:
        raise ConfigError(
            f"{free} bytes are free, the weights of {model} need {weights}: nothing is left",
            where="memory.budget",
            fix="free some memory, or choose a smaller model",
        )
    memory = config.memory.model_copy(update={"budget": budget})
    return config.model_copy(update={"memory": memory})
