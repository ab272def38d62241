"""``s3-fifo``: S3-FIFO, which uses three queues instead of a score.

Pages enter a small queue. A page that is used often enough while in this queue moves to the main
queue on reaching the head; other pages are evicted there, so that pages used only once do not
displace the rest. The numbers of recently evicted pages are remembered (ghosts); when loaded again,
such pages enter the main queue directly.
Source: Yang, Zhang, Qiu, Yue, Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fluxmoe.core.policy.paging import EvictionPolicy, PageView
from fluxmoe.core.types import Access, Int64s

#: Highest count of uses, as in the paper: two bits per page.
_MOST = 3
#: Number of uses in the small queue with which a page moves to the main queue.
_EARNED = 2


class S3FifoOptions(BaseModel):
    """Options of ``s3-fifo``."""

    model_config = ConfigDict(extra="forbid")
    small: float = Field(default=0.1, gt=0, lt=1, description="Share of slots in the small queue.")


class S3Fifo(EvictionPolicy):
    """Evict pages that were not reused from a small queue, or from the main queue (SOSP 2023)."""

    def __init__(self, small: float = 0.1) -> None:
        self._share = small
        self.reset()

    def reset(self) -> None:
        # Dictionaries keep insertion order: the first key is the head. Values are the numbers of
        # uses since the page entered.
        self._small: dict[int, int] = {}
        self._main: dict[int, int] = {}
        self._ghosts: dict[int, None] = {}

    def on_access(self, view: PageView, access: Access) -> None:
        for page in access.pages[access.hit].tolist():
            queue = self._small if page in self._small else self._main
            queue[page] = min(queue.get(page, 0) + 1, _MOST)

    def on_load(self, view: PageView, pages: Int64s) -> None:
        for page in pages.tolist():
            self._forget(page)  # it may have lost its slot without being a victim (released)
            queue = self._main if page in self._ghosts else self._small
            self._ghosts.pop(page, None)
            queue[page] = 0

    def on_evict(self, view: PageView, pages: Int64s) -> None:
        for page in pages.tolist():
            if page in self._small:
                self._ghosts.pop(page, None)
                self._ghosts[page] = None
            self._forget(page)
        # There may be as many ghosts as the main queue has slots.
        while len(self._ghosts) > int((1 - self._share) * view.slots):
            del self._ghosts[next(iter(self._ghosts))]

    def select(self, view: PageView, pages: Int64s, n: int) -> Int64s:
        resident = view.resident
        for queue in (self._small, self._main):
            for page in [page for page in queue if not resident[page]]:
                del queue[page]
        candidates = set(pages.tolist())  # other pages at the head are skipped
        small = deque(page for page in self._small if page in candidates)
        main = deque(page for page in self._main if page in candidates)
        passed_over = len(self._small) - len(small)
        target = max(1, int(self._share * view.slots))
        victims: list[int] = []
        while len(victims) < n and (small or main):
            if small and (passed_over + len(small) >= target or not main):
                page = small.popleft()
                if self._small[page] < _EARNED:
                    victims.append(page)
                else:
                    del self._small[page]
                    self._main[page] = 0
                    main.append(page)
            else:
                page = main.popleft()
                if self._main[page] == 0:
                    victims.append(page)
                else:
                    self._main[page] = self._main.pop(page) - 1
                    main.append(page)
        return np.asarray(victims)

    def _forget(self, page: int) -> None:
        self._small.pop(page, None)
        self._main.pop(page, None)
