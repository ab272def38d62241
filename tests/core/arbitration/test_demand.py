"""The workers' reports of demand for expert pages, and the scheduler's view of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fluxmoe.core.arbitration.demand import DemandMeter, DemandView
from fluxmoe.core.arbitration.messages import StepReport
from tests.core.rig import PAGE_CLASS, Rig

REPORT = StepReport(0, None, 10, 4, 4, 0.02, 0.005, (1.0, 0.5, 0.0))


def view() -> DemandView:
    return DemandView(PAGE_CLASS, 24, PAGE_CLASS.nbytes // 2)


def test_before_any_report_nothing_is_known():
    demand = view()
    demand.update([])
    latest = demand.latest()
    assert (latest.frames, latest.pages, latest.accesses, latest.load_seconds) == (2.0, 24, 0, 0)
    assert latest.miss_ratio(7) == 0


def test_counts_are_the_first_workers_and_times_the_slowests():
    demand = view()
    slow = replace(REPORT, rank=1, accesses=99, stall_seconds=0.03, load_seconds=0.007, curve=None)
    demand.update([slow, REPORT])
    latest = demand.latest()
    assert (latest.accesses, latest.misses, latest.loads) == (10, 4, 4)
    assert (demand.stall_seconds, latest.load_seconds) == (0.03, 0.007)
    assert latest.miss_ratio([0, 24, 48]).tolist() == [1.0, 0.5, 0.0]


def test_the_curve_stands_until_another_is_sent_and_cannot_be_written_to():
    demand = view()
    demand.update([REPORT])
    demand.update([replace(REPORT, curve=None)])
    curve = demand.latest().curve
    assert curve.tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="read-only"):
        curve[0] = 0


def test_a_report_is_of_one_step():
    rig = Rig(2, 4, (4,))
    meter = DemandMeter(0, rig.pager)
    try:
        for expected in (2, 0, 0):
            rig.acquire(0, [1, 3])
            report = meter.report(None)
            assert (report.accesses, report.misses, report.loads) == (2, expected, expected)
        assert report.curve is None  # computed only occasionally
        rig.pager.reset()
        meter.restarted()
        rig.acquire(1, [0])
        assert meter.report(None).misses == 1
        assert np.isfinite(report.load_seconds)
    finally:
        rig.close()
