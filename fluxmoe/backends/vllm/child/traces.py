"""Recording a trace from a real vLLM engine in a child process."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from fluxmoe.core.types import Phase
from fluxmoe.errors import FluxMoEError

# Batches of requests that are given to the engine together where a recording may end early: it
# runs them to their end. More of them make the batches in the middle fuller.
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
    replace: bool = True,
) -> dict[str, Any]:
    """Record a trace of the prompts' run, from a cold page table; returns ``fluxmoe_stats``.

    Args:
        engine: An engine that pages.
        prompts: The requests, all waiting from the beginning.
        path: The file to make.
        batch: Requests that the engine runs at once.
        weights: Also record the routing weights (eager mode only).
        max_steps: Leave out all that comes after so many steps.
        phase: Leave out steps that do anything else.
        replace: Whether an existing file may be replaced.

    Raises:
        TraceError: The file cannot be written, or is there already.
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
        with contextlib.suppress(FluxMoEError):  # the error above says more
            engine.call("rpc", "fluxmoe_record", None)
        raise
    engine.call("rpc", "fluxmoe_record", None)
    return stats
