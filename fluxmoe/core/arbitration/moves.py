"""Moves of memory: the protocol between the scheduler and the workers, and its execution.

The scheduler's side is a pure state machine without an engine or a clock. The worker's side applies
actions to the pager (slots) and to the memory (KV groups).

A move *shrinks* one tenant and *grows* the other. The scheduler's ``MoveCoordinator`` sends one
order at a time to all workers, and the next order only after every worker has answered::

    shrink ── all done ──▶ grow ── all done ──▶ MOVED
       │ one failed          │ one failed
       │                  shrink back
       ▼                     ▼
    grow back ◀──────────────┘
       │ all done ──▶ UNDONE           one failed ──▶ shrink again ──▶ STRANDED (frames are free)

Since messages may be lost, duplicated or late, orders are numbered, repeated in every step until
answered, and carried out only once. Workers repeat their last answer in every step. Actions contain
absolute values, so that repeating a half-completed action is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from fluxmoe.core.arbitration.messages import Action, Answer, FreeKV, Order, SetSlots, TakeKV
from fluxmoe.core.memory.worker import WorkerMemory
from fluxmoe.core.paging.pager import ExpertPager
from fluxmoe.errors import InvariantError
from fluxmoe.words import raised


@dataclass(frozen=True, slots=True)
class Move:
    """A move of memory: KV groups change in one direction, bank slots in the other.

    A move that affects only one tenant has ``slots == before`` or empty ``groups``.

    Attributes:
        to_kv: True if KV groups are committed and experts lose slots; False for the reverse.
        groups: KV groups to commit or release.
        before: Number of slots in each bank before the move.
        slots: Number of slots in each bank after the move.
    """

    to_kv: bool
    groups: tuple[int, ...]
    before: tuple[int, ...]
    slots: tuple[int, ...]

    def shrink(self) -> Action:
        return SetSlots(self.slots) if self.to_kv else FreeKV(self.groups)

    def grow(self) -> Action:
        return TakeKV(self.groups) if self.to_kv else SetSlots(self.slots)

    def shrink_back(self) -> Action:
        """Undo ``grow``."""
        return FreeKV(self.groups) if self.to_kv else SetSlots(self.before)

    def grow_back(self) -> Action:
        """Undo ``shrink``."""
        return SetSlots(self.before) if self.to_kv else TakeKV(self.groups)


class MoveOutcome(Enum):
    """Outcome of a move.

    ``STRANDED`` means that one tenant has shrunk and neither has grown, so that frames are free.
    """

    MOVED = "moved"
    UNDONE = "undone"
    STRANDED = "stranded"


@dataclass(frozen=True, slots=True)
class MoveResult:
    """A move that has ended, with the problems that workers reported.

    ``seconds`` is the duration of the move's slowest order.
    """

    move: Move
    outcome: MoveOutcome
    problems: tuple[str, ...]
    seconds: float


class _Stage(Enum):
    SHRINK = "shrink"
    GROW = "grow"
    SHRINK_BACK = "shrink back"
    GROW_BACK = "grow back"
    SHRINK_AGAIN = "shrink again"


#: Stage → the next stage or outcome, first if all workers succeeded, then if any failed.
_NEXT: dict[_Stage, tuple[_Stage | MoveOutcome, _Stage | MoveOutcome]] = {
    _Stage.SHRINK: (_Stage.GROW, _Stage.GROW_BACK),
    _Stage.GROW: (MoveOutcome.MOVED, _Stage.SHRINK_BACK),
    # A failed shrink is not repeated: the following grow uses the available frames.
    _Stage.SHRINK_BACK: (_Stage.GROW_BACK, _Stage.GROW_BACK),
    _Stage.GROW_BACK: (MoveOutcome.UNDONE, _Stage.SHRINK_AGAIN),
    _Stage.SHRINK_AGAIN: (MoveOutcome.STRANDED, MoveOutcome.STRANDED),
}


class MoveCoordinator:
    """The scheduler's side: coordinates one move at a time.

    Args:
        workers: Number of workers that must answer.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._number = 0
        self._move: Move | None = None
        self._stage = _Stage.SHRINK
        self._answers: dict[int, Answer] = {}
        self._problems: list[str] = []
        self._seconds = 0.0

    @property
    def busy(self) -> bool:
        return self._move is not None

    def begin(self, move: Move) -> None:
        """Begin a move. The planner must already hold the blocks of KV groups to be freed."""
        assert self._move is None
        self._move, self._problems, self._seconds = move, [], 0.0
        self._enter(_Stage.SHRINK)

    def order(self) -> Order | None:
        """Return the order to send to all workers in this step; None if no move is in progress."""
        if self._move is None:
            return None
        action = {
            _Stage.SHRINK: self._move.shrink,
            _Stage.GROW: self._move.grow,
            _Stage.SHRINK_BACK: self._move.shrink_back,
            _Stage.GROW_BACK: self._move.grow_back,
            _Stage.SHRINK_AGAIN: self._move.shrink,
        }[self._stage]()
        return Order(self._number, action)

    def receive(self, answers: Iterable[Answer]) -> MoveResult | None:
        """Process answers; return the move's result if the move has ended, otherwise None."""
        if self._move is None:
            return None
        for answer in answers:
            if answer.number == self._number and 0 <= answer.rank < self._workers:
                self._answers[answer.rank] = answer
        if len(self._answers) < self._workers:
            return None
        failed = [a for a in self._answers.values() if a.problem]
        self._problems += [f"worker {a.rank}: {self._stage.value}: {a.problem}" for a in failed]
        self._seconds = max(self._seconds, *(a.seconds for a in self._answers.values()))
        following = _NEXT[self._stage][bool(failed)]
        if isinstance(following, _Stage):
            self._enter(following)
            return None
        result = MoveResult(self._move, following, tuple(self._problems), self._seconds)
        self._move = None
        return result

    def _enter(self, stage: _Stage) -> None:
        self._stage = stage
        self._number += 1
        self._answers = {}


