"""Checks that layers and pages given to a store have the model's layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxmoe.core.types import Bytes, Geometry, PageClass
from fluxmoe.errors import StoreError


def require_layer(
    geometry: Geometry, page_class: PageClass, layer: int, parts: Sequence[Bytes]
) -> None:
    """Raise StoreError unless ``parts`` can be adopted as ``layer``, the next layer."""
    if layer == geometry.num_layers:
        raise StoreError(f"the store already has all {layer} layers")
    got = [part.shape for part in parts]
    expected = [(geometry.experts_per_layer, part.nbytes) for part in page_class.parts]
    if got != expected:
        raise StoreError(f"layer {layer} has parts of shape {got}, expected {expected}")
    if any(part.dtype != np.uint8 for part in parts):
        dtypes = [str(part.dtype) for part in parts]
        raise StoreError(f"layer {layer} has parts of {dtypes}, expected uint8")
    if not all(part.flags.c_contiguous for part in parts):
        raise StoreError(f"layer {layer} has parts that are not contiguous")


def require_page(
    geometry: Geometry,
    page_class: PageClass,
    page: int,
    parts: Sequence[Bytes],
    *,
    given: bool,
) -> None:
    """Raise StoreError if ``parts`` do not have a page's layout, or if ``page`` was ``given``."""
    if not 0 <= page < geometry.num_pages:
        raise StoreError(f"there is no page {page}: the last page is {geometry.num_pages - 1}")
    if given:
        raise StoreError(f"page {page} is put twice")
    got = [(part.shape, str(part.dtype)) for part in parts]
    expected = [((part.nbytes,), "uint8") for part in page_class.parts]
    if got != expected:
        raise StoreError(f"page {page} has parts {got}, expected {expected}")
