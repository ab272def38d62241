"""The trace format: which experts a model routed to, as one Parquet file, read in a stream.

A row is one token in one MoE layer of one step; rows are sorted by step, layer, token. The rows of
one (step, layer) are one event. What the numbers mean lies in the file's metadata (``TraceMeta``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fluxmoe.core.types import Bools, Geometry, Int64s, Ints, Phase
from fluxmoe.errors import TraceError

VERSION = 1
_KEY = b"fluxmoe"
_LARGEST = np.iinfo(np.int16).max

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("layer", pa.int16()),
        ("token", pa.int32()),
        ("phase", pa.int8()),
        ("request", pa.int32()),
        ("experts", pa.list_(pa.int16())),
    ]
)
# ``request`` must be there but says nothing about events.
_READ = ["step", "layer", "token", "phase", "experts"]
_BATCH_ROWS = 1 << 17


@dataclass(frozen=True, slots=True)
class TraceMeta:
    """What a trace is a trace of.

    Attributes:
        model: Name or path of the model.
        num_layers: MoE layers.
        experts_per_layer: Routed experts of each layer.
        top_k: Experts per token.
        page_bytes: Bytes of one expert page, None if unknown.
        source: Who wrote the trace.
    """

    model: str
    num_layers: int
    experts_per_layer: int
    top_k: int
    page_bytes: int | None
    source: str

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.num_layers, self.experts_per_layer)

    def check(self, where: str) -> None:
        """Raise TraceError, naming ``where``, unless the numbers can be those of a model."""
        for name in ("num_layers", "experts_per_layer", "top_k"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _LARGEST:
                raise TraceError(f"metadata: {name} is {value!r}, not 1…{_LARGEST}", where=where)
        if self.top_k > self.experts_per_layer:
            raise TraceError(
                f"metadata: top_k is {self.top_k} of {self.experts_per_layer} experts",
                where=where,
            )
        size = self.page_bytes
        if size is not None and (type(size) is not int or size < 1):
            raise TraceError(
                f"metadata: page_bytes is {size!r}, not a positive integer or null", where=where
            )


class EventBlock(NamedTuple):
    """N consecutive events. Event ``i`` routed to ``ids[offsets[i]:offsets[i + 1]]``."""

    step: npt.NDArray[np.int32]  # [N]
    layer: npt.NDArray[np.int16]  # [N]
    phase: npt.NDArray[np.int8]  # [N]
    offsets: Int64s  # [N + 1]
    ids: npt.NDArray[np.int32]  # one per (token, expert) pair, token by token


class TraceWriter:
    """Writes a trace event by event. The file appears under its name only when it is complete.

    Use it as a context manager: an exception inside leaves no file behind. ``append`` fits
    ``ExpertPager.watcher``.

    Args:
        path: The file to make or replace.
        meta: What the trace is a trace of.
        group_rows: Rows that are held in memory and written together.

    Raises:
        TraceError: The metadata make no sense, or the file cannot be created.
    """

    def __init__(self, path: str | Path, meta: TraceMeta, *, group_rows: int = _BATCH_ROWS) -> None:
        self.path, self.meta = Path(path), meta
        meta.check(str(path))
        if self.path.is_dir() or not self.path.parent.is_dir():
            what = "it is a folder" if self.path.is_dir() else "there is no such folder"
            raise TraceError(f"cannot write a trace: {what}", where=str(path), fix="name a file")
        self._group_rows = group_rows
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        document = json.dumps({"version": VERSION, **asdict(meta)})
        try:
            self._file = pq.ParquetWriter(
                self._temporary, SCHEMA.with_metadata({_KEY: document}), compression="zstd"
            )
        except OSError as error:
            raise TraceError(f"cannot write it: {error.strerror}", where=str(path)) from error
        self._last = (-1, -1)
        self._headers: list[tuple[int, int, int]] = []
        self._ids: list[Ints] = []
        self._rows = 0

    def append(self, step: int, layer: int, ids: Ints, phase: Phase = Phase.DECODE) -> None:
        """Add one event.

        Args:
            step: Forward pass; (step, layer) must grow from event to event.
            layer: MoE layer, from 0.
            ids: Routed experts, any integer dtype, ``[tokens, top_k]`` or flat in that order.
                Negative entries are padding and are left out of their token's row. Copied.
            phase: What the step mostly does.

        Raises:
            TraceError: Out of order, out of range, or not ``top_k`` experts per token.
        """
        if (step, layer) <= self._last or not 0 <= layer < self.meta.num_layers:
            raise TraceError(
                f"event (step {step}, layer {layer}) cannot follow (step {self._last[0]}, "
                f"layer {self._last[1]}) in a trace of {self.meta.num_layers} layers",
                where=str(self.path),
            )
        if ids.size % self.meta.top_k:
            raise TraceError(
                f"step {step}, layer {layer}: {ids.size} expert ids are no multiple of "
                f"top_k = {self.meta.top_k}",
                where=str(self.path),
            )
        self._last = (step, layer)
        rows = ids.reshape(-1, self.meta.top_k).copy()
        self._headers.append((step, layer, phase))
        self._ids.append(rows)
        self._rows += len(rows)
        if self._rows >= self._group_rows:
            self._flush()

    def close(self) -> None:
        """Write what is held and give the file its name.

        Raises:
            TraceError: No event was appended; no file is made.
        """
        try:
            if self._last == (-1, -1):
                raise TraceError("the trace has no events", where=str(self.path))
            self._flush()
            self._file.close()
            os.replace(self._temporary, self.path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Give up: leave no file behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _flush(self) -> None:
        if not self._headers:
            return
        ids = np.concatenate(self._ids)
        if ids.size and ids.max() >= self.meta.experts_per_layer:
            raise TraceError(
                f"expert {ids.max()} of {self.meta.experts_per_layer}", where=str(self.path)
            )
        valid = ids >= 0
        offsets = np.zeros(len(ids) + 1, np.int32)
        np.cumsum(valid.sum(axis=1), out=offsets[1:])
        tokens = np.asarray([len(rows) for rows in self._ids])
        headers = np.repeat(np.asarray(self._headers, np.int32), tokens, axis=0)
        first = np.repeat(np.cumsum(tokens) - tokens, tokens)
        columns = [
            pa.array(headers[:, 0]),
            pa.array(headers[:, 1].astype(np.int16)),
            pa.array((np.arange(len(ids)) - first).astype(np.int32)),
            pa.array(headers[:, 2].astype(np.int8)),
            pa.array(np.full(len(ids), -1, np.int32)),
            pa.ListArray.from_arrays(offsets, ids[valid].astype(np.int16)),
        ]
        self._file.write_table(pa.table(columns, schema=SCHEMA))
        self._headers.clear()
        self._ids.clear()
        self._rows = 0


class _Rows(NamedTuple):
    """Consecutive rows of a file; row ``i`` has ``width[i]`` of the ``ids`` (int32)."""

    step: npt.NDArray[Any]
    layer: npt.NDArray[Any]
    token: npt.NDArray[Any]
    phase: npt.NDArray[Any]
    width: npt.NDArray[Any]
    ids: npt.NDArray[Any]

    def then(self, more: _Rows) -> _Rows:
        return _Rows(*(np.concatenate(pair) for pair in zip(self, more, strict=True)))

    def split(self, row: int) -> tuple[_Rows, _Rows]:
        cuts = [row] * 5 + [int(self.width[:row].sum())]
        columns = list(zip(self, cuts, strict=True))
        return _Rows(*(c[:i] for c, i in columns)), _Rows(*(c[i:] for c, i in columns))


class TraceReader:
    """Reads a trace in a stream, checking every row. ``meta`` is known at once.

    Raises:
        TraceError: Not a trace: unreadable, damaged, or not of this format and version.
    """

    def __init__(self, path: str | Path) -> None:
        self._where = str(path)
        try:
            self._file = pq.ParquetFile(path)
        except FileNotFoundError as error:
            raise TraceError("no such file", where=self._where) from error
        except (OSError, pa.ArrowException) as error:
            raise TraceError(
                "not a Parquet file, or a truncated one",
                where=self._where,
                fix="make traces with `fluxmoe trace synth`, or record them again",
            ) from error
        schema = self._file.schema_arrow
        self.meta = self._read_meta((schema.metadata or {}).get(_KEY))
        for field in SCHEMA:
            found = [other.type for other in schema if other.name == field.name]
            if not found:
                raise self._error(f"column {field.name!r} is missing")
            if found[0] != field.type:
                raise self._error(
                    f"column {field.name!r} has type {found[0]}, expected {field.type}"
                )

    def events(self) -> Iterator[tuple[int, int, Phase, npt.NDArray[np.int32]]]:
        """All events in order, as (step, layer, phase, routed experts with repeats, 1-D).

        Raises:
            TraceError: A row is damaged, out of range or out of order, or there are no rows.
        """
        phases = (Phase.PREFILL, Phase.DECODE)
        for block in self.blocks():
            bounds = block.offsets.tolist()
            rows = zip(block.step.tolist(), block.layer.tolist(), block.phase.tolist(), strict=True)
            for i, (step, layer, phase) in enumerate(rows):
                yield step, layer, phases[phase], block.ids[bounds[i] : bounds[i + 1]]

    def blocks(self) -> Iterator[EventBlock]:
        """All events in order, many at a time. Raises TraceError like ``events``."""
        held: _Rows | None = None
        first = 0  # number of the first row of `rows` in the file
        for batch in self._batches():
            if batch.num_rows == 0:
                continue
            rows = self._checked(batch, first + (len(held.step) if held else 0))
            if held is not None:
                rows = held.then(rows)
            starts = self._starts(rows, first)
            # The last event may go on in the next batch.
            whole, held = rows.split(int(starts[-1]))
            first += len(whole.step)
            if len(whole.step):
                yield _block(whole, starts[:-1])
        if held is None:
            raise self._error("the trace has no events")
        yield _block(held, np.zeros(1, np.int64))

    def _batches(self) -> Iterator[Any]:
        try:
            yield from self._file.iter_batches(_BATCH_ROWS, columns=_READ)
        except (OSError, pa.ArrowException) as error:
            raise self._error(f"damaged data: {error}") from error

    def _checked(self, batch: Any, first: int) -> _Rows:
        columns = {name: batch.column(name) for name in _READ}
        experts = columns["experts"]
        values = experts.flatten()
        if any(column.null_count for column in (*columns.values(), values)):
            raise self._error(f"a value is missing in one of the rows from {first} on")
        step, layer, token, phase = (
            columns[name].to_numpy(zero_copy_only=False) for name in _READ[:-1]
        )
        width = np.diff(experts.offsets.to_numpy())
        ids = values.to_numpy(zero_copy_only=False).astype(np.int32)
        meta = self.meta
        self._require(step >= 0, first, "the step is negative")
        self._require(
            (layer >= 0) & (layer < meta.num_layers),
            first,
            f"the layer is not within 0…{meta.num_layers - 1}",
        )
        self._require((phase == 0) | (phase == 1), first, "the phase is neither 0 nor 1")
        self._require(width <= meta.top_k, first, f"more than top_k = {meta.top_k} experts")
        if ids.size and (ids.min() < 0 or ids.max() >= meta.experts_per_layer):
            wrong = (ids < 0) | (ids >= meta.experts_per_layer)
            row = np.searchsorted(np.cumsum(width), int(np.argmax(wrong)), side="right")
            raise self._error(
                f"row {first + int(row)}: expert {ids[np.argmax(wrong)]} is not within "
                f"0…{meta.experts_per_layer - 1}"
            )
        return _Rows(step, layer, token, phase, width, ids)

    def _starts(self, rows: _Rows, first: int) -> Int64s:
        """The rows that begin an event, after a check that all rows are in order."""
        key = rows.step.astype(np.int64) * self.meta.num_layers + rows.layer
        change = np.diff(key)
        ordered = (change > 0) | ((change == 0) & (np.diff(rows.token) >= 0))
        self._require(ordered, first + 1, "not sorted by step, layer, token")
        return np.concatenate([[0], np.flatnonzero(change) + 1])

    def _require(self, ok: Bools, first: int, what: str) -> None:
        if not ok.all():
            raise self._error(f"row {first + int(np.argmin(ok))}: {what}")

    def _read_meta(self, raw: bytes | None) -> TraceMeta:
        if raw is None:
            raise self._error("the Parquet file has no metadata key 'fluxmoe': it is no trace")
        try:
            data = json.loads(raw)
        except ValueError as error:
            raise self._error("the metadata key 'fluxmoe' holds no JSON") from error
        if not isinstance(data, dict):
            raise self._error("the metadata key 'fluxmoe' holds no JSON object")
        if data.get("version") != VERSION:
            raise self._error(
                f"trace format version {data.get('version')!r}, this FluxMoE reads {VERSION}"
            )
        meta = TraceMeta(
            model=str(data.get("model") or ""),
            num_layers=data.get("num_layers", 0),
            experts_per_layer=data.get("experts_per_layer", 0),
            top_k=data.get("top_k", 0),
            page_bytes=data.get("page_bytes") or None,
            source=str(data.get("source") or ""),
        )
        meta.check(self._where)
        return meta

    def _error(self, what: str) -> TraceError:
        return TraceError(what, where=self._where)


def _block(rows: _Rows, starts: Int64s) -> EventBlock:
    ends = np.concatenate([[0], np.cumsum(rows.width, dtype=np.int64)])
    return EventBlock(
        step=rows.step[starts],
        layer=rows.layer[starts],
        # 0 is prefill: a batch that mixes both counts as prefill.
        phase=np.minimum.reduceat(rows.phase, starts),
        offsets=ends[np.concatenate([starts, [len(rows.step)]])],
        ids=rows.ids,
    )
