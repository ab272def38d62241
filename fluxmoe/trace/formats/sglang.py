"""Files of SGLang's expert distribution recorder in ``per_token`` mode.

Layout: https://github.com/sgl-project/sglang, ``python/sglang/srt/eplb/expert_distribution.py``
(``_DetailSinglePassGatherer``, ``_DetailAccumulator``): a ``.pt`` file with ``records``, one per
forward pass and rank, and ``last_physical_to_logical_map`` ``[layers, physical experts]``. A
record has ``topk_ids_of_layer`` ``[layers, tokens, top_k]`` (physical experts; −1 where nothing was
routed), ``forward_mode`` (2 = decode) and ``forward_pass_id``.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.core.types import Phase
from fluxmoe.errors import MissingDependencyError
from fluxmoe.trace.formats.base import ForeignEvent, Reader

_DECODE = 2  # ForwardMode.DECODE


class ExpertDistribution(Reader):
    """The file of one rank, read as data: nothing in the file is executed."""

    name = "sglang"
    summary = (
        "SGLang's expert distribution: .pt recorded with "
        "--expert-distribution-recorder-mode per_token"
    )

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        """Return True for files saved by torch."""
        if not head.startswith(b"PK") or not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())

    def events(self) -> Iterator[ForeignEvent]:
        """Yield all events. The whole file is loaded, since its format cannot be streamed."""
        data = self._load()
        records = data.get("records") if isinstance(data, dict) else None
        if not isinstance(records, list) or not records:
            keys = sorted(map(str, data)) if isinstance(data, dict) else [type(data).__name__]
            raise self.wrong(f"no per-token records, only {', '.join(keys)}")
        logical = self._map(data.get("last_physical_to_logical_map"))
        step = 0
        for index, record in enumerate(records):
            where = f"record {index}"
            if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
                raise self.wrong("counts of experts instead of the routing of each token", where)
            ids = self._integers(record["topk_ids_of_layer"], 3, "topk_ids_of_layer", where)
            if not ids.shape[1]:
                continue  # a pass without tokens for this rank
            decode = record.get("forward_mode") == _DECODE
            phase = Phase.DECODE if decode else Phase.PREFILL
            for layer, routed in enumerate(ids):
                if (routed >= 0).any():
                    yield ForeignEvent(step, layer, self._logical(routed, layer, logical), phase)
            step += 1

    def _load(self) -> Any:
        try:
            import torch
        except ImportError as error:
            raise MissingDependencyError(
                "torch is needed to read SGLang's .pt files", fix="pip install 'fluxmoe[hf]'"
            ) from error
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's message advises executing the file
            raise self.wrong("it contains objects other than tensors, lists and maps") from error
        except (OSError, RuntimeError, EOFError) as error:
            what = str(error).strip().partition("\n")[0]
            raise self.wrong(f"cannot be read: {what}") from error

    def _map(self, found: Any) -> Any:
        if found is None:
            return None
        return self._integers(found, 2, "last_physical_to_logical_map")

    def _integers(self, found: Any, dimensions: int, name: str, where: str = "") -> Any:
        import torch

        floating = isinstance(found, torch.Tensor) and found.is_floating_point()
        try:
            array = np.asarray(found.float() if floating else found)  # numpy has no bf16
        except ValueError:  # lists of different lengths
            array = np.asarray(None)
        if array.dtype.kind not in "iu":
            raise self.wrong(f"{name} is not an array of whole numbers", where)
        if array.ndim != dimensions:
            raise self.wrong(f"{name} has the shape {list(array.shape)}", where)
        return array

    def _logical(self, physical: Any, layer: int, logical: Any) -> Any:
        if logical is None:
            return physical
        if layer >= len(logical) or physical.max() >= logical.shape[1]:
            raise self.wrong(
                f"physical expert {physical.max()} is not in last_physical_to_logical_map",
                f"layer {layer}",
            )
        return np.where(physical >= 0, logical[layer][physical], -1)
