"""The steps in which an arbitration policy is called, and the input of each call."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

import fluxmoe
from fluxmoe.core.arbitration.schedule import AskingSchedule
from fluxmoe.core.policy.arbitration import Split, StepSample
from fluxmoe.core.policy.guards import ArbitrationGuard
from fluxmoe.errors import PolicyFaultError

#: Running requests, waiting requests, and True if the policy would keep the current split.
State = tuple[int, int, bool]
CALM: State = (3, 0, True)


def asked(schedule: AskingSchedule, states: Iterable[State]) -> list[int]:
    """Return the steps in which the policy is called; check that each call gets all new steps."""
    found, wanted, seen = [], True, 0
    for step, (running, waiting, content) in enumerate(states):
        if schedule.due(StepSample(running, step, 0.01), running, waiting, content=wanted):
            assert [sample.tokens for sample in schedule.steps] == list(range(seen, step + 1))
            seen, wanted = step + 1, content
            schedule.asked(running, waiting, content=content)
            found.append(step)
    return found


def test_by_default_in_every_step():
    assert asked(AskingSchedule(1, 1), [CALM] * 5) == [0, 1, 2, 3, 4]


def test_less_and_less_often_while_nothing_happens():
    assert asked(AskingSchedule(4, 16), [CALM] * 80) == [0, 4, 12, 28, 44, 60, 76]


def test_an_engine_that_is_idle_at_first():
    assert asked(AskingSchedule(4, 64), [(0, 0, True)] * 30) == [0, 4, 12, 28]


@pytest.mark.parametrize("news", [(4, 0, True), (3, 1, True)])
def test_soon_when_something_happens(news):
    steps = asked(AskingSchedule(4, 64), [CALM] * 70 + [news] * 20)
    assert steps[:5] == [0, 4, 12, 28, 60]
    assert steps[5] == 70  # ten steps after the previous call
    assert steps[6] == 74


def test_not_more_often_than_wished():
    busy = [(running, 1, False) for running in range(40)]
    assert asked(AskingSchedule(4, 64), busy) == list(range(0, 40, 4))


def test_while_it_wants_something_else_nothing_is_calm():
    assert asked(AskingSchedule(2, 64), [(3, 0, False)] * 9) == [0, 2, 4, 6, 8]


def test_calm_is_never_more_often():
    assert asked(AskingSchedule(8, 1), [CALM] * 20) == [0, 8, 16]


class Nonsense(fluxmoe.ArbitrationPolicy):
    interval = 0
    calm_interval = "often"

    def split(self, view):
        return Split(view.frames)


def test_nonsense_is_a_fault(caplog):
    guard = ArbitrationGuard(Nonsense(), name="nonsense")
    assert (guard.interval, guard.calm_interval, guard.faults) == (1, 1, 2)
    assert "interval is 0, not a number of steps" in caplog.text
    assert "calm_interval is 'often'" in caplog.text


def test_strict_it_is_an_error():
    with pytest.raises(PolicyFaultError, match="interval is 0"):
        ArbitrationGuard(Nonsense(), name="nonsense", strict=True)
