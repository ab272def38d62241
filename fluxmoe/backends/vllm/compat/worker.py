"""The worker, its KV cache and its end of the KV connector."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.core.kv_cache_utils import max_memory_usage_bytes
from vllm.v1.worker.cpu_worker import CPUWorker


def kv_allocated(worker: CPUWorker) -> int:
    """Bytes of the KV buffers that a worker has really allocated."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in worker.model_runner.kv_caches
    }
    return sum(storages.values())


def worker_connector() -> Any:
    """The KV connector of this worker process."""
    return kv_transfer_state.get_kv_transfer_group()


def drop_connector(connector: object) -> None:
    """Forget a connector whose worker is gone, if it is still this process's.

    vLLM does so when it shuts a worker down, but not when a start fails later on. An engine that
    is started in the same process afterwards would meet the old connector.
    """
    if kv_transfer_state._KV_CONNECTOR_AGENT is connector:
        kv_transfer_state.ensure_kv_transfer_shutdown()


__all__ = [
    "CPUWorker",
    "drop_connector",
    "kv_allocated",
    "max_memory_usage_bytes",
    "worker_connector",
]
