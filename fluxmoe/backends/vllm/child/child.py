"""A vLLM engine in a child process, for the demo, benchmarks and tests.

By default the child runs vLLM in-process and single-threaded, so that two engines can be measured
alternately on the same machine. Each engine needs its own process, because vLLM and OpenMP read
environment variables only once.
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
import traceback
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any

from fluxmoe.backends.vllm.child.inside import Engine, Generation, Prompt
from fluxmoe.backends.vllm.preflight import checks
from fluxmoe.config import parse_most
from fluxmoe.core.owner import Owner
from fluxmoe.errors import EngineError, FluxMoEError
from fluxmoe.findings import Findings
from fluxmoe.words import line

__all__ = ["ENVIRONMENT", "ChildEngine", "Generation", "Prompt"]

#: Environment in which vLLM uses one thread and one process, and is quiet and offline.
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


def examine(
    model: str | Path, fluxmoe: dict[str, Any], found: Findings, *, where: str, **options: Any
) -> None:
    """Find all reasons why a ``ChildEngine`` could not start with these arguments.

    Args:
        model, fluxmoe, options: As for ``ChildEngine``.
        found: Receives errors and notes.
        where: Name of the caller, for errors.
    """
    data = {**fluxmoe, "model": str(model), "vllm": options}
    config = parse_most(data, found, where=where)
    if config is not None:
        checks.examine(config, {**os.environ, **ENVIRONMENT}, found, start="child")


class ChildEngine:
    """The handle of an engine in a child process.

    Args:
        model: Folder of a checkpoint.
        fluxmoe: FluxMoE's configuration; None for stock vLLM.
        threads: Number of OpenMP threads of the engine.
        three_processes: Run vLLM in its default way: the child is only the client, and the
            scheduler and the worker run in processes of their own.
        options: Arguments for ``vllm.LLM``.

    Raises:
        FluxMoEError: The engine failed in the child with this error.
        EngineError: The engine failed for another reason, or its process ended. The message
            contains the end of the log. All methods may raise these two errors.
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
        self._owner = Owner()
        self._remove_log = weakref.finalize(self, _remove, self._log, self._owner)
        self._family = three_processes
        self._busy = True  # a call is pending, initially the start
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
        # A caller that does not call close() must be able to exit. multiprocessing waits for
        # processes that are not daemons, and they end when the pipe is closed.
        self._hang_up = Finalize(self, self._connection.close, exitpriority=10)
        try:
            with theirs:
                self._process.start()
            #: Properties of the started engine: ``kv_blocks``, ``kv_bytes``, ``block_size``, and
            #: whether ``prefix_caching`` and ``chunked_prefill`` are in use.
            self.info: dict[str, Any] = self._receive()
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: Sequence[Prompt], *, watch: bool = False, cold: bool = True
    ) -> Generation:
        """Run all prompts together to completion.

        Args:
            prompts: The requests; all are added before the first step, except those with ``after``.
            watch: Check all books and the committed bytes after each step (slow).
            cold: Start from a cold page table and an empty prefix cache.
        """
        run = self.call("generate", list(prompts), watch, cold)
        assert isinstance(run, Generation)
        return run

    def restart(
        self,
        *,
        model: str | Path | None = None,
        fluxmoe: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Replace the engine with a new one in the same process, by default with the same model.

        If the new engine cannot start, there is no engine, but ``restart`` can be called again.
        """
        self._model = str(model or self._model)
        self.info = self.call("restart", self._model, fluxmoe, options)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of ``inside.Engine``."""
        self._owner.require()  # requests of two processes would mix in the pipe
        try:
            self._connection.send((method, args))
        except OSError as error:
            raise self._gone() from error
        self._busy = True
        return self._receive()

    def pss_bytes(self) -> int:
        """Measure the memory of the engine's processes: own pages and a share of shared pages."""
        import psutil

        child = psutil.Process(self._process.pid)
        tree = [child, *child.children(recursive=True)]
        return sum(int(process.memory_full_info().pss) for process in tree)

    def close(self) -> None:
        """End the child even if it is busy. Idempotent. Does nothing in a forked process."""
        if not self._owner.here:
            return
        if self._process.is_alive():
            if not self._busy:
                with contextlib.suppress(OSError):
                    self._connection.send(("stop", ()))
                self._process.join(30)
            self._process.kill()
            self._process.join()
        if self._family and self._process.pid is not None:
            # vLLM's scheduler and worker survive a killed client.
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
        raise EngineError(f"the engine failed: {line(value, limit=2000)}", where=self._tail())

    def _gone(self) -> EngineError:
        self._process.join(1)  # the exit code may arrive shortly after the pipe is closed
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


def _remove(log: str, owner: Owner) -> None:
    if owner.here:
        Path(log).unlink(missing_ok=True)


def _main(
    connection: Connection, log: str, environment: dict[str, str], first: tuple[Any, ...]
) -> None:
    """Run the child: build the engine, and answer calls until a call stops the child."""
    sys.stdout.flush()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    if environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1":
        os.setsid()  # makes a process group, which is killed as a whole
    threading.Thread(target=_die_with_parent, args=(log,), daemon=True).start()
    engine: Engine | None = None
    request: tuple[str, tuple[Any, ...]] = ("restart", first)
    while request[0] != "stop":
        method, args = request
        try:
            if method == "restart":
                old, engine = engine, None
                if old is not None:
                    old.stop()
                del old
                gc.collect()  # engines, including partly started ones, are full of cycles
                gc.freeze()  # a start runs five collections; freezing saves 2 of 3 s
                engine = Engine(*args)
                answer: Any = engine.info
            elif engine is None:
                raise EngineError("there is no engine: its last start failed", fix="call restart()")
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
    """Wait for the parent to end, then kill this process even if it is busy."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        Path(log).unlink(missing_ok=True)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # kills the scheduler and the worker as well
        os._exit(1)


def _portable(error: BaseException) -> FluxMoEError | str:
    """Return the FluxMoEError that caused the exception, or else a description of the exception."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FluxMoEError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"
