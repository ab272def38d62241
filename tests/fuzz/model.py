"""The fuzzer's reference: the event rule in plain Python, informed of policy faults."""

from __future__ import annotations

from collections import deque

import numpy as np

from fluxmoe.core.paging.books import LEAVING, PROTECTED, UNUSED
from tests.core.reference import Reference, lru
from tests.core.rig import Rig
from tests.fuzz.policies import Entry, wild


class Model(Reference):
    """Expected behaviour of the rig.

    The model cannot predict which policy calls fail, so the guards report failures to it. The
    model derives the consequences itself.
    """

    def __init__(self, rig: Rig, entry: Entry, ahead: int | None) -> None:
        """Make a model; ``ahead``: number of layers to prefetch, or None for random proposals."""
        table = rig.table
        super().__init__(
            table.geometry.num_layers,
            table.geometry.experts_per_layer,
            table.slots,
            table.books.bank_of.tolist(),
            entry.key,
            ahead=ahead or 0,
        )
        self.entry, self.wild = entry, ahead is None
        self.rig = rig
        self.failed: dict[str, deque[bool]] = {}
        self._listen(rig.rule, "victims", rig.eviction)
        self._listen(rig.eviction, "retained", rig.eviction)
        self._listen(rig.prefetch, "propose", rig.prefetch)

    def _listen(self, owner, method: str, guard) -> None:
        call, notes = getattr(owner, method), self.failed.setdefault(method, deque())

        def noting(*args, **options):
            before = guard.faults
            answer = call(*args, **options)
            notes.append(guard.faults > before or before >= guard.limits.strikes)
            return answer

        setattr(owner, method, noting)

    def event(self, layer, ids, width=0) -> None:
        super().event(layer, ids, width)
        self.assert_all_heard()

    def resize(self, bank: int, slots: int) -> None:
        super().resize(bank, slots)
        self.assert_all_heard()

    def assert_all_heard(self) -> None:
        assert not any(self.failed.values()), f"more policy calls than the rule has: {self.failed}"

    def keeps(self, page: int) -> bool:
        return self.entry.keeps(self.now, page)

    def admit(self) -> None:
        super().admit()
        # ``retain`` is called once per event, if the policy overrides it.
        if self.rig.eviction.retains and self.failed["retained"].popleft():
            self.leaving = []

    def proposals(self) -> list[int]:
        guard = self.rig.prefetch
        if not self.failed["propose"]:
            assert guard.faults >= guard.limits.strikes or not (self.wild or self.ahead)
            return []
        if self.failed["propose"].popleft():
            return []
        if not self.wild:
            return super().proposals()
        return list(dict.fromkeys(wild(self.now, self.layer, self.layers, self.experts)))

    def evict(self, bank: int, count: int, spared: set[int], counter: str = "evictions") -> None:
        if count <= 0:
            return
        own, self.key = self.key, lru if self.failed["victims"].popleft() else self.key
        super().evict(bank, count, spared, counter)
        self.key = own

    def lose(self, pages: set[int]) -> None:
        """Remove pages in flight that could not be read when they had to move."""
        for page in pages:
            self.drop(page)

    def follow_failure(self) -> None:
        """Continue after an event cut short by an error, checking that the state is valid.

        Only pages of the event itself may have become resident.
        """
        for notes in self.failed.values():
            notes.clear()
        rig, b = self.rig, self.rig.table.books
        assert rig.resident - self.resident <= set(self.own)
        counts = rig.table.counters()
        decided = ("events", "accesses", "hits", "misses", "cold", "released", "prefetch_hits")
        for name in decided:
            assert getattr(counts, name) == self.counts[name], name
        self.counts = {name: getattr(counts, name) for name in self.counts}
        self.resident = rig.resident
        self.protected = set(np.flatnonzero(b.flags & PROTECTED).tolist())
        self.unused = set(np.flatnonzero(b.flags & UNUSED).tolist())
        self.loaded = {page: at for page, at in enumerate(b.loaded_at.tolist()) if at >= 0}
        self.leaving = b.leaving[: b.now[LEAVING]].tolist()

    def assert_same_books(self) -> None:
        """Compare every array in the policies' view, and every counter."""
        b, pages = self.rig.table.books, range(self.layers * self.experts)
        assert self.rig.resident == self.resident
        assert b.last_use.tolist() == [self.last.get(page, -1) for page in pages]
        assert b.use_count.tolist() == [self.count.get(page, 0) for page in pages]
        assert b.loaded_at.tolist() == [self.loaded.get(page, -1) for page in pages]
        assert set(np.flatnonzero(b.flags & PROTECTED).tolist()) == self.protected
        assert set(np.flatnonzero(b.flags & UNUSED).tolist()) == self.unused
        counts = self.rig.table.counters()
        assert {name: getattr(counts, name) for name in self.counts} == self.counts
