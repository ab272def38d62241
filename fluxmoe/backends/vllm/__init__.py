"""The vLLM backend, loaded by the entry point ``fluxmoe`` of the group ``vllm.general_plugins``.

vLLM calls ``register`` in each of its processes. It has no effect on models that are not paged:
paging is enabled by the settings of ``engine_options``. Only the worker class imports the paging
code. One folder per process: ``server``, ``scheduler``, ``worker``; ``child`` runs an
engine in a child process, ``compat`` imports vLLM's private names.
"""

from __future__ import annotations

import logging
import sys

from fluxmoe.backends.vllm.settings import CONNECTOR, WORKER_CLS, engine_options
from fluxmoe.errors import UnsupportedVersionError

__all__ = ["WORKER_CLS", "engine_options", "register"]

_registered = False


def register() -> None:
    """Register FluxMoE's settings with vLLM. Idempotent."""
    global _registered
    if _registered:
        return
    try:
        from fluxmoe.backends.vllm import half_configured
        from fluxmoe.backends.vllm.compat.plugin import KVConnectorFactory
    except UnsupportedVersionError as error:
        # vLLM must keep working for users who do not page; those who do name our worker class,
        # which raises this error again.
        logging.getLogger("vllm.fluxmoe").warning("FluxMoE is off: %s", error)
        return
    half_configured.register()
    KVConnectorFactory.register_connector(
        CONNECTOR, "fluxmoe.backends.vllm.connector", "PagingConnector"
    )
    _log_as_vllm_does()
    if "llvmlite" in sys.modules:
        from fluxmoe.backends.vllm.compat.numba import tolerate_numba

        tolerate_numba()
    _registered = True


class _ToVllm(logging.Handler):
    """Forwards to vLLM's log, which vLLM sets up only after calling plugins."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm.fluxmoe")
        # A root handler already shows the record; vLLM's own logger does not propagate.
        if not logging.getLogger().handlers and theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def _log_as_vllm_does() -> None:
    """Show FluxMoE's messages, such as reasons for moves, in vLLM's log."""
    ours = logging.getLogger("fluxmoe")
    ours.addHandler(_ToVllm())
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
