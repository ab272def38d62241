"""The class ``ExpertPager``: makes a layer's experts resident just before the layer's kernel runs.

Each worker has one pager, which is called only on the engine's thread. The pager runs the event
rule, orders the copies and returns slot numbers; the kernel then reads the arenas as if they were
the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.owner import Owner
from fluxmoe.core.paging.books import EVENT, LOADED, PAGES
from fluxmoe.core.paging.event import Slots
from fluxmoe.core.paging.measures import MissRatioCurve
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.transfer.engine import TransferEngine
from fluxmoe.core.types import Counters, Int64s, Ints, Phase
from fluxmoe.errors import FluxMoEError, InvariantError, StoreError

#: Computes some tokens of an event, given their indices (int64 ``[tokens]``), or all if None.
Compute = Callable[[Int64s | None], None]

#: Called for every event, with (step, layer, expert ids as routed, phase); records traces.
EventWatcher = Callable[[int, int, Ints, Phase], None]


class ExpertPager:
    """Pages a model's experts into the slots of its arenas.

    Args:
        rule: The event rule over the page table, with its policies.
        experts: Arenas with the table's slots.
        transfer: Copies pages from the store into the arenas.
        phase: Function that returns the phase of a step; called once at the beginning of each step.
    """

    def __init__(
        self,
        rule: EventRule,
        experts: ExpertTenant,
        transfer: TransferEngine,
        *,
        phase: Callable[[], Phase] = lambda: Phase.DECODE,
    ) -> None:
        self._rule, self._experts, self._transfer = rule, experts, transfer
        self._books = rule.table.books
        self._step, self._layer = -1, rule.table.geometry.num_layers
        self._phase = phase
        #: The process whose memory the pager fills. No other process may move pages.
        self.owner = Owner()
        self.watcher: EventWatcher | None = None
        #: Estimates the misses with other numbers of slots; None if the split is fixed.
        self.curve: MissRatioCurve | None = None

    @property
    def table(self) -> PageTable:
        return self._rule.table

    @property
    def transfer(self) -> TransferEngine:
        return self._transfer

    @property
    def predictions(self) -> bool:
        """True if the prefetch policy needs predictions; see ``predict``."""
        return self._rule.predictions

    def predict(self, experts: Ints) -> None:
        """Set the predictions for the next event; see ``Predicted.set``."""
        self._rule.predicted.set(experts)

    def counters(self) -> Counters:
        return self.table.counters()

    def acquire(self, layer: int, ids: Ints, slots: Slots, *, waves: bool = False) -> bool:
        """Make the routed experts resident, and fill ``slots`` with their slots.

        Args:
            layer: Number of the MoE layer, from 0. If it is not above the previous event's layer, a
                new step begins.
            ids: Routed experts, 1-D integers; negative entries are padding.
            slots: Filled with slots of the layer's bank; int32, as long as ``ids``.
            waves: Return False, and load nothing, if the bank has too few slots; see ``run``.

        Raises:
            CapacityError: The bank has too few slots for all routed experts.
            StoreError: A page could not be read. It is not resident; the books are consistent.
            PolicyFaultError: A policy failed in strict mode. The books are consistent.
            UnsupportedError: This process was forked from the pager's process.
        """
        self.owner.require()
        if layer <= self._layer:
            self._step += 1
            self.table.phase = self._phase()
        self._layer = layer
        if self.watcher is not None:
            self.watcher(self._step, layer, ids, self.table.phase)
        if self.curve is not None:
            self.curve.observe(self._books.last_use, layer, ids)
        misses = self._rule.open(self._step, layer, ids, slots)
        if misses or self._transfer.busy or self._rule.follows:
            if waves and self.table.exceeded:
                return False
            self._complete_event(misses, layer, ids, slots)
        return True

    def run(self, layer: int, ids: Ints, slots: Slots, compute: Compute) -> None:
        """Compute a layer, in waves if the layer's bank has too few slots for all routed experts.

        Args:
            layer: Index of the MoE layer, as for ``acquire``.
            ids: Routed experts, integers ``[tokens, top_k]``, contiguous; negative entries are
                padding.
            slots: Filled with slots; int32 ``[tokens, top_k]``, contiguous. A token's slots hold
                its experts while the token's wave is computed.
            compute: Called once with None for all tokens, or once per wave with the wave's tokens.

        Raises:
            StoreError, PolicyFaultError, UnsupportedError: See ``acquire``.
        """
        flat, targets = ids.reshape(-1), slots.reshape(-1)
        if self.acquire(layer, flat, targets, waves=True):
            compute(None)
            return
        starts = np.zeros(flat.size, np.bool_)
        starts[:: ids.shape[1]] = True
        try:
            if self._transfer.busy:
                self._complete_prefetched(layer)
            waves = self._rule.admit_waves(flat, starts, targets)
            for wave in waves:
                if len(wave.loads):
                    self._transfer.demand(wave.loads)
                if wave is waves[-1]:
                    self._prefetch()
                compute(wave.tokens)
        except BaseException:
            # This includes the pages of waves that have not begun.
            b = self._books
            self.table.discard(np.flatnonzero(b.loaded_at == b.now[EVENT]))
            raise

    def _complete_event(self, misses: int, layer: int, ids: Ints, slots: Slots) -> None:
        """Complete an event that fits: copy the missing pages, then order prefetches."""
        rule = self._rule
        try:
            if self._transfer.busy:
                self._complete_prefetched(layer)
            if misses or rule.eviction.retains:
                rule.admit()
            if misses:
                for loads in rule.loads():
                    self._transfer.demand(loads)
                rule.lookup(layer, ids, slots)
            self._prefetch()
        except BaseException:
            # Pages that have slots but whose bytes may be incomplete must not count as resident.
            self.table.discard(self._books.loaded[: self._books.now[LOADED]])
            raise

    def _prefetch(self) -> None:
        if self._rule.prefetch():
            for loads in self._rule.loads():
                self._transfer.prefetch(loads)

    def _complete_prefetched(self, layer: int) -> None:
        b, bank = self._books, self.table.bank(layer)
        count = b.now[PAGES]
        for page in b.pages[:count][b.hit[:count]].tolist():
            try:
                self._transfer.complete(bank, page, int(b.slot_of[page]))
            except BaseException:
                # The event's missing pages have no slots yet, so only this page must be discarded.
                self.table.discard(np.asarray([page]))
                raise

    def resize(self, bank: int, slots: int) -> None:
        """Change the number of slots of a bank, between events.

        When a bank shrinks, the eviction policy chooses the pages to evict, and the other pages
        move into the remaining slots.

        Raises:
            CapacityError: ``slots`` is too small for one layer's experts, or exceeds the number of
                reserved slots.
            PolicyFaultError: The policy failed in strict mode; the slots are unchanged.
            OutOfFramesError, SubstrateError: The memory cannot be changed. The number of slots is
                unchanged or, if restoring it failed as well, the slots that still have memory
                remain.
        """
        self.owner.require()
        self.table.require(slots)
        before = self.table.slots[bank]
        if slots >= before:
            self._experts.resize(bank, slots)
            self.table.resize(bank, slots)
            return
        moved, sources = self._rule.shrink(bank, slots)  # before memory is released
        targets = self._books.slot_of[moved].tolist()
        for page, source, target in zip(moved.tolist(), sources.tolist(), targets, strict=True):
            try:
                self._transfer.move(bank, page, source, target)
            except StoreError:
                self.table.discard(np.asarray([page]))
        self._transfer.settle_from(bank, slots)
        try:
            self._experts.resize(bank, slots)
        except FluxMoEError:
            with suppress(FluxMoEError):
                self._experts.resize(bank, before)
            self.table.resize(bank, self._experts.slots[bank])
            raise

    def resize_all(self, slots: Sequence[int]) -> None:
        """Resize all banks, those that shrink first; if one fails, restore the others.

        Raises: See ``resize``.
        """
        before = list(self.table.slots)
        if len(slots) != len(before):
            raise InvariantError(f"{len(slots)} sizes for {len(before)} banks")
        order = sorted(range(len(before)), key=lambda bank: slots[bank] - before[bank])
        done = []
        try:
            for bank in order:
                if slots[bank] != before[bank]:
                    self.resize(bank, slots[bank])
                    done.append(bank)
        except BaseException:
            for bank in reversed(done):  # first the banks that grew, which release frames
                self.resize(bank, before[bank])
            raise

    def drop(self) -> None:
        """Drop all resident pages, between events, because the store's pages are about to change.

        No page is read from the store before the next event.

        Raises:
            PolicyFaultError: The policy failed in strict mode. No page is resident.
        """
        self.owner.require()
        self._transfer.settle_all()
        self._rule.drop()

    def reset(self) -> None:
        """Drop all pages and clear all counters, for example after a warm-up."""
        self.owner.require()
        self._transfer.reset()
        self._rule.reset()
        if self.curve is not None:
            self.curve.reset()
        self._step, self._layer = -1, self.table.geometry.num_layers

    def close(self) -> None:
        """Stop all copies; afterwards, nothing writes to the arenas."""
        self._transfer.close()

    def check(self) -> None:
        """Raise InvariantError unless the table is consistent and agrees with the arenas."""
        self.table.check()
        if self.table.slots != self._experts.slots:
            raise InvariantError("the page table and the arenas have different numbers of slots")
