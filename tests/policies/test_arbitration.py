"""Arbitration policies with a model of an engine: moves in both directions, or no moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fluxmoe import plugins
from fluxmoe.core.arbitration.schedule import AskingSchedule
from fluxmoe.core.policy.arbitration import (
    ArbitrationPolicy,
    ArbitrationView,
    ExpertDemand,
    PrefixDemand,
    StepSample,
)
from fluxmoe.core.types import Budget
from fluxmoe.errors import ConfigError

TOTAL, PAGES, FRAMES_PER_PAGE = 400, 100, 3.0


@dataclass
class Engine:
    """An engine that applies a split at once, with step times given by formulas."""

    policy: ArbitrationPolicy
    experts: int = 200
    requests: int = 4
    frames_each: float = 10.0
    max_running: int = 64
    page_seconds: float = 1e-4
    per_step: int = 40
    flat: float = 5e-3
    per_request: float = 2e-4
    #: Every ``every`` steps, a prompt of ``prompt`` tokens is looked up. The prompt is found if the
    #: KV cache has at least ``cliff`` free frames; otherwise, each of its tokens takes
    #: ``token_seconds``.
    every: int = 20
    prompt: int = 0
    cliff: float = 0.0
    token_seconds: float = 1e-4
    #: First step with a miss-ratio curve.
    late: int = 0
    asked: int = 0
    found: int = 0
    step: int = 0
    running: int = 0
    preemptions: int = 0
    history: list[int] = field(default_factory=list)
    wish: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        self.schedule = AskingSchedule(self.policy.interval, self.policy.calm_interval)

    @property
    def kv(self) -> int:
        return TOTAL - self.experts

    def throughput(self, experts: int) -> float:
        batch = min(self.requests, self.max_running, int((TOTAL - experts) / self.frames_each))
        return batch / sum(self.seconds(experts, batch))

    def seconds(self, experts: int, batch: int) -> tuple[float, float]:
        misses = self.per_step * max(1 - experts / (PAGES * FRAMES_PER_PAGE), 0.0)
        return self.flat + self.per_request * batch, misses * self.page_seconds

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.running = min(self.requests, self.max_running, int(self.kv / self.frames_each))
            compute, stall = self.seconds(self.experts, self.running)
            tokens = self.running
            if self.prompt and self.step % self.every == 0:
                free = self.kv - self.running * self.frames_each
                new = 0 if free >= self.cliff else self.prompt
                self.asked += self.prompt
                self.found += self.prompt - new
                compute += new * self.token_seconds
                tokens += new
            known = np.linspace(0, 400, 65) >= self.cliff if self.asked else np.zeros(0)
            curve = np.linspace(1, 0, 65 if self.step >= self.late else 0)
            used = self.per_step
            missed = used * float(np.interp(self.experts / 300, [0, 1], [1, 0]))
            sample = StepSample(self.running, tokens, compute + stall, stall, used, missed)
            waiting = self.requests - self.running
            due = self.schedule.due(sample, self.running, waiting, content=self.wish is None)
            view = ArbitrationView(
                frames={"experts": self.experts, "kv": self.kv},
                total_frames=TOTAL,
                bounds={"experts": Budget(20, 0, 300), "kv": Budget(12, 0, 380)},
                step=self.step,
                waiting_requests=waiting,
                running_requests=self.running,
                max_running_requests=self.max_running,
                kv_used_frames=round(self.running * self.frames_each),
                preemptions=self.preemptions,
                tokens=tokens,
                step_seconds=compute + stall,
                stall_seconds=stall,
                steps=tuple(self.schedule.steps),
                experts=ExpertDemand(
                    frames=FRAMES_PER_PAGE,
                    pages=PAGES,
                    accesses=used,
                    misses=missed,
                    loads=stall / self.page_seconds if self.page_seconds else 0,
                    load_seconds=self.page_seconds,
                    curve=curve,
                ),
                prefixes=PrefixDemand(self.asked, self.found, 400.0, known.astype(np.float64)),
            )
            if due:
                wish = self.policy.split(view).frames
                self.wish = None if wish == view.frames else wish
                self.schedule.asked(self.running, waiting, content=self.wish is None)
            wanted = self.wish or view.frames
            assert sum(wanted.values()) <= TOTAL
            # As the host does: one small move, within the bounds, without taking memory in use.
            kv = max(wanted["kv"], 12, min(view.kv_used_frames, self.kv))
            experts = min(max(wanted["experts"], 20), 300, TOTAL - kv)
            self.experts += int(np.clip(experts - self.experts, -25, 25))
            self.history.append(self.experts)
            self.step += 1


def engine(policy, **options) -> Engine:
    return Engine(plugins.load().create("arbitration", policy), **options)


def best_fixed(e: Engine) -> float:
    return max(e.throughput(experts) for experts in range(20, 301))


BURST = {"requests": 40, "frames_each": 8.0}
QUIET = {"requests": 1, "frames_each": 8.0}


@pytest.mark.parametrize("policy", ["kv-first", "marginal"])
def test_a_burst_gets_kv_cache_within_fifty_steps(policy):
    e = engine(policy, **QUIET)
    e.run(100)
    e.requests = 40
    e.run(50)
    assert e.kv >= 0.9 * 320


@pytest.mark.parametrize("policy", ["kv-first", "marginal"])
def test_a_quiet_hour_gives_it_back_to_the_experts(policy):
    e = engine(policy, **BURST)
    e.run(100)
    assert e.experts < 100
    e.requests = 1
    e.run(400)
    assert e.experts > 250


@pytest.mark.parametrize(
    "load",
    [
        BURST,
        QUIET,
        {"requests": 16, "frames_each": 20.0},
        {"requests": 64, "frames_each": 2.0},
    ],
)
def test_marginal_comes_close_to_the_best_fixed_split_of_each_load(load):
    e = engine("marginal", **load)
    e.run(400)
    assert e.throughput(e.experts) >= 0.93 * best_fixed(e)


def test_marginal_makes_room_for_prefixes_that_are_not_found_yet():
    e = engine("marginal", experts=300, requests=4, frames_each=8.0, prompt=2000, cliff=188.0)
    e.run(400)
    assert 220 <= e.kv <= 260
    e.prompt = 0
    e.run(3000)
    assert e.experts > 280


def test_marginal_makes_no_room_for_prefixes_that_cost_less_than_experts():
    e = engine("marginal", experts=300, requests=4, frames_each=8.0, prompt=8, cliff=188.0)
    e.run(400)
    assert e.experts == 300


def test_marginal_moves_nothing_where_nothing_is_to_be_earned():
    e = engine("marginal", experts=300, requests=6, frames_each=8.0)
    e.run(500)
    assert set(e.history) == {300}


def test_marginal_does_not_swing():
    e = engine("marginal", requests=30, page_seconds=3e-4)
    e.run(1000)
    turns = np.diff(np.sign(np.diff(np.asarray(e.history))[np.diff(e.history) != 0]))
    assert np.count_nonzero(turns) <= 2
    assert len(set(e.history[-500:])) == 1


def test_marginal_for_latency_prefers_experts():
    load = {"requests": 40, "frames_each": 8.0, "page_seconds": 1e-4}
    fast, many = engine({"kind": "marginal", "goal": "latency"}, **load), engine("marginal", **load)
    fast.run(300)
    many.run(300)
    assert fast.experts > many.experts


def test_marginal_says_why():
    e = engine("marginal", **QUIET)
    e.run(100)
    e.requests = 40
    e.run(8)
    reason = e.policy._wish.reason
    for word in ("expected tokens/s", "waiting", "misses at 100 µs"):
        assert word in reason


def test_marginal_remembers_what_a_batch_costs_through_a_long_quiet_time():
    e = engine("marginal", **BURST)
    e.run(200)
    e.requests = 1
    e.run(3000)
    assert e.policy._model.line() == pytest.approx((5e-3, 2e-4), rel=0.1)


def test_rho_balances_computing_and_loading():
    e = engine("rho", requests=4, page_seconds=1e-3)  # loading takes ten times as long
    e.run(300)
    compute, load = e.seconds(e.experts, e.running)
    assert 0.85 <= compute / load <= 1.1
    e.page_seconds = 0.0
    e.run(300)
    assert e.experts == 20  # no loads: the KV cache gets everything


def test_rho_spares_what_the_kv_cache_uses():
    e = engine("rho", experts=100, requests=25, frames_each=10.0, page_seconds=1e-2)
    e.run(200)
    assert e.kv >= 250


@pytest.mark.parametrize(("prompt", "answer"), [(1000, 200), (128, 256), (2000, 20)])
def test_a_burst_is_served_although_nothing_was_seen_before_it(prompt, answer):
    e = engine("marginal", experts=280, requests=40, frames_each=8.0, token_seconds=2e-5)
    e.prompt, e.every = 12 * prompt, answer  # all requests that fit begin at once, repeatedly
    e.cliff = float("inf")
    e.run(60)
    assert e.kv >= 0.9 * 320


def test_the_first_misses_are_not_counted_many_times():
    policy = plugins.load().create("arbitration", "marginal")
    e = Engine(policy, experts=150, late=40)
    e.run(80)
    model = policy._model
    assert model._averages["misses"] / model._averages["expected"] == pytest.approx(1, rel=0.1)


def test_fixed_never_moves():
    e = engine("fixed")
    e.run(50)
    assert set(e.history) == {200}


@pytest.mark.parametrize("policy", ["kv-first", "rho", "marginal"])
def test_idle_steps_and_a_lowered_limit_are_no_trouble(policy):
    e = engine(policy, **BURST)
    e.run(50)
    view = ArbitrationView(
        frames={"experts": 100, "kv": 300},
        total_frames=60,
        bounds={"experts": Budget(20, 0, 300), "kv": Budget(12, 0, 380)},
    )
    for tokens in (0, 5):
        idle = replace(view, steps=(StepSample(0, tokens, 0.0),))
        frames = e.policy.split(idle).frames
        assert sum(frames.values()) <= 400 and min(frames.values()) >= 0, tokens
    e.policy.reset()
    e.run(50)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "rho", "low": 2.0}, r"low \(2.0\) must not be above high"),
        ({"kind": "marginal", "goal": "fun"}, "goal"),
        ({"kind": "marginal", "gian": 1}, "unknown option 'gian'"),
        ({"kind": "kv-first", "headroom": -1}, "headroom"),
    ],
)
def test_options_are_checked(policy, message):
    with pytest.raises(ConfigError, match=message):
        plugins.load().create("arbitration", policy)
