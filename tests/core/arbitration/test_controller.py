"""The controller with real memory: many moves, failing workers, and invalid splits."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fluxmoe
from fluxmoe.core.arbitration.controller import Arbiter, EngineState
from fluxmoe.core.arbitration.messages import Inventory, OperatorLimits
from fluxmoe.core.arbitration.moves import MoveWorker
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.policy.arbitration import ExpertDemand, PrefixDemand, Split, StepSample
from fluxmoe.core.policy.guards import ArbitrationGuard
from fluxmoe.core.types import Budget
from fluxmoe.errors import PolicyFaultError, SubstrateError
from fluxmoe.testing.faults import FaultySubstrate
from tests.core.rig import FRAME, PAGE_CLASS, Leaks, Rig, frames_of_memory

FRAMES, BLOCKS, GROUPS_AT_START = 40, 21, 3
LAYERS, EXPERTS = 4, 4
SLOTS = 10


class Blocks:
    """The scheduler's block pool: held groups, and blocks in use by requests."""

    def __init__(self, layout, groups: int) -> None:
        self.layout = layout
        self.held = set(range(groups, layout.groups))
        self.in_use: set[int] = set()

    def hold(self, groups):
        free = [
            group
            for group in range(self.layout.groups)
            if group not in self.held and not self.in_use & set(self.layout.blocks_of(group))
        ]
        taken = tuple(free[-groups:])
        self.held |= set(taken)
        return taken

    def release(self, groups):
        assert self.held >= set(groups)
        self.held -= set(groups)

    def used(self):
        return len(self.in_use)

    def cached(self):
        return 0

    @property
    def usable(self):
        return {
            block
            for group in range(self.layout.groups)
            if group not in self.held
            for block in self.layout.blocks_of(group)
        }


class Wish(fluxmoe.ArbitrationPolicy):
    """A policy that requests the split given by the test; by default the current split."""

    answer: object = None
    asked = 0

    def split(self, view):
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or Split(view.frames)


class World:
    """A scheduler and its workers, each with arenas, page table and pager."""

    def __init__(
        self,
        workers: int = 1,
        *,
        strict: bool = False,
        frames: int = FRAMES,
        blocks: int = BLOCKS,
        **declared: object,
    ) -> None:
        self.substrates = [FaultySubstrate(frames_of_memory(frames)) for _ in range(workers)]
        self.rigs = []
        for substrate in self.substrates:
            rig = Rig(
                LAYERS,
                EXPERTS,
                (SLOTS,),
                reserved=(LAYERS * EXPERTS,),
                substrate=substrate,
                kv_blocks=blocks,
            )
            rig.memory.kv.commit(range(GROUPS_AT_START))
            self.rigs.append(rig)
        self.layout = self.rigs[0].memory.kv.layout
        self.movers = [
            MoveWorker(rank, rig.memory, rig.pager, float) for rank, rig in enumerate(self.rigs)
        ]
        self.blocks = Blocks(self.layout, GROUPS_AT_START)
        self.policy = Wish()
        for name, value in declared.items():
            setattr(self.policy, name, value)
        least = frames_for(PAGE_CLASS, EXPERTS, FRAME)
        inventory = Inventory(
            frames=frames,
            geometry=self.rigs[0].geometry,
            page_class=PAGE_CLASS,
            bank_limit=None,
            minimum=EXPERTS,
            slots=(SLOTS,),
            experts=Budget(least, 0, frames_for(PAGE_CLASS, LAYERS * EXPERTS, FRAME)),
            kv=Budget(3, 0, frames - least),
            layout=self.layout,
            groups=GROUPS_AT_START,
        )
        guard = ArbitrationGuard(self.policy, name="wish", strict=strict)
        self.arbiter = Arbiter(inventory, guard, self.blocks, workers)
        self.answers: list = []
        self.running = 1
        self.views = 0
        self.rng = np.random.default_rng(0)

    def want(self, experts: int, kv: int) -> None:
        self.policy.answer = Split({"experts": experts, "kv": kv}, "the test says so")

    def step(self) -> None:
        last = StepSample(self.running, 1, 1.0)
        order = self.arbiter.step(EngineState(last, self.running, 0, self.answers, self))
        answers = [mover.receive(order) for mover in self.movers]
        self.answers = [answer for answer in answers if answer is not None]
        for rig in self.rigs:
            rig.acquire(int(self.rng.integers(LAYERS)), self.rng.integers(0, EXPERTS, 3).tolist())
            for block in self.blocks.usable:  # a write to a block without memory would crash
                rig.memory.kv.buffer()[block * self.layout.block_bytes] = 1

    # The demand in a view; each view reads it once.
    max_running, preemptions = 8, 0

    def request_blocks(self) -> float:
        return 0.0

    def experts(self) -> ExpertDemand:
        self.views += 1
        return ExpertDemand()

    def prefixes(self) -> PrefixDemand:
        return PrefixDemand()

    def settle(self, steps: int = 80) -> None:
        for _ in range(steps):
            self.step()
        assert not self.arbiter.busy

    @property
    def frames(self):
        return self.arbiter.frames

    def check(self) -> None:
        for rig in self.rigs:
            rig.check()
            groups = {int(g) for g in np.flatnonzero(rig.memory.kv.committed)}
            assert groups | self.blocks.held >= set(range(self.layout.groups))
        if not self.arbiter.busy:
            assert self.blocks.used() <= len(self.blocks.usable)

    def close(self) -> None:
        for rig in self.rigs:
            rig.close()


