"""FluxMoE's KV connector: the channel between vLLM's scheduler, its workers and ``/metrics``.

It moves no KV cache. vLLM calls a connector on both sides in every step and carries what it says
to the other side and, as statistics, to the process that serves ``/metrics``; nothing else in vLLM
does that for an extension, and it switches nothing off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import prometheus_client

from fluxmoe.backends.vllm import metrics
from fluxmoe.backends.vllm.compat.connector import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorPromMetrics,
    KVConnectorRole,
    KVConnectorStats,
    SupportsHMA,
)
from fluxmoe.backends.vllm.compat.plugin import VllmConfig
from fluxmoe.backends.vllm.metrics import METRICS, Meter
from fluxmoe.backends.vllm.settings import paging_config


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the scheduler tells the workers with each step: nothing yet."""


class PagingStats(KVConnectorStats):
    """Changes of metrics (``metrics.Samples``), of one step or of many, of one worker or of all."""

    data: metrics.Samples

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: PagingStats) -> PagingStats:
        metrics.add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, str]:
        return metrics.summary(self.data)

    def is_empty(self) -> bool:
        return not self.data


#: Collectors of this process, so that a second engine in it can replace them as it does vLLM's.
_collectors: list[Any] = []


class PagingProm(KVConnectorPromMetrics):
    """The metrics in the process that serves ``/metrics``, per engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Mapping[type, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        while _collectors:
            with contextlib.suppress(KeyError):
                prometheus_client.REGISTRY.unregister(_collectors.pop())
        self._metrics = {}
        for metric in METRICS:
            options = {
                "name": metric.name,
                "documentation": metric.help,
                "labelnames": [*labelnames, *metric.labels],
            }
            if metric.kind == "counter":
                shown = self._counter_cls(**options)
            else:  # several server processes: each has seen a part of the changes
                shown = self._gauge_cls(**options, multiprocess_mode="sum")
            self._metrics[metric.name] = shown
            _collectors.append(shown)

    def observe(self, transfer_stats_data: metrics.Samples, engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for name, samples in transfer_stats_data.items():
            for labels, change in samples.items():
                self._metrics[name].labels(*engine, *labels).inc(change)


class PagingConnector(KVConnectorBase_V1, SupportsHMA):
    """One object in the scheduler (role SCHEDULER) and one in each worker (role WORKER).

    Raises:
        ConfigError: The other settings that paging needs are missing.
    """

    #: No request waits for anything to be delivered.
    requires_kv_delivery = False

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: object
    ) -> None:
        paging_config(vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        self._meter: Meter | None = None

    # --- scheduler -------------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: object, num_computed_tokens: int
    ) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(
        self, request: object, blocks: object, num_external_tokens: int
    ) -> None:
        pass

    def build_connector_meta(self, scheduler_output: object) -> StepMetadata:
        return StepMetadata()

    def request_finished_all_groups(
        self, request: object, block_ids: object
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    # --- worker ----------------------------------------------------------------------------------

    def bind(self, meter: Meter) -> None:
        """Send what this meter says after each step. The worker calls it, with its own."""
        self._meter = meter

    def start_load_kv(self, forward_context: object, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: object, attn_metadata: object, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    # --- statistics ------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> PagingStats | None:
        """Called on both sides after each step; the scheduler's has no meter."""
        changes = self._meter.take() if self._meter is not None else {}
        return PagingStats(changes) if changes else None

    @classmethod
    def build_kv_connector_stats(cls, data: metrics.Samples | None = None) -> PagingStats:
        return PagingStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Mapping[type, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PagingProm:
        return PagingProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)
