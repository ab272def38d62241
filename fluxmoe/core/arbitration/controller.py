"""SplitController: the scheduler's side of arbitration. Asks the policy, turns its wish into moves.

In every step it takes in what the workers say, asks the policy if that is due, and, if no move is
under way, begins the next one: at most so many frames that the pause they cause stays a fraction of
a step. A wish that is far away is reached in many moves, and can be changed or dropped at any time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from fluxmoe.core.arbitration.limits import EXPERTS, KV, in_words, narrowed
from fluxmoe.core.arbitration.messages import Answer, ByHand, Inventory, Order
from fluxmoe.core.arbitration.moves import Move, Mover, Outcome, Result
from fluxmoe.core.arbitration.planning import Held, Planner
from fluxmoe.core.policy.arbitration import ArbitrationView, Split, StepSample
from fluxmoe.core.policy.guards import ArbitrationGuard

logger = logging.getLogger("fluxmoe")

#: Steps before a decision is told of again that goes the same way as the last, or the other way.
QUIET, TURN = 64, 8
#: Decisions that are remembered.
REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class Decision:
    """Why memory began to move: the ``number``-th decision, ``to_kv`` or ``to_experts``."""

    number: int
    direction: str
    reason: str


class BlockSource(Protocol):
    """The scheduler's KV blocks, by group. Blocks of held groups are handed out to nobody."""

    def hold(self, groups: int) -> tuple[int, ...]:
        """Hold up to so many wholly free groups, those first that are worth least; which."""

    def release(self, groups: Iterable[int]) -> None:
        """Blocks of these held groups may be handed out again."""

    def used(self) -> int:
        """Blocks that requests use."""


class Pace:
    """Counts the steps from one call of a policy to the next.

    A policy that looks at many steps at once costs hardly more than one that looks at one: between
    two steps of the engine its code has left the processor's caches. So it says how often it wants
    to be asked, and is shown all the steps since.

    Nothing happens while as many requests run, none waits and the policy wants what there is.

    Args:
        interval, calm: ``ArbitrationPolicy.interval`` and ``calm_interval``.
    """

    def __init__(self, interval: int, calm: int) -> None:
        self._interval, self._calm = interval, max(interval, calm)
        self._pause, self._running = 1, 0
        #: Since it was asked last, the oldest first.
        self.steps: list[StepSample] = []

    def due(self, step: StepSample, running: int, waiting: int, *, content: bool) -> bool:
        """Whether to ask now.

        Args:
            step: The one that has just ended.
            running, waiting: Requests of the step that begins.
            content: Whether the policy wanted what there is when it was asked last.
        """
        self.steps.append(step)
        calm = content and not waiting and running == self._running
        return len(self.steps) >= (self._pause if calm else min(self._pause, self._interval))

    def asked(self, running: int, waiting: int, *, content: bool) -> None:
        """It was: with so many requests, and that is what came of it."""
        calm = content and not waiting and running == self._running
        longer = min(2 * self._pause, self._calm) if calm else 0
        self._pause = max(longer, self._interval)
        self._running = running
        self.steps.clear()