@pytest.fixture
def world():
    leaks, made = Leaks(), []

    def make(*args, **options) -> World:
        made.append(World(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.check()
        each.close()
    leaks.assert_none()


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_goes_both_ways_and_back(world, workers):
    w = world(workers)
    w.want(20, 9)
    w.settle()
    assert w.frames == {"experts": frames_for(PAGE_CLASS, 16, FRAME), "kv": 9}
    w.want(8, 32)
    w.settle()
    assert w.frames == {"experts": 10, "kv": 30}  # the experts keep what the KV cache cannot take
    w.want(19, 21)
    w.settle()
    assert w.frames == {"experts": 19, "kv": 21}
    assert min(w.arbiter.changes.values()) >= 3  # in small moves
    assert w.arbiter.failures == 0
    for rig in w.rigs:
        assert rig.memory.frames() == w.frames


def test_to_return_the_present_split_moves_nothing(world):
    w = world()
    w.settle(5)
    assert w.arbiter.changes == {"to_kv": 0, "to_experts": 0}


def test_bounds_and_use_win_over_any_wish(world):
    w = world()
    w.want(0, 0)
    w.settle()
    assert w.frames["kv"] >= 3 and w.frames["experts"] >= frames_for(PAGE_CLASS, EXPERTS, FRAME)
    w.want(0, FRAMES)
    w.settle()
    assert w.frames == {"experts": FRAMES - 32, "kv": 32}  # the KV cache has no further blocks
    w.blocks.in_use = set(w.blocks.usable)
    kv = w.frames["kv"]
    w.want(FRAMES - 3, 3)
    w.settle(20)
    assert w.frames["kv"] == kv  # every block is in use: the request waits …
    w.blocks.in_use = set()
    w.settle()
    assert w.frames["kv"] < kv  # … until blocks are free


@pytest.mark.parametrize("used", [{0}, {0, 4, 9}])
def test_groups_with_a_block_in_use_are_not_touched(world, used):
    w = world()
    w.want(0, 30)
    w.settle()
    w.blocks.in_use = used
    w.want(FRAMES, 0)
    w.policy.answer = Split({"experts": FRAMES - 3, "kv": 3})
    w.settle()
    assert used <= w.blocks.usable


@pytest.mark.parametrize("rank", [0, 1])
def test_a_commit_that_fails_on_one_worker_rolls_all_back(world, rank, caplog):
    w = world(2)
    w.settle(2)
    before = w.frames
    w.want(20, 9)
    w.substrates[rank].plan.arm("commit", SubstrateError("injected fault"), lasting=True)
    for _ in range(30):
        w.step()
        w.check()
    assert w.frames == before
    assert w.arbiter.failures > 3
    assert "a move was undone" in caplog.text or "a move was stranded" in caplog.text
    w.substrates[rank].plan.disarm()
    w.settle()
    assert w.frames["experts"] == frames_for(PAGE_CLASS, 16, FRAME)


def exact(w):
    """Assert that the scheduler's view of memory matches every worker's."""
    for rig in w.rigs:
        assert rig.memory.frames() == w.frames
        committed = {int(group) for group in np.flatnonzero(rig.memory.kv.committed)}
        assert committed.isdisjoint(w.blocks.held)
        assert committed | w.blocks.held == set(range(w.layout.groups))


@pytest.mark.parametrize("to_kv", [True, False], ids=["to KV", "to experts"])
@pytest.mark.parametrize("outcome", ["undone", "stranded"])
def test_after_a_move_that_failed_the_split_is_the_workers(world, to_kv, outcome, caplog):
    w = world(2)
    w.want(13, 27)  # hardly any frame is free
    w.settle()
    before, held = w.frames, set(w.blocks.held)
    w.want(*((8, 30) if to_kv else (19, 3)))
    # Growing fails; for a stranded move, so does growing back.
    for at, substrate in enumerate(w.substrates):
        if at == 1 or outcome == "undone":
            error = SubstrateError("injected fault")
            substrate.plan.arm("commit", error, lasting=outcome == "stranded")
    w.step()
    w.policy.answer = None  # request only one move
    while w.arbiter.busy:
        w.step()
    assert f"a move was {outcome}" in caplog.text
    assert w.arbiter.failures == 1
    exact(w)
    if outcome == "undone":
        assert (w.frames, w.blocks.held) == (before, held)
    else:
        loser = "experts" if to_kv else "kv"
        assert w.frames[loser] < before[loser]
        assert sum(w.frames.values()) < sum(before.values())
    for substrate in w.substrates:
        substrate.plan.disarm()
    w.want(20, 9)
    w.settle()
    exact(w)


def test_frames_that_were_stranded_are_found_again(world):
    w = world(2)
    w.want(0, 30)
    # Neither growing nor growing back succeeds.
    w.substrates[1].plan.arm("commit", SubstrateError("injected fault"), lasting=True)
    for _ in range(30):
        w.step()
        w.check()
    w.substrates[1].plan.disarm()
    w.settle()
    assert w.frames["kv"] == 30


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("no idea"),
        "half and half",
        Split({"experts": 10}),
        Split({"experts": 10, "kv": 10, "me": 1}),
        Split({"experts": -1, "kv": 10}),
        Split({"experts": 10.5, "kv": 10}),
        Split({"experts": float("nan"), "kv": 10}),
        Split({"experts": FRAMES, "kv": 1}),
        Split({"experts": True, "kv": 10}),
        Split({"experts": 10, "kv": 10}, reason=7),
        Split([10, 10]),
    ],
)
def test_nonsense_changes_nothing_and_is_counted(world, answer, caplog):
    w = world()
    before = w.frames
    w.policy.answer = answer
    w.settle(20)
    assert w.frames == before
    assert w.arbiter.policy.faults == 16  # after that, the policy is replaced
    assert caplog.text.count("arbitration policy 'wish': split") == 1
    strict = world(strict=True)
    strict.policy.answer = answer
    with pytest.raises(PolicyFaultError, match="split"):
        strict.step()


