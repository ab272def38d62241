"""Planning of the next move from the current split towards the requested one.

Planning is stateless; its only side effect is to hold the blocks of groups about to be freed.

Three units occur: experts own *slots*, the KV cache owns *groups*, and both are compared in
*frames*; names that end in ``frames`` are numbers of frames. ``free_frames`` is the budget minus
the frames of both tenants. This number is negative while an operator's limit is lower than their
sum: with a limit of 20 frames, 12 frames of experts and 15 frames of KV cache, it is −7, so that 7
frames must be released before a tenant can grow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from fluxmoe.core.arbitration.limits import EXPERTS, KV, filled
from fluxmoe.core.arbitration.messages import Inventory
from fluxmoe.core.arbitration.moves import Move
from fluxmoe.core.memory.experts import frames_for
from fluxmoe.core.memory.sizing import slots_per_bank
from fluxmoe.core.policy.arbitration import ArbitrationView, Split

#: Longest pause of the engine that a move may cause, as a fraction of a step.
PAUSE = 0.25
#: Largest move as a fraction of the budget (but at least one group and one slot); FIRST applies
#: until a pause has been measured.
LARGEST = 1 / 16
FIRST = 1 / 64


@dataclass(frozen=True, slots=True)
class CurrentSplit:
    """The current split.

    Attributes:
        slots: Number of slots in each bank.
        groups: KV groups whose memory is committed.
        frames: The frames of both: tenant → frames.
    """

    slots: tuple[int, ...]
    groups: Collection[int]
    frames: Mapping[str, int]


class Planner:
    """Plans moves within the resources of the workers.

    Args:
        inventory: Resources of the workers.
        hold: Function that holds up to a given number of entirely free KV groups and returns them
            (see ``BlockSource``).
    """

    def __init__(self, inventory: Inventory, hold: Callable[[int], tuple[int, ...]]) -> None:
        self._inventory, self._hold = inventory, hold

    def frames(self, slots: Sequence[int], groups: Collection[int]) -> Mapping[str, int]:
        """Convert slots and groups to frames: tenant → frames."""
        experts, kv = self.expert_frames(slots), self.kv_frames(groups)
        return MappingProxyType({EXPERTS: experts, KV: kv})

    def within(self, split: Split, view: ArbitrationView, *, fill: bool) -> dict[str, int]:
        """Clip the requested split to the bounds; KV cache in use always takes precedence.

        Args:
            split: The requested split.
            view: The policy's input.
            fill: True to distribute unclaimed frames, so that memory that an operator takes from
                one tenant goes to the other. Otherwise a policy may leave frames unclaimed.
        """
        experts, kv = view.bounds[EXPERTS], view.bounds[KV]
        floor = max(kv.min, min(view.kv_used_frames, view.frames[KV]))
        wanted_kv = min(max(split.frames[KV], floor), kv.max, view.total_frames - experts.min)
        wanted = min(max(split.frames[EXPERTS], experts.min), experts.max)
        room = max(view.total_frames - wanted_kv, experts.min)
        wishes = {EXPERTS: min(wanted, room), KV: wanted_kv}
        return filled(wishes, view) if fill else wishes

    def move(
        self,
        wanted: dict[str, int],
        view: ArbitrationView,
        current: CurrentSplit,
        pause_per_frame: float,
    ) -> Move | None:
        """Plan the next move towards ``wanted``; return None if no move is worthwhile.

        Args:
            wanted: Tenant → frames, within the bounds.
            view: The policy's input.
            current: The current split. If the move takes groups from the KV cache, their blocks are
                held from then on.
            pause_per_frame: Average pause of recent moves in seconds per frame; 0 before the first
                move.
        """
        have, per_group = current.frames, self._inventory.layout.frames_per_group
        if wanted == have:  # the usual case
            return None
        bounds, free_frames = view.bounds, view.total_frames - have[EXPERTS] - have[KV]
        most_frames = self._most_frames(view, current, pause_per_frame)
        grow_frames = min(wanted[KV] - have[KV], most_frames)
        if grow_frames >= per_group:
            return self._to_kv(current, grow_frames, free_frames)

        # Banks fill whole frames, so the experts may be unable to use all requested frames.
        expert_frames = self.expert_frames(self._slots(wanted[EXPERTS]) or current.slots)
        surplus_frames = max(-free_frames, have[EXPERTS] - bounds[EXPERTS].max)
        if expert_frames < have[EXPERTS] and surplus_frames > 0:
            least_frames = have[EXPERTS] - min(surplus_frames, most_frames)
            return self._resize(current, max(expert_frames, least_frames))

        # The KV cache gives up no more than the experts can use or the limit demands.
        missing_frames = expert_frames - have[EXPERTS] - free_frames
        needed_frames = max(missing_frames, have[KV] - bounds[KV].max, 0)
        gap_frames = have[KV] - wanted[KV]
        limited = free_frames < 0 or have[KV] > bounds[KV].max
        if limited and have[KV] - per_group >= bounds[KV].min:
            gap_frames = _up(gap_frames, per_group)  # a limit must be met, not just approached
        shrink_frames = min(gap_frames, _up(needed_frames, per_group), most_frames)
        if shrink_frames >= per_group:
            return self._to_experts(current, shrink_frames // per_group, expert_frames, free_frames)
        if expert_frames > have[EXPERTS] and free_frames > 0:
            grow_frames = min(expert_frames - have[EXPERTS], free_frames, most_frames)
            return self._resize(current, have[EXPERTS] + grow_frames)
        return None

    def _most_frames(
        self, view: ArbitrationView, current: CurrentSplit, pause_per_frame: float
    ) -> int:
        """Return the maximum number of frames for the next move.

        The pause limits this number, but it is always large enough for a move to have an effect.
        """
        per_group, total_frames = self._inventory.layout.frames_per_group, self._inventory.frames
        next_slots = tuple(count + 1 for count in current.slots)
        slot_frames = self.expert_frames(next_slots) - current.frames[EXPERTS]
        most_frames = total_frames * FIRST
        if pause_per_frame and view.step_seconds:
            most_frames = PAUSE * view.step_seconds / pause_per_frame
        return max(_up(slot_frames, per_group), int(min(most_frames, total_frames * LARGEST)))

    def _to_kv(self, current: CurrentSplit, most_frames: int, free_frames: int) -> Move | None:
        """Commit as many of the lowest groups as fit in ``most_frames`` frames.

        Free frames are used first, then the experts' frames.
        """
        layout, groups, group_frames = self._inventory.layout, [], 0
        for group in range(layout.groups):
            if group not in current.groups:
                if group_frames + layout.frames_of(group) > most_frames:
                    break
                groups.append(group)
                group_frames += layout.frames_of(group)
        slots: tuple[int, ...] | None = current.slots
        if group_frames > free_frames:
            slots = self._slots(self.expert_frames(current.slots) - (group_frames - free_frames))
        if not groups or slots is None:
            return None
        return Move(True, tuple(groups), current.slots, slots)

    def _to_experts(
        self, current: CurrentSplit, groups: int, expert_frames: int, free_frames: int
    ) -> Move | None:
        """Release up to ``groups`` unused groups, for the experts.

        Their frames and the free frames go to the experts, which own at most ``expert_frames``.
        """
        released = self._hold(groups)
        if not released:
            return None  # all groups are in use; planned again in the next step
        have_frames = current.frames[EXPERTS]
        room_frames = have_frames + free_frames + self.kv_frames(released)
        slots = self._slots(max(min(expert_frames, room_frames), have_frames)) or current.slots
        return Move(False, released, current.slots, slots)

    def _resize(self, current: CurrentSplit, expert_frames: int) -> Move | None:
        """Resize only the experts, to at most ``expert_frames`` frames."""
        slots = self._slots(expert_frames)
        if slots is None or slots == current.slots:
            return None
        return Move(slots < current.slots, (), current.slots, slots)

    def _slots(self, expert_frames: int) -> tuple[int, ...] | None:
        """Return the most slots per bank that fit in these frames; None below the minimum."""
        i = self._inventory
        slots = slots_per_bank(
            i.geometry,
            i.page_class,
            expert_frames,
            i.layout.frame_bytes,
            banks=len(i.slots),
            limit=i.bank_limit,
            minimum=i.minimum,
        )
        return None if slots is None else tuple(slots)

    def expert_frames(self, slots: Sequence[int]) -> int:
        """Return the number of frames that these numbers of slots occupy."""
        i = self._inventory
        return sum(frames_for(i.page_class, count, i.layout.frame_bytes) for count in slots)

    def kv_frames(self, groups: Collection[int]) -> int:
        """Return the number of frames that these KV groups occupy."""
        return self._inventory.layout.frames(groups)


def _up(frames: int, step: int) -> int:
    """Round up to a multiple of ``step``."""
    return -(-frames // step) * step
