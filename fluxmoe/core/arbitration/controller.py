"""SplitController: the scheduler's side of arbitration. Asks the policy, turns its wish into moves.

In every step it processes the workers' answers, asks the policy if that is due, and, if no move is
in progress, begins the next one, with few enough frames that the resulting pause stays a fraction
of a step. A distant wish is reached in many moves, and can be changed or dropped at any time.
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

#: Steps before the next decision is reported, in the same direction as the last or in the other.
QUIET, TURN = 64, 8
#: Number of decisions that are remembered.
REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class Decision:
    """Reason of a move: the ``number``-th decision, direction ``to_kv`` or ``to_experts``."""

    number: int
    direction: str
    reason: str


class BlockSource(Protocol):
    """The scheduler's KV blocks, by group. Blocks of held groups are not handed out."""

    def hold(self, groups: int) -> tuple[int, ...]:
        """Hold up to ``groups`` wholly free groups, least valuable first; return them."""

    def release(self, groups: Iterable[int]) -> None:
        """Allow blocks of these held groups to be handed out again."""

    def used(self) -> int:
        """Number of blocks that requests use."""


class Pace:
    """Counts the steps from one call of a policy to the next.

    Evaluating many steps at once costs hardly more than evaluating one: between two steps of the
    engine the policy's code has left the CPU caches. So a policy declares how often to ask it, and
    sees all steps since the last call.

    Calls become rarer while the number of running requests is constant, none waits and the policy
    keeps the current split.

    Args:
        interval, calm: ``ArbitrationPolicy.interval`` and ``calm_interval``.
    """

    def __init__(self, interval: int, calm: int) -> None:
        self._interval, self._calm = interval, max(interval, calm)
        self._pause, self._running = 1, 0
        #: Steps since the policy was last asked, oldest first.
        self.steps: list[StepSample] = []

    def due(self, step: StepSample, running: int, waiting: int, *, content: bool) -> bool:
        """True if the policy should be asked now.

        Args:
            step: The step that has just ended.
            running, waiting: Number of requests in the step that begins.
            content: True if the policy's last answer was the current split.
        """
        self.steps.append(step)
        calm = content and not waiting and running == self._running
        return len(self.steps) >= (self._pause if calm else min(self._pause, self._interval))

    def asked(self, running: int, waiting: int, *, content: bool) -> None:
        """Record that the policy was asked, with the arguments of ``due``."""
        calm = content and not waiting and running == self._running
        longer = min(2 * self._pause, self._calm) if calm else 0
        self._pause = max(longer, self._interval)
        self._running = running
        self.steps.clear()


class SplitController:
    """Moves frames between experts and KV cache as a policy wishes.

    Args:
        inventory: Resources of the workers.
        policy: Policy to ask.
        blocks: The scheduler's KV blocks; uncommitted groups are already held.
        workers: Number of workers that must answer.
    """

    def __init__(
        self, inventory: Inventory, policy: ArbitrationGuard, blocks: BlockSource, workers: int
    ) -> None:
        self._inventory, self._policy, self._blocks = inventory, policy, blocks
        self._mover = Mover(workers)
        self._pace = Pace(policy.interval, policy.calm_interval)
        #: Split that the policy wants; None if it wants the current one.
        self._wish: Split | None = None
        self._planner = Planner(inventory, blocks.hold)
        self._slots = inventory.slots
        #: KV groups whose memory is committed on every worker.
        self._groups = set(range(inventory.groups))
        self._frames = self._planner.frames(self._slots, self._groups)
        self._limit = inventory.frames
        bounds = {EXPERTS: inventory.experts, KV: inventory.kv}
        self._bounds = self._initial_bounds = MappingProxyType(bounds)
        #: Limits set by hand; None if none were ever set.
        self._by_hand: ByHand | None = None
        #: True if the current split needs no move unless the policy wants another.
        self._settled = True
        self._pause_per_frame = 0.0
        #: Seconds of the longest move so far, both halves together.
        self.longest_pause = 0.0
        self._steps, self._told, self._line = 0, -QUIET, ""
        #: The last reported decisions, oldest first.
        self.decisions: deque[Decision] = deque(maxlen=REMEMBERED)
        #: Moves that took effect, by direction.
        self.changes = {"to_kv": 0, "to_experts": 0}
        #: Moves that were rolled back or left frames free.
        self.failures = 0

    # --- reading ---------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """True if a move is in progress, so that steps are needed."""
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
        """Number of faults of the policy."""
        return self._policy.faults

    @property
    def slow(self) -> int:
        """Number of slow calls of the policy."""
        return self._policy.slow

    def set_limits(self, limits: ByHand) -> None:
        """Enforce these limits from now on, in as many moves as needed. See ``narrowed``."""
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
        """Called before each step of the engine.

        Args:
            last: The previous step.
            running, waiting: Number of requests in the step that begins.
            make_view: Makes the policy's view from the engine's state and the keyword arguments
                that the controller passes; called only if needed.
            answers: Answers of the workers since the last call.

        Returns:
            The order to send to all workers with this step, if any.
        """
        result = self._mover.receive(answers)
        if result is not None:
            self._finish(result)
        self._steps += 1
        content = self._wish is None
        due = not self._policy.fixed and self._pace.due(last, running, waiting, content=content)
        # Most steps need no work, and should cost nothing.
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
        # An idle engine finishes the current move and begins no other: moves keep it stepping.
        if not view.running_requests and not over:
            return
        wanted = self._planner.within(split, view, fill=self._by_hand is not None)
        held = Held(self._slots, self._groups, self._frames)
        move = self._planner.move(wanted, view, held, self._pause_per_frame)
        self._settled = move is None and not over
        if move is not None:
            if not move.to_kv:  # their blocks are already held
                self._groups -= set(move.groups)
                self._count()
            # Also if a limit set by hand frees memory for a tenant whose policy wants no change.
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
        """Log a line per decision, not per move towards the same wish."""
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
