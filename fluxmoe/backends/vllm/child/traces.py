"""Recording of traces from a vLLM engine in a child process."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from fluxmoe.core.types import Phase
from fluxmoe.errors import FluxMoEError

# Number of batches submitted together if a recording may end early. The engine completes all of
# them. With a larger number, more batches are full.
_BATCHES = 4


def record(
    engine: ChildEngine,
    prompts: Sequence[Prompt],
    path: str | Path,
    *,
    batch: int,
    weights: bool = False,
    max_steps: int | None = None,
    phase: Phase | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Record a trace of the prompts, run from a cold page table; return ``fluxmoe_stats``.

    Args:
        engine: A paged engine.
        prompts: The requests; with ``max_steps``, at most ``4 * batch`` are queued at once.
        path: Path of the new trace file.
        batch: Number of requests that the engine runs at once.
        weights: Also record the routing weights (eager mode only).
        max_steps: Number of steps after which recording stops.
        phase: Record only the steps of this phase.
        replace: Overwrite an existing file.

    Raises:
        TraceError: The file cannot be written.
        ConfigError: The file already exists and ``replace`` is false.
        FluxMoEError: The engine failed.
    """
    together = len(prompts) if max_steps is None else batch * _BATCHES
    stats: dict[str, Any] = {}
    engine.call("rpc", "fluxmoe_record", str(path), weights, max_steps, phase, replace)
    try:
        for first in range(0, len(prompts), together):
            part = prompts[first : first + together]
            stats = engine.generate(part, cold=first == 0).stats
            if engine.call("rpc", "fluxmoe_recorded"):
                break
    except BaseException:
        with contextlib.suppress(FluxMoEError):  # the original error is more informative
            engine.call("rpc", "fluxmoe_record", None)
        raise
    engine.call("rpc", "fluxmoe_record", None)
    return stats
