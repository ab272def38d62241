"""Worker processes: the paged worker, its layers, its KV cache and its end of the connector.

``PagedCPUWorker`` is found here by the name that configurations and vLLM's command line give
(``settings.WORKER_CLS``); it is imported only then, with torch and vLLM.
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
