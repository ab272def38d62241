"""Foreign trace formats, one small reader for each, and their conversion to FluxMoE's format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.errors import ConfigError, TraceError, join, meant
from fluxmoe.trace import StepRows, TraceMeta, TraceWriter
from fluxmoe.trace.format import KEY, parquet_file
from fluxmoe.trace.formats.base import ForeignEvent, Options, Reader
from fluxmoe.trace.formats.flame import Flame
from fluxmoe.trace.formats.jsonl import JsonLines
from fluxmoe.trace.formats.selection import Selection
from fluxmoe.trace.formats.sglang import ExpertDistribution
from fluxmoe.trace.formats.vllm import RoutedExperts

#: Known formats by the value of ``--from``.
FORMATS: dict[str, type[Reader]] = {
    reader.name: reader
    for reader in (Flame, Selection, RoutedExperts, ExpertDistribution, JsonLines)
}

__all__ = ["FORMATS", "ForeignEvent", "Options", "Reader", "convert", "detect"]


@dataclass(slots=True)
class _Survey:
    """Properties of a file, collected by reading it once."""

    layers: set[int] = field(default_factory=set)
    top_k: int = 0
    largest: int = -1
    weights: bool = True

    def add(self, event: ForeignEvent, reader: Reader) -> None:
        valid = event.ids >= 0
        if not valid.any():
            return
        if event.weights is not None:
            # Checked as float16, the stored type: weights beyond its range become infinite.
            with np.errstate(over="ignore"):
                weights = np.asarray(event.weights)[valid].astype(np.float16)
            if not np.isfinite(weights).all():
                where = f"step {event.step}, layer {event.layer}"
                raise reader.wrong("a routing weight is not a finite number", where)
        self.layers.add(event.layer)
        self.top_k = max(self.top_k, int(valid.sum(axis=1).max()))
        self.largest = max(self.largest, int(event.ids.max()))
        self.weights &= event.weights is not None


def detect(path: Path) -> type[Reader]:
    """Detect the format of a file or folder from its content.

    Raises:
        TraceError: The path does not exist, is already a trace, or has an unknown format.
    """
    head = _head(path)
    inside = _formats_in(path) if path.is_dir() else {}
    if len(inside) > 1:
        listed = ", ".join(f"{file} ({name})" for name, file in inside.items())
        raise TraceError(
            f"the folder has files of several formats: {listed}",
            where=str(path),
            fix="name one file, or choose the format with --from",
        )
    for reader in FORMATS.values():
        if reader.recognises(path, head):
            return reader
    raise TraceError(
        "unknown trace format",
        where=str(path),
        fix="name one of its files"
        if inside
        else "; ".join(f"{reader.name}: {reader.summary}" for reader in FORMATS.values()),
    )


def _formats_in(folder: Path) -> dict[str, str]:
    """Return the formats of a folder's files, each with its first file's name, ignoring traces.

    Raises:
        TraceError: A file cannot be read.
    """
    found: dict[str, str] = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        head = _first_bytes(file)
        if not _is_trace(file, head):
            for reader in FORMATS.values():
                if reader.recognises(file, head):
                    found.setdefault(reader.name, file.name)
                    break
    return found


def convert(
    path: str | Path,
    out: str | Path,
    format_: str | None = None,
    options: Options | None = None,
    *,
    model: str | None = None,
    experts: int | None = None,
    page_bytes: int | None = None,
    max_steps: int | None = None,
    replace: bool = False,
) -> TraceMeta:
    """Convert a file of another format to a trace, reading the file twice.

    Args:
        path: A file or folder.
        out: Trace file to write.
        format_: A key of ``FORMATS``; None to detect the format from the content.
        options: Facts that the file does not contain.
        model: Model name for the trace's metadata; by default the file's name.
        experts: Number of experts per layer; by default the largest expert number plus one.
        page_bytes: Bytes of an expert page; None if unknown.
        max_steps: Maximum number of steps to convert; later steps are omitted.
        replace: Overwrite ``out`` if it exists.

    Raises:
        TraceError: The file is damaged or does not have this format, or ``out`` cannot be written.
        ConfigError: The format is unknown, ``experts`` is too small, or ``out`` exists and
            ``replace`` is false.
    """
    path = Path(path)
    if format_ is not None and format_ not in FORMATS:
        raise ConfigError(
            f"unknown format {format_!r}",
            where="--from",
            fix=join(meant(format_, FORMATS), f"known: {', '.join(FORMATS)}"),
        )
    _head(path)
    reader = (FORMATS[format_] if format_ else detect(path))(path, options or Options())
    survey = _Survey()
    for event in _events(reader, max_steps):
        survey.add(event, reader)
    if not survey.layers:
        raise reader.wrong("no experts were routed to")
    if experts is not None and experts <= survey.largest:
        raise ConfigError(
            f"{experts} experts, but the file has expert {survey.largest}", where="--experts"
        )
    ordinal = {layer: index for index, layer in enumerate(sorted(survey.layers))}
    meta = TraceMeta(
        model=model or path.name,
        num_layers=len(ordinal),
        experts_per_layer=experts or survey.largest + 1,
        top_k=survey.top_k,
        page_bytes=page_bytes,
        source=reader.name,
    )
    columns = ["weights"] if survey.weights else []
    with TraceWriter(out, meta, columns=columns, replace=replace) as writer:
        for event in _events(reader, max_steps):
            if event.layer in ordinal:
                ids, weights = _packed(event.ids, event.weights, meta.top_k)
                writer.append(
                    event.step,
                    ordinal[event.layer],
                    ids,
                    event.phase,
                    rows=_rows(event),
                    weights=weights,
                )
    return meta


def _events(reader: Reader, max_steps: int | None) -> Iterator[ForeignEvent]:
    if max_steps is None:
        return reader.events()
    return takewhile(lambda event: event.step < max_steps, reader.events())


def _rows(event: ForeignEvent) -> StepRows:
    tokens = len(event.ids)
    return StepRows(np.full(tokens, event.request, np.int32), np.full(tokens, event.phase, np.int8))


def _packed(ids: Any, weights: Any, top_k: int) -> tuple[Any, Any]:
    """Pack ids and weights into ``top_k`` columns: valid ids first, then −1, with weight 0."""
    ids = np.asarray(ids, np.int64)
    order = np.argsort(ids < 0, axis=1, kind="stable")
    packed = np.full((len(ids), top_k), -1, np.int64)
    width = min(top_k, ids.shape[1])
    packed[:, :width] = np.take_along_axis(ids, order, axis=1)[:, :width]
    if weights is None:
        return packed, None
    scores = np.zeros((len(ids), top_k), np.float16)
    scores[:, :width] = np.take_along_axis(np.asarray(weights), order, axis=1)[:, :width]
    return packed, scores


def _head(path: Path) -> bytes:
    """Read the first bytes of a file; raise TraceError if it is missing or already a trace."""
    if not path.exists():
        raise TraceError("no such file", where=str(path))
    if path.is_dir():
        return b""
    head = _first_bytes(path)
    if _is_trace(path, head):
        raise TraceError("the file is already a trace", where=str(path))
    return head


def _first_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(64)
    except OSError as error:
        raise TraceError(f"cannot be read: {error.strerror}", where=str(file)) from error


def _is_trace(file: Path, head: bytes) -> bool:
    import pyarrow as pa

    if not head.startswith(b"PAR1"):
        return False
    try:
        return KEY in (parquet_file(file).schema_arrow.metadata or {})
    except pa.ArrowException:
        return False  # a damaged file: the format's reader will report it
