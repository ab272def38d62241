"""Several tiers that share the pages: each page is kept by the first tier that has room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import numpy as np

from fluxmoe import sizes
from fluxmoe.core.transfer.jobs import Urgency
from fluxmoe.core.transfer.store import Ahead, Put, Read, Reader
from fluxmoe.core.types import Bytes, Geometry, Int64s, PageClass
from fluxmoe.errors import ConfigError, StoreError
from fluxmoe.stores.disk.reader import DiskMeter
from fluxmoe.stores.layout import require_layer, require_page


class Tier(Protocol):
    """A store for some of the pages."""

    @property
    def nbytes(self) -> int:
        """Number of bytes that the pages occupy."""

    def claim(self, page: int) -> bool:
        """Keep a page that an earlier start put into this tier; return False if it is not there."""

    @property
    def depth(self) -> int:
        """Number of threads that read from the disk."""

    @property
    def meters(self) -> Sequence[DiskMeter]:
        """Measurements of the reads from the disk, one per file."""

    def put(self, page: int, parts: Sequence[Bytes]) -> bool:
        """Keep a page if there is room; return True if it is kept.

        The caller may change ``parts`` afterwards.
        """

    def finish(self) -> None:
        """Complete the tier after the last ``put``."""

    def read_into(self, page: int, parts: Sequence[Bytes]) -> None:
        """Read a page that was put. Called from several threads."""

    def ahead(self, page: int, parts: Sequence[Bytes]) -> Read | None:
        """Prepare a read of a page that was put. Called from several threads.

        Returns:
            The read; None if no read thread should read the page.
        """

    def stage(self, page: int, parts: Sequence[Bytes]) -> bool:
        """Keep a page's new contents and the old ones until ``commit``; return False if full."""

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

    Raises (``adopt``, ``put``):
        ConfigError: No tier has room for a page.
        StoreError: The layer or the page has a different layout, or a tier failed.
    """

    def __init__(self, geometry: Geometry, page_class: PageClass, tiers: Sequence[Tier]) -> None:
        self._geometry, self._page_class, self._tiers = geometry, page_class, tiers
        self._tier_of = np.full(geometry.num_pages, -1, np.int8)
        self._adopted = 0

    @property
    def nbytes(self) -> int:
        return sum(tier.nbytes for tier in self._tiers)

    def claim(self, page: int) -> bool:
        """Return True if a tier has the page from an earlier start; such a page need not be put."""
        for index, tier in enumerate(self._tiers):
            if tier.claim(page):
                self._tier_of[page] = index
                return True
        return False

    def put(self, page: int, parts: Sequence[Bytes]) -> None:
        """Keep a page, given as one uint8 array per part; the arrays may change afterwards."""
        given = 0 <= page < len(self._tier_of) and bool(self._tier_of[page] >= 0)
        require_page(self._geometry, self._page_class, page, parts, given=given)
        self._tier_of[page] = self._taker(page, lambda tier: tier.put(page, parts))

    def finish(self) -> None:
        """Complete the store after the last ``put``.

        Raises:
            StoreError: Pages are missing.
        """
        if missing := int((self._tier_of < 0).sum()):
            raise StoreError(f"{missing} of {len(self._tier_of)} pages are missing")
        for tier in self._tiers:
            tier.finish()

    @property
    def depth(self) -> int:
        """Number of read threads of the tier that has the most read threads."""
        return max(tier.depth for tier in self._tiers)

    @property
    def meters(self) -> list[DiskMeter]:
        """Measurements of the reads from the disk, one per file."""
        return [meter for tier in self._tiers for meter in tier.meters]

    def adopt(self, parts: Sequence[Bytes]) -> None:
        """Take over the next layer, one array ``[experts, nbytes]`` per part of the page class."""
        layer = self._adopted
        require_layer(self._geometry, self._page_class, layer, parts)
        for expert in range(self._geometry.experts_per_layer):
            page = self._geometry.page(layer, expert)
            if not self.claim(page):
                self.put(page, [part[expert] for part in parts])
        self._adopted += 1
        if self._adopted == self._geometry.num_layers:
            self.finish()

    @contextmanager
    def update(self) -> Iterator[Put]:
        """See ``ChangingStore``. A page whose tier has no room left moves to another tier."""
        moves: dict[int, int] = {}  # page → its tier after the update

        def put(page: int, parts: Sequence[Bytes]) -> None:
            require_page(self._geometry, self._page_class, page, parts, given=page in moves)
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
        """Offer a page to tier ``own``, then to the others; return the index of its new tier."""
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
        self._holder(page).read_into(page, parts)

    def reader(self, arenas: Sequence[Bytes]) -> Reader:
        """Make a reader that requests all reads before it decodes the first page."""

        def read(pages: Int64s, slots: Int64s) -> None:
            ordered: list[Read] = []
            here = []  # pages that the calling thread reads meanwhile
            for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
                tier, parts = self._holder(page), [rows[slot] for rows in arenas]
                ahead = tier.ahead(page, parts)
                if ahead is None:
                    here.append((tier, page, parts))
                else:
                    ordered.append(ahead)
            try:
                # With no other work, the calling thread makes the first read itself.
                for ahead in ordered[0 if here else 1 :]:
                    ahead.begin(Urgency.DEMAND)
                for tier, page, parts in here:
                    tier.read_into(page, parts)
                for ahead in ordered:
                    ahead.finish()
            finally:
                for ahead in ordered:
                    ahead.withdraw()
                for ahead in ordered:
                    ahead.settle()

        return read

    def ahead(self, arenas: Sequence[Bytes]) -> Ahead:
        """Make a function that prepares reads into ``arenas``. See ``AheadStore``."""

        def ahead(page: int, slot: int) -> Read | None:
            try:
                return self._holder(page).ahead(page, [rows[slot] for rows in arenas])
            except StoreError:
                return None  # ``reader`` raises the error when the page is needed

        return ahead

    def _holder(self, page: int) -> Tier:
        index = self._tier_of[page] if 0 <= page < len(self._tier_of) else -1
        if index < 0:
            raise StoreError(f"page {page} is not in the store")
        return self._tiers[index]

    def close(self) -> None:
        self._tier_of[:] = -1
        with ExitStack() as each:  # runs all callbacks even if one fails
            for tier in self._tiers:
                each.callback(tier.close)
