"""A streaming writer of traces, which holds at most one row group in memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fluxmoe import arguments
from fluxmoe.core.owner import Owner
from fluxmoe.core.types import Bools, Ints, Phase
from fluxmoe.errors import TraceError
from fluxmoe.trace.file import AllOrNothing, OwnFile, require_place
from fluxmoe.trace.format import GROUP_ROWS, KEY, OPTIONAL, SCHEMA, Array, StepRows, TraceMeta


class Header(NamedTuple):
    """One event in the writer's buffer; the ids of its ``tokens`` rows are stored separately.

    ``weights`` is ``[tokens, top_k]``, and ``predicted`` is ``[tokens, any]``.
    """

    step: int
    layer: int
    phase: int
    tokens: int
    rows: StepRows | None = None
    weights: Array | None = None
    predicted: Array | None = None


class TraceWriter(AllOrNothing):
    """Event-by-event writer of a trace.

    The file appears under its name only when it is complete. Use the writer as a context manager:
    if an exception is raised inside, no file is left. ``append`` can serve as an
    ``ExpertPager.watcher``. In a forked process nothing is written, and closing does nothing.

    Args:
        path: File to write.
        meta: Metadata of the trace.
        columns: Columns from ``OPTIONAL`` to include in the file; every event must provide them.
        replace: Overwrite an existing file.
        group_rows: Number of rows held in memory and written together.

    Raises:
        TraceError: The metadata is invalid, or the file cannot be created.
        ConfigError: The file already exists and ``replace`` is false, or ``path`` is not a path.
    """

    def __init__(
        self,
        path: str | Path,
        meta: TraceMeta,
        *,
        columns: Collection[str] = (),
        replace: bool = False,
        group_rows: int = GROUP_ROWS,
    ) -> None:
        self.path, self.meta = arguments.path(path, "path", where="TraceWriter"), meta
        meta.check(str(path))
        require_place(self.path, replace=replace)
        self._columns = [name for name in OPTIONAL if name in columns]
        self._schema = SCHEMA
        for name in self._columns:
            self._schema = self._schema.append(pa.field(name, OPTIONAL[name]))
        self._group_rows, self._owner = group_rows, Owner()
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self._out = OwnFile(self._temporary)
            self._file = pq.ParquetWriter(
                self._out, self._schema.with_metadata({KEY: meta.dump()}), compression="zstd"
            )
        except OSError as error:
            raise self._unwritable(error) from error
        self._last = (-1, -1)
        self._headers: list[Header] = []
        self._ids: list[npt.NDArray[np.int16]] = []
        self._rows = 0

    def append(
        self,
        step: int,
        layer: int,
        ids: Ints,
        phase: Phase = Phase.DECODE,
        *,
        rows: StepRows | None = None,
        weights: Array | None = None,
        predicted: Ints | None = None,
    ) -> None:
        """Add one event. All arrays are copied.

        Args:
            step: Forward pass; (step, layer) must increase from event to event.
            layer: MoE layer, from 0.
            ids: Routed experts, any integer dtype, ``[tokens, top_k]`` or flattened in that order.
                Negative entries are padding; a token with only padding is omitted, unless the event
                has no other tokens.
            phase: Phase of the step, for tokens not covered by ``rows``.
            rows: Request and phase of each token.
            weights: Routing weights, floats in the order of ``ids``; required if the file has the
                column.
            predicted: Experts predicted for the next layer, ``[tokens, any]``; negative = none.
                Required if the file has the column.

        Raises:
            TraceError: The event is out of order or out of range, or does not have ``top_k``
                experts per token. Some of these errors are raised only by a later ``append`` or by
                ``close``.
        """
        top_k = self.meta.top_k
        if ids.size % top_k:
            raise TraceError(
                f"step {step}, layer {layer}: {ids.size} expert ids are not a multiple of "
                f"top_k = {top_k}",
                where=str(self.path),
            )
        self._require_range(ids)
        tokens = ids.size // top_k
        header = Header(
            step,
            layer,
            phase,
            tokens,
            rows,
            None if weights is None else np.array(weights, np.float16).reshape(tokens, top_k),
            None if predicted is None else np.array(predicted).reshape(tokens, -1),
        )
        self.extend([header], ids.reshape(tokens, top_k).astype(np.int16))

    def extend(self, headers: Sequence[Header], ids: npt.NDArray[np.int16]) -> None:
        """Add many events without copying them.

        Args:
            headers: The events, in order.
            ids: int16 ``[tokens of all events, top_k]``.

        Raises:
            TraceError: See ``append``.
        """
        self._owner.require()
        self._headers += headers
        self._ids.append(ids)
        self._rows += len(ids)
        if self._rows >= self._group_rows:
            self._flush()

    def close(self) -> None:
        """Write pending events and give the file its name.

        Raises:
            TraceError: No event was appended, an event is invalid, or the file cannot be written;
                no file is created.
        """
        if not self._owner.here:
            return
        try:
            self._flush()
            if self._last == (-1, -1):
                raise TraceError("the trace has no events", where=str(self.path))
            try:
                self._file.close()
                self._out.close()
                os.replace(self._temporary, self.path)
            except OSError as error:
                raise self._unwritable(error) from error
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Abort and leave no file behind."""
        if not self._owner.here:
            return
        try:
            self._file.close()
        except OSError:
            pass  # for example, the disk is full; the file is removed anyway
        finally:
            self._temporary.unlink(missing_ok=True)
            self._out.close()

    def _flush(self) -> None:
        headers, tables = self._headers, self._ids
        self._headers, self._ids, self._rows = [], [], 0
        if not headers:
            return
        numbers = np.asarray([header[:4] for header in headers], np.int64)
        self._require_order(numbers[:, :2])
        ids = np.concatenate(tables)
        self._require_range(ids)
        tokens = numbers[:, 3]
        first = np.repeat(np.cumsum(tokens) - tokens, tokens)
        token = np.arange(len(ids)) - first
        kept = _kept(ids, token)
        columns: list[Array] = [
            np.repeat(numbers[:, 0].astype(np.int32), tokens),
            np.repeat(numbers[:, 1].astype(np.int16), tokens),
            token.astype(np.int32),
            _of_rows(headers, "phase", numbers[:, 2], tokens, np.int8),
            _of_rows(headers, "request", np.full(len(headers), -1), tokens, np.int32),
        ]
        arrays = [pa.array(column[kept]) for column in columns]
        valid = ids[kept] >= 0
        arrays.append(_lists(ids[kept], valid))
        if "weights" in self._columns:
            weights = np.concatenate(self._needed(headers, "weights"))[kept]
            if not np.isfinite(weights[valid]).all():
                raise TraceError("a routing weight is not a finite number", where=str(self.path))
            arrays.append(_lists(weights, valid))
        if "predicted" in self._columns:
            predicted = _stacked(self._needed(headers, "predicted"))
            self._require_range(predicted)
            arrays.append(_lists(predicted[kept].astype(np.int16), predicted[kept] >= 0))
        try:
            self._file.write_table(pa.table(arrays, schema=self._schema))
        except OSError as error:
            raise self._unwritable(error) from error

    def _needed(self, headers: Iterable[Header], name: str) -> list[Array]:
        found = [getattr(header, name) for header in headers]
        if any(array is None for array in found):
            raise TraceError(
                f"an event lacks {name}, which this file requires",
                where=str(self.path),
                fix="use eager mode: compiled models omit weights" if name == "weights" else "",
            )
        return found

    def _require_order(self, numbers: npt.NDArray[np.int64]) -> None:
        layers = self.meta.num_layers
        keys = numbers[:, 0] * layers + numbers[:, 1]
        before = np.concatenate([[self._last[0] * layers + self._last[1]], keys[:-1]])
        if self._last == (-1, -1):
            before[0] = -1
        wrong = (keys <= before) | (numbers[:, 1] < 0) | (numbers[:, 1] >= layers)
        if wrong.any():
            at = int(np.argmax(wrong))
            step, layer = numbers[at].tolist()
            last = (int(numbers[at - 1, 0]), int(numbers[at - 1, 1])) if at else self._last
            raise TraceError(
                f"event (step {step}, layer {layer}) cannot follow (step {last[0]}, "
                f"layer {last[1]}) in a trace of {layers} layers",
                where=str(self.path),
            )
        self._last = (int(numbers[-1, 0]), int(numbers[-1, 1]))

    def _require_range(self, ids: Ints) -> None:
        if ids.size and ids.max() >= self.meta.experts_per_layer:
            raise TraceError(
                f"expert {ids.max()} is not within 0…{self.meta.experts_per_layer - 1}",
                where=str(self.path),
            )

    def _unwritable(self, error: OSError) -> TraceError:
        return TraceError(f"cannot write a trace: {error.strerror or error}", where=str(self.path))


