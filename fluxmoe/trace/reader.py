"""A streaming reader of traces, which validates every row."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fluxmoe import arguments
from fluxmoe.core.types import Bools, EventList, Int64s, Phase
from fluxmoe.errors import TraceError
from fluxmoe.trace.format import (
    GROUP_ROWS,
    KEY,
    OPTIONAL,
    SCHEMA,
    Array,
    Rows,
    TraceMeta,
    parquet_file,
)

# Columns that make up events. The file must have ``request``, but events do not need it.
_EVENTS = ("step", "layer", "token", "phase", "experts")


class TraceReader:
    """Streaming reader that validates every row of a trace. ``meta`` is available immediately.

    Attributes:
        meta: Metadata of the trace.
        columns: Optional columns present in the file.
        num_rows: Number of rows in the file, one per (step, layer, token).

    Raises:
        TraceError: The file is unreadable, damaged, or not a trace of this version.
    """

    def __init__(self, path: str | Path) -> None:
        self._where = str(arguments.path(path, "path", where="TraceReader"))
        try:
            self._file = parquet_file(self._where)
        except FileNotFoundError as error:
            raise TraceError("no such file", where=self._where) from error
        except (OSError, pa.ArrowException) as error:
            raise TraceError(
                "not a Parquet file, or truncated",
                where=self._where,
                fix="record the trace again, or make one with `fluxmoe trace synth`",
            ) from error
        schema = self._file.schema_arrow
        self.meta = TraceMeta.load((schema.metadata or {}).get(KEY), self._where)
        self.num_rows = int(self._file.metadata.num_rows)
        found = {field.name: field.type for field in schema}
        self.columns = tuple(name for name in OPTIONAL if name in found)
        for name, type_ in [*((field.name, field.type) for field in SCHEMA), *OPTIONAL.items()]:
            if name not in found:
                if name in OPTIONAL:
                    continue
                raise self._error(f"column {name!r} is missing")
            if found[name] != type_:
                raise self._error(f"column {name!r} has type {found[name]}, expected {type_}")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._where!r}, {self.meta.described}, rows={self.num_rows})"
        )

    def events(self) -> Iterator[tuple[int, int, Phase, npt.NDArray[np.int32]]]:
        """Yield all events in order, as (step, layer, phase, routed experts with repeats, 1-D).

        Raises:
            TraceError: A row is damaged, out of range or out of order, or the file has no rows.
        """
        phases = (Phase.PREFILL, Phase.DECODE)
        for block in self.blocks():
            bounds = block.offsets.tolist()
            rows = zip(block.step.tolist(), block.layer.tolist(), block.phase.tolist(), strict=True)
            for i, (step, layer, phase) in enumerate(rows):
                yield step, layer, phases[phase], block.ids[bounds[i] : bounds[i + 1]]

    def blocks(self, *, predicted: bool = False) -> Iterator[EventList]:
        """Yield all events in order, many at a time.

        Args:
            predicted: Include each layer's predictions for the next layer, if the file has them.

        Raises:
            TraceError: See ``events``.
        """
        more = ["predicted"] if predicted and "predicted" in self.columns else []
        for rows in self.rows(more):
            yield _block(rows)

    def rows(self, more: Collection[str] = ()) -> Iterator[Rows]:
        """Yield all rows in order, many at a time, without splitting events.

        Args:
            more: Columns to read besides step, layer, token, phase and experts: ``request``, or
                optional columns that the file has.

        Raises:
            TraceError: See ``events``.
        """
        held: Rows | None = None
        first = 0  # position in the file of the first row in ``rows``
        for batch in self._batches([*_EVENTS, *more]):
            if batch.num_rows == 0:
                continue
            rows = self._checked(batch, first + (len(held) if held else 0))
            if held is not None:
                rows = held.then(rows)
            self._require_order(rows, first)
            # The last event may continue in the next batch.
            whole, held = rows.split(int(rows.starts()[-1]))
            first += len(whole)
            if len(whole):
                yield whole
        if held is None:
            raise self._error("the trace has no events")
        yield held

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        try:
            yield from self._file.iter_batches(GROUP_ROWS, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise self._error(f"damaged data: {error}") from error

    def _checked(self, batch: Any, first: int) -> Rows:
        scalars: dict[str, Array] = {}
        lists: dict[str, tuple[Array, Array]] = {}
        for name in batch.schema.names:
            column = batch.column(name)
            values = column.flatten() if pa.types.is_list(column.type) else column
            if column.null_count or values.null_count:
                raise self._error(f"a value is missing in one of the rows from {first} on")
            numbers = values.to_numpy(zero_copy_only=False)
            if values is column:
                scalars[name] = numbers
            else:
                lists[name] = (np.diff(column.offsets.to_numpy()), numbers)
        for name in lists.keys() - {"weights"}:
            lists[name] = self._experts(*lists[name], first)
        meta, width = self.meta, lists["experts"][0]
        self._require(scalars["step"] >= 0, first, "the step is negative")
        self._require(
            (scalars["layer"] >= 0) & (scalars["layer"] < meta.num_layers),
            first,
            f"the layer is not within 0…{meta.num_layers - 1}",
        )
        self._require(scalars["token"] >= 0, first, "the token is negative")
        self._require(
            (scalars["phase"] == 0) | (scalars["phase"] == 1),
            first,
            "the phase is neither 0 nor 1",
        )
        self._require(width <= meta.top_k, first, f"more than top_k = {meta.top_k} experts")
        if "weights" in lists:
            self._require(lists["weights"][0] == width, first, "not as many weights as experts")
            wrong = ~np.isfinite(lists["weights"][1])
            if wrong.any():
                row = _row_of(int(np.argmax(wrong)), width, first)
                raise self._error(f"row {row}: a routing weight is not a finite number")
        return Rows(scalars, lists)

    def _experts(self, width: Array, ids: Array, first: int) -> tuple[Array, Array]:
        ids = ids.astype(np.int32)
        most = self.meta.experts_per_layer
        if ids.size and (ids.min() < 0 or ids.max() >= most):
            at = int(np.argmax((ids < 0) | (ids >= most)))
            row = _row_of(at, width, first)
            raise self._error(f"row {row}: expert {ids[at]} is not within 0…{most - 1}")
        return width, ids

    def _require_order(self, rows: Rows, first: int) -> None:
        key = rows["step"].astype(np.int64) * self.meta.num_layers + rows["layer"]
        change = np.diff(key)
        ordered = (change > 0) | ((change == 0) & (np.diff(rows["token"]) >= 0))
        self._require(ordered, first + 1, "not sorted by step, layer, token")

    def _require(self, ok: Bools, first: int, what: str) -> None:
        if not ok.all():
            raise self._error(f"row {first + int(np.argmin(ok))}: {what}")

    def _error(self, what: str) -> TraceError:
        return TraceError(what, where=self._where)


def _row_of(at: int, width: Array, first: int) -> int:
    """Return the row that holds value number ``at`` in a column of lists with lengths ``width``."""
    return first + int(np.searchsorted(np.cumsum(width), at, side="right"))


def _block(rows: Rows) -> EventList:
    starts = rows.starts()
    width, ids = rows.lists["experts"]
    block = EventList(
        step=rows["step"][starts],
        layer=rows["layer"][starts],
        # The minimum, because prefill is 0 and a mixed batch counts as prefill.
        phase=np.minimum.reduceat(rows["phase"], starts),
        offsets=_offsets(width, starts),
        ids=ids,
        starts=_token_starts(width, len(ids)),
    )
    if "predicted" not in rows.lists:
        return block
    width, ids = rows.lists["predicted"]
    return block._replace(guess_offsets=_offsets(width, starts), guesses=ids)


def _token_starts(width: Array, pairs: int) -> Bools:
    """Return, for each (token, expert) pair, True if the pair is the first of its token."""
    starts = np.zeros(pairs, np.bool_)
    starts[(np.cumsum(width, dtype=np.int64) - width)[width > 0]] = True
    return starts


def _offsets(width: Array, starts: Int64s) -> Int64s:
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(width, dtype=np.int64)])
    chosen: Int64s = ends[np.concatenate([starts, [len(width)]])]
    return chosen
