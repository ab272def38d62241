"""vLLM's output with ``--enable-return-routed-experts``: one array per request.

Layout: https://github.com/vllm-project/vllm (``vllm/outputs.py``, ``CompletionOutput``; the
comment on ``routed_experts`` in ``vllm/entrypoints/openai/completion/protocol.py``; pull request
#28284): ``(tokens - 1, layers, top_k)`` of uint8, uint16 or int32, including dense layers. The last
token is missing because no forward pass follows it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fluxmoe.core.types import Phase
from fluxmoe.trace.formats.base import ForeignEvent, Reader


class RoutedExperts(Reader):
    """An ``.npy`` file of one request, or an ``.npz`` file of requests, replayed one after another.

    The array does not contain the prompt's length: ``prompt_tokens`` gives the length; without it,
    every token is a decode step. A row of zeros means that nothing was routed: the layer is dense,
    or the token belongs to a cached prefix; such rows are left out. In a top-1 model, a zero may
    also be expert 0 and is always read as expert 0.
    """

    name = "vllm"
    summary = "vLLM's routed experts: .npy or .npz of integer arrays [tokens, layers, top_k]"

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        """Return True for a NumPy array, or for a zip file of NumPy arrays."""
        if head.startswith(b"\x93NUMPY"):
            return True
        if not head.startswith(b"PK") or not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())

    def events(self) -> Iterator[ForeignEvent]:
        """Yield all events, with one request in memory at a time."""
        step = 0
        for request, (name, array) in enumerate(self._arrays()):
            if array.ndim != 3 or array.dtype.kind not in "ui":
                raise self.wrong(f"{array.dtype} of shape {list(array.shape)}", name)
            routed = array.any(axis=2) | (array.shape[2] == 1)
            tokens = np.flatnonzero(routed.any(axis=1))
            prompt = int((tokens < self.options.prompt_tokens).sum())
            parts = [tokens[:prompt]] if prompt else []
            for part in [*parts, *tokens[prompt:, np.newaxis]]:
                phase = Phase.PREFILL if prompt and part[0] == tokens[0] else Phase.DECODE
                for layer in range(array.shape[1]):
                    ids = np.where(
                        routed[part, layer, np.newaxis], array[part, layer].astype(np.int64), -1
                    )
                    yield ForeignEvent(step, layer, ids, phase, request)
                step += 1

    def _arrays(self) -> Iterator[tuple[str, Any]]:
        try:
            found = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if isinstance(found, np.ndarray):
                yield self.path.name, found
                return
            with found:
                for name in found.files:
                    yield name, found[name]
        except ValueError as error:  # numpy's message advises unpickling the file
            raise self.wrong("it is damaged or contains objects instead of numbers") from error
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise self.wrong(f"cannot be read: {error}") from error