def test_a_lowered_limit_is_kept_to_and_raised_again(world):
    w = world()
    w.want(20, 20)
    w.settle()
    full = sum(w.frames.values())
    kv = w.frames["kv"]
    w.blocks.in_use = set(w.blocks.usable)
    w.policy.answer = None  # the current split is valid, even if it is too large now
    w.arbiter.set_limits(OperatorLimits(20))
    w.settle()
    assert w.frames == {"experts": frames_for(PAGE_CLASS, EXPERTS, FRAME), "kv": kv}
    w.arbiter.set_limits(OperatorLimits(24))
    w.blocks.in_use = set()
    w.settle()
    assert w.arbiter.policy.faults == 0
    assert sum(w.frames.values()) <= 24
    w.arbiter.set_limits(OperatorLimits())
    w.want(20, 20)
    w.settle()
    assert sum(w.frames.values()) >= full


def test_limits_of_a_tenant_by_hand_win_over_any_wish(world, caplog):
    w = world()
    w.want(20, 20)
    w.settle()
    with caplog.at_level(logging.INFO, "fluxmoe"):
        w.arbiter.set_limits(OperatorLimits(kv_max=12))
        w.settle()
    assert w.frames["kv"] <= 12 and w.frames["experts"] >= 19
    assert "limits set by the operator: kv_max 12 frames" in caplog.text
    assert "set by the operator" in w.arbiter.decisions[-1].reason
    w.arbiter.set_limits(OperatorLimits(kv_min=25))
    w.settle()
    assert w.frames["kv"] >= 25
    w.policy.answer = None
    w.arbiter.set_limits(OperatorLimits(experts_max=10))  # no tenant requests the freed frames
    w.settle()
    assert w.frames["experts"] <= 10
    w.arbiter.set_limits(
        OperatorLimits(experts_max=0, kv_max=0)
    )  # limits below the minimums are raised to them
    w.settle()
    assert 0 < w.frames["kv"] <= 5
    assert w.frames["experts"] == frames_for(PAGE_CLASS, EXPERTS, FRAME)
    w.arbiter.set_limits(OperatorLimits())
    w.want(20, 20)
    w.settle()
    assert sum(w.frames.values()) >= FRAMES - 4
    assert w.arbiter.policy.faults == 0


