"""A recorder of an engine's routing: the engine's thread fills a ring, and another writes the file.

The engine's thread only copies the expert ids of each event (about 1.5 µs). Full chunks of events
go to a thread that builds the Parquet file; if that thread lags by the whole ring, the engine
waits, so that no event is lost.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fluxmoe.core.owner import Owner
from fluxmoe.core.types import Ints, Phase
from fluxmoe.errors import TraceError
from fluxmoe.trace import StepRows, TraceMeta, TraceWriter
from fluxmoe.trace.file import AllOrNothing
from fluxmoe.trace.writer import Header

#: Called at a step's first event with the step's number of tokens; returns the tokens' requests and
#: phases.
AskRows: TypeAlias = Callable[[int], StepRows | None]

_Noted: TypeAlias = tuple[npt.NDArray[np.float16] | None, npt.NDArray[np.int16] | None]

_CHUNKS, _CHUNK_IDS = 4, 1 << 16


class _Chunk:
    """A chunk of events: their headers and concatenated expert ids."""

    def __init__(self) -> None:
        self.ids: npt.NDArray[np.int16] = np.empty(_CHUNK_IDS, np.int16)
        self.headers: list[Header] = []
        self.used = 0


class Recorder(AllOrNothing):
    """Recorder of the routing of an engine's steps; ``observe`` serves as a pager's watcher.

    Use the recorder as a context manager or call ``close``: only then does the file appear under
    its name. Write errors end the recording but do not disturb the engine; ``close`` raises them.

    Args:
        path: File to write.
        meta: Metadata of the trace.
        columns: Optional columns of the trace (``trace.OPTIONAL``); the engine must then call
            ``note`` before every event.
        replace: Overwrite an existing file.
        max_steps: Number of steps to record; later steps are ignored.
        phase: Record only steps of this phase. A replay then counts fewer events than the engine.
        rows: Function that returns the request and phase of each token of the step just begun.

    Attributes:
        steps: Number of steps begun so far; with ``phase``, only the steps of that phase.
        first_request: Offset added to the request numbers from ``rows``, for engines that number
            the requests of each batch from 0.

    Raises:
        TraceError: The file cannot be written.
        ConfigError: The file already exists and ``replace`` is false, or an argument is invalid.
    """

    def __init__(
        self,
        path: str | Path,
        meta: TraceMeta,
        *,
        columns: Collection[str] = (),
        replace: bool = False,
        max_steps: int | None = None,
        phase: Phase | None = None,
        rows: AskRows = lambda tokens: None,
    ) -> None:
        self._writer = TraceWriter(path, meta, columns=columns, replace=replace)
        self._top_k, self._max_steps, self._ask_rows = meta.top_k, max_steps, rows
        self._phase, self._skip = phase, False
        self.columns = tuple(columns)
        self.steps, self.first_request, self._layer = 0, 0, meta.num_layers
        self._rows: StepRows | None = None
        self._noted: _Noted = (None, None)
        self._closed, self._owner = False, Owner()
        self._error: BaseException | None = None
        self._free: queue.SimpleQueue[_Chunk] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        for _ in range(_CHUNKS - 1):
            self._free.put(_Chunk())
        self._chunk = _Chunk()
        self._thread = threading.Thread(target=self._write, name="fluxmoe-trace", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """True after ``max_steps`` complete steps, a failed write, ``close`` or ``discard``."""
        full = self._max_steps is not None and self.steps > self._max_steps
        last = self.steps == self._max_steps and self._layer == self._writer.meta.num_layers - 1
        return full or (last and not self._skip) or self._error is not None or self._closed

    def note(
        self,
        weights: npt.NDArray[np.float16] | None = None,
        predicted: npt.NDArray[np.int16] | None = None,
    ) -> None:
        """Set optional columns of the next event, except those that are None, without copying.

        Args:
            weights: ``[tokens, top_k]``.
            predicted: ``[tokens, any]``; negative = none.
        """
        noted = self._noted
        self._noted = (
            noted[0] if weights is None else weights,
            noted[1] if predicted is None else predicted,
        )

    def observe(self, step: int, layer: int, ids: Ints, phase: Phase) -> None:
        """Record one event. The recorder counts steps itself, regardless of resets of the pager.

        Args:
            step: Ignored.
            layer: MoE layer; a layer that is not above the previous event's begins a new step.
            ids: Routed experts, any integer dtype, token by token; they are copied.
            phase: Phase of the step.
        """
        tokens = ids.size // self._top_k
        if layer <= self._layer:
            self._skip = self._phase is not None and phase != self._phase
            self.steps += not self._skip
            self._rows = self._ask_rows(tokens)
            if self._rows is not None and self.first_request:
                request = self._rows.request + np.int32(self.first_request)
                self._rows = self._rows._replace(request=request)
        self._layer = layer
        (weights, predicted), self._noted = self._noted, (None, None)
        if self._skip or (self._max_steps is not None and self.steps > self._max_steps):
            return
        chunk = self._chunk
        end = chunk.used + ids.size
        if end > len(chunk.ids):
            chunk = self._next_chunk(ids.size)
            end = ids.size
        chunk.ids[chunk.used : end] = ids.reshape(-1)
        chunk.used = end
        chunk.headers.append(
            Header(self.steps - 1, layer, phase, tokens, self._rows, weights, predicted)
        )

    def close(self) -> None:
        """Write pending events and give the file its name. Idempotent.

        Raises:
            TraceError: Writing failed or nothing was recorded; no file is created.
        """
        if self._stop():
            if self._error is None:
                self._writer.close()
            else:
                self._writer.discard()
                raise self._error

    def discard(self) -> None:
        """Abort the recording and leave no file behind. Idempotent."""
        if self._stop():
            self._writer.discard()

    def _next_chunk(self, least: int) -> _Chunk:
        self._full.put(self._chunk)
        self._chunk = self._free.get()
        if least > len(self._chunk.ids):
            self._chunk.ids = np.empty(least, np.int16)
        return self._chunk

    def _stop(self) -> bool:
        """Stop the thread; return True if it was running. A forked process has no such thread."""
        if self._closed or not self._owner.here:
            return False
        self._closed = True
        self._full.put(self._chunk)
        self._full.put(None)
        self._thread.join()
        return True

    def _write(self) -> None:
        while (chunk := self._full.get()) is not None:
            if self._error is None:
                try:
                    ids = chunk.ids[: chunk.used].reshape(-1, self._top_k)
                    self._writer.extend(chunk.headers, ids.copy())
                except TraceError as error:
                    self._error = error
                except BaseException as error:
                    self._error = TraceError(
                        f"recording failed: {type(error).__name__}: {error}",
                        where=str(self._writer.path),
                    )
            chunk.headers, chunk.used = [], 0
            self._free.put(chunk)
