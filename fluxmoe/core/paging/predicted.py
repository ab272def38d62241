"""Predicted experts of the next layer, converted from tokens' votes to pages for policies."""

from __future__ import annotations

import numpy as np

from fluxmoe.core.paging.books import EVENT, LAYER
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.types import Int64s, Ints


class Predicted:
    """The predictions that belong to one event of a page table."""

    def __init__(self, table: PageTable) -> None:
        self._books, self._geometry = table.books, table.geometry
        self._experts, self._event = np.zeros(0, np.int64), -1

    def set(self, experts: Ints) -> None:
        """Set the experts that tokens of the next event are predicted to use one layer later.

        Args:
            experts: Experts with repeats, 1-D; negative entries are ignored.
        """
        votes = np.bincount(experts[experts >= 0], minlength=self._geometry.experts_per_layer)
        self._experts = np.argsort(-votes, kind="stable")[: np.count_nonzero(votes)]
        self._event = int(self._books.now[EVENT]) + 1

    def pages(self) -> Int64s | None:
        """Return the pages by descending votes, then by id; None without a prediction."""
        if self._event != self._books.now[EVENT]:
            return None
        following = int(self._books.now[LAYER]) + 1
        if following == self._geometry.num_layers:
            return np.zeros(0, np.int64)
        return following * self._geometry.experts_per_layer + self._experts
