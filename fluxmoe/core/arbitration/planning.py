"""Planning of moves: the next one on the way from what is held to what is wished.

Nothing here is remembered, and nothing is asked for but blocks of groups that are to be given up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from fluxmoe.core.arbitration.limits import EXPERTS, KV, filled
from fluxmoe.core.arbitration.messages import Inventory
from fluxmoe.core.arbitration.moves import Move
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.memory.sizing import sizes
from fluxmoe.core.policy.arbitration import ArbitrationView, Split

#: A move may pause the engine for this part of a step.
PAUSE = 0.25
#: A move is at most this part of the budget, at least one group and one slot.
LARGEST = 1 / 16
FIRST = 1 / 64


@dataclass(frozen=True, slots=True)
class Held:
    """The present split.

    Attributes:
        slots: Slots per bank.
        groups: KV groups whose memory is committed.
        frames: Both in frames: tenant → frames.
    """

    slots: tuple[int, ...]
    groups: Collection[int]
    frames: Mapping[str, int]


class Planner:
    """Plans moves within what the workers have.

    Args:
        inventory: What they have.
        hold: Holds up to so many wholly free KV groups and tells which (``BlockSource.hold``).
    """

    def __init__(self, inventory: Inventory, hold: Callable[[int], tuple[int, ...]]) -> None:
        self._inventory, self._hold = inventory, hold

    def frames(self, slots: Sequence[int], groups: Collection[int]) -> Mapping[str, int]:
        """Slots and groups in frames: tenant → frames."""
        experts, kv = self.expert_frames(slots), self.kv_frames(groups)
        return MappingProxyType({EXPERTS: experts, KV: kv})

    def within(self, split: Split, view: ArbitrationView, *, fill: bool) -> dict[str, int]:
        """What the policy wants, within the bounds; KV cache in use always wins.

        Args:
            split: What it wants.
            view: What it was shown.
            fill: Whether what it leaves over is shared out: policies need not use all of their
                bounds, but what a person takes from one tenant is the other's.
        """
        experts, kv = view.bounds[EXPERTS], view.bounds[KV]
        floor = max(kv.min, min(view.kv_used_frames, view.frames[KV]))
        wanted_kv = min(max(split.frames[KV], floor), kv.max, view.total_frames - experts.min)
        wanted = min(max(split.frames[EXPERTS], experts.min), experts.max)
        room = max(view.total_frames - wanted_kv, experts.min)
        wishes = {EXPERTS: min(wanted, room), KV: wanted_kv}
        return filled(wishes, view) if fill else wishes

    def move(
        self, wanted: dict[str, int], view: ArbitrationView, held: Held, pause_per_frame: float
    ) -> Move | None:
        """The next move towards ``wanted``; None if there is none worth making.

        Args:
            wanted: Tenant → frames, within the bounds.
            view: What the policy was shown.
            held: The present split. Groups of a move to the experts are on hold from now on.
            pause_per_frame: Seconds that moving a frame took lately; 0 before anything moved.
        """
        have, per_group = held.frames, self._inventory.layout.frames_per_group
        if wanted == have:  # as in most steps
            return None
        free = view.total_frames - have[EXPERTS] - have[KV]
        most = self._most(view, held, pause_per_frame)
        grow = min(wanted[KV] - have[KV], most)
        if grow >= per_group:
            return self._to_kv(held, grow, free)
        slots = self._sizes(wanted[EXPERTS]) or held.slots
        experts = self.expert_frames(slots)
        surplus = max(-free, have[EXPERTS] - view.bounds[EXPERTS].max)
        if experts < have[EXPERTS] and surplus > 0:
            return self._resize(held, max(experts, have[EXPERTS] - min(surplus, most)))
        # The KV cache gives no more than the experts can use, or than the limit demands.
        needed = max(experts - have[EXPERTS] - free, have[KV] - view.bounds[KV].max, 0)
        needed = -(-needed // per_group) * per_group
        gap = have[KV] - wanted[KV]
        limited = free < 0 or have[KV] > view.bounds[KV].max
        if limited and have[KV] - per_group >= view.bounds[KV].min:
            gap = -(-gap // per_group) * per_group  # a limit is kept to, not come close to
        shrink = min(gap, needed, most)
        if shrink >= per_group:
            return self._to_experts(held, shrink // per_group, experts, free)
        if experts > have[EXPERTS] and free > 0:
            return self._resize(held, have[EXPERTS] + min(experts - have[EXPERTS], free, most))
        return None

    def _most(self, view: ArbitrationView, held: Held, pause_per_frame: float) -> int:
        """Frames of the next move: what the pause allows, but enough to change something."""
        layout, total = self._inventory.layout, self._inventory.frames
        slot = self.expert_frames(tuple(n + 1 for n in held.slots)) - held.frames[EXPERTS]
        least = layout.frames_per_group * -(-slot // layout.frames_per_group)
        most = total * FIRST
        if pause_per_frame and view.step_seconds:
            most = PAUSE * view.step_seconds / pause_per_frame
        return max(least, int(min(most, total * LARGEST)))

    def _to_kv(self, held: Held, count: int, free: int) -> Move | None:
        """Commit as many of the lowest groups as ``count`` frames hold; experts give the rest."""
        layout, groups, needed = self._inventory.layout, [], -free
        for group in range(layout.groups):
            if group not in held.groups:
                if needed + free + layout.frames_of(group) > count:
                    break
                groups.append(group)
                needed += layout.frames_of(group)
        slots: tuple[int, ...] | None = held.slots
        if needed > 0:
            slots = self._sizes(self.expert_frames(held.slots) - needed)
        if not groups or slots is None:
            return None
        return Move(True, tuple(groups), held.slots, slots)

    def _to_experts(self, held: Held, count: int, wanted: int, free: int) -> Move | None:
        """Give up groups that nobody uses; experts get their frames, and what else is free."""
        groups = self._hold(count)
        if not groups:
            return None  # all in use: the wish stays, and the next step tries again
        have = held.frames[EXPERTS]
        room = have + free + self.kv_frames(groups)
        slots = self._sizes(max(min(wanted, room), have)) or held.slots
        return Move(False, groups, held.slots, slots)

    def _resize(self, held: Held, frames: int) -> Move | None:
        """A move of the experts alone, to at most ``frames`` frames."""
        slots = self._sizes(frames)
        if slots is None or slots == held.slots:
            return None
        return Move(slots < held.slots, (), held.slots, slots)

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

    def expert_frames(self, slots: Sequence[int]) -> int:
        """Frames of slots per bank."""
        i = self._inventory
        return sum(frames_for(i.page_class, count, i.layout.frame_bytes) for count in slots)

    def kv_frames(self, groups: Collection[int]) -> int:
        """Frames of KV groups."""
        return self._inventory.layout.frames(groups)