class MoveWorker:
    """The worker's side: carries out each order once and keeps the answer.

    Args:
        rank: Rank of the worker.
        memory: The worker's memory.
        pager: The worker's pager.
        clock: Function that returns the time in seconds, for ``Answer.seconds``.
    """

    def __init__(
        self, rank: int, memory: WorkerMemory, pager: ExpertPager, clock: Callable[[], float]
    ) -> None:
        self._rank, self._memory, self._pager, self._clock = rank, memory, pager, clock
        self._last: Answer | None = None

    @property
    def done(self) -> int:
        """Number of the last order carried out, 0 before the first."""
        return 0 if self._last is None else self._last.number

    def receive(self, order: Order | None) -> Answer | None:
        """Carry out ``order`` unless already done; return the answer to the last order."""
        # The scheduler waits for all answers, so an order with any other number is an old message.
        if order is not None and order.number == self.done + 1:
            started, problem = self._clock(), ""
            try:
                self.apply(order.action)
            except Exception as error:  # the engine must keep serving after any error
                problem = raised(error)
            self._last = Answer(self._rank, order.number, problem, self._clock() - started)
        return self._last

    def apply(self, action: Action) -> None:
        """Carry out one action of a move, between two steps.

        After an error, ``FreeKV`` may be partly done; other actions are undone as far as possible.

        Raises:
            OutOfFramesError: There is no room to grow.
            SubstrateError: A system call failed.
            CapacityError: A bank cannot have the requested number of slots.
            InvariantError: A KV group does not exist.
        """
        if isinstance(action, SetSlots):
            self._pager.resize_all(action.slots)
            return
        if self._memory.kv is None:
            raise InvariantError("there is no KV cache in this budget")
        if isinstance(action, TakeKV):
            self._memory.kv.commit(action.groups)
        elif isinstance(action, FreeKV):
            self._memory.kv.free(action.groups)
