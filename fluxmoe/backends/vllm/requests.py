"""The demand for KV cache, as far as vLLM's scheduler tells its connector."""

from __future__ import annotations

from typing import Any

from fluxmoe.core.prefixes import PrefixCurve


class RequestWatch:
    """Counts what the scheduler tells its connector about requests."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self._hits: dict[str, int] = {}
        self.running = self.preemptions = self.prompt_tokens = self.prefix_hits = 0
        #: Told of prompts, where somebody wants to know.
        self.prefixes: PrefixCurve | None = None
        #: Tokens of the step that was scheduled last, and of the one before, whose end is known.
        self.tokens = self.computed = 0
        #: Whether there was a time without requests between the last two steps.
        self.rested = self._emptied = False

    def arrived(self, request: str) -> None:
        self.known.add(request)

    def looked_up(self, request: str, computed: int) -> None:
        """A waiting request would find so many of its tokens in the prefix cache."""
        self._hits[request] = computed

    def admitted(self, request: Any) -> None:
        """vLLM's ``Request`` has its KV cache and begins to run."""
        self.prompt_tokens += request.num_tokens
        self.prefix_hits += self._hits.pop(request.request_id, 0)
        if self.prefixes is not None:
            self.prefixes.admitted(request.block_hashes)

    def gone(self, request: Any) -> None:
        """vLLM's ``Request`` has ended."""
        self.known.discard(request.request_id)
        self._hits.pop(request.request_id, None)
        if self.prefixes is not None:
            self.prefixes.freed(request.block_hashes)
        self._emptied |= not self.known

    def scheduled(self, output: Any) -> None:
        """A step was scheduled: vLLM's ``SchedulerOutput``."""
        self.rested, self._emptied = self._emptied, False
        self.running = len(output.num_scheduled_tokens)
        self.computed, self.tokens = self.tokens, output.total_num_scheduled_tokens
        self.preemptions += len(output.preempted_req_ids or ())

    @property
    def waiting(self) -> int:
        return max(len(self.known) - self.running, 0)
