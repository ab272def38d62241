"""Planning of moves: the next one on the way from the current split to the wanted one.

Stateless; its only side effect is holding blocks of groups that are to be freed.
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

#: Largest pause of the engine by a move, as a fraction of a step.
PAUSE = 0.25
#: Largest move, as a fraction of the budget (at least one group and one slot); FIRST applies before
#: a pause was measured.
LARGEST = 1 / 16
FIRST = 1 / 64


@dataclass(frozen=True, slots=True)
class Held:
    """The current split.

    Attributes:
        slots: Slots per bank.
        groups: KV groups whose memory is committed.
        frames: Both in frames: tenant → frames.
    """

    slots: tuple[int, ...]
    groups: Collection[int]
    frames: Mapping[str, int]


class Planner:
    """Plans moves within the resources of the workers.

    Args:
        inventory: Resources of the workers.
        hold: Holds up to this many wholly free KV groups and returns them (``BlockSource.hold``).
    """

    def __init__(self, inventory: Inventory, hold: Callable[[int], tuple[int, ...]]) -> None:
        self._inventory, self._hold = inventory, hold

    def frames(self, slots: Sequence[int], groups: Collection[int]) -> Mapping[str, int]:
        """Convert slots and groups to frames: tenant → frames."""
        experts, kv = self.expert_frames(slots), self.kv_frames(groups)
        return MappingProxyType({EXPERTS: experts, KV: kv})

    def within(self, split: Split, view: ArbitrationView, *, fill: bool) -> dict[str, int]:
        """The split that the policy wants, within the bounds; KV cache in use always wins.

        Args:
            split: Split that the policy wants.
            view: View that the policy saw.
            fill: True to distribute unclaimed frames: policies need not use all of their bounds,
                but memory that an operator takes from one tenant goes to the other.
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
        """The next move towards ``wanted``; None if none is worthwhile.

        Args:
            wanted: Tenant → frames, within the bounds.
            view: View that the policy saw.
            held: The current split. Groups of a move to the experts are held from now on.
            pause_per_frame: Recent seconds per moved frame; 0 before anything moved.
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
            gap = -(-gap // per_group) * per_group  # a limit must be met, not just approached
        shrink = min(gap, needed, most)
        if shrink >= per_group:
            return self._to_experts(held, shrink // per_group, experts, free)
        if experts > have[EXPERTS] and free > 0:
            return self._resize(held, have[EXPERTS] + min(experts - have[EXPERTS], free, most))
        return None

    def _most(self, view: ArbitrationView, held: Held, pause_per_frame: float) -> int:
        """Most frames of the next move: as the pause allows, but enough to change something."""
        layout, total = self._inventory.layout, self._inventory.frames
        slot = self.expert_frames(tuple(n + 1 for n in held.slots)) - held.frames[EXPERTS]
        least = layout.frames_per_group * -(-slot // layout.frames_per_group)
        most = total * FIRST
        if pause_per_frame and view.step_seconds:
            most = PAUSE * view.step_seconds / pause_per_frame
        return max(least, int(min(most, total * LARGEST)))

    def _to_kv(self, held: Held, count: int, free: int) -> Move | None:
        """Commit as many of the lowest groups as ``count`` frames hold, free frames first, then the
        experts'.
        """
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
        """Release unused groups; experts get their frames and any other free ones."""
        groups = self._hold(count)
        if not groups:
            return None  # all in use: the wish remains, and the next step tries again
        have = held.frames[EXPERTS]
        room = have + free + self.kv_frames(groups)
        slots = self._sizes(max(min(wanted, room), have)) or held.slots
        return Move(False, groups, held.slots, slots)

    def _resize(self, held: Held, frames: int) -> Move | None:
        """Resize the experts alone, to at most ``frames`` frames."""
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
        """Number of frames for these slots per bank."""
        i = self._inventory
        return sum(frames_for(i.page_class, count, i.layout.frame_bytes) for count in slots)

    def kv_frames(self, groups: Collection[int]) -> int:
        """Number of frames of these KV groups."""
        return self._inventory.layout.frames(groups)
