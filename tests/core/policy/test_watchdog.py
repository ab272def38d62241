"""Time limits of policies, and interrupts that affect only the policy's call."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fluxmoe
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy import watchdog
from fluxmoe.core.policy.watchdog import DEFAULT_LIMITS, HardLimitExceeded, Limits, TimeLimiter
from fluxmoe.core.types import Geometry
from fluxmoe.errors import PolicyFaultError
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from tests.core.rig import rule_for

LAYERS, E, SLOTS = 4, 6, 6
QUICK = Limits(hard_s=0.05)


def make(policy, *, prefetch=None, limits=QUICK, strict=False) -> EventRule:
    table = PageTable(Geometry(LAYERS, E), [SLOTS])
    return rule_for(table, policy, prefetch, name="pony", strict=strict, limits=limits)


def evict_once(rule: EventRule) -> list[int]:
    rule.run(0, 0, np.arange(4))
    rule.run(0, 1, np.arange(4))
    rule.table.check()
    return np.flatnonzero(rule.table.resident).tolist()


LRU = [2, 3, 6, 7, 8, 9]


def for_ever():
    while True:
        pass


def lru_but(**methods):
    return type("Pony", (LeastRecentlyUsed,), {"stable_score": False, **methods})()


def in_a_thread(function):
    """Run ``function`` in a thread other than the main one; return or raise its result."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return outcome[0]


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def work(seconds: float) -> None:
    """Use the processor for at least ``seconds``."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


# --- the hard limit ------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [in_a_thread, lambda f: f()], ids=["thread", "main"])
@pytest.mark.parametrize("method", ["score", "select", "retain", "on_access", "on_load"])
def test_a_call_that_never_ends_is_interrupted_and_falls_back_to_lru(method, run, caplog):
    rule = make(lru_but(**{method: lambda self, view, *_: for_ever()}), limits=QUICK)
    with caplog.at_level(logging.WARNING, "fluxmoe"):
        assert run(lambda: evict_once(rule)) == LRU
    assert rule.eviction.faults == (1 if method in ("score", "select") else 2)
    assert rule.eviction.slow == 0
    assert f"eviction policy 'pony': {method} took more than 0.05 s" in caplog.text


def test_reset_and_propose_are_limited_too():
    class Fetch(fluxmoe.PrefetchPolicy):
        def propose(self, view, access):
            for_ever()

    rule = make(lru_but(reset=lambda self: for_ever()), prefetch=Fetch())
    rule.reset()
    rule.run(0, 0, np.arange(2))
    assert rule.eviction.faults == 1
    assert rule.eviction.slow == rule._prefetch.slow == 0
    assert rule._prefetch.faults == 1


def test_an_answer_that_never_becomes_an_array_is_interrupted():
    class Reluctant:
        def __array__(self, *args, **kwargs):
            for_ever()

    rule = make(lru_but(score=lambda self, view, pages: Reluctant()))
    assert evict_once(rule) == LRU
    assert rule.eviction.faults == 1


def test_except_exception_in_the_policy_does_not_swallow_the_interrupt():
    def score(self, view, pages):
        while True:
            with contextlib.suppress(Exception):
                for_ever()

    rule = make(lru_but(score=score))
    assert evict_once(rule) == LRU
    assert rule.eviction.faults == 1


def test_a_policy_that_swallows_the_interrupt_has_its_answer_refused():
    def score(self, view, pages):
        try:
            for_ever()
        except BaseException:
            return -view.last_use[pages]

    rule = make(lru_but(score=score))
    assert evict_once(rule) == LRU
    assert rule.eviction.faults == 1


def test_c_code_runs_to_its_end_and_is_a_fault_all_the_same():
    def score(self, view, pages):
        time.sleep(0.2)  # one C call, which cannot be interrupted
        return -view.last_use[pages]

    rule = make(lru_but(score=score))
    assert evict_once(rule) == LRU
    assert rule.eviction.faults == 1


def test_timeouts_are_strikes_like_other_faults(caplog):
    rule = make(lru_but(on_access=lambda *_: for_ever()), limits=Limits(strikes=2, hard_s=0.05))
    with caplog.at_level(logging.WARNING, "fluxmoe"):
        for layer in range(LAYERS):
            rule.run(0, layer, np.arange(3))
    assert rule.eviction.faults == 2
    assert "'pony' is replaced after 2 faults" in caplog.messages[-1]


def test_strict_raises_instead():
    rule = make(lru_but(score=lambda *_: for_ever()), strict=True)
    with pytest.raises(PolicyFaultError, match=r"'pony': score took more than 0\.05 s"):
        evict_once(rule)


def test_an_interrupt_from_the_keyboard_is_no_fault_and_ends_the_call():
    def score(self, view, pages):
        raise KeyboardInterrupt

    rule = make(lru_but(score=score))
    with pytest.raises(KeyboardInterrupt):
        evict_once(rule)
    spin(0.12)  # the watchdog would fire here if the call still counted as running
    assert rule.eviction.faults == 0


# --- the race ------------------------------------------------------------------------------------


def race(rounds: int, seed: int) -> tuple[int, int]:
    """Run calls that end just as the watchdog fires; count those that return, and all others.

    Anything raised outside ``call`` propagates.
    """
    rng, hard = random.Random(seed), 0.002
    watch = TimeLimiter(Limits(hard_s=hard))
    answered = late = 0
    for number in range(rounds):
        try:
            assert (
                watch.call(lambda n: (spin(hard + rng.gauss(0, 1e-4)), n)[1], (number,)) == number
            )
            answered += 1
        except HardLimitExceeded:
            late += 1
        assert not watch._started  # otherwise the watchdog would fire again
        spin(1e-4)  # a late interrupt would surface here
    spin(3 * hard)
    return answered, late


def test_an_interrupt_never_comes_after_its_call_has_returned():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads switch constantly
    try:
        outcomes = [race(400, 1)]
        threads: list[tuple[int, int] | BaseException] = []
        workers = [
            threading.Thread(
                target=lambda s=seed: threads.append(in_a_thread(lambda: race(150, s)))
            )
            for seed in (2, 3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        outcomes += threads
    finally:
        sys.setswitchinterval(before)
    assert len(outcomes) == 3
    assert not [o for o in outcomes if isinstance(o, BaseException)]
    assert sum(answered for answered, _ in outcomes) > 20  # both outcomes of the race occurred
    assert sum(late for _, late in outcomes) > 20


LATE = 10**18  # nanoseconds after any call has begun


def test_a_call_is_fired_at_once_only():
    watch, rest = TimeLimiter(Limits(hard_s=60)), []

    def swallows():
        try:
            watch.due(LATE)  # called in place of the watchdog
        except HardLimitExceeded:
            rest.append(watch.due(LATE))

    for _ in range(100):
        with pytest.raises(HardLimitExceeded):
            watch.call(swallows, ())
        assert watch.call(len, ("four",)) == 4
    assert rest == [60 * 10**9] * 100


def test_a_shot_and_the_end_of_a_call_exclude_each_other():
    watch = TimeLimiter(Limits(hard_s=60))
    reached = []

    def ends_while_it_is_aimed_at():
        watch._lock.acquire()
        aiming = threading.Thread(target=watch.due, args=(LATE,))
        aiming.start()
        spin(0.02)  # the watchdog has found the call late, and waits for the lock
        reached.append(aiming.is_alive())
        watch._started = 0  # like the end of a call that got the lock first
        watch._lock.release()
        aiming.join()
        return "answer"

    assert watch.call(ends_while_it_is_aimed_at, ()) == "answer"
    assert reached == [True]


def test_a_call_does_not_return_while_it_is_aimed_at():
    watch, released = TimeLimiter(Limits(hard_s=60)), []

    def release():
        time.sleep(0.05)
        released.append(True)
        watch._lock.release()

    watch.call(lambda: (watch._lock.acquire(), threading.Thread(target=release).start()), ())
    assert released


def test_nothing_is_fired_at_a_call_that_has_ended_or_at_the_next_one():
    watch = TimeLimiter(Limits(hard_s=1.0))
    watch.call(len, ("",))
    assert watch.due(time.perf_counter_ns() + 2 * 10**9) == 10**9
    assert watch.call(lambda: watch.due(time.perf_counter_ns()), ()) < 10**9
    assert watch.call(len, ("four",)) == 4


# --- the soft limit and its cost -----------------------------------------------------------------


def test_slow_calls_are_counted_and_reported_once_and_their_answers_used(caplog):
    def score(self, view, pages):
        work(0.006)
        return -view.last_use[pages]

    rule = make(lru_but(score=score), limits=Limits(strikes=3))
    with caplog.at_level(logging.WARNING, "fluxmoe"):
        for layer in range(3):
            rule.run(0, layer, np.arange(4))
        # The first late call only starts the measurement.
        assert (rule.eviction.slow, caplog.messages) == (1, [])
        assert rule.table.resident[2:4].all()  # LRU would not have kept these
        for layer in range(LAYERS):
            rule.run(1, layer, np.arange(4))
    assert rule.eviction.slow > 3
    assert rule.eviction.faults == 0
    [line] = caplog.messages
    assert line == (
        "eviction policy 'pony': 3 calls worked for more than 5 ms, most recently score "
        "(reported once)"
    )


def test_c5_a_call_that_only_waited_is_not_slow():
    watch = TimeLimiter(DEFAULT_LIMITS)
    for _ in range(5):
        watch.call(time.sleep, (0.006,))  # as if other programs had used the processor
    assert watch.slow == 0
    for _ in range(3):
        watch.call(work, (0.006,))
    assert watch.slow == 3


def test_c5_a_suspicion_ends(monkeypatch):
    monkeypatch.setattr(watchdog, "_SUSPECTED", 3)
    watch = TimeLimiter(DEFAULT_LIMITS)
    watch.call(work, (0.006,))
    for _ in range(3):
        watch.call(len, ("",))
    watch.call(work, (0.006,))
    assert watch.slow == 0
    for _ in range(2):
        watch.call(len, ("",))
    watch.call(work, (0.006,))
    assert watch.slow == 1


def test_c5_without_a_soft_limit_no_call_is_slow():
    watch = TimeLimiter(Limits(soft_s=math.inf))
    for _ in range(3):
        watch.call(work, (0.006,))
    assert watch.slow == 0


def test_compiling_a_kernel_is_nobodys_slow_call():
    class Kernel(fluxmoe.EvictionPolicy):
        @staticmethod
        def score_kernel(last_use, use_count, loaded_at, event, page):
            return last_use * 1.0

    rule = make(Kernel())
    assert evict_once(rule) == LRU
    assert (rule.eviction.slow, rule.eviction.faults) == (0, 0)


def test_processor_time_is_read_only_after_a_late_call(monkeypatch):
    """Reading the processor time costs more than the rest of a limited call."""
    reads = []

    def thread_time_ns():
        reads.append(time.thread_time_ns())
        return reads[-1]

    monkeypatch.setattr(watchdog, "thread_time_ns", thread_time_ns)
    watch = TimeLimiter(DEFAULT_LIMITS)
    for _ in range(3):
        watch.call(len, ("",))
    assert not reads
    watch.call(time.sleep, (2 * DEFAULT_LIMITS.soft_s,))  # late by the clock, but idle
    watch.call(len, ("",))
    assert len(reads) == 1
    assert watch.slow == 0


def test_no_policy_call_no_stopwatch():
    rule = make(LeastRecentlyUsed())
    rule.run(0, 0, np.arange(4))  # slots are free: no policy is called
    assert not rule.eviction._faults._limiter._watched
    evict_once(rule)
    assert rule.eviction._faults._limiter._watched


def test_there_is_one_watchdog_and_it_ends_when_there_is_nothing_to_watch():
    # This runs in a separate process, because other tests leave stopwatches behind.
    program = """