class SplitController:
    """Moves frames between experts and KV cache as a policy wishes.

    Args:
        inventory: What the workers have.
        policy: Whom to ask.
        blocks: The scheduler's KV blocks; groups that are not committed are held already.
        workers: How many must answer.
    """

    def __init__(
        self, inventory: Inventory, policy: ArbitrationGuard, blocks: BlockSource, workers: int
    ) -> None:
        self._inventory, self._policy, self._blocks = inventory, policy, blocks
        self._mover = Mover(workers)
        self._pace = Pace(policy.interval, policy.calm_interval)
        #: What the policy wants; None if it wants what there is.
        self._wish: Split | None = None
        self._planner = Planner(inventory, blocks.hold)
        self._slots = inventory.slots
        #: KV groups whose memory is committed on every worker.
        self._groups = set(range(inventory.groups))
        self._frames = self._planner.frames(self._slots, self._groups)
        self._limit = inventory.frames
        bounds = {EXPERTS: inventory.experts, KV: inventory.kv}
        self._bounds = self._initial_bounds = MappingProxyType(bounds)
        #: What was set by hand; None if nothing ever was.
        self._by_hand: ByHand | None = None
        #: Whether the present split is as it should be, as long as the policy wants no other.
        self._settled = True
        self._pause_per_frame = 0.0
        #: Seconds of the longest move so far, both halves together.
        self.longest_pause = 0.0
        self._steps, self._told, self._line = 0, -QUIET, ""
        #: The last decisions that were told of, the oldest first.
        self.decisions: deque[Decision] = deque(maxlen=REMEMBERED)
        #: Moves that took effect, by direction.
        self.changes = {"to_kv": 0, "to_experts": 0}
        #: Moves that were rolled back or left frames free.
        self.failures = 0

    # --- reading ---------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a move is under way, so that steps are needed."""
        return self._mover.busy

    @property
    def frames(self) -> dict[str, int]:
        """The split that all workers have confirmed: tenant → frames."""
        return dict(self._frames)

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return self._policy.name

    @property
    def faults(self) -> int:
        """Faults of the policy."""
        return self._policy.faults

    @property
    def slow(self) -> int:
        """Slow calls of the policy."""
        return self._policy.slow

    def set_limits(self, limits: ByHand) -> None:
        """Keep to these limits from now on, in as many moves as it takes. See ``narrowed``."""
        total = self._inventory.frames
        self._by_hand, self._settled = limits, False
        self._limit = total if limits.total is None else min(max(limits.total, 0), total)
        self._bounds = narrowed(
            self._initial_bounds,
            limits,
            total=total,
            group=self._inventory.layout.frames_per_group,
        )

    # --- every step ------------------------------------------------------------------------------

    def step(
        self,
        last: StepSample,
        running: int,
        waiting: int,
        make_view: Callable[..., ArbitrationView],
        answers: Iterable[Answer],
    ) -> Order | None:
        """Before each step of the engine.

        Args:
            last: The step before.
            running, waiting: Requests of the step that begins.
            make_view: Makes the state of the engine from what is said here and what the controller
                knows itself; called only where it is needed.
            answers: What the workers have said since.

        Returns:
            What to tell all workers with this step.
        """
        result = self._mover.receive(answers)
        if result is not None:
            self._finish(result)
        self._steps += 1
        content = self._wish is None
        due = not self._policy.fixed and self._pace.due(last, running, waiting, content=content)
        # In most steps there is nothing to do, and that should cost nothing.
        if due or not (self._mover.busy or (content and self._settled)):
            view = self._seen(last, running, waiting, make_view)
            if due:
                self._ask(view)
            split = self._wish or Split(view.frames)
            if not self._mover.busy:
                self._begin(split, view)
        return self._mover.order()

    def _seen(
        self,
        last: StepSample,
        running: int,
        waiting: int,
        make_view: Callable[..., ArbitrationView],
    ) -> ArbitrationView:
        layout = self._inventory.layout
        return make_view(
            frames=self._frames,
            total_frames=max(self._limit, self._least()),
            bounds=self._bounds,
            waiting_requests=waiting,
            running_requests=running,
            kv_used_frames=-(-self._blocks.used() * layout.block_bytes // layout.frame_bytes),
            tokens=last.tokens,
            step_seconds=last.seconds,
            stall_seconds=last.stall_seconds,
            steps=tuple(self._pace.steps),
        )

    def _ask(self, view: ArbitrationView) -> None:
        split = self._policy.split(view)
        self._wish = None if split.frames == view.frames else split
        self._pace.asked(view.running_requests, view.waiting_requests, content=self._wish is None)

    def _begin(self, split: Split, view: ArbitrationView) -> None:
        """Begin the next move towards ``split``, if there is one."""
        frames = view.frames
        over = sum(frames.values()) > view.total_frames or any(
            not bounds.min <= frames[name] <= bounds.max for name, bounds in self._bounds.items()
        )
        # An idle engine ends the move that is under way, and begins none: moves keep it stepping.
        if not view.running_requests and not over:
            return
        wanted = self._planner.within(split, view, fill=self._by_hand is not None)
        held = Held(self._slots, self._groups, self._frames)
        move = self._planner.move(wanted, view, held, self._pause_per_frame)
        self._settled = move is None and not over
        if move is not None:
            if not move.to_kv:  # their blocks are on hold already
                self._groups -= set(move.groups)
                self._count()
            # Also where a policy that wants nothing gets what a person took from the other.
            told = self._by_hand is not None and split.frames == frames
            self._report(move, split, by_hand=over or told)
            self._mover.begin(move)

    def _finish(self, result: Result) -> None:
        move, groups = result.move, set(result.move.groups)
        if result.outcome is Outcome.MOVED:
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
            if result.outcome is Outcome.UNDONE and not move.to_kv:
                self._groups |= groups
                self._blocks.release(groups)
            elif result.outcome is Outcome.STRANDED:
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

    def _report(self, move: Move, split: Split, *, by_hand: bool) -> None:
        """A line per decision; moves on the way to the same wish are not worth one each."""
        direction = "to_kv" if move.to_kv else "to_experts"
        words = "to the KV cache" if move.to_kv else "to the experts"
        reason = split.reason
        if by_hand:
            reason = f"limits set by hand: {in_words(self._by_hand or ByHand())}"
        line = f"{words}; {reason}" if reason else words
        turned = not self.decisions or self.decisions[-1].direction != direction
        if line == self._line or self._steps - self._told < (TURN if turned else QUIET):
            return
        self._line, self._told = line, self._steps
        number = self.decisions[-1].number + 1 if self.decisions else 1
        self.decisions.append(Decision(number, direction, reason))
        size = self._inventory.layout.frame_bytes / 2**20
        have = {name: f"{count * size:.1f}" for name, count in self.frames.items()}
        want = {name: f"{count * size:.1f}" for name, count in split.frames.items()}
        logger.info(
            "arbitration (%s): memory moves %s: experts %s → %s MiB, KV cache %s → %s MiB",
            *(self._policy.name, line),
            *(have[EXPERTS], want[EXPERTS], have[KV], want[KV]),
        )
