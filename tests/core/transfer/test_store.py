from __future__ import annotations

import numpy as np
import pytest

from fluxmoe.core.types import Geometry, PageClass, Part
from fluxmoe.errors import StoreError
from fluxmoe.stores.host import HostStore
from tests.core.rig import PAGE_CLASS, content, host_store


def rows() -> list[np.ndarray]:
    return [np.zeros(part.nbytes, np.uint8) for part in PAGE_CLASS.parts]


def test_every_page_comes_back_as_it_was_adopted():
    store = host_store(Geometry(3, 4))
    for page in range(12):
        store.read_into(page, target := rows())
        for part, row in enumerate(target):
            np.testing.assert_array_equal(row, content(page, part))
    assert store.nbytes == 12 * PAGE_CLASS.nbytes


def test_layers_are_adopted_without_a_copy():
    store = HostStore(Geometry(1, 2), PageClass((Part("w", 3, 3),)))
    weights = np.zeros((2, 3), np.uint8)
    store.adopt([weights])
    weights[1] = 7
    store.read_into(1, [row := np.zeros(3, np.uint8)])
    assert row.tolist() == [7, 7, 7]


@pytest.mark.parametrize("page", [-1, 4, 12])
def test_a_page_that_is_not_there_is_an_error(page):
    store = HostStore(Geometry(3, 4), PAGE_CLASS)
    store.adopt([np.zeros((4, part.nbytes), np.uint8) for part in PAGE_CLASS.parts])
    with pytest.raises(StoreError, match=f"page {page} is not in the store"):
        store.read_into(page, rows())


def test_closing_forgets_the_pages_and_is_idempotent():
    store = host_store(Geometry(1, 2))
    store.close()
    store.close()
    assert store.nbytes == 0
    with pytest.raises(StoreError):
        store.read_into(0, rows())


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        ([(2, 3), (2, 4)], np.uint8, r"parts of shape \[\(2, 3\), \(2, 4\)\], expected"),
        ([(2, 3)], np.uint8, "expected"),
        ([(3, 3), (3, 5)], np.uint8, "expected"),
        ([(2, 3), (2, 5)], np.int8, "expected uint8"),
    ],
)
def test_a_layer_of_another_layout_is_refused(shapes, dtype, message):
    store = HostStore(Geometry(1, 2), PageClass((Part("a", 3, 3), Part("b", 5, 5))))
    with pytest.raises(StoreError, match=message):
        store.adopt([np.zeros(shape, dtype) for shape in shapes])
    assert store.nbytes == 0


def test_a_layer_too_many_is_refused():
    with pytest.raises(StoreError, match="already has all 1 layers"):
        store = host_store(Geometry(1, 2))
        store.adopt([np.zeros((2, part.nbytes), np.uint8) for part in PAGE_CLASS.parts])
