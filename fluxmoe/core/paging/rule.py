"""The event rule (docs/concepts/event-rule.md), which defines hit, miss, eviction and release.

An *event* is one execution of one MoE layer, with the distinct experts to which it routes. Compiled
functions apply the rule to the whole event at once, over the page table's books, with one call to a
policy for each of the policy's decisions. In an engine, the pager runs the rule event by event; the
simulator runs the same object over a trace.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fluxmoe.core.compiled.directory import directory
from fluxmoe.core.paging import heap
from fluxmoe.core.paging.books import (
    ABSENT,
    C_EVICTIONS,
    C_RESIZED,
    EVENT,
    LAYER,
    LEAVING,
    LOADED,
    MISSES,
    PAGES,
    PROTECTED,
    STEP,
    compact,
    mark_dirty,
    release_leaving,
)
from fluxmoe.core.paging.event import (
    Slots,
    candidates,
    evict,
    load_ahead,
    load_missing,
    lookup,
    open_event,
)
from fluxmoe.core.paging.measures import PageAges
from fluxmoe.core.paging.predicted import Predicted
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.paging.victims import FAILED, new_chooser, take_dirty, victims
from fluxmoe.core.paging.waves import divide, in_order, place
from fluxmoe.core.policy.guards import EvictionGuard, PrefetchGuard
from fluxmoe.core.policy.paging import own
from fluxmoe.core.types import Access, Bools, Int64s, Ints, Loads, Wave
from fluxmoe.errors import CapacityError


class EventRule:
    """The rule bound to a page table, an eviction policy and a prefetch policy.

    For each event, call ``open``, then ``admit``, which assigns slots to the misses, and then
    ``prefetch``. After each of the last two calls, ``loads`` returns the copies to make. If the
    event needs more pages than its bank has slots (``PageTable.exceeded``), call ``admit_waves`` in
    place of ``admit``; the copies to make are then in the waves.
    """

    def __init__(self, table: PageTable, eviction: EvictionGuard, prefetch: PrefetchGuard) -> None:
        self.table, self.eviction, self._prefetch = table, eviction, prefetch
        stable = eviction.stable
        shape = table.books.page_at.shape
        self.heap = heap.new_heap(table.geometry.num_pages, *shape) if stable else None
        self.chooser = new_chooser(table.books, stable=stable, next_use=eviction.future)
        self._heap = None if self.heap is None else directory(self.heap)
        #: Directories of the books, the heap and the chooser: the first arguments of ``victims``.
        self.scoring = table.directory, self._heap, directory(self.chooser)
        self.scratch = np.zeros(table.geometry.num_pages, np.int64)
        self._no_slots = np.zeros(0, np.int32)
        self.predicted, self.predictions = Predicted(table), prefetch.predictions
        #: False if events whose pages are all resident need no work after ``open``.
        self.follows = eviction.retains or prefetch.active
        #: Counts page ages; None if not needed. Compiled loops do not count them.
        self.ages: PageAges | None = None
        if eviction.kernel is not None:
            # Compile ``victims``, or load it, outside any timed call to the policy.
            event = *self.scoring, eviction.kernel.entry, 0, 0, True
            victims(*event, np.zeros(0, np.int64))

    @property
    def prefetches(self) -> bool:
        """True if a prefetch policy is called after each event."""
        return self._prefetch.active

    def reset(self) -> None:
        """Start cold: clear the books, the counters and the policies."""
        self.table.reset()
        if self.heap is not None:
            heap.clear(self.heap)
        self.eviction.reset()
        self._prefetch.reset()
        if self.ages is not None:
            self.ages.reset()

    def run(
        self,
        step: int,
        layer: int,
        ids: Ints,
        predicted: Ints | None = None,
        starts: Bools | None = None,
    ) -> None:
        """Run one whole event, for a caller that copies nothing (the simulator).

        Without ``starts``, an event that needs more pages than its bank has slots is an error. For
        ``predicted``, see ``Predicted.set``.
        """
        if predicted is not None:
            self.predicted.set(predicted)
        self.open(step, layer, ids, self._no_slots)
        if starts is not None and self.table.exceeded:
            self.admit_waves(ids, starts, self._no_slots)
        else:
            self.admit()
        self.prefetch()

    def open(self, step: int, layer: int, ids: Ints, slots: Slots) -> int:
        """Apply points 1–3 and 6 of the rule; see ``event.open_event``."""
        if self.ages is not None:
            self.ages.routed(layer, ids)
        misses = open_event(self.table.directory, step, layer, ids, slots)
        if self.eviction.watches_access:
            self.eviction.on_access(self.access())
        return misses

    def lookup(self, layer: int, ids: Ints, slots: Slots) -> None:
        """Fill ``slots`` for resident experts; see ``event.lookup``."""
        lookup(self.table.directory, layer, ids, slots)

    def admit(self) -> None:
        """Apply points 4 and 5: choose victims if slots are missing, then load the misses."""
        b = self.table.books
        misses = int(b.now[MISSES])
        if misses:
            bank = self.table.bank(int(b.now[LAYER]))
            short = misses - int(b.num_free[bank])
            if short > 0:
                self._evict(bank, short, spare=False)
            load_missing(self.table.directory)
            if self.eviction.watches_load:
                self.eviction.on_load(b.missing[:misses])
        self._retain()

    def admit_waves(self, ids: Ints, starts: Bools, slots: Slots) -> list[Wave]:
        """Apply points 4, 5 and 8 to an event that needs more pages than its bank has slots.

        All other pages of the bank are victims. Policies get one event: ``on_load`` gets the pages
        that the event loads and leaves in the bank; ``on_evict`` gets the pages that it removes.

        Args:
            ids: The event's routed experts, integers ``[N]``.
            starts: Bool ``[N]``, True where a token begins.
            slots: Filled with the slot of each entry of ``ids`` during its token's wave; int32
                ``[N]``, or empty.

        Returns:
            The waves, in order.

        Raises:
            CapacityError: A token needs more pages than the bank has slots.
        """
        b, bank = self.table.books, self.table.bank(self.table.layer)
        count, usable = int(b.now[PAGES]), self.table.slots[bank]
        pages, hit = b.pages[:count], b.hit[:count]
        wide = ids.astype(np.int64)
        waves = divide(wide, starts, self.table.geometry.experts_per_layer, usable)
        others = usable - int(b.num_free[bank]) - int(np.count_nonzero(hit))
        if others:
            self._evict(bank, others, spare=False)
        placed = place(self.table.directory, waves, wide, starts, slots)
        resident = b.slot_of[pages] != ABSENT
        gone, came = pages[hit & ~resident], pages[resident & (b.loaded_at[pages] == b.now[EVENT])]
        if self.ages is not None:
            self.ages.leave(gone)
        if len(gone) and self.eviction.watches_evict:
            self.eviction.on_evict(gone)
        if self.eviction.watches_load:
            self.eviction.on_load(came)
        self._retain()
        return in_order(bank, waves, placed)

    def _retain(self) -> None:
        """Apply point 6: record the event's pages that leave when the next event begins."""
        if not self.eviction.retains:
            return
        b = self.table.books
        pages = b.pages[: b.now[PAGES]]
        kept = self.eviction.retained(self.access())
        leaving = pages[:0] if kept is None else pages[~kept & (b.slot_of[pages] != ABSENT)]
        if self.ages is not None:
            self.ages.leave(leaving)
        b.leaving[: len(leaving)] = leaving
        b.now[LEAVING] = len(leaving)

    def prefetch(self) -> bool:
        """Apply point 7: load proposed pages into free slots, then victims' slots; protect them.

        Returns:
            True if there is a prefetch policy; ``loads`` then returns the loaded pages.
        """
        if not self._prefetch.active:
            return False
        b = self.table.books
        b.now[LOADED] = 0
        proposed = self._prefetch.propose(self.access())
        if self.table.waste > self._prefetch.waste:  # the policy was called, so that it can learn
            return True
        resident = b.slot_of[proposed] != ABSENT
        b.flags[proposed[resident]] |= PROTECTED
        wanted = proposed[~resident]
        banks = b.bank_of[wanted // self.table.geometry.experts_per_layer]
        for bank in np.unique(banks).tolist():
            pages = wanted[banks == bank]
            short = len(pages) - int(b.num_free[bank])
            if short > 0:
                self._evict(bank, short, spare=True)
            pages = pages[: int(b.num_free[bank])]
            load_ahead(self.table.directory, pages)
            if len(pages) and self.eviction.watches_load:
                self.eviction.on_load(pages)
        return True

    def shrink(self, bank: int, slots: int) -> tuple[Int64s, Int64s]:
        """Reduce a bank to its first ``slots`` slots, between events.

        The policy chooses the pages to evict, which count as ``resized``. Pages of the last event
        are evicted last, in ascending order. The other pages in higher slots move to free slots.

        Returns:
            The moved pages and their previous slots. The table has their new slots.
        """
        b = self.table.books
        release_leaving(b)
        held = self.table.slots[bank] - int(b.num_free[bank])
        own = b.pages[: b.now[PAGES]]
        own = own[(b.slot_of[own] != ABSENT) & (self.table.bank(self.table.layer) == bank)]
        if (others := min(held - slots, held - len(own))) > 0:
            self._evict(bank, others, spare=False, counter=C_RESIZED)
        if len(own) > slots:
            self._unload(own[: len(own) - slots], C_RESIZED)
        moved, source = self.scratch, np.zeros_like(self.scratch)
        count = compact(b, bank, slots, moved, source)
        self.table.resize(bank, slots)
        return moved[:count].copy(), source[:count]

    def drop(self) -> None:
        """Drop all resident pages, between events; they count as ``resized``."""
        b = self.table.books
        release_leaving(b)
        if self.heap is not None:
            heap.clear(self.heap)
        self._unload(np.flatnonzero(self.table.resident), C_RESIZED)

    def loads(self) -> Iterator[Loads]:
        """Yield the pages that the last ``admit`` or ``prefetch`` loaded, per bank, in order."""
        b = self.table.books
        pages = b.loaded[: b.now[LOADED]].copy()
        if self.table.num_banks == 1:
            yield Loads(0, pages, b.slot_of[pages].astype(np.int64))
            return
        banks = b.bank_of[pages // self.table.geometry.experts_per_layer]
        for bank in np.unique(banks).tolist():
            mine = pages[banks == bank]
            yield Loads(bank, mine, b.slot_of[mine].astype(np.int64))

    def access(self) -> Access:
        """Return the current event in the form that policies get."""
        b, n = self.table.books, self.table.books.now[PAGES]
        return Access(
            step=int(b.now[STEP]),
            layer=int(b.now[LAYER]),
            pages=own(b.pages[:n]),
            hit=own(b.hit[:n]),
            tokens=own(b.tokens[:n]),
            phase=self.table.phase,
            predicted=self.predicted.pages(),
        )

    def _evict(self, bank: int, count: int, *, spare: bool, counter: int = C_EVICTIONS) -> None:
        """Evict ``count`` pages of a bank, or fewer if ``spare`` forbids evicting protected pages.

        Without ``spare``, protected pages are evicted only if there are not enough other pages.
        """
        try:
            victims = self.victims(bank, count, protect=True)
            if len(victims):
                self._unload(victims, counter)
            if not spare and len(victims) < count:
                more = self.victims(bank, count - len(victims), protect=False)
                self._unload(more, counter)
                if len(victims) + len(more) < count:
                    n, slots = self.table.books.now[PAGES], self.table.slots[bank]
                    raise CapacityError(f"an event of {n} experts does not fit into {slots} slots")
        except BaseException:
            self._score_again()
            raise

    def _unload(self, victims: Int64s, counter: int) -> None:
        if self.ages is not None:
            self.ages.leave(victims)
        try:
            if self.eviction.watches_evict:
                self.eviction.on_evict(victims)
        finally:  # evict the victims even if the policy fails
            evict(self.table.directory, victims, counter)

    def _score_again(self) -> None:
        """Mark all resident pages dirty, since the heap may have dropped some as victims."""
        for page in np.flatnonzero(self.table.resident).tolist():
            mark_dirty(self.table.books, page)

    def victims(self, bank: int, count: int, *, protect: bool) -> Int64s:
        """Apply point 4: choose up to ``count`` victims of a bank, lowest score first.

        Evicts nothing. A compiled score uses ``victims.victims``, other stable scores use
        ``heap.choose``, and all other policies ``EvictionGuard.choose``. After a fault of the
        policy, the victims are the least recently used pages.
        """
        guard = self.eviction
        if guard.kernel is not None:
            out = np.empty(count, np.int64)
            event = *self.scoring, guard.kernel.entry, bank, count, protect, out
            found = guard.limited(victims, *event)
            if found is None:  # timed out
                self._score_again()
            elif found != FAILED:
                return out[:found]
        elif guard.stable and self._heap is not None:
            books = self.table.directory
            dirty = self.scratch[: take_dirty(books, self.scratch)]
            dirty.sort()  # policies get pages in ascending order
            scores = guard.scores(dirty)
            if scores is None:  # policy fault
                self._score_again()
                return guard.least_recent(self._candidates(bank, protect), count)
            heap.update(self._heap, books, dirty, scores)
            out = np.empty(count, np.int64)
            return out[: heap.choose(self._heap, books, bank, count, protect, out)]
        # If a kernel failed, the guard calls it once more to get the exception.
        pages = self._candidates(bank, protect)
        return guard.choose(pages, min(count, len(pages)))

    def _candidates(self, bank: int, protect: bool) -> Int64s:
        n = candidates(self.table.directory, bank, protect, self.scratch)
        return self.scratch[:n]
