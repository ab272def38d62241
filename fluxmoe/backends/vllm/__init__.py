"""FluxMoE under vLLM: started by the entry point ``fluxmoe`` of the group ``vllm.general_plugins``.

vLLM calls ``register`` in each of its processes. It changes nothing for models that are not paged:
paging begins when ``additional_config["fluxmoe"]`` holds a configuration and the worker class is
FluxMoE's (``WORKER_CLS``).
"""

from __future__ import annotations

import logging

from fluxmoe.errors import UnsupportedVersionError

#: Value for vLLM's ``worker_cls`` / ``--worker-cls``.
WORKER_CLS = "fluxmoe.backends.vllm.worker.PagedCPUWorker"

_registered = False


def register() -> None:
    """Make vLLM build paged expert layers. Idempotent."""
    global _registered
    if _registered:
        return
    try:
        from fluxmoe.backends.vllm import compat, layer
    except UnsupportedVersionError as error:
        # Whoever does not page must not lose vLLM; whoever does names the worker class, which
        # raises this error again.
        logging.getLogger("vllm.fluxmoe").warning("FluxMoE is off: %s", error)
        return
    compat.tolerate_numba()
    layer.register()
    _registered = True