@pytest.mark.parametrize(
    ("limits", "frames"),
    [
        (
            OperatorLimits(kv_max=9),
            {"kv": 9, "experts": 19},
        ),  # all experts are resident; the remaining frames stay free
        (OperatorLimits(experts_max=10), {"kv": 30, "experts": 10}),
        (OperatorLimits(total=24), None),
    ],
)
def test_what_a_person_takes_from_one_tenant_is_the_others(world, limits, frames):
    w = world()
    w.want(20, 20)
    w.settle()
    w.policy.answer = None  # the policy never requests a change
    begun = w.frames
    w.arbiter.set_limits(limits)
    w.settle()
    if frames is not None:
        assert w.frames == frames
    else:
        assert 22 <= sum(w.frames.values()) <= 24
    w.arbiter.set_limits(OperatorLimits())
    w.settle()
    assert sum(w.frames.values()) >= sum(begun.values()) - 2


def test_limits_by_hand_move_an_idle_engines_memory_and_let_it_rest(world):
    w = world()
    w.want(20, 20)
    w.settle()
    w.running, w.policy.answer = 0, None
    w.blocks.in_use = set(w.blocks.usable)
    w.arbiter.set_limits(OperatorLimits(kv_max=4))
    for _ in range(3):
        w.step()
        assert not w.arbiter.busy  # all blocks are in use: no move, and no reason to step
    w.blocks.in_use = set()
    w.step()
    while w.arbiter.busy:
        w.step()
    assert w.frames["kv"] <= 4


def test_an_idle_engine_ends_a_move_and_begins_none(world):
    w = world()
    w.want(8, 30)
    w.step()
    assert w.arbiter.busy
    w.running = 0
    for _ in range(4):
        w.step()
    assert not w.arbiter.busy
    assert sum(w.arbiter.changes.values()) == 1
    w.policy.answer = None
    w.arbiter.set_limits(OperatorLimits(16))  # a lower total: no tenant gets the memory
    w.settle()
    assert sum(w.frames.values()) <= 16


def test_a_line_per_decision_not_per_move(world, caplog):
    w = world()
    with caplog.at_level(logging.INFO, "fluxmoe"):
        w.want(8, 30)
        w.settle()
        w.want(20, 9)
        w.settle()
    lines = [r.getMessage() for r in caplog.records if "memory moves" in r.getMessage()]
    assert len(lines) == 2
    assert "arbitration (wish): memory moves to the KV cache; the test says so: experts" in lines[0]
    assert "to the experts" in lines[1]
    assert all(abs(d.time - time.time()) < 600 for d in w.arbiter.decisions)  # C7
    told = [(d.number, d.direction, d.reason) for d in w.arbiter.decisions]
    assert told == [(1, "to_kv", "the test says so"), (2, "to_experts", "the test says so")]


