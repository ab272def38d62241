"""The move protocol with adversarial workers and an adversarial network."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fluxmoe.core.arbitration.messages import Answer, FreeKV, Order, SetSlots, TakeKV
from fluxmoe.core.arbitration.moves import Move, MoveCoordinator, MoveOutcome, MoveWorker
from fluxmoe.errors import OutOfFramesError, SubstrateError

GROUP, SLOT = 3, 2  # frames
FRAMES, GROUPS = 40, 9


class Worker:
    """A worker's memory: KV groups and a slot count. Each action is all or nothing."""

    def __init__(self, rank: int) -> None:
        self.groups: set[int] = {0, 1, 2}
        self.slots = 12
        self.failures: list[bool | Exception] = []  # failures of the next actions; False: none
        self.mover = MoveWorker(rank, self, self, clock=lambda: 0.0)
        self.inbox: deque[Order] = deque()
        self.executed = 0

    @property
    def frames(self) -> int:
        return len(self.groups) * GROUP + self.slots * SLOT

    @property
    def kv(self) -> Worker:
        return self

    def commit(self, groups) -> None:
        self._become(self.groups | set(groups), self.slots)

    def free(self, groups) -> None:
        self._become(self.groups - set(groups), self.slots)

    def resize_all(self, slots) -> None:
        self._become(self.groups, *slots)

    def _become(self, groups: set[int], slots: int) -> None:
        self.executed += 1
        failure = self.failures.pop(0) if self.failures else False
        if failure:
            raise failure if failure is not True else SubstrateError("the system refused")
        if len(groups) * GROUP + slots * SLOT > FRAMES:
            raise OutOfFramesError("no room")
        self.groups, self.slots = groups, slots


class ProtocolMachine(RuleBasedStateMachine):
    """A check that the scheduler's view is safe, even with lost messages and failing workers."""

    @initialize(workers=st.integers(1, 3))
    def build(self, workers):
        self.workers = [Worker(rank) for rank in range(workers)]
        self.mover = MoveCoordinator(workers)
        self.usable = {0, 1, 2}  # groups whose blocks the scheduler may hand out
        self.slots = 12  # the scheduler's lower bound for all workers
        self.answers: deque[Answer] = deque()
        self.healthy = True
        self.moves: list[MoveOutcome] = []

    @precondition(lambda self: not self.mover.busy)
    @rule(data=st.data(), to_kv=st.booleans(), slots=st.integers(4, 18))
    def begin(self, data, to_kv, slots):
        if to_kv:
            pool = sorted(set(range(GROUPS)) - self.usable)
            groups = data.draw(st.sets(st.sampled_from(pool)) if pool else st.just(set()))
            move = Move(True, tuple(groups), (self.slots,), (min(slots, self.slots),))
        else:
            pool = sorted(self.usable)
            groups = data.draw(st.sets(st.sampled_from(pool)) if pool else st.just(set()))
            self.usable -= groups  # the balloon takes them first
            move = Move(False, tuple(groups), (self.slots,), (max(slots, self.slots),))
        self.mover.begin(move)

    @rule()
    def send(self):
        """Begin a step: send the order to all workers."""
        order = self.mover.order()
        if order is not None:
            for worker in self.workers:
                worker.inbox.append(order)

    @rule(data=st.data())
    def deliver(self, data):
        worker = data.draw(st.sampled_from(self.workers))
        if worker.inbox:
            index = data.draw(st.integers(0, len(worker.inbox) - 1))  # messages arrive in any order
            order = worker.inbox[index]
            if data.draw(st.booleans(), label="only once"):
                del worker.inbox[index]
            self.reply(worker, order)

    @rule(data=st.data())
    def a_step_without_an_order(self, data):
        self.reply(data.draw(st.sampled_from(self.workers)), None)

    @rule(data=st.data())
    def lose(self, data):
        box = data.draw(st.sampled_from([self.answers, *(w.inbox for w in self.workers)]))
        if box:
            del box[data.draw(st.integers(0, len(box) - 1))]

    @rule(data=st.data())
    def hear(self, data):
        if self.answers:
            index = data.draw(st.integers(0, len(self.answers) - 1))
            answer = self.answers[index]
            if data.draw(st.booleans(), label="only once"):
                del self.answers[index]
            self.take(answer)

    @rule(data=st.data(), failures=st.lists(st.booleans(), max_size=3))
    def break_worker(self, data, failures):
        data.draw(st.sampled_from(self.workers)).failures = failures

    @rule()
    def everything_heals(self):
        """Check that, without faults, any move completes within a few steps."""
        for worker in self.workers:
            worker.failures = []
        for _ in range(5):
            order = self.mover.order()
            for worker in self.workers:
                self.reply(worker, order)
            while self.answers:
                self.take(self.answers.popleft())
        assert not self.mover.busy

    def reply(self, worker, order):
        answer = worker.mover.receive(order)
        if answer is not None:
            self.answers.append(answer)

    def take(self, answer):
        result = self.mover.receive([answer])
        if result is None:
            return
        move, moved = result.move, set(result.move.groups)
        self.moves.append(result.outcome)
        if result.outcome is MoveOutcome.MOVED:
            self.slots = move.slots[0]
            self.usable |= moved if move.to_kv else set()
            assert not [p for p in result.problems if ": grow:" in p]
        elif result.outcome is MoveOutcome.UNDONE:
            self.slots = move.before[0]
            self.usable |= set() if move.to_kv else moved
            assert result.problems
        else:
            self.slots = min(move.slots[0], move.before[0])
            assert result.problems

    @invariant()
    @precondition(lambda self: hasattr(self, "workers"))
    def safe(self):
        for worker in self.workers:
            # Every block handed out has memory on all workers.
            assert self.usable <= worker.groups
            assert worker.frames <= FRAMES
            # No order is executed twice, so none undoes a later one.
            assert worker.executed == worker.mover.done


ProtocolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestProtocol = ProtocolMachine.TestCase


def run(workers: list[Worker], move: Move):
    """Run a move over a perfect network."""
    mover = MoveCoordinator(len(workers))
    mover.begin(move)
    sent = []
    for _ in range(10):
        order = mover.order()
        sent.append(order.action)
        result = mover.receive([w.mover.receive(order) for w in workers])
        if result is not None:
            return result, sent
    raise AssertionError("no end")


TO_KV = Move(True, (5, 6), (12,), (9,))
TO_EXPERTS = Move(False, (1, 2), (12,), (15,))


def test_frames_are_free_before_they_are_taken():
    result, sent = run([Worker(0), Worker(1)], TO_KV)
    assert (result.outcome, result.problems) == (MoveOutcome.MOVED, ())
    assert sent == [SetSlots((9,)), TakeKV((5, 6))]
    result, sent = run([Worker(0), Worker(1)], TO_EXPERTS)
    assert result.outcome is MoveOutcome.MOVED
    assert sent == [FreeKV((1, 2)), SetSlots((15,))]


@pytest.mark.parametrize(
    ("move", "failures", "outcome", "stages"),
    [
        (TO_KV, [True], MoveOutcome.UNDONE, ["shrink"]),
        (TO_KV, [False, True], MoveOutcome.UNDONE, ["grow"]),
        (TO_KV, [False, True, True], MoveOutcome.UNDONE, ["grow", "shrink back"]),
        (TO_KV, [False, True, False, True], MoveOutcome.STRANDED, ["grow", "grow back"]),
        (TO_EXPERTS, [True], MoveOutcome.UNDONE, ["shrink"]),
        (TO_EXPERTS, [False, True], MoveOutcome.UNDONE, ["grow"]),
        (TO_EXPERTS, [False, True, False, True], MoveOutcome.STRANDED, ["grow", "grow back"]),
    ],
)
def test_one_worker_that_fails_rolls_all_back(move, failures, outcome, stages):
    workers = [Worker(0), Worker(1), Worker(2)]
    workers[1].failures = failures
    result, _ = run(workers, move)
    assert result.outcome is outcome
    assert [problem.split(": ")[:2] for problem in result.problems] == [
        ["worker 1", stage] for stage in stages
    ]
    before = Worker(0)
    for worker in workers:
        if outcome is MoveOutcome.UNDONE:
            assert (worker.groups, worker.slots) == (before.groups, before.slots)
        elif move.to_kv:
            assert (worker.groups, worker.slots) == (before.groups, 9)
        else:
            assert (worker.groups, worker.slots) == (before.groups - {1, 2}, 12)


@pytest.mark.parametrize("number", [0, 2, 3, 7])
def test_a_worker_carries_out_the_next_order_only(number):
    """Skipping an order would lose the memory that the order moves."""
    worker = Worker(0)
    assert worker.mover.receive(Order(number, TakeKV((5,)))) is None
    first = worker.mover.receive(Order(1, TakeKV((5,))))
    assert worker.mover.receive(Order(3, TakeKV((6,)))) is first
    assert (worker.groups, worker.executed) == ({0, 1, 2, 5}, 1)


def test_a_worker_that_raises_anything_answers():
    worker = Worker(0)
    worker.failures = [MemoryError("somewhere deep")]
    answer = worker.mover.receive(Order(1, TakeKV((1,))))
    assert answer.problem == "MemoryError: somewhere deep"


def test_the_result_tells_the_longest_pause():
    times = iter([0.0, 0.5, 1.0, 3.0])
    mover = MoveCoordinator(1)
    worker = Worker(0)
    worker.mover = MoveWorker(0, worker, worker, clock=lambda: next(times))
    mover.begin(TO_KV)
    assert mover.receive([worker.mover.receive(mover.order())]) is None
    assert mover.receive([worker.mover.receive(mover.order())]).seconds == 2.0


def test_answers_of_strangers_and_of_other_orders_count_for_nothing():
    mover = MoveCoordinator(2)
    assert mover.receive([Answer(0, 1)]) is None
    mover.begin(TO_KV)
    for answer in (Answer(2, 1), Answer(-1, 1), Answer(1, 0), Answer(1, 2)):
        assert mover.receive([Answer(0, 1), answer]) is None
    assert mover.order().number == 1
    mover.receive([Answer(1, 1)])
    assert mover.order().number == 2
