"""``gate``: the experts that the next layer's router chooses for this layer's hidden states.

The residual stream changes little from one layer to the next, so the next layer's router, given the
input of this layer's router, predicts most of the experts that it will choose (HOBBIT,
arXiv 2411.01433, and others). The source of the events makes the prediction; the policy passes it
on.
"""

from __future__ import annotations

from math import inf

from pydantic import BaseModel, ConfigDict, Field

from fluxmoe.core.policy.paging import PageView, PrefetchPolicy
from fluxmoe.core.types import Access, Int64s

#: Description of the option ``waste``.
WASTE = (
    "Unused prefetched pages, as a share of the pages loaded on demand, above which nothing is "
    "prefetched; by default unlimited."
)


class GateOptions(BaseModel):
    """Options of ``gate``."""

    model_config = ConfigDict(extra="forbid")
    waste: float | None = Field(default=None, ge=0, description=WASTE)


class Gate(PrefetchPolicy):
    """Fetch ``access.predicted``, the pages with the most tokens first; nothing if it is None."""

    predictions = True

    def __init__(self, waste: float | None = None) -> None:
        self.waste = inf if waste is None else float(waste)

    def propose(self, view: PageView, access: Access) -> Int64s:
        return access.pages[:0] if access.predicted is None else access.predicted
