"""``none``: no prefetch; every page is loaded when its layer needs it."""

from __future__ import annotations

from fluxmoe.core.policy.paging import PageView, PrefetchPolicy
from fluxmoe.core.types import Access, Int64s


class NoPrefetch(PrefetchPolicy):
    """Fetch nothing ahead, as the baseline."""

    lead = 0

    def propose(self, view: PageView, access: Access) -> Int64s:
        return access.pages[:0]
