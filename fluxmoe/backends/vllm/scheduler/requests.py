"""The demand for KV cache, as far as vLLM's scheduler tells its connector."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from fluxmoe.core.arbitration.prefixes import PrefixCurve

#: The last answers, whose lengths are expected again.
ANSWERS = 16
#: The oldest requests, which run or are next: whose sizes are foreseen.
REQUESTS = 256


class RequestWatch:
    """Counts what the scheduler tells its connector about requests, all of them vLLM's ``Request``.

    Attributes:
        running, ran: Requests in the step that was scheduled last, and in the one before.
        preemptions: Since the start.
        prompt_tokens, prefix_hits: Tokens of requests that were admitted, and how many of them the
            prefix cache had, since the start.
        tokens, computed: Tokens of the step that was scheduled last, and of the one before, whose
            end is known.
        rested: Whether there was a time without requests between the last two steps.
        prefixes: Told of prompts, where somebody wants to know.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}  # tokens of the prompt, most of the answer
        self._answers: deque[int] = deque(maxlen=ANSWERS)
        self._foreseen = 0.0
        self._hits: dict[str, int] = {}
        self.running = self.ran = self.preemptions = self.prompt_tokens = self.prefix_hits = 0
        self.tokens = self.computed = 0
        self.rested = self._emptied = False
        self.prefixes: PrefixCurve | None = None

    def arrived(self, request: Any) -> None:
        """A request waits."""
        self._known[request.request_id] = request.num_prompt_tokens, request.max_tokens

    def looked_up(self, request: str, computed: int) -> None:
        """A waiting request would find so many of its tokens in the prefix cache."""
        self._hits[request] = computed

    def admitted(self, request: Any) -> None:
        """It has its KV cache and begins to run."""
        self.prompt_tokens += request.num_tokens
        self.prefix_hits += self._hits.pop(request.request_id, 0)
        if self.prefixes is not None:
            self.prefixes.admitted(request.request_id, request.block_hashes)

    def gone(self, request: Any) -> None:
        """It has ended, whether it ever ran or not."""
        prompt, _ = self._known.pop(request.request_id, (0, 0))
        self._hits.pop(request.request_id, None)
        if request.num_tokens > prompt:
            self._answers.append(request.num_tokens - prompt)
        self._emptied |= not self._known
        if self.prefixes is not None:
            self.prefixes.freed(request.request_id, request.block_hashes)

    def scheduled(self, output: Any) -> None:
        """A step was scheduled: vLLM's ``SchedulerOutput``."""
        self.rested, self._emptied = self._emptied, False
        self.ran, self.running = self.running, len(output.num_scheduled_tokens)
        self.computed, self.tokens = self.tokens, output.total_num_scheduled_tokens
        self.preemptions += len(output.preempted_req_ids or ())

    @property
    def waiting(self) -> int:
        return max(len(self._known) - self.running, 0)

    def foreseen_blocks(self, tokens: int) -> float:
        """KV blocks of so many tokens that a request has at its end, on average.

        It has a prompt, and an answer as long as one of those that have ended, unless it says that
        it wants less. The last token of an answer is never computed.
        """
        if self._known and self._answers:
            sizes = np.array([*islice(self._known.values(), REQUESTS)])
            answers = np.minimum(sizes[:, 1:], np.array(self._answers))
            self._foreseen = float(np.ceil((sizes[:, :1] + answers - 1) / tokens).mean())
        return self._foreseen


class StepClock:
    """The duration of the last step.

    A busy engine's step lasts until the next one begins: scheduling and sampling are part of what
    more requests share. The last step before a rest lasts until its answer is there.

    Args:
        now: Seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._begun = now, -1.0
        self.seconds = 0.0

    def begins(self, *, rested: bool) -> None:
        """A step begins; whether the engine had nothing to do before it."""
        now = self._now()
        if self._begun >= 0 and not rested:
            self.seconds = now - self._begun
        self._begun = now

    def answered(self) -> None:
        """The workers have answered."""
        self.seconds = self._now() - self._begun
