"""Mapping of a vLLM step's tokens to requests, for traces."""

from __future__ import annotations

from typing import Any

import numpy as np

from fluxmoe.backends.vllm.compat.worker import scheduled_requests
from fluxmoe.backends.vllm.worker.layer import PagedRoutedExperts
from fluxmoe.core.types import Phase
from fluxmoe.trace import StepRows


class Requests:
    """The numbers of requests, in the order in which they first run, for ``Recorder.rows``.

    Args:
        runner: The worker's ``model_runner``.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._numbers: dict[str, int] = {}

    def __call__(self, tokens: int) -> StepRows | None:
        """Return the request and the phase of each token of the current step.

        A request that computes more than one token is in prefill, as is a step with such a request
        (``step_phase``). Tokens beyond those of the requests are padding.
        """
        names, starts = scheduled_requests(self._runner)
        if not names or starts[-1] > tokens:
            return None
        numbers = [self._numbers.setdefault(name, len(self._numbers)) for name in names]
        lengths = np.diff(starts)
        phases = np.where(lengths > 1, Phase.PREFILL, Phase.DECODE).astype(np.int8)
        return StepRows(
            np.repeat(np.asarray(numbers, np.int32), lengths), np.repeat(phases, lengths)
        )


def note_weights(runner: Any, wanted: bool) -> None:
    """Start or stop passing the routing weights of a model runner's paged layers to recorders."""
    model = getattr(runner, "model", None)  # None after the worker's shutdown
    for module in model.modules() if model is not None else ():
        if isinstance(module, PagedRoutedExperts):
            module.notes_weights = wanted
