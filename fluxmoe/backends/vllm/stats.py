"""Changes to metrics, sent by workers and the scheduler to the server as connector statistics."""

from __future__ import annotations

from fluxmoe.backends.vllm import metrics
from fluxmoe.backends.vllm.compat.connector import KVConnectorStats


class PagingStats(KVConnectorStats):
    """Changes to metrics (``metrics.Samples``) over one or more steps and workers."""

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
