"""FLAME-MoE's routing traces: one Parquet file per MoE layer, one row per training token.

Layout: https://huggingface.co/datasets/CMU-FLAME/FLAME-MoE-Traces (README, "Schema"):
``actives/iter_NNNN/layer_NN.parquet`` with ``scores`` (list of float16) and ``indices`` (list of
int16); row i is the same token in every layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fluxmoe.core.types import Phase
from fluxmoe.trace.format import parquet_file
from fluxmoe.trace.formats.base import ForeignEvent, Reader

_LAYER = re.compile(r"layer_(\d+)\.parquet")
_BATCH_ROWS = 1 << 14


class Flame(Reader):
    """A folder ``iter_NNNN`` of layers, or one of its files. ``step_tokens`` tokens form a step."""

    name = "flame"
    summary = "FLAME-MoE: layer_NN.parquet, or a folder of them, with columns indices and scores"

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        """True for any Parquet file that is not a trace, and folders with ``layer_NN.parquet``."""
        if path.is_dir():
            return any(_LAYER.fullmatch(file.name) for file in path.iterdir())
        return head.startswith(b"PAR1")

    def events(self) -> Iterator[ForeignEvent]:
        """Yield all events, reading the files of all layers side by side."""
        files = self._files()
        size = self.options.step_tokens
        phase = Phase.DECODE if size == 1 else Phase.PREFILL
        streams = [self._steps(file, size) for file in files.values()]
        step = 0
        while True:
            parts = [next(stream, None) for stream in streams]
            lengths = {None if part is None else len(part[0]) for part in parts}
            if lengths == {None}:
                return
            if len(lengths) > 1:
                raise self.wrong("the layers' files have different numbers of rows")
            for layer, part in zip(files, parts, strict=True):
                assert part is not None
                yield ForeignEvent(step, layer, part[0], phase, weights=part[1])
            step += 1

    def _files(self) -> dict[int, Path]:
        found = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        named = [(_LAYER.fullmatch(file.name), file) for file in found]
        files = {int(match[1]): file for match, file in named if match is not None}
        return dict(sorted(files.items())) or {0: self.path}

    def _steps(self, path: Path, size: int) -> Iterator[tuple[Any, Any]]:
        """Yield (ids, weights or None) for ``size`` rows each; the last has the remainder."""
        held: list[Any] = []
        try:
            file = parquet_file(path)
            names = file.schema_arrow.names
            if "indices" not in names:
                raise self.wrong(f"{path.name} has the columns {', '.join(names)}, not indices")
            columns = [name for name in ("indices", "scores") if name in names]
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                arrays = [self._matrix(batch.column(name), name, path) for name in columns]
                if held:
                    arrays = [np.concatenate(pair) for pair in zip(held, arrays, strict=True)]
                whole = len(arrays[0]) // size * size
                for start in range(0, whole, size):
                    part = [array[start : start + size] for array in arrays]
                    yield part[0], part[1] if len(part) > 1 else None
                held = [array[whole:] for array in arrays]
        except (OSError, pa.ArrowException) as error:
            raise self.wrong(f"{path.name}: not a valid Parquet file: {error}") from error
        if held and len(held[0]):
            yield held[0], held[1] if len(held) > 1 else None

    def _matrix(self, column: Any, name: str, path: Path) -> Any:
        if not pa.types.is_list(column.type) and not pa.types.is_fixed_size_list(column.type):
            raise self.wrong(f"{path.name}: a column of {column.type} instead of lists")
        kinds = pa.types.is_integer if name == "indices" else pa.types.is_floating
        if not kinds(column.type.value_type):
            raise self.wrong(f"{path.name}: {name} are {column.type.value_type}")
        values, lengths = column.flatten(), pc.list_value_length(column).unique()
        if column.null_count or values.null_count or len(lengths) > 1:
            raise self.wrong(f"{path.name}: rows of different lengths, or without a value")
        width = lengths[0].as_py() if len(lengths) else 0
        return values.to_numpy(zero_copy_only=False).reshape(len(column), width)
