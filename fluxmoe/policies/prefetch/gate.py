"""``gate``: the experts that the next layer's router chooses for this layer's hidden states.

The residual stream changes little from one layer to the next, so the next layer's router, given the
input of this layer's router, predicts most of the experts that it will choose (HOBBIT,
arXiv 2411.01433, and others). The source of the events makes the prediction; the policy passes it
on.
"""

from __future__ import annotations

from fluxmoe.core.policy.paging import PageView, PrefetchPolicy
from fluxmoe.core.types import Access, Int64s


class Gate(PrefetchPolicy):
    """Fetch ``access.predicted``, the pages with the most tokens first; nothing if it is None."""

    predictions = True

    def propose(self, view: PageView, access: Access) -> Int64s:
        return access.pages[:0] if access.predicted is None else access.predicted
