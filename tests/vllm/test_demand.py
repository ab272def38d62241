"""The scheduler's data on the engine's demand: requests and step durations."""

from types import SimpleNamespace

from fluxmoe.backends.vllm.scheduler.requests import RequestWatch, StepClock
from fluxmoe.core.arbitration.prefixes import PrefixCurve


def scheduled(watch, **tokens):
    watch.scheduled(
        SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
            preempted_req_ids=None,
        )
    )


def request(name, tokens=100, blocks=(), prompt=100, limit=1000):
    return SimpleNamespace(
        request_id=name,
        num_tokens=tokens,
        num_prompt_tokens=prompt,
        max_tokens=limit,
        block_hashes=list(blocks),
    )


def test_tokens_are_those_of_the_step_whose_time_is_known():
    watch = RequestWatch()
    watch.arrived(request("a"))
    scheduled(watch, a=300)
    assert (watch.running, watch.computed) == (1, 0)
    scheduled(watch, a=1)
    assert (watch.running, watch.computed) == (1, 300)


def test_a_rest_is_a_time_without_requests_between_two_steps():
    watch = RequestWatch()
    watch.arrived(request("a"))
    scheduled(watch, a=1)
    assert not watch.rested
    watch.gone(request("a"))
    watch.arrived(request("b"))
    scheduled(watch, b=1)
    assert watch.rested
    watch.arrived(request("c"))
    watch.gone(request("b"))
    scheduled(watch, c=1)
    assert not watch.rested


def test_prompts_count_when_they_are_admitted_and_their_blocks_are_remembered():
    watch = RequestWatch()
    watch.prefixes = PrefixCurve(16)
    blocks = [bytes([i] * 8) for i in range(3)]
    watch.arrived(request("a"))
    watch.looked_up("a", 0)
    watch.looked_up("a", 32)  # the request waited, and only the last lookup counts
    assert (watch.prompt_tokens, watch.prefix_hits) == (0, 0)
    watch.admitted(request("a", 100, blocks[:2]))
    assert (watch.prompt_tokens, watch.prefix_hits) == (100, 32)
    watch.gone(request("a", 140, blocks))
    watch.admitted(request("b", 100, blocks))
    assert watch.prefixes.curve()[-1] > 0.5


def test_the_size_of_requests_is_foreseen_from_those_that_ended():
    watch = RequestWatch()
    watch.arrived(request("a", prompt=100))
    assert watch.foreseen_blocks(1) == 0  # the length of answers is unknown
    watch.gone(request("a", tokens=100, prompt=100))  # aborted before its first token
    watch.arrived(request("b", prompt=100))
    assert watch.foreseen_blocks(1) == 0
    watch.gone(request("b", tokens=160))
    watch.arrived(request("c", prompt=20))
    assert watch.foreseen_blocks(1) == 20 + 60 - 1  # the last token is returned, not computed
    watch.arrived(request("d", prompt=40))
    assert watch.foreseen_blocks(1) == 30 + 60 - 1
    assert watch.foreseen_blocks(32) == (3 + 4) / 2
    watch.gone(request("c", tokens=21, prompt=20))
    watch.gone(request("d", tokens=41, prompt=40))
    assert watch.foreseen_blocks(32) == (3 + 4) / 2  # unchanged without requests
    watch.arrived(request("e", prompt=10, limit=5))
    assert watch.foreseen_blocks(1) == 10 + (5 + 1 + 1) / 3 - 1  # limited to the maximum
    assert watch.foreseen_blocks(128) == 1


def test_old_answers_are_forgotten():
    watch = RequestWatch()
    for length in [500] + [10] * 16:
        watch.arrived(request("a"))
        watch.gone(request("a", tokens=100 + length))
    watch.arrived(request("a"))
    assert watch.foreseen_blocks(1) == 109


def test_without_arbitration_nobody_follows_prefixes():
    watch = RequestWatch()
    watch.admitted(request("a", 7))
    watch.gone(request("a", 9))
    assert (watch.prompt_tokens, watch.prefixes) == (7, None)


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
    at(60.0).begins(rested=True)  # no requests for a minute
    assert abs(clock.seconds - 0.2) < 1e-9
