"""FluxMoE's metrics in the process that serves ``/metrics``.

The histograms of ``prometheus_client`` count one value per call, which is too slow for thousands of
values per step. The histograms in this module accept precomputed buckets.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import prometheus_client
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from fluxmoe.backends.vllm import metrics
from fluxmoe.backends.vllm.compat.connector import KVConnectorPromMetrics
from fluxmoe.backends.vllm.compat.plugin import VllmConfig
from fluxmoe.backends.vllm.metrics import BUCKETS, METRICS, PASSING, Metric


class Histograms(Collector):
    """All histograms of one process, by engine.

    Args:
        metrics: The histograms' metrics.
        labelnames: Names of the labels that vLLM adds.
    """

    def __init__(self, metrics: Sequence[Metric], labelnames: Sequence[str]) -> None:
        self._metrics, self._labelnames = metrics, list(labelnames)
        self._counts: dict[str, dict[tuple[str, ...], dict[str, float]]] = {
            metric.name: {} for metric in metrics
        }
        self._lock = threading.Lock()  # /metrics may be rendered by another thread

    def add(
        self, name: str, engine: Sequence[object], changes: Mapping[tuple[str, ...], float]
    ) -> None:
        """Add changes to the buckets of an engine, identified by its values of vLLM's labels."""
        with self._lock:
            counts = self._counts[name].setdefault(tuple(map(str, engine)), {})
            for (bucket,), change in changes.items():
                counts[bucket] = counts.get(bucket, 0) + change

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Yield the current histograms, which have no series until values are added."""
        with self._lock:
            for metric in self._metrics:
                family = HistogramMetricFamily(metric.name, metric.help, labels=self._labelnames)
                for engine, counts in self._counts[metric.name].items():
                    total, buckets = 0.0, []
                    for end in BUCKETS:
                        total += counts.get(end, 0)
                        buckets.append((end, total))
                    family.add_metric(list(engine), buckets, counts.get("sum", 0))
                yield family


#: Collectors of this process. As in vLLM, a second engine in the process replaces them.
_collectors: list[Any] = []


class PagingProm(KVConnectorPromMetrics):
    """The metrics of all engines in the process that serves ``/metrics``."""

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
        self._metrics: dict[str, Any] = {}
        #: Values of the series that may be removed.
        self._passing: defaultdict[tuple[object, ...], float] = defaultdict(float)
        self._ages = Histograms([m for m in METRICS if m.kind == "histogram"], labelnames)
        prometheus_client.REGISTRY.register(self._ages)
        _collectors.append(self._ages)
        for metric in METRICS:
            if metric.kind == "histogram":
                continue
            options = {
                "name": metric.name,
                "documentation": metric.help,
                "labelnames": [*labelnames, *metric.labels],
            }
            if metric.kind == "counter":
                shown = self._counter_cls(**options)
            else:  # with several server processes, each gets part of the changes
                shown = self._gauge_cls(**options, multiprocess_mode="sum")
            self._metrics[metric.name] = shown
            _collectors.append(shown)

    def observe(self, transfer_stats_data: metrics.Samples, engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for name, samples in transfer_stats_data.items():
            if name not in self._metrics:
                self._ages.add(name, engine, samples)
                continue
            for labels, change in samples.items():
                self._metrics[name].labels(*engine, *labels).inc(change)
            if name in PASSING:
                self._remove_what_is_over(name, engine, samples)

    def _remove_what_is_over(
        self, name: str, engine: list[object], changes: Mapping[tuple[str, ...], float]
    ) -> None:
        for labels, change in changes.items():
            key = (name, *engine, *labels)
            self._passing[key] += change
            if self._passing[key] <= 0:
                del self._passing[key]
                self._metrics[name].remove(*engine, *labels)
