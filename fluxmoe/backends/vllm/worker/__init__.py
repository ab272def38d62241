"""Code for vLLM's worker processes: the paged worker, layers, KV cache and connector side.

Configurations and vLLM's command line refer to ``PagedCPUWorker`` in this package
(``settings.WORKER_CLS``). The class is imported on first use, together with torch and vLLM.
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
