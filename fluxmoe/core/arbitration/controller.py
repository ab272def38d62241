"""Arbiter, the scheduler's side of arbitration, which turns a policy's splits into moves.

In every step, the arbiter processes the workers' answers, calls the policy if a call is due, and,
if no move is in progress, begins the next move, which is small enough to pause the engine for only
a fraction of a step. A distant split is reached in many moves and can be changed or dropped at any
time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from fluxmoe.core.arbitration.limits import EXPERTS, KV, in_words, narrowed
from fluxmoe.core.arbitration.messages import Answer, Decision, Inventory, OperatorLimits, Order
from fluxmoe.core.arbitration.moves import Move, MoveCoordinator, MoveOutcome, MoveResult
from fluxmoe.core.arbitration.planning import CurrentSplit, Planner
from fluxmoe.core.arbitration.schedule import AskingSchedule
from fluxmoe.core.policy.arbitration import (
    ArbitrationView,
    ExpertDemand,
    PrefixDemand,
    Split,
    StepSample,
)
from fluxmoe.core.policy.guards import ArbitrationGuard

logger = logging.getLogger("fluxmoe")

#: Numbers of steps before the next decision is logged: one in the same direction as the last, and
#: one in the opposite direction.
QUIET, TURN = 64, 8
#: Number of decisions to keep.
REMEMBERED = 4


class BlockSource(Protocol):
    """The scheduler's KV blocks, by group. Blocks of held groups are not allocated."""

    def hold(self, groups: int) -> tuple[int, ...]:
        """Hold up to ``groups`` entirely free groups, least valuable first, and return them."""

    def release(self, groups: Iterable[int]) -> None:
        """Make the blocks of these held groups available again."""

    def used(self) -> int:
        """Return the number of blocks that requests use."""

    def cached(self) -> int:
        """Return the number of blocks that hold only cached prefixes that no request uses."""


