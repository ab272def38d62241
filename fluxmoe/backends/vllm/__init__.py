"""FluxMoE under vLLM: started by the entry point ``fluxmoe`` of the group ``vllm.general_plugins``.

vLLM calls ``register`` in each of its processes. It changes nothing for models that are not paged:
paging begins when ``additional_config["fluxmoe"]`` holds a configuration and the worker class is
FluxMoE's (``WORKER_CLS``).
"""

from __future__ import annotations

#: Value for vLLM's ``worker_cls`` / ``--worker-cls``.
WORKER_CLS = "fluxmoe.backends.vllm.worker.PagedCPUWorker"

_registered = False


def register() -> None:
    """Make vLLM build paged expert layers. Idempotent."""
    global _registered
    if not _registered:
        _registered = True
        from fluxmoe.backends.vllm import compat, layer

        compat.tolerate_numba()
        layer.register()