import threading, time
from fluxmoe.core.policy.watchdog import HardLimitExceeded, Limits, TimeLimiter

def dogs():
    return [t for t in threading.enumerate() if t.name == "fluxmoe-watchdog"]

watches = [TimeLimiter(Limits(hard_s=0.05)) for _ in range(5)]
assert not dogs()
for watch in watches:
    watch.call(len, ("",))
assert len(dogs()) == 1
del watch, watches
end = time.monotonic() + 10
while dogs() and time.monotonic() < end:
    time.sleep(0.01)
assert not dogs()

def for_ever():
    while True:
        pass

try:
    TimeLimiter(Limits(hard_s=0.05)).call(for_ever, ())
except HardLimitExceeded:
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_a_forked_process_watches_even_if_it_was_forked_at_a_bad_moment():
    script = """if True:
        import os
        from fluxmoe.core.policy import watchdog

        def loop():
            while True:
                pass

        watchdog.TimeLimiter(watchdog.DEFAULT_LIMITS).call(int, ())  # the thread is there
        watchdog._watchdog._lock.acquire()  # and looks at its watches when the process is forked
        child = os.fork()
        if child == 0:
            try:
                watchdog.TimeLimiter(watchdog.Limits(hard_s=0.1)).call(loop, ())
            except watchdog.HardLimitExceeded:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
