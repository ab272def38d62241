"""The vLLM backend, loaded by the entry point ``fluxmoe`` of the group ``vllm.general_plugins``.

vLLM calls ``register`` in each of its processes. The call has no effect on models that are not
paged, because paging is enabled by the settings of ``engine_options``. Only the worker class
imports the paging code. The folders ``server``, ``scheduler`` and ``worker`` contain the code for
one process each. ``child`` runs an engine in a child process, and ``compat`` imports vLLM's private
names. Only this package imports vLLM.
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
        # vLLM must keep working for users who do not page. Users who page name FluxMoE's worker
        # class, which raises this error again.
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
    """A handler that forwards to vLLM's log, which vLLM sets up only after calling plugins."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm.fluxmoe")
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def _log_as_vllm_does() -> None:
    """Show FluxMoE's messages, such as the reasons for moving memory, in vLLM's log and format.

    If the program has handlers of its own at the root logger, these handlers are used instead.
    Handlers that libraries add later, with their own formats, have no effect.
    """
    ours = logging.getLogger("fluxmoe")
    if not logging.getLogger().handlers:
        ours.addHandler(_ToVllm())
        ours.propagate = False  # like vLLM's own logger
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
