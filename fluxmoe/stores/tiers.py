"""Several tiers that share the pages: each page is kept by the first tier that has room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import numpy as np

from fluxmoe import sizes
from fluxmoe.core.transfer.store import Put
from fluxmoe.core.types import Bytes, Geometry, PageClass
from fluxmoe.errors import ConfigError, StoreError
from fluxmoe.stores.host import require_layer, require_page


class Tier(Protocol):
    """A store for some of the pages."""

    @property
    def nbytes(self) -> int:
        """The bytes that the pages occupy."""

    def put(self, page: int, parts: Sequence[Bytes]) -> bool:
        """Keep a page if there is room; return True if it is kept.

        The caller may change ``parts`` afterwards.
        """

    def finish(self) -> None:
        """Complete the tier after the last ``put``."""

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        """Read a page that was put. Called from several threads."""

    def stage(self, page: int, parts: Sequence[Bytes]) -> bool:
        """Keep a page's new contents until ``commit``, beside the old; return False if full."""

    def commit(self) -> None:
        """Make all staged contents current. Not called while a page is being read."""

    def discard(self) -> None:
        """Drop all staged contents."""

    def forget(self, page: int) -> None:
        """Drop a page, which has moved to another tier."""

    def close(self) -> None:
        """Release everything. Idempotent."""


class TieredStore:
    """A store that puts each page into the first tier that has room for it.

    Raises (``adopt``):
        ConfigError: No tier has room for a page.
        StoreError: The layer has a different layout, or a tier failed.
    """

    def __init__(self, geometry: Geometry, page_class: PageClass, tiers: Sequence[Tier]) -> None:
        self._geometry, self._page_class, self._tiers = geometry, page_class, tiers
        self._tier_of = np.full(geometry.num_pages, -1, np.int8)
        self._adopted = 0

    @property
    def nbytes(self) -> int:
        return sum(tier.nbytes for tier in self._tiers)

    def adopt(self, parts: Sequence[Bytes]) -> None:
        """Take over the next layer, one array ``[experts, nbytes]`` per part of the page class."""
        layer = self._adopted
        require_layer(self._geometry, self._page_class, layer, parts)
        for expert in range(self._geometry.experts_per_layer):
            page = self._geometry.page(layer, expert)
            rows = [part[expert] for part in parts]
            self._tier_of[page] = self._taker(page, lambda tier: tier.put(page, rows))  # noqa: B023
        self._adopted += 1
        if self._adopted == self._geometry.num_layers:
            for tier in self._tiers:
                tier.finish()

    @contextmanager
    def update(self) -> Iterator[Put]:
        """See ``ChangingStore``. A page for which its tier has no room left moves to another."""
        moves: dict[int, int] = {}  # page → its tier after the update

        def put(page: int, parts: Sequence[Bytes]) -> None:
            require_page(self._geometry, self._page_class, page, parts, moves)
            own = int(self._tier_of[page])
            moves[page] = self._taker(page, lambda tier: tier.stage(page, parts), own)

        try:
            yield put
        except BaseException:
            for tier in self._tiers:
                tier.discard()
            raise
        for page, index in moves.items():
            own = int(self._tier_of[page])
            if own != index:
                self._tiers[own].forget(page)
                self._tier_of[page] = index
        for tier in self._tiers:
            tier.commit()

    def _taker(self, page: int, keep: Callable[[Tier], bool], own: int = 0) -> int:
        """Offer a page to tier ``own``, then to the others; return the index of the taker."""
        for index in sorted(range(len(self._tiers)), key=lambda index: index != own):
            if keep(self._tiers[index]):
                return index
        raise ConfigError(
            f"no store has room for page {page} of {self._geometry.num_pages}, "
            f"{sizes.shown(self._page_class.nbytes)} each",
            where="stores",
            fix="raise a limit or add a store without one",
        )

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        index = self._tier_of[page] if 0 <= page < len(self._tier_of) else -1
        if index < 0:
            raise StoreError(f"page {page} is not in the store")
        self._tiers[index].read_into(page, parts)

    def close(self) -> None:
        self._tier_of[:] = -1
        with ExitStack() as each:  # runs all callbacks even if one fails
            for tier in self._tiers:
                each.callback(tier.close)
