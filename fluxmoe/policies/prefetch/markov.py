"""``markov``: first-order transitions between the experts of two layers, counted at run time.

This is FluxMoE's own Markov predictor: the experts of one layer predict those of a later layer,
because tokens pass through both. Its main state is the counts: layers × experts² numbers of four
bytes. To follow changes in routing, an expert's counts are halved when its uses reach a limit, so
that old observations fade.
"""

from __future__ import annotations

from collections import deque
from math import inf

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from fluxmoe.core.policy.paging import PageView, PrefetchPolicy
from fluxmoe.core.types import Access, Int64s
from fluxmoe.policies.prefetch.gate import WASTE

#: Number of uses of an expert after which its counts are halved.
_LIMIT = 1024


class MarkovOptions(BaseModel):
    """Options of ``markov``."""

    model_config = ConfigDict(extra="forbid")
    top: int | None = Field(
        default=None, ge=1, description="Pages to propose; by default, as many as the event uses."
    )
    lead: int = Field(default=1, ge=1, description="Number of layers to predict ahead.")
    waste: float | None = Field(default=None, ge=0, description=WASTE)


class Markov(PrefetchPolicy):
    """Fetch the experts that most often followed the current event's experts."""

    def __init__(self, top: int | None = None, lead: int = 1, waste: float | None = None) -> None:
        self.lead, self._top, self.waste = lead, top, inf if waste is None else float(waste)
        self.reset()

    def reset(self) -> None:
        # The last `lead` events; and, per (layer, expert), the counts of uses and of followers.
        self._recent: deque[tuple[int, Int64s]] = deque(maxlen=self.lead)
        self._seen: npt.NDArray[np.float32] | None = None
        self._followed: npt.NDArray[np.float32] | None = None

    def propose(self, view: PageView, access: Access) -> Int64s:
        if self.lead % view.num_layers == 0:
            return access.pages[:0]  # the layer ahead is the current one
        if self._seen is None or self._followed is None:
            experts = view.experts_per_layer
            self._seen = np.zeros((view.num_layers, experts), np.float32)
            self._followed = np.zeros((view.num_layers, experts, experts), np.float32)
        experts_now = access.pages - access.layer * view.experts_per_layer
        if len(self._recent) == self.lead:
            layer, before = self._recent[0]
            if (layer + self.lead) % view.num_layers == access.layer:
                self._learn(self._seen[layer], self._followed[layer], before, experts_now)
        self._recent.append((access.layer, experts_now))
        return self._likely(self._seen, self._followed, view, access, experts_now)

    @staticmethod
    def _learn(
        seen: npt.NDArray[np.float32],
        followed: npt.NDArray[np.float32],
        before: Int64s,
        after: Int64s,
    ) -> None:
        seen[before] += 1
        followed[before[:, np.newaxis], after] += 1
        full = before[seen[before] >= _LIMIT]
        seen[full] /= 2
        followed[full] /= 2

    def _likely(
        self,
        seen: npt.NDArray[np.float32],
        followed: npt.NDArray[np.float32],
        view: PageView,
        access: Access,
        experts: Int64s,
    ) -> Int64s:
        """Rank pages by the current experts' transition shares, weighted by tokens."""
        known = experts[seen[access.layer, experts] > 0]
        weight = access.tokens[seen[access.layer, experts] > 0] / seen[access.layer, known]
        expected = weight.astype(np.float32) @ followed[access.layer, known]
        order = np.argsort(-expected, kind="stable")[: self._top or len(experts)]
        order = order[expected[order] > 0]
        return view.page_of((access.layer + self.lead) % view.num_layers, order)
