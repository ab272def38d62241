"""Histograms whose buckets were counted elsewhere.

Those of ``prometheus_client`` count one value a call, which is too slow for thousands a step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from fluxmoe.backends.vllm.metrics import BUCKETS, Metric


class Histograms(Collector):
    """All histograms of one process, per engine.

    Args:
        metrics: Which.
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
        """Add to the buckets of one engine, which has these values of vLLM's labels."""
        with self._lock:
            counts = self._counts[name].setdefault(tuple(map(str, engine)), {})
            for (bucket,), change in changes.items():
                counts[bucket] = counts.get(bucket, 0) + change

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """As they are now; without series before anything was added."""
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
