"""JSON files of the dataset MoE_expert_selection_trace.

Layout: https://huggingface.co/datasets/core12345/MoE_expert_selection_trace (arXiv:2510.05497). A
file is one request: a list whose first element is the prefill and whose other elements are decode
steps. Each element maps a layer's number to the experts of each token, ``[tokens][top_k]``, or to
null if the layer is dense.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.core.types import Phase
from fluxmoe.trace.formats.base import ForeignEvent, Reader


class Selection(Reader):
    """A file, or a folder whose files are requests that run one after the other."""

    name = "selection"
    summary = (
        "MoE_expert_selection_trace: JSON per request, [{layer: [[expert, …] per token] or null}], "
        "the prefill first"
    )

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        """Return True for a JSON list, or for a folder that contains ``*.json`` files."""
        if path.is_dir():
            return any(path.glob("*.json"))
        return head.lstrip().startswith(b"[")

    def events(self) -> Iterator[ForeignEvent]:
        """Yield all events, with one request in memory at a time."""
        files = sorted(self.path.glob("*.json")) if self.path.is_dir() else [self.path]
        first = 0
        for request, file in enumerate(files):
            steps = self._read(file)
            for index, element in enumerate(steps):
                where = f"{file.name}: element {index}"
                if not isinstance(element, dict):
                    raise self.wrong("not an object", where)
                phase = Phase.PREFILL if index == 0 else Phase.DECODE
                for layer, rows in sorted(self._numbered(element, where)):
                    ids = self._matrix(rows, f"{where}, layer {layer}")
                    yield ForeignEvent(first + index, layer, ids, phase, request)
            first += len(steps)

    def _read(self, file: Path) -> list[Any]:
        try:
            data = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise self.wrong(f"not valid JSON: {error}", file.name) from error
        if not isinstance(data, list):
            raise self.wrong("not a list of steps", file.name)
        return data

    def _numbered(self, element: dict[str, Any], where: str) -> Iterator[tuple[int, Any]]:
        for key, rows in element.items():
            if rows is None:
                continue
            if not key.isdecimal():
                raise self.wrong(f"layer {key!r} is not a number", where)
            yield int(key), rows

    def _matrix(self, rows: Any, where: str) -> Any:
        try:
            ids = np.asarray(rows)
        except ValueError as error:
            raise self.wrong("tokens with different numbers of experts", where) from error
        if ids.ndim != 2 or ids.dtype.kind != "i":
            raise self.wrong("not one list of expert numbers per token", where)
        return ids