def _kept(ids: Array, token: Array) -> Bools:
    """Return a mask of the rows to keep.

    These are the rows that are not padding, and the first row of each event with only padding.
    """
    kept: Bools = np.any(ids >= 0, axis=1)
    if kept.all():
        return kept
    starts = np.flatnonzero(token == 0)
    kept[starts[~np.logical_or.reduceat(kept, starts)]] = True
    return kept


def _of_rows(
    headers: Sequence[Header], name: str, otherwise: Array, tokens: Array, dtype: npt.DTypeLike
) -> Array:
    """Make a column from the events' ``StepRows``; tokens without them get ``otherwise``."""
    column = np.repeat(otherwise, tokens).astype(dtype)
    start = 0
    for header in headers:
        if header.rows is not None:
            known = getattr(header.rows, name)[: header.tokens]
            column[start : start + len(known)] = known
        start += header.tokens
    return column


def _lists(values: Array, valid: Bools) -> Any:
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum(valid.sum(axis=1), out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, values[valid])


def _stacked(parts: Sequence[Array]) -> Array:
    """Stack 2-D arrays of different widths vertically, padding them with −1."""
    width = max(part.shape[1] for part in parts)
    stacked = np.full((sum(map(len, parts)), width), -1, np.int64)
    start = 0
    for part in parts:
        stacked[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return stacked
