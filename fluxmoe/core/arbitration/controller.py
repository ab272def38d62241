"""SplitController: the scheduler's side of arbitration. Asks the policy, turns its wish into moves.

In every step it takes in what the workers say, asks the policy if that is due, and, if no move is
under way, begins the next one: at most so many frames that the pause they cause stays a fraction of
a step. A wish that is far away is reached in many moves, and can be changed or dropped at any time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from fluxmoe.core.arbitration.limits import EXPERTS, KV, filled, in_words, narrowed
from fluxmoe.core.arbitration.messages import Answer, ByHand, Inventory, Order
from fluxmoe.core.arbitration.moves import Move, Mover, Outcome, Result
from fluxmoe.core.arbitration.pace import Pace
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.memory.sizing import sizes
from fluxmoe.core.policy.arbitration import ArbitrationView, Split, StepSample
from fluxmoe.core.policy.arbitration_guard import ArbitrationGuard

logger = logging.getLogger("fluxmoe")

#: A move may pause the engine for this part of a step.
PAUSE = 0.25
#: A move is at most this part of the budget, at least one group and one slot.
LARGEST = 1 / 16
FIRST = 1 / 64
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
        self._slots = inventory.slots
        #: KV groups whose memory is committed on every worker.
        self._groups = set(range(inventory.groups))
        self._frames = self._counted()
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

    def _counted(self) -> Mapping[str, int]:
        experts, kv = self._expert_frames(self._slots), self._kv_frames(self._groups)
        return MappingProxyType({EXPERTS: experts, KV: kv})

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
        move = self._plan(self._within(split, view), view)
        self._settled = move is None and not over
        if move is not None:
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
        self._frames = self._counted()
        moved = max(
            self._inventory.layout.frames(groups),
            abs(self._expert_frames(move.slots) - self._expert_frames(move.before)),
        )
        self.longest_pause = max(self.longest_pause, result.seconds)
        pause = result.seconds / max(moved, 1)
        self._pause_per_frame += (pause - self._pause_per_frame) / 4

    # --- planning --------------------------------------------------------------------------------

    def _least(self) -> int:
        return sum(bounds.min for bounds in self._bounds.values())

    def _within(self, split: Split, view: ArbitrationView) -> dict[str, int]:
        """What the policy wants, within the bounds; KV cache in use always wins."""
        experts, kv = view.bounds[EXPERTS], view.bounds[KV]
        floor = max(kv.min, min(view.kv_used_frames, view.frames[KV]))
        wanted_kv = min(max(split.frames[KV], floor), kv.max, view.total_frames - experts.min)
        wanted = min(max(split.frames[EXPERTS], experts.min), experts.max)
        room = max(view.total_frames - wanted_kv, experts.min)
        wishes = {EXPERTS: min(wanted, room), KV: wanted_kv}
        # Policies need not use all of their bounds. What a person takes from one is the other's.
        return wishes if self._by_hand is None else filled(wishes, view)

    def _plan(self, wanted: dict[str, int], view: ArbitrationView) -> Move | None:
        """The next move towards ``wanted``; None if there is none worth making."""
        have, per_group = self._frames, self._inventory.layout.frames_per_group
        if wanted == have:  # as in most steps
            return None
        free = view.total_frames - have[EXPERTS] - have[KV]
        most = self._most(view)
        grow = min(wanted[KV] - have[KV], most)
        if grow >= per_group:
            return self._to_kv(grow, free)
        slots = self._sizes(wanted[EXPERTS]) or self._slots
        experts = self._expert_frames(slots)
        surplus = max(-free, have[EXPERTS] - view.bounds[EXPERTS].max)
        if experts < have[EXPERTS] and surplus > 0:
            return self._resize(max(experts, have[EXPERTS] - min(surplus, most)))
        # The KV cache gives no more than the experts can use, or than the limit demands.
        needed = max(experts - have[EXPERTS] - free, have[KV] - view.bounds[KV].max, 0)
        needed = -(-needed // per_group) * per_group
        gap = have[KV] - wanted[KV]
        limited = free < 0 or have[KV] > view.bounds[KV].max
        if limited and have[KV] - per_group >= view.bounds[KV].min:
            gap = -(-gap // per_group) * per_group  # a limit is kept to, not come close to
        shrink = min(gap, needed, most)
        if shrink >= per_group:
            return self._to_experts(shrink // per_group, experts, free)
        if experts > have[EXPERTS] and free > 0:
            return self._resize(have[EXPERTS] + min(experts - have[EXPERTS], free, most))
        return None

    def _most(self, view: ArbitrationView) -> int:
        """Frames of the next move: what the pause allows, but enough to change something."""
        layout, total = self._inventory.layout, self._inventory.frames
        slot = self._expert_frames(tuple(n + 1 for n in self._slots)) - self.frames[EXPERTS]
        least = layout.frames_per_group * -(-slot // layout.frames_per_group)
        most = total * FIRST
        if self._pause_per_frame and view.step_seconds:
            most = PAUSE * view.step_seconds / self._pause_per_frame
        return max(least, int(min(most, total * LARGEST)))

    def _to_kv(self, count: int, free: int) -> Move | None:
        """Commit as many of the lowest groups as ``count`` frames hold; experts give the rest."""
        layout, groups, needed = self._inventory.layout, [], -free
        for group in range(layout.groups):
            if group not in self._groups:
                if needed + free + layout.frames_of(group) > count:
                    break
                groups.append(group)
                needed += layout.frames_of(group)
        slots: tuple[int, ...] | None = self._slots
        if needed > 0:
            slots = self._sizes(self._expert_frames(self._slots) - needed)
        if not groups or slots is None:
            return None
        return Move(True, tuple(groups), self._slots, slots)

    def _to_experts(self, count: int, wanted: int, free: int) -> Move | None:
        """Give up groups that nobody uses; experts get their frames, and what else is free."""
        groups = self._blocks.hold(count)
        if not groups:
            return None  # all in use: the wish stays, and the next step tries again
        self._groups -= set(groups)
        self._frames = self._counted()
        have = self._frames[EXPERTS]
        room = have + free + self._kv_frames(groups)
        slots = self._sizes(max(min(wanted, room), have)) or self._slots
        return Move(False, groups, self._slots, slots)

    def _resize(self, frames: int) -> Move | None:
        """A move of the experts alone, to at most ``frames`` frames."""
        slots = self._sizes(frames)
        if slots is None or slots == self._slots:
            return None
        return Move(slots < self._slots, (), self._slots, slots)

    def _sizes(self, frames: int) -> tuple[int, ...] | None:
        i = self._inventory
        slots = sizes(
            i.geometry,
            i.page_class,
            frames,
            i.layout.frame_bytes,
            banks=len(i.slots),
            limit=i.bank_limit,
        )
        return None if slots is None else tuple(slots)

    def _expert_frames(self, slots: Sequence[int]) -> int:
        i = self._inventory
        return sum(frames_for(i.page_class, count, i.layout.frame_bytes) for count in slots)

    def _kv_frames(self, groups: Collection[int]) -> int:
        return self._inventory.layout.frames(groups)

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
