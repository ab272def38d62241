"""Names shared by tests of recordings: policies, counters and rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from fluxmoe import plugins

REGISTRY = plugins.load()
#: Every built-in policy that an engine can run.
POLICIES = [
    name
    for name in REGISTRY.names("eviction")
    if not REGISTRY.create("eviction", name).needs_future
]
COUNTERS = ("events", "accesses", "hits", "misses", "evictions", "released", "prefetch_hits",
            "loads_demand", "loads_prefetch", "bytes_demand", "bytes_prefetch")  # fmt: skip


def table(path: Path) -> list[dict]:
    """Read the rows of a trace."""
    return pq.ParquetFile(path).read().to_pylist()
