"""The demand for KV cache, as reported by vLLM's scheduler to its connector."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from fluxmoe.core.arbitration.prefixes import PrefixCurve

#: Number of recent answers whose lengths predict the lengths of new answers.
ANSWERS = 16
#: Maximum number of requests, oldest first, whose sizes are predicted.
REQUESTS = 256


class RequestWatch:
    """Counts of the requests (vLLM's ``Request``) that the scheduler reports to its connector.

    Attributes:
        running, ran: Number of requests in the last scheduled step, and in the step before.
        preemptions: Number of preemptions since startup.
        prompt_tokens, prefix_hits: Number of tokens of admitted requests since startup, and number
            of these tokens that were found in the prefix cache.
        tokens, computed: Number of tokens in the last scheduled step, and in the step before, which
            has ended.
        rested: True if there was a period without requests between the last two steps.
        prefixes: Receives the prompts; None if the prompts are not needed.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}  # prompt tokens, maximum answer tokens
        self._answers: deque[int] = deque(maxlen=ANSWERS)
        self._foreseen = 0.0
        self._hits: dict[str, int] = {}
        self.running = self.ran = self.preemptions = self.prompt_tokens = self.prefix_hits = 0
        self.tokens = self.computed = 0
        self.rested = self._emptied = False
        self.prefixes: PrefixCurve | None = None

    def arrived(self, request: Any) -> None:
        """Record a new, waiting request."""
        self._known[request.request_id] = request.num_prompt_tokens, request.max_tokens

    def looked_up(self, request: str, computed: int) -> None:
        """Record how many tokens of a waiting request are in the prefix cache."""
        self._hits[request] = computed

    def admitted(self, request: Any) -> None:
        """Record that a request has its KV cache and starts running."""
        self.prompt_tokens += request.num_tokens
        self.prefix_hits += self._hits.pop(request.request_id, 0)
        if self.prefixes is not None:
            self.prefixes.admitted(request.request_id, request.block_hashes)

    def gone(self, request: Any) -> None:
        """Record the end of a request, even if it never ran."""
        prompt, _ = self._known.pop(request.request_id, (0, 0))
        self._hits.pop(request.request_id, None)
        if request.num_tokens > prompt:
            self._answers.append(request.num_tokens - prompt)
        self._emptied |= not self._known
        if self.prefixes is not None:
            self.prefixes.freed(request.request_id, request.block_hashes)

    def scheduled(self, output: Any) -> None:
        """Record a scheduled step, vLLM's ``SchedulerOutput``."""
        self.rested, self._emptied = self._emptied, False
        self.ran, self.running = self.running, len(output.num_scheduled_tokens)
        self.computed, self.tokens = self.tokens, output.total_num_scheduled_tokens
        self.preemptions += len(output.preempted_req_ids or ())

    @property
    def unfinished(self) -> int:
        return len(self._known)

    @property
    def waiting(self) -> int:
        return max(self.unfinished - self.running, 0)

    def foreseen_blocks(self, tokens: int) -> float:
        """Predict the mean number of KV blocks, of ``tokens`` tokens each, at a request's end.

        Each answer is assumed to be as long as a recent answer, but at most the request's maximum.
        The last token of an answer is never computed.
        """
        if self._known and self._answers:
            sizes = np.array([*islice(self._known.values(), REQUESTS)])
            answers = np.minimum(sizes[:, 1:], np.array(self._answers))
            self._foreseen = float(np.ceil((sizes[:, :1] + answers - 1) / tokens).mean())
        return self._foreseen


class StepClock:
    """A clock that measures the duration of the last step.

    A busy engine's step lasts until the next step begins, because requests also share scheduling
    and sampling. The last step before an idle period lasts until its answer arrives.

    Args:
        now: Function that returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._begun = now, -1.0
        self.seconds = 0.0

    def begins(self, *, rested: bool) -> None:
        """Record the beginning of a step; ``rested`` is true if the engine was idle before it."""
        now = self._now()
        if self._begun >= 0 and not rested:
            self.seconds = now - self._begun
        self._begun = now

    def answered(self) -> None:
        """Record the workers' answer."""
        self.seconds = self._now() - self._begun