def test_a_policy_that_turns_all_the_time_does_not_fill_the_log(world, caplog):
    w = world()
    with caplog.at_level(logging.INFO, "fluxmoe"):
        for step in range(200):
            w.want(*((8, 30), (20, 9))[step // 2 % 2])
            w.policy.answer = Split(w.policy.answer.frames, f"because of {step}")
            w.step()
    lines = [r.getMessage() for r in caplog.records if "memory moves" in r.getMessage()]
    assert 3 <= len(lines) <= 200 / 8 + 1
    assert sum(w.arbiter.changes.values()) > 2 * len(lines)
    assert len(w.arbiter.decisions) == 4


def test_a_slow_move_makes_the_next_one_small(world):
    def moves(seconds: float) -> int:
        w = world(frames=800, blocks=500)
        ticks = iter(np.arange(10_000) * seconds)
        w.movers[0]._clock = lambda: float(next(ticks))
        w.want(8, 400)
        w.settle(400)
        assert w.frames["kv"] == 399
        return w.arbiter.changes["to_kv"]

    assert moves(10.0) > 100  # a move would take ten steps, so each is as small as possible
    assert 5 <= moves(1e-9) < 20


def test_a_wish_is_approached_until_the_policy_is_asked_again(world):
    w = world(interval=60, calm_interval=60)
    w.want(8, 32)
    w.settle(50)
    assert w.policy.asked == 1
    assert w.frames == {"experts": 10, "kv": 30}
    w.want(20, 9)
    w.settle(9)
    assert w.frames == {"experts": 10, "kv": 30}
    w.settle(40)
    assert w.policy.asked == 2
    assert w.frames["experts"] == frames_for(PAGE_CLASS, 16, FRAME)


def test_without_news_no_view_is_made(world):
    w = world(interval=4, calm_interval=32)
    w.settle(128)
    assert w.views == w.policy.asked == 7  # in steps 0, 4, 12, 28, 60, 92, 124
    w.arbiter.set_limits(OperatorLimits(total=35))
    w.settle(10)
    assert sum(w.frames.values()) <= 35
    w.arbiter.set_limits(OperatorLimits())
    w.settle(128)
    views = w.views
    w.settle(128)
    assert w.views - views <= 5


def test_limits_do_not_wait_for_the_policy(world):
    w = world(interval=100, calm_interval=100)
    w.settle(3)
    w.arbiter.set_limits(OperatorLimits(kv_max=12))
    w.settle(40)
    assert w.policy.asked == 1
    assert w.frames["kv"] == 12


def test_a_fixed_policy_is_never_asked_but_limits_are_kept_to(world):
    w = world(fixed=True)
    w.settle(10)
    w.arbiter.set_limits(OperatorLimits(kv_max=12))
    w.settle(40)
    assert w.policy.asked == 0
    assert w.frames["kv"] == 12


def test_a_fault_ends_the_wish_before_it(world):
    w = world(interval=4, calm_interval=4)
    before = w.frames
    w.want(8, 32)
    w.step()
    w.policy.answer = RuntimeError("not today")
    w.settle(40)
    assert w.policy.asked == 11
    assert w.arbiter.policy.faults == 10
    assert before["kv"] < w.frames["kv"] < 30


class ControllerMachine(RuleBasedStateMachine):
    """A test with random splits, use, faults and limits; every step writes to all usable blocks."""

    @initialize(workers=st.integers(1, 2))
    def build(self, workers):
        self.leaks = Leaks()
        self.world = World(workers)

    @rule(experts=st.integers(0, FRAMES), kv=st.integers(0, FRAMES))
    def wish(self, experts, kv):
        self.world.want(experts, min(kv, FRAMES - experts))

    @rule(steps=st.integers(1, 12))
    def run(self, steps):
        for _ in range(steps):
            self.world.step()

    @rule(data=st.data())
    def use(self, data):
        usable = sorted(self.world.blocks.usable)
        self.world.blocks.in_use = data.draw(st.sets(st.sampled_from(usable)))

    @rule(data=st.data(), commits=st.sampled_from([None, 0, 1, 2]))
    def break_commits(self, data, commits):
        plan = data.draw(st.sampled_from(self.world.substrates)).plan
        if commits is None:
            plan.disarm()
        else:
            plan.arm("commit", SubstrateError("injected fault"), commits + 1, lasting=True)

    @rule(limits=st.builds(OperatorLimits, *[st.none() | st.integers(0, FRAMES + 5)] * 5))
    def limit(self, limits):
        self.world.arbiter.set_limits(limits)

    @rule(data=st.data())
    def lose_an_answer(self, data):
        if self.world.answers:
            index = data.draw(st.integers(0, len(self.world.answers) - 1))
            del self.world.answers[index]

    @invariant()
    @precondition(lambda self: hasattr(self, "world"))
    def holds(self):
        self.world.check()
        assert self.world.blocks.in_use <= self.world.blocks.usable

    def teardown(self):
        if hasattr(self, "world"):
            for substrate in self.world.substrates:
                substrate.plan.disarm()
            self.world.settle()
            if not self.world.arbiter.failures:
                for rig in self.world.rigs:
                    assert rig.memory.frames() == self.world.frames
            self.world.close()
            self.leaks.assert_none()


ControllerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20)
TestController = ControllerMachine.TestCase
