"""The vLLM settings that enable paging.

This module does not import vLLM, so that commands work without vLLM.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fluxmoe.config import parse
from fluxmoe.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from fluxmoe.backends.vllm.compat.plugin import VllmConfig

#: Value for vLLM's ``worker_cls`` / ``--worker-cls``.
WORKER_CLS = "fluxmoe.backends.vllm.worker.PagedCPUWorker"
#: Name under which the entry point registers FluxMoE's KV connector.
CONNECTOR = "FluxMoEConnector"
#: Path on the server at which operator limits are read and set.
LIMITS_PATH = "/v1/fluxmoe/limits"


def engine_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make the keyword arguments for ``vllm.LLM`` that enable paging.

    Args:
        settings: FluxMoE's configuration (docs/reference/configuration.md) without ``model``
            and ``vllm``. Policies are given by name.

    Raises:
        ConfigError: ``settings`` is not a valid configuration.
    """
    budget = parse(settings, where="additional_config.fluxmoe").memory.budget
    if budget is None:  # auto
        return _options(settings)
    return _options({**settings, "memory": {**settings["memory"], "budget": int(budget)}})


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "worker_cls": WORKER_CLS,
        "additional_config": {"fluxmoe": settings},
        # The connector transfers no KV cache; this role disables no features.
        "kv_transfer_config": {"kv_connector": CONNECTOR, "kv_role": "kv_producer"},
    }


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Make the options of ``vllm serve`` that enable paging."""
    words: list[str] = []
    for key, value in _options(settings).items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        words += [f"--{key.replace('_', '-')}", text]
    return words


def moving_latent_attention() -> UnsupportedError:
    """Make the error for a dynamic split with a model that uses multi-head latent attention."""
    return UnsupportedError(
        "the KV cache of multi-head latent attention (MLA) cannot grow or shrink while serving",
        where="arbitration",
        fix="set arbitration: fixed and control: false",
    )


def paging_config(config: VllmConfig) -> object | None:
    """Return FluxMoE's configuration as passed to vLLM, not validated; None for a stock engine.

    Raises:
        ConfigError: Only some of the settings that paging needs are given.
    """
    additional = config.additional_config
    settings: object | None = additional.get("fluxmoe") if isinstance(additional, dict) else None
    transfer = config.kv_transfer_config
    connector = transfer.kv_connector if transfer is not None else None
    given = {
        "--worker-cls": config.parallel_config.worker_cls == WORKER_CLS,
        "--additional-config": settings is not None,
        "--kv-transfer-config": connector == CONNECTOR,
    }
    if not any(given.values()):
        return None
    if not all(given.values()):
        words = flags({"memory": {"budget": "SIZE"}})
        pairs = zip(words[::2], words[1::2], strict=True)
        missing = [shlex.join(pair) for pair in pairs if not given[pair[0]]]
        raise ConfigError(
            "vLLM was given only some of the settings that paging needs",
            where=", ".join(flag for flag, there in given.items() if there),
            fix=f"add {' '.join(missing)}; `fluxmoe serve --print-command` prints a full command",
        )
    return settings
