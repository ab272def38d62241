"""Reports from workers to the scheduler in each step, on the demand for expert pages."""

from __future__ import annotations

from collections.abc import Sequence
from operator import sub

import numpy as np

from fluxmoe.core.arbitration.messages import Answer, OperatorLimits, StepReport
from fluxmoe.core.paging.books import C_ACCESSES, C_LOADS_DEMAND, C_LOADS_PREFETCH, C_MISSES
from fluxmoe.core.paging.measures import MissRatioCurve, convex_hull
from fluxmoe.core.paging.pager import ExpertPager
from fluxmoe.core.policy.arbitration import ExpertDemand
from fluxmoe.core.types import PageClass

#: Number of points on the curve in a report, and number of steps between two curves.
POINTS, EVERY = 65, 16


class DemandMeter:
    """The worker's side: measures the demand since the last report.

    Args:
        rank: Rank of the worker.
        pager: Pager whose counters are read and to which the curve is attached.
        seed: Seed for the sampling of events.
    """

    def __init__(self, rank: int, pager: ExpertPager, *, seed: int = 0) -> None:
        self._rank, self._pager = rank, pager
        geometry = pager.table.geometry
        self._curve = MissRatioCurve(geometry.num_pages, geometry.experts_per_layer, seed=seed)
        pager.curve = self._curve
        self._grid = np.linspace(0, geometry.num_pages, POINTS).round().astype(np.int64)
        self._load_seconds, self._steps = 0.0, 0
        #: Limits to send with every report.
        self.limits: OperatorLimits | None = None
        self.restarted()

    def restarted(self) -> None:
        """Start again after the pager's counters were reset to zero."""
        self._last = (0, 0, 0, 0, 0.0)

    def report(self, answer: Answer | None) -> StepReport:
        """Make the report on the step that has just ended, including ``answer``."""
        counts, stall = self._pager.table.books.counts.tolist(), self._pager.transfer.stall_seconds
        now = (
            counts[C_ACCESSES],
            counts[C_MISSES],
            counts[C_LOADS_DEMAND],
            counts[C_LOADS_PREFETCH],
            stall,
        )
        accesses, misses, demanded, ahead, stalled = map(sub, now, self._last)
        self._last = now
        if demanded:
            rate = stalled / demanded
            self._load_seconds += (rate - self._load_seconds) * (0.2 if self._load_seconds else 1)
        curve = None
        if self._steps % EVERY == 0 and accesses:
            curve = tuple(convex_hull(self._curve.curve()[self._grid]).tolist())
        self._steps += 1
        return StepReport(
            self._rank,
            answer,
            accesses,
            misses,
            demanded + ahead,
            stalled,
            self._load_seconds,
            curve,
            self.limits,
        )


class DemandView:
    """The scheduler's side: the reports of all workers combined into one ``ExpertDemand``.

    Workers hold different parts of the same pages and have the same routing, so counts are taken
    from the first worker. Times are the longest of all workers' times, since all workers wait for
    the slowest.
    """

    def __init__(self, page_class: PageClass, pages: int, frame_bytes: int) -> None:
        self._frames, self._pages = page_class.nbytes / frame_bytes, pages
        self._curve = np.zeros(0)
        self._load_seconds = 0.0
        #: Counts for the last step.
        self.accesses = self.misses = self.loads = 0
        self.stall_seconds = 0.0

    def update(self, reports: Sequence[StepReport]) -> None:
        """Process the reports of one step."""
        if not reports:
            return
        first = reports[0] if len(reports) == 1 else min(reports, key=lambda report: report.rank)
        if first.curve is not None:
            self._curve = np.asarray(first.curve)
        self.accesses, self.misses, self.loads = first.accesses, first.misses, first.loads
        self.stall_seconds = max([report.stall_seconds for report in reports])
        self._load_seconds = max([report.load_seconds for report in reports])

    def latest(self) -> ExpertDemand:
        """Return the demand in the form that policies get."""
        return ExpertDemand(
            frames=self._frames,
            pages=self._pages,
            accesses=self.accesses,
            misses=self.misses,
            loads=self.loads,
            load_seconds=self._load_seconds,
            curve=self._curve,
        )
