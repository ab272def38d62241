"""The demand for KV cache, as far as vLLM's scheduler tells its connector."""

from __future__ import annotations

from typing import Any

from fluxmoe.core.prefixes import PrefixCurve

#: Answers after which the weight of older ones has fallen to 1/e.
ANSWERS = 16


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
        self._prompts = self._limits = 0
        self._answer, self._foreseen = 0.0, 0.0
        self._hits: dict[str, int] = {}
        self.running = self.ran = self.preemptions = self.prompt_tokens = self.prefix_hits = 0
        self.tokens = self.computed = 0
        self.rested = self._emptied = False
        self.prefixes: PrefixCurve | None = None

    def arrived(self, request: Any) -> None:
        """A request waits."""
        self._known[request.request_id] = size = request.num_prompt_tokens, request.max_tokens
        self._prompts += size[0]
        self._limits += size[1]

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
        prompt, limit = self._known.pop(request.request_id, (0, 0))
        self._prompts -= prompt
        self._limits -= limit
        self._hits.pop(request.request_id, None)
        answer = request.num_tokens - prompt
        if answer > 0:
            self._answer += (answer - self._answer) / (ANSWERS if self._answer else 1)
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

    @property
    def foreseen_tokens(self) -> float:
        """What a request will have at its end: its prompt, and an answer like those that ended."""
        known = len(self._known)
        if known and self._answer:
            self._foreseen = self._prompts / known + min(self._limits / known, self._answer)
        return self._foreseen
