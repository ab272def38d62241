"""The class ``PageTable``: the slots and the usage records of all expert pages.

The books are plain numpy arrays (``books.Books``), because they have three readers: the compiled
event rule (``event``), policies, which get copies (``uses``), and kernels, which need the expert
table ``slot_of``. Slots are numbered per *bank*; nearly every model has one bank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.directory import directory
from fluxmoe.core.paging.books import (
    ABSENT,
    ALL_PAGES,
    C_RESIZED,
    CHANGES,
    EVENT,
    LAYER,
    NEVER,
    PAGES,
    PROTECTED,
    STEP,
    UNUSED,
    Shown,
    new_books,
    release_leaving,
    show,
    unload,
)
from fluxmoe.core.types import Bools, Counters, Geometry, Int64s, Phase
from fluxmoe.errors import CapacityError, InvariantError


class PageTable:
    """The slots of all pages of a model, per bank, and the books of the event rule.

    Args:
        geometry: Layers and experts.
        slots: Number of usable slots of each bank, at least ``minimum``.
        reserved: Maximum number of slots per bank; by default ``max(slots)``.
        bank_of: Bank of each layer; by default 0 for all layers.
        minimum: Minimum number of slots per bank; by default ``experts_per_layer``. If events run
            in waves, the largest number of experts of any token suffices.

    Raises:
        CapacityError: A bank has fewer than ``minimum`` slots, so an event might not fit.
    """

    def __init__(
        self,
        geometry: Geometry,
        slots: Sequence[int],
        *,
        reserved: int | None = None,
        bank_of: Sequence[int] | None = None,
        minimum: int | None = None,
    ) -> None:
        self.geometry = geometry
        #: Minimum number of slots of a bank: the experts of one layer, of a known trace's largest
        #: event or, if events run in waves, of one token.
        self.minimum = geometry.experts_per_layer if minimum is None else minimum
        banks, width = len(slots), max(*slots, reserved or 0, self.minimum)
        self.books = new_books(geometry, banks, width, bank_of)
        #: Directory of the books, for compiled code (``open_books``).
        self.directory = directory(self.books)
        if not np.isin(self.books.bank_of, np.arange(banks)).all() or (
            len(self.books.bank_of) != geometry.num_layers
        ):
            raise InvariantError(f"bank_of must assign each layer one of {banks} banks")
        self._shown = Shown(*(np.zeros(geometry.num_pages, np.int64) for _ in range(3)))
        self._shown_directory = directory(self._shown)
        self._uses = Shown(*(_locked(array) for array in self._shown))
        self.slots = [0] * banks
        self.phase = Phase.DECODE
        self.reset()
        for bank, count in enumerate(slots):
            self.resize(bank, count)
        _ = self.uses  # so that ``show`` is compiled or loaded outside any timed call to a policy

    # --- reading ---------------------------------------------------------------------------------

    @property
    def event(self) -> int:
        """The number of the current event, from 0; −1 before the first event."""
        return int(self.books.now[EVENT])

    @property
    def step(self) -> int:
        """The number of the current forward pass."""
        return int(self.books.now[STEP])

    @property
    def layer(self) -> int:
        """The MoE layer of the current event."""
        return int(self.books.now[LAYER])

    @property
    def waste(self) -> float:
        """Prefetched pages that have not been used, as a share of the pages loaded on demand."""
        counted = self.counters()
        unused = counted.loads_prefetch - counted.prefetch_hits
        return unused / counted.loads_demand if counted.loads_demand else float(unused)

    @property
    def exceeded(self) -> bool:
        """True if the current event needs more pages than its bank has slots."""
        return int(self.books.now[PAGES]) > self.slots[self.bank(self.layer)]

    @property
    def num_banks(self) -> int:
        return len(self.slots)

    @property
    def expert_table(self) -> npt.NDArray[np.int32]:
        """A view ``[layers, experts]`` of each expert's slot in the layer's bank, or −1."""
        shape = (self.geometry.num_layers, self.geometry.experts_per_layer)
        return self.books.slot_of.reshape(shape)

    @property
    def resident(self) -> Bools:
        """Bool ``[pages]``, True for pages that have a slot."""
        mask: Bools = self.books.slot_of != ABSENT
        return mask

    @property
    def uses(self) -> Shown:
        """Read-only copies of the usage records for policies, brought up to date.

        The cost depends on the number of pages that have changed since the last read. Writing to
        the copies by any means does not change the books.
        """
        if self.books.now[CHANGES]:
            show(self.directory, self._shown_directory)
        return self._uses

    def counters(self) -> Counters:
        return Counters(*self.books.counts.tolist())

    def bank(self, layer: int) -> int:
        return int(self.books.bank_of[layer])

    # --- changing --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Clear everything: afterwards, no page is resident, and all counts start at 0."""
        b = self.books
        for array, value in (
            (b.last_use, NEVER),
            (b.use_count, 0),
            (b.loaded_at, NEVER),
            (b.slot_of, ABSENT),
            (b.flags, 0),
            (b.present, 0),
            (b.page_at, ABSENT),
            (b.counts, 0),
            (b.now, 0),
        ):
            array[...] = value
        b.now[EVENT] = b.now[LAYER] = b.now[STEP] = -1
        b.now[CHANGES] = ALL_PAGES
        for bank, count in enumerate(self.slots):
            # The lowest slot is on top and is taken first, because a bank shrinks at its end.
            b.free[bank, :count] = np.arange(count - 1, -1, -1)
            b.num_free[bank] = count

    def discard(self, pages: Int64s) -> None:
        """Undo the loads of pages whose copies failed; they do not count as evictions."""
        for page in pages.tolist():
            if self.books.slot_of[page] != ABSENT:
                unload(self.books, page)

    def require(self, slots: int) -> None:
        """Raise CapacityError unless a bank may have ``slots`` slots."""
        reserved = self.books.page_at.shape[1]
        if slots < self.minimum:
            raise CapacityError(
                f"{slots} slots cannot hold the {self.minimum} experts that may be needed at once",
                fix=f"at least {self.minimum} slots are needed",
            )
        if slots > reserved:
            raise CapacityError(
                f"{slots} slots requested, but only {reserved} are reserved",
                fix=f"at most {reserved} slots are possible",
            )

    def resize(self, bank: int, slots: int) -> None:
        """Make exactly ``slots`` slots of a bank usable; drop the pages in higher slots.

        Called only between events, after ``EventRule.shrink`` has moved the pages worth keeping.

        Raises:
            CapacityError: ``slots`` is less than ``minimum``, or exceeds the number of reserved
                slots.
        """
        self.require(slots)
        b = self.books
        release_leaving(b)
        for page in b.page_at[bank, slots:].tolist():
            if page != ABSENT:
                unload(b, page)
                b.counts[C_RESIZED] += 1
        free = b.free[bank, : b.num_free[bank]]
        kept = np.sort(free[free < slots])[::-1]
        fresh = np.arange(slots - 1, self.slots[bank] - 1, -1, dtype=np.int32)
        b.num_free[bank] = len(kept) + len(fresh)
        b.free[bank, : b.num_free[bank]] = np.concatenate([fresh, kept])
        self.slots[bank] = b.num_slots[bank] = slots

    # --- checking --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise InvariantError unless pages and slots match one to one and no slot is lost."""
        b = self.books
        experts = self.geometry.experts_per_layer
        for bank, usable in enumerate(self.slots):
            held = np.flatnonzero(b.page_at[bank] != ABSENT)
            free = b.free[bank, : b.num_free[bank]]
            if sorted([*held.tolist(), *free.tolist()]) != list(range(usable)):
                raise InvariantError(f"bank {bank}: slots are lost, duplicated or out of range")
            pages = b.page_at[bank, held]
            if np.any(b.slot_of[pages] != held) or np.any(b.bank_of[pages // experts] != bank):
                raise InvariantError(f"bank {bank}: page → slot and slot → page disagree")
        if np.count_nonzero(self.resident) != np.count_nonzero(b.page_at != ABSENT):
            raise InvariantError("a page is marked resident but has no slot")
        present = np.unpackbits(b.present.view(np.uint8), bitorder="little")
        if np.any(present[: self.geometry.num_pages] != self.resident):
            raise InvariantError("the bits of the resident pages disagree with the table")
        counts = self.counters()
        if counts.hits + counts.misses != counts.accesses:
            raise InvariantError("hits and misses do not add up to accesses")
        if np.any(b.flags[~self.resident] & (PROTECTED | UNUSED)):
            raise InvariantError("an absent page is protected")


def _locked(array: Int64s) -> Int64s:
    """Return a read-only view of ``array`` that changing its flags cannot make writable."""
    return np.asarray(array.data.toreadonly())
