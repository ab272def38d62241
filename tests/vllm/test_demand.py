"""What the scheduler's side knows of demand: requests and the duration of steps."""

from types import SimpleNamespace

from fluxmoe.backends.vllm.requests import RequestWatch
from fluxmoe.backends.vllm.stepclock import StepClock


def scheduled(watch, **tokens):
    watch.scheduled(
        SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
            preempted_req_ids=None,
        )
    )


def test_tokens_are_those_of_the_step_whose_time_is_known():
    watch = RequestWatch()
    watch.arrived("a")
    scheduled(watch, a=300)
    assert (watch.running, watch.computed) == (1, 0)
    scheduled(watch, a=1)
    assert (watch.running, watch.computed) == (1, 300)


def test_a_rest_is_a_time_without_requests_between_two_steps():
    watch = RequestWatch()
    watch.arrived("a")
    scheduled(watch, a=1)
    assert not watch.rested
    watch.gone("a")
    watch.arrived("b")
    scheduled(watch, b=1)
    assert watch.rested
    watch.arrived("c")
    watch.gone("b")
    scheduled(watch, c=1)
    assert not watch.rested


def test_a_busy_engines_step_lasts_until_the_next_begins():
    time = [0.0]
    clock = StepClock(lambda: time[0])

    def at(seconds):
        time[0] = seconds
        return clock

    at(1.0).begins(rested=False)
    assert clock.seconds == 0.0
    at(1.5).answered()
    assert clock.seconds == 0.5
    at(1.8).begins(rested=False)  # sampling and scheduling took 0.3 s
    assert abs(clock.seconds - 0.8) < 1e-9
    at(2.0).answered()
    at(60.0).begins(rested=True)  # nobody asked anything for a minute
    assert abs(clock.seconds - 0.2) < 1e-9
