"""Code for vLLM's worker processes: paged worker, layers, KV cache, end of the connector.

Configurations and vLLM's command line refer to ``PagedCPUWorker`` by this package
(``settings.WORKER_CLS``); it is imported on first use, with torch and vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxmoe.backends.vllm.worker.cpu import PagedCPUWorker as PagedCPUWorker


def __getattr__(name: str) -> Any:
    if name == "PagedCPUWorker":
        from fluxmoe.backends.vllm.worker.cpu import PagedCPUWorker

        return PagedCPUWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
