"""Checks before a server starts, for errors that it would show late or deep in its log."""

from __future__ import annotations

import errno
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxmoe import checkpoint
from fluxmoe.backends.budget import require_free
from fluxmoe.backends.vllm.settings import moving_latent_attention
from fluxmoe.config import Resolved
from fluxmoe.errors import ConfigError

_CACHE = "VLLM_CACHE_ROOT"


def check(config: Resolved, environment: Mapping[str, str], *, moving: bool) -> None:
    """Refuse a start that cannot succeed.

    Args:
        config: The configuration.
        environment: The server's environment variables.
        moving: True if the split between experts and KV cache may change while serving.

    Raises:
        CheckpointError: The model's files are missing or damaged.
        ConfigError: The budget exceeds free memory, the port is in use, or the given cache folder
            cannot be written.
        UnsupportedError: The KV cache of this model cannot be moved.
    """
    require_free(config.memory.budget)
    options = {key.replace("_", "-"): value for key, value in config.vllm.items()}
    if config.model is not None and options.get("load-format", "auto") in checkpoint.LOAD_FORMATS:
        checkpoint.require_readable(config.model)
    if moving and config.model is not None and environment.get("VLLM_MLA_DISABLE", "0") == "0":
        _require_plain_attention(Path(config.model))
    if "uds" not in options:
        _require_open(options.get("host") or "", options.get("port", 8000))
    if _CACHE in environment:
        _require_writable(Path(environment[_CACHE]).expanduser())


def _require_plain_attention(folder: Path) -> None:
    """Refuse a checkpoint with MLA, detected by ``kv_lora_rank``; the worker refuses the others."""
    path = folder / "config.json"
    if path.is_file():
        config = checkpoint.read_map(path)
        if config.get("text_config", config).get("kv_lora_rank") is not None:
            raise moving_latent_attention()


def _require_open(host: Any, port: Any) -> None:
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 2**16:
        raise ConfigError(
            f"not a valid port: {port!r}", where="vllm.port", fix="use a number from 1 to 65535"
        )
    family = socket.AF_INET6 if ":" in str(host) else socket.AF_INET
    with socket.socket(family) as probe:
        # As in vLLM, so that sockets of a server that has just ended do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(host), port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} is in use",
                    where="vllm.port",
                    fix="choose another port, or stop the server that listens there",
                ) from error
            raise ConfigError(
                f"cannot listen on {host or 'any address'}, port {port}: {error.strerror}",
                where="vllm.host, vllm.port",
            ) from error


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}",
            where=_CACHE,
            fix="name a writable folder, or unset the variable",
        ) from error
