"""JSON lines, one per (token, layer): ``{"layer_idx": 0, "token_idx": 0, "selected_ids": [3, 1]}``.

Layout: https://github.com/ohdearquant/lattice/pull/903 (``crates/inference/src/moe_admission.rs``);
``gate_weights`` is optional, and other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.core.types import Phase
from fluxmoe.trace.formats.base import ForeignEvent, Reader


class JsonLines(Reader):
    """One token per step, layers ascending; a token number that restarts begins a new request."""

    name = "jsonl"
    summary = "JSON lines {layer_idx, token_idx, selected_ids}, sorted by token, then layer"

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        """Return True for text that begins with a JSON object."""
        return head.lstrip().startswith(b"{")

    def events(self) -> Iterator[ForeignEvent]:
        """Yield all events, reading line by line."""
        step, request, lowest = -1, 0, None
        last = (-1, -1)
        for number, line in enumerate(self._lines(), 1):
            if not line.strip():
                continue
            where = f"line {number}"
            token, layer, ids, weights = self._parse(line, where)
            if lowest is None:
                lowest = layer
            if token != last[0] or (layer == lowest and layer <= last[1]):
                if layer != lowest and token < last[0]:
                    raise self.wrong("sorted by layer, not by token_idx, layer_idx", where)
                step += 1
                request += step > 0 and token <= last[0]
            elif layer <= last[1]:
                raise self.wrong(f"layer {layer} after layer {last[1]} of the same token", where)
            last = (token, layer)
            yield ForeignEvent(step, layer, ids, Phase.DECODE, request, weights)

    def _lines(self) -> Iterator[str]:
        try:
            with self.path.open(encoding="utf-8") as file:
                yield from file
        except (OSError, UnicodeDecodeError) as error:
            raise self.wrong(f"cannot be read: {error}") from error

    def _parse(self, line: str, where: str) -> tuple[int, int, Any, Any]:
        try:
            data = json.loads(line)
            token, layer = data["token_idx"], data["layer_idx"]
            ids = np.asarray([data["selected_ids"]])
            weights = data.get("gate_weights")
        except (ValueError, TypeError, RecursionError) as error:
            raise self.wrong(f"not a JSON object: {error}", where) from error
        except KeyError as error:
            raise self.wrong(f"{error.args[0]} is missing", where) from error
        numbers = type(token) is int and type(layer) is int and min(token, layer) >= 0
        if not numbers or ids.ndim != 2 or ids.dtype.kind != "i":
            raise self.wrong(
                "token_idx and layer_idx must be whole numbers from 0, "
                "and selected_ids a non-empty list of integers",
                where,
            )
        if weights is None:
            return token, layer, ids, None
        scores = np.asarray([weights])
        if scores.shape != ids.shape or scores.dtype.kind not in "if":
            raise self.wrong("gate_weights must contain one number per selected id", where)
        return token, layer, ids, scores
