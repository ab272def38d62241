"""The trace format (docs/reference/traces.md): columns, metadata, and a file's arrays in memory.

A row is one token in one MoE layer of one step; rows are sorted by step, layer and token. The rows
of one (step, layer) form one event. The file's metadata (``TraceMeta``) describes the model.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fluxmoe.core.types import Geometry, Int64s
from fluxmoe.errors import TraceError
from fluxmoe.words import line

VERSION = 1
KEY = b"fluxmoe"
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
#: Optional columns: routing weights, one per expert of the row; and the experts that the next layer
#: is predicted to route the token to (empty in the last layer).
OPTIONAL = {"weights": pa.list_(pa.float16()), "predicted": pa.list_(pa.int16())}

#: Number of rows held in memory and read or written together.
GROUP_ROWS = 1 << 17
#: Size of the buffer of a column chunk, so that even a file with one huge row group is streamed.
_BUFFER_BYTES = 1 << 20

Array: TypeAlias = npt.NDArray[Any]


def parquet_file(path: str | Path) -> pq.ParquetFile:
    """Open a Parquet file with any name; raise OSError or ArrowException on failure."""
    # Passed as bytes and opened as a file, because pyarrow would encode text as UTF-8 and mistake a
    # path with a colon for a URI.
    return pq.ParquetFile(pa.OSFile(os.fsencode(path)), buffer_size=_BUFFER_BYTES)


@dataclass(frozen=True, slots=True)
class TraceMeta:
    """Metadata of a trace: the model and the source.

    Attributes:
        model: Name or path of the model.
        num_layers: Number of MoE layers.
        experts_per_layer: Number of routed experts per layer.
        top_k: Number of experts per token.
        page_bytes: Bytes of one expert page; None if unknown.
        source: Name of the program or format that the trace comes from.
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

    @property
    def described(self) -> str:
        """Readable description of the model, such as ``prose: 6 layers of 64 experts, top 8``."""
        return (
            f"{line(self.model)}: {self.num_layers} layers of {self.experts_per_layer} experts, "
            f"top {self.top_k}"
        )

    def check(self, where: str) -> None:
        """Raise TraceError, located at ``where``, unless the numbers are plausible for a model."""
        for name in ("num_layers", "experts_per_layer", "top_k"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _LARGEST:
                raise TraceError(f"metadata: {name} is {value!r}, not 1…{_LARGEST}", where=where)
        if self.top_k > self.experts_per_layer:
            raise TraceError(
                f"metadata: top_k is {self.top_k}, but a layer has {self.experts_per_layer} "
                "experts",
                where=where,
            )
        size = self.page_bytes
        if size is not None and (type(size) is not int or size < 1):
            raise TraceError(
                f"metadata: page_bytes is {size!r}, not a positive integer or null", where=where
            )

    def dump(self) -> str:
        """Return the value of the metadata key ``fluxmoe``, a JSON object."""
        return json.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, raw: bytes | None, where: str) -> TraceMeta:
        """Parse the result of ``dump``; raise TraceError, located at ``where``, if invalid."""
        if raw is None:
            raise TraceError(
                "not a trace: the Parquet file has no metadata key 'fluxmoe'",
                where=where,
                fix="convert files of other formats with `fluxmoe trace convert`",
            )
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise TraceError("the metadata key 'fluxmoe' is not valid JSON", where=where) from error
        if not isinstance(data, dict):
            raise TraceError("the metadata key 'fluxmoe' is not a JSON object", where=where)
        if data.get("version") != VERSION:
            raise TraceError(
                f"trace format version {data.get('version')!r}; this version of FluxMoE "
                f"reads {VERSION}",
                where=where,
            )
        meta = cls(
            model=str(data.get("model") or ""),
            num_layers=data.get("num_layers", 0),
            experts_per_layer=data.get("experts_per_layer", 0),
            top_k=data.get("top_k", 0),
            page_bytes=data.get("page_bytes") or None,
            source=str(data.get("source") or ""),
        )
        meta.check(where)
        return meta


class StepRows(NamedTuple):
    """Request and phase of the T tokens of a step, which are the same in all layers.

    ``request`` is int32 ``[T]`` (−1 = unknown), and ``phase`` is int8 ``[T]``.
    """

    request: npt.NDArray[np.int32]
    phase: npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Rows:
    """N consecutive rows of a file.

    Attributes:
        scalars: Column → array ``[N]``.
        lists: Column → (number of entries per row ``[N]``, all entries concatenated).
    """

    scalars: dict[str, Array]
    lists: dict[str, tuple[Array, Array]]

    def __len__(self) -> int:
        return len(self.scalars["step"])

    def __getitem__(self, column: str) -> Array:
        return self.scalars[column]

    def then(self, more: Rows) -> Rows:
        """Concatenate these rows and ``more``."""
        return Rows(
            {name: np.concatenate([one, more[name]]) for name, one in self.scalars.items()},
            {
                name: (
                    np.concatenate([widths, more.lists[name][0]]),
                    np.concatenate([values, more.lists[name][1]]),
                )
                for name, (widths, values) in self.lists.items()
            },
        )

    def split(self, row: int) -> tuple[Rows, Rows]:
        """Return the rows before ``row``, and the other rows."""
        cuts = {name: int(widths[:row].sum()) for name, (widths, _) in self.lists.items()}
        return (
            Rows(
                {name: column[:row] for name, column in self.scalars.items()},
                {n: (w[:row], v[: cuts[n]]) for n, (w, v) in self.lists.items()},
            ),
            Rows(
                {name: column[row:] for name, column in self.scalars.items()},
                {n: (w[row:], v[cuts[n] :]) for n, (w, v) in self.lists.items()},
            ),
        )

    def starts(self) -> Int64s:
        """Return the index of the first row of each event; the rows must be sorted."""
        same = (np.diff(self["step"]) == 0) & (np.diff(self["layer"]) == 0)
        return np.concatenate([[0], np.flatnonzero(~same) + 1])
