"""Pages in host memory, adopted layer by layer without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxmoe.core.types import Bytes, Geometry, PageClass
from fluxmoe.errors import StoreError


class HostStore:
    """Keeps each layer's parts as the uint8 arrays ``[experts, part bytes]`` it was given."""

    def __init__(self, geometry: Geometry, page_class: PageClass) -> None:
        self._geometry, self._page_class = geometry, page_class
        self._layers: list[list[Bytes]] = []

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self._layers for part in layer)

    def adopt(self, parts: Sequence[Bytes]) -> None:
        """Take the next layer: one array ``[experts, nbytes]`` per part of the page class."""
        layer, experts = len(self._layers), self._geometry.experts_per_layer
        if layer == self._geometry.num_layers:
            raise StoreError(f"the store already has all {layer} layers")
        got = [part.shape for part in parts]
        expected = [(experts, part.nbytes) for part in self._page_class.parts]
        if got != expected:
            raise StoreError(f"layer {layer} has parts of shape {got}, expected {expected}")
        if any(part.dtype != np.uint8 for part in parts):
            dtypes = [str(part.dtype) for part in parts]
            raise StoreError(f"layer {layer} has parts of {dtypes}, expected uint8")
        self._layers.append(list(parts))

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        layer, expert = divmod(page, self._geometry.experts_per_layer)
        if not 0 <= layer < len(self._layers):
            raise StoreError(f"page {page} is not in the store")
        for source, target in zip(self._layers[layer], parts, strict=True):
            np.copyto(target, source[expert])

    def close(self) -> None:
        self._layers.clear()