class Demand(Protocol):
    """The engine's demand for memory, which is read only in steps that build a view."""

    max_running: int

    @property
    def preemptions(self) -> int:
        """Number of times since startup that a request lost its KV cache because it was full."""

    def request_blocks(self) -> float:
        """Estimate the KV blocks of a request at its end; 0 until the first has finished."""

    def experts(self) -> ExpertDemand:
        """Return the demand for expert pages."""

    def prefixes(self) -> PrefixDemand:
        """Return the demand for cached prefixes."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """The engine between two steps.

    Attributes:
        last: The step that just ended.
        running, waiting: Numbers of requests in the step that is about to begin.
        answers: The workers' answers since the last step.
        demand: The engine's demand for memory.
    """

    last: StepSample
    running: int
    waiting: int
    answers: Sequence[Answer]
    demand: Demand


class Arbiter:
    """Moves frames between experts and KV cache towards the split that a policy requests.

    Args:
        inventory: Resources of the workers.
        policy: The arbitration policy.
        blocks: The scheduler's KV blocks; uncommitted groups are already held.
        workers: Number of workers that must answer.
        clock: Function that returns the Unix time, for decisions.
    """

    def __init__(
        self,
        inventory: Inventory,
        policy: ArbitrationGuard,
        blocks: BlockSource,
        workers: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._inventory, self._blocks = inventory, blocks
        #: The guard of the policy, with its name, faults and slow calls.
        self.policy = policy
        self._moves, self._clock = MoveCoordinator(workers), clock
        self._schedule = AskingSchedule(policy.interval, policy.calm_interval)
        #: The requested split; None if the policy keeps the current one.
        self._wish: Split | None = None
        self._planner = Planner(inventory, blocks.hold)
        self._slots = inventory.slots
        #: KV groups committed on every worker.
        self._groups = set(range(inventory.groups))
        self._frames = self._planner.frames(self._slots, self._groups)
        self._limit = inventory.frames
        bounds = {EXPERTS: inventory.experts, KV: inventory.kv}
        self._bounds = self._initial_bounds = MappingProxyType(bounds)
        #: The operator's limits; None if never set.
        self._limits: OperatorLimits | None = None
        #: True if no move is needed until the policy requests another split.
        self._settled = True
        self._pause_per_frame = 0.0
        #: Duration of the slowest order of any move so far, in seconds.
        self.longest_pause = 0.0
        self._steps, self._reported, self._line = 0, -QUIET, ""
        #: The last logged decisions, oldest first.
        self.decisions: deque[Decision] = deque(maxlen=REMEMBERED)
        #: Completed moves by direction.
        self.changes = {"to_kv": 0, "to_experts": 0}
        #: Moves that were rolled back or left frames free.
        self.failures = 0

    # --- reading ---------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """True if a move is in progress and needs further steps."""
        return self._moves.busy

    @property
    def frames(self) -> dict[str, int]:
        """The split confirmed by all workers: tenant → frames."""
        return dict(self._frames)

    def set_limits(self, limits: OperatorLimits) -> None:
        """Enforce these limits from now on, in as many moves as needed (see ``narrowed``)."""
        total = self._inventory.frames
        self._limits, self._settled = limits, False
        self._limit = total if limits.total is None else min(max(limits.total, 0), total)
        self._bounds = narrowed(
            self._initial_bounds,
            limits,
            total=total,
            group=self._inventory.layout.frames_per_group,
        )

    # --- every step ------------------------------------------------------------------------------

    def step(self, state: EngineState) -> Order | None:
        """Run before each engine step.

        Returns:
            The order to send to all workers with this step, if any.
        """
        last, running, waiting = state.last, state.running, state.waiting
        result = self._moves.receive(state.answers)
        if result is not None:
            self._finish(result)
        self._steps += 1
        content = self._wish is None
        due = not self.policy.fixed and self._schedule.due(last, running, waiting, content=content)
        # Most steps need no work here and must cost almost nothing.
        if due or not (self._moves.busy or (content and self._settled)):
            view = self._view(state)
            if due:
                self._ask(view)
            split = self._wish or Split(view.frames)
            if not self._moves.busy:
                self._begin(split, view)
        return self._moves.order()

    def _view(self, state: EngineState) -> ArbitrationView:
        """Build the policy's input; needed only if the policy is called or memory moves."""
        layout, demand = self._inventory.layout, state.demand
        per_block = layout.block_bytes / layout.frame_bytes
        return ArbitrationView(
            frames=self._frames,
            total_frames=max(self._limit, self._least()),
            bounds=self._bounds,
            step=self._steps - 1,
            waiting_requests=state.waiting,
            running_requests=state.running,
            max_running_requests=demand.max_running,
            kv_used_frames=-(-self._blocks.used() * layout.block_bytes // layout.frame_bytes),
            request_frames=demand.request_blocks() * per_block,
            kv_cached_frames=int(self._blocks.cached() * per_block),
            preemptions=demand.preemptions,
            tokens=state.last.tokens,
            step_seconds=state.last.seconds,
            stall_seconds=state.last.stall_seconds,
            steps=tuple(self._schedule.steps),
            experts=demand.experts(),
            prefixes=demand.prefixes(),
        )

    def _ask(self, view: ArbitrationView) -> None:
        split = self.policy.split(view)
        self._wish = None if split.frames == view.frames else split
        content = self._wish is None
        self._schedule.asked(view.running_requests, view.waiting_requests, content=content)

    def _begin(self, split: Split, view: ArbitrationView) -> None:
        """Begin the next move towards ``split``, if there is one."""
        frames = view.frames
        over = sum(frames.values()) > view.total_frames or any(
            not bounds.min <= frames[name] <= bounds.max for name, bounds in self._bounds.items()
        )
        # An idle engine finishes the current move but begins no other, since each move would keep
        # the engine stepping.
        if not view.running_requests and not over:
            return
        wanted = self._planner.within(split, view, fill=self._limits is not None)
        current = CurrentSplit(self._slots, self._groups, self._frames)
        move = self._planner.move(wanted, view, current, self._pause_per_frame)
        self._settled = move is None and not over
        if move is not None:
            if not move.to_kv:  # the blocks of these groups are already held
                self._groups -= set(move.groups)
                self._count()
            # The operator also causes a move if limits are set and the policy keeps the split.
            freed = self._limits is not None and split.frames == frames
            self._report(move, split, by_operator=over or freed)
            self._moves.begin(move)

    def _finish(self, result: MoveResult) -> None:
        move, groups = result.move, set(result.move.groups)
        if result.outcome is MoveOutcome.MOVED:
            self._slots = move.slots
            if move.to_kv:
                self._groups |= groups
                self._blocks.release(groups)
            self.changes["to_kv" if move.to_kv else "to_experts"] += 1
        else:
            self.failures += 1
            logger.warning(
                "arbitration: a move was %s: %s", result.outcome.value, "; ".join(result.problems)
            )
            if result.outcome is MoveOutcome.UNDONE and not move.to_kv:
                self._groups |= groups
                self._blocks.release(groups)
            elif result.outcome is MoveOutcome.STRANDED:
                self._slots = move.slots if move.to_kv else move.before
        self._count()
        moved = max(
            self._inventory.layout.frames(groups),
            abs(self._planner.expert_frames(move.slots) - self._planner.expert_frames(move.before)),
        )
        self.longest_pause = max(self.longest_pause, result.seconds)
        pause = result.seconds / max(moved, 1)
        self._pause_per_frame += (pause - self._pause_per_frame) / 4

    def _count(self) -> None:
        self._frames = self._planner.frames(self._slots, self._groups)

    def _least(self) -> int:
        return sum(bounds.min for bounds in self._bounds.values())

    def _report(self, move: Move, split: Split, *, by_operator: bool) -> None:
        """Log one line per decision, rather than one per move towards the same split."""
        direction = "to_kv" if move.to_kv else "to_experts"
        words = "to the KV cache" if move.to_kv else "to the experts"
        reason = split.reason
        if by_operator:
            reason = f"limits set by the operator: {in_words(self._limits or OperatorLimits())}"
        line = f"{words}; {reason}" if reason else words
        turned = not self.decisions or self.decisions[-1].direction != direction
        if line == self._line or self._steps - self._reported < (TURN if turned else QUIET):
            return
        self._line, self._reported = line, self._steps
        number = self.decisions[-1].number + 1 if self.decisions else 1
        self.decisions.append(
            Decision(number, self.policy.name, direction, reason, int(self._clock()))
        )
        size = self._inventory.layout.frame_bytes / 2**20
        have = {name: f"{count * size:.1f}" for name, count in self.frames.items()}
        want = {name: f"{count * size:.1f}" for name, count in split.frames.items()}
        logger.info(
            "arbitration (%s): memory moves %s: experts %s → %s MiB, KV cache %s → %s MiB",
            *(self.policy.name, line),
            *(have[EXPERTS], want[EXPERTS], have[KV], want[KV]),
        )
