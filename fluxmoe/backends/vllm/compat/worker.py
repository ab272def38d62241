"""vLLM's MoE layers, the current step, and a worker's end of the KV connector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fluxmoe.backends.vllm.names import NAMES
from fluxmoe.core.types import Phase
from fluxmoe.errors import FluxMoEError
from fluxmoe.words import line

NAMES.require("worker")  # the imports below would raise an error without a remedy

from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.v1.core.kv_cache_utils import max_memory_usage_bytes


def errors_of_all(own: BaseException | None) -> list[Exception]:
    """List the errors of all tensor-parallel workers by rank. Each worker must call this function.

    Args:
        own: This worker's error, if any.
    """
    group = get_tp_group()
    if own is not None and not isinstance(own, FluxMoEError):
        own = RuntimeError(line(own, repr))  # the others may be unable to unpickle it
    found: list[Any] = [own]
    if group.world_size > 1:
        found *= group.world_size
        torch.distributed.all_gather_object(found, own, group=group.cpu_group)
    return [error for error in found if error is not None]


def is_last_worker() -> bool:
    """Return True in the tensor-parallel worker of the highest rank."""
    return bool(get_tp_group().is_last_rank)


def worker_connector() -> Any:
    """Return the KV connector of this worker process."""
    return kv_transfer_state.get_kv_transfer_group()


def drop_connector(connector: object) -> None:
    """Drop this process's connector if it is ``connector``, whose worker is gone.

    vLLM drops the connector when it shuts down a worker, but not if startup fails. The
    next engine in the same process would then find the old connector.
    """
    if kv_transfer_state._KV_CONNECTOR_AGENT is connector:
        kv_transfer_state.ensure_kv_transfer_shutdown()


def scheduled_requests(runner: Any) -> tuple[list[str], np.ndarray[Any, Any]]:
    """List the current step's requests in the order of their tokens, and their first tokens.

    Args:
        runner: A worker's ``model_runner``.

    Returns:
        The ids of R requests, and int32 ``[R + 1]``: the index of each request's first token,
        followed by the token count. A dummy run has no requests.
    """
    if not get_forward_context().attn_metadata:
        return [], np.zeros(1, np.int32)
    count = runner.input_batch.num_reqs
    return runner.input_batch.req_ids[:count], runner.query_start_loc.np[: count + 1].copy()


def step_phase(runner: Any) -> Phase:
    """Return prefill if a request of the current step computes more than one token, else decode.

    The phase is derived from the batch rather than from attention metadata, of which hybrid models
    have several kinds. A prompt of one token cannot be distinguished from decoding.
    """
    _, starts = scheduled_requests(runner)
    return Phase.PREFILL if np.diff(starts).max(initial=0) > 1 else Phase.DECODE


__all__ = [
    "CPUUnquantizedExperts",
    "RoutedExperts",
    "UnquantizedFusedMoEMethod",
    "drop_connector",
    "errors_of_all",
    "get_tensor_model_parallel_rank",
    "is_last_worker",
    "max_memory_usage_bytes",
    "scheduled_requests",
    "step_phase",
    "worker_connector",
]
