import pytest
from fluxmoe_senpai import Senpai

import fluxmoe
from fluxmoe import plugins
from fluxmoe.testing import check_arbitration_policy


@pytest.mark.parametrize("options", [{}, {"period": 1, "ratio": 1.0}, {"target": 0.9}])
def test_it_keeps_to_the_contract(options):
    check_arbitration_policy(lambda: Senpai(**options))


def view(experts=600, stall=0.0, **more):
    given = {
        "frames": {"experts": experts, "kv": 1000 - experts},
        "total_frames": 1000,
        "bounds": {"experts": fluxmoe.Budget(100, 600, 900), "kv": fluxmoe.Budget(100, 400, 900)},
        "tokens": 8,
        "step_seconds": 0.1,
        "stall_seconds": 0.1 * stall,
    }
    return fluxmoe.ArbitrationView(**{**given, **more})


def after(policy, steps, **given):
    for _ in range(steps):
        split = policy.split(view(**given))
    return split.frames["experts"]


@pytest.mark.parametrize(
    ("stall", "experts"),
    [
        (0.0, 570),  # no layer waits: 5 % are taken
        (0.05, 585),  # half of the target: half as much
        (0.1, 600),  # the target
        (0.15, 615),  # half of the target above the target
        (0.9, 630),  # far above the target: 5 % at most
    ],
)
def test_the_amount_follows_the_formula_of_the_paper(stall, experts):
    policy = Senpai(target=0.1, ratio=0.05, period=4)
    assert after(policy, 3, stall=stall) == 600  # the period is not over
    assert after(policy, 1, stall=stall) == experts
    assert after(policy, 3, stall=stall) == experts  # unchanged until the next period ends


def test_pressure_is_weighed_by_time():
    policy = Senpai(period=2)
    policy.split(view(step_seconds=0.9, stall_seconds=0.0))
    assert policy.split(view(step_seconds=0.1, stall_seconds=0.1)).frames["experts"] == 600


def test_an_idle_engine_is_not_squeezed():
    assert after(Senpai(period=1), 50, tokens=0) == 600


def test_a_preemption_ends_the_period():
    policy = Senpai(period=100)
    assert after(policy, 1) == 600
    assert policy.split(view(preemptions=1)).frames["experts"] == 570


@pytest.mark.parametrize(("stall", "experts"), [(0.0, 100), (0.5, 900)])
def test_it_stays_within_the_bounds(stall, experts):
    policy, have = Senpai(period=1), 600
    for _ in range(100):
        have = after(policy, 1, experts=have, stall=stall)
    assert have == pytest.approx(experts, abs=12)  # rounding stops the last steps


def test_it_is_known_by_its_name_and_takes_options():
    registry = plugins.load(["fluxmoe_senpai"])
    made = registry.create("arbitration", {"kind": "senpai", "period": 4})
    assert isinstance(made, Senpai)
