"""The event rule (docs/concepts/event-rule.md) in plain Python, independent of the product.

This module was written from the text, not from the code. Where the text leaves a choice open, a
comment notes the choice made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise


class Reference:
    """Residency and counters of one pager.

    Args:
        key: ``key(reference, page)`` → worth. The page with the lowest worth is evicted; on a tie,
            the lowest page.
        retain: True if an event's pages stay after the layer has run.
        ahead: Number of whole layers fetched ahead of their turn.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: Sequence[int],
        bank_of: Sequence[int],
        key: Callable[[Reference, int], float],
        *,
        retain: bool = True,
        ahead: int = 0,
    ) -> None:
        self.layers, self.experts, self.bank_of = layers, experts, list(bank_of)
        self.slots, self.key, self.retain = list(slots), key, retain
        self.ahead = min(ahead, layers - 1)
        self.reset()

    def reset(self) -> None:
        self.now = self.layer = -1
        self.last: dict[int, int] = {}
        self.count: dict[int, int] = {}
        self.loaded: dict[int, int] = {}
        self.resident: set[int] = set()
        self.own: list[int] = []  # the pages of the current event
        self.misses: list[int] = []
        self.leaving: list[int] = []
        self.protected: set[int] = set()
        self.unused: set[int] = set()
        self.counts = dict.fromkeys(
            [
                *("events", "accesses", "hits", "misses", "evictions", "released", "resized"),
                *("prefetch_hits", "loads_demand", "loads_prefetch", "cold", "reloads"),
            ],
            0,
        )

    def bank(self, page: int) -> int:
        return self.bank_of[page // self.experts]

    def in_bank(self, bank: int) -> list[int]:
        return [page for page in self.resident if self.bank(page) == bank]

    def free(self, bank: int) -> int:
        return self.slots[bank] - len(self.in_bank(bank))

    def drop(self, page: int) -> None:
        self.resident.remove(page)
        self.protected.discard(page)
        self.unused.discard(page)

    def release(self) -> None:
        for page in self.leaving:
            if page in self.resident:
                self.drop(page)
                self.counts["released"] += 1
        self.leaving = []

    def event(self, layer: int, ids: Sequence[int], width: int = 0) -> None:
        """Run an event, in waves if necessary and ``width`` (the ids per token) is given."""
        self.tokens = [list(ids[i : i + width]) for i in range(0, len(ids), width or len(ids) + 1)]
        self.open(layer, ids)
        self.admit()
        self.prefetch()

    def open(self, layer: int, ids: Sequence[int]) -> None:
        self.release()  # point 6
        self.now, self.layer = self.now + 1, layer
        own = sorted({layer * self.experts + i for i in ids if i >= 0})  # point 1
        for page in [p for p in self.protected if p // self.experts == layer]:
            self.protected.discard(page)  # point 7: until its layer's next event
        hits = [p for p in own if p in self.resident]  # point 2
        self.own, self.misses = own, [p for p in own if p not in self.resident]
        self.counts["events"] += 1
        self.counts["accesses"] += len(own)
        self.counts["hits"] += len(hits)
        self.counts["misses"] += len(self.misses)
        self.counts["cold"] += sum(page not in self.loaded for page in self.misses)
        self.counts["prefetch_hits"] += len(self.unused.intersection(hits))
        self.unused.difference_update(hits)
        for page in own:  # point 3
            self.last[page] = self.now
            self.count[page] = self.count.get(page, 0) + 1

    def admit(self) -> None:
        bank, misses = self.bank_of[self.layer], self.misses
        if len(self.own) > self.slots[bank]:
            self.admit_waves(bank)
            return
        short = len(misses) - self.free(bank)
        if short > 0:  # point 4; protected pages go only if no others are left (our choice)
            self.evict(bank, short, {*self.own, *self.protected})
            self.evict(bank, len(misses) - self.free(bank), set(self.own))
        for page in misses:  # point 5
            self.resident.add(page)
            self.loaded[page] = self.now
        self.counts["loads_demand"] += len(misses)
        self.leaving = [page for page in self.own if not self.keeps(page)]

    def admit_waves(self, bank: int) -> None:  # point 8
        hits = len(set(self.own) & self.resident)
        for spared in ({*self.own, *self.protected}, set(self.own)):
            self.evict(bank, len(self.in_bank(bank)) - hits, spared)
        first, loads = self.layer * self.experts, 0
        waves = [
            {first + expert for token in wave for expert in token}
            for wave in in_waves(self.tokens, self.slots[bank])
        ]
        for now, wave in enumerate(waves):
            for page in sorted(wave - self.resident):
                if self.free(bank) == 0:
                    self.drop(latest(set(self.own) & self.resident - wave, waves[now:]))
                    self.counts["evictions"] += 1
                self.resident.add(page)
                self.loaded[page] = self.now
                loads += 1
        self.counts["loads_demand"] += len(self.misses)
        self.counts["reloads"] += loads - len(self.misses)
        self.leaving = [p for p in self.own if not self.keeps(p) and p in self.resident]

    def keeps(self, page: int) -> bool:
        return self.retain

    def proposals(self) -> list[int]:
        return [
            (self.layer + 1 + i) % self.layers * self.experts + expert
            for i in range(self.ahead)
            for expert in range(self.experts)
        ]

    def prefetch(self) -> None:  # point 7
        own, proposals = set(self.own), self.proposals()
        wanted = [page for page in proposals if page not in self.resident]
        # Proposals that are already resident are protected like the others (our choice).
        self.protected.update(page for page in proposals if page in self.resident)
        for bank in range(len(self.slots)):
            mine = [page for page in wanted if self.bank(page) == bank]
            self.evict(bank, len(mine) - self.free(bank), {*own, *self.protected})
            for page in mine[: self.free(bank)]:
                self.resident.add(page)
                self.protected.add(page)
                self.unused.add(page)
                self.loaded[page] = self.now
                self.counts["loads_prefetch"] += 1

    def evict(self, bank: int, count: int, spared: set[int], counter: str = "evictions") -> None:
        candidates = [page for page in self.in_bank(bank) if page not in spared]
        candidates.sort(key=lambda page: (self.key(self, page), page))
        for page in candidates[: max(count, 0)]:
            self.drop(page)
            self.counts[counter] += 1

    def resize(self, bank: int, slots: int) -> None:
        """Resize a bank; if the bank shrinks, the pages with the lowest worth go, as in point 4."""
        self.release()
        own = {page for page in self.resident if self.last.get(page) == self.now}
        for spared in ({*own, *self.protected}, own):
            least = max(slots, len(own.intersection(self.in_bank(bank))))
            self.evict(bank, len(self.in_bank(bank)) - least, spared, "resized")
        for page in sorted(self.in_bank(bank))[: max(len(self.in_bank(bank)) - slots, 0)]:
            self.drop(page)  # pages of the last event, if layers run in waves
            self.counts["resized"] += 1
        self.slots[bank] = slots


def latest(pages: set[int], waves: list[set[int]]) -> int:
    def turn(page: int) -> int:
        return next((i for i, wave in enumerate(waves) if page in wave), len(waves))

    return max(pages, key=lambda page: (turn(page), -page))


def in_waves(tokens: Sequence[Sequence[int]], slots: int) -> list[list[set[int]]]:
    """Divide an event's tokens, each a list of experts or −1, into waves."""
    left = [(number, {e for e in token if e >= 0}) for number, token in enumerate(tokens)]
    uses = Counter(expert for _, token in left for expert in token)
    most = max(len(token) for _, token in left)
    assert most <= slots
    kept = set(sorted(uses, key=lambda e: (-uses[e], e))[: slots - most])
    held: set[int] = set()
    waves: list[list[set[int]]] = [[]]
    while left:
        chosen = min(left, key=lambda each: (len(each[1] - held), each[0]))
        left.remove(chosen)
        token, over = chosen[1], False
        wave, needed = set().union(*waves[-1]), set().union(*(other for _, other in left))
        for expert in [e for e in tokens[chosen[0]] if e in token]:
            if expert in held:
                continue
            if len(held) == slots:
                victim = min(
                    held - token - (kept & needed),
                    key=lambda e: (e in wave, uses[e] if e in needed else 0, e),
                )
                over |= victim in wave
                held.remove(victim)
            held.add(expert)
        if over:
            waves.append([])
        waves[-1].append(token)
    return waves


def lru(r: Reference, page: int) -> float:
    return r.last.get(page, -1)


def lfu(r: Reference, page: int) -> float:
    return r.count.get(page, 0)


def quadratic(r: Reference, page: int) -> float:
    return lru(r, page) + 3 * lfu(r, page) ** 2 - page % 3


def highest_pages(r: Reference, page: int) -> float:
    return -page


def kernel(r: Reference, page: int) -> float:
    age, loaded = r.now - lru(r, page), r.loaded.get(page, -1)
    return lfu(r, page) * 2.0 - age / 3.0 + loaded * 0.25 - page % 5


def stable_kernel(r: Reference, page: int) -> float:
    return lfu(r, page) * 2.0 + lru(r, page) / 3.0 - r.loaded.get(page, -1) * 0.25 - page % 5


def outlook(r: Reference, page: int) -> tuple[int, float, int]:
    """Return the events until the layer's next turn, expected turns until use, and missed turns."""
    own = page // r.experts
    turns = len(range(own, r.now + 1, r.layers))
    missed = (r.now - lru(r, page)) // r.layers
    distance = (own - r.layer - 1) % r.layers + 1
    return distance, max(1.0, (turns + 1.0) / (lfu(r, page) + 0.5)), missed


def next_use(r: Reference, page: int) -> float:
    distance, tries, missed = outlook(r, page)
    p = 1.0 / (tries + 0.3 * missed)
    p += 0.1 * (1.0 - p) / ((missed + 1.0) * (missed + 1.0))
    return -(distance + (1.0 / p - 1.0) * r.layers)


def lfru(r: Reference, page: int) -> float:
    distance, tries, missed = outlook(r, page)
    return -(distance + (tries - 1.0 + 0.3 * missed) * r.layers)


def replay(
    events: Sequence[tuple[int, Iterable[int]]],
    layers: int,
    experts: int,
    policy: str,
    capacity: int,
    prefetch: str = "none",
    banks: int = 1,
) -> dict[str, int]:
    """Compute the counters of a trace of (layer, routed experts) with the named policies.

    Consecutive layers share a bank, which has slots in proportion to its layers.
    """
    bank_of = [layer * banks // layers for layer in range(layers)]
    ends = [*(bank_of.index(bank) for bank in range(banks)), layers]
    slots = [capacity * end // layers - capacity * first // layers for first, end in pairwise(ends)]
    uses = defaultdict(list)  # page → the events that use it
    for now, (layer, ids) in enumerate(events):
        for expert in set(ids):
            uses[layer * experts + expert].append(now)

    def belady(r: Reference, page: int) -> float:
        upcoming = uses[page][bisect_right(uses[page], r.now) :]
        return -min(upcoming, default=float("inf"))

    keys = {"lru": lru, "immediate": lru, "lfu": lfu, "lfru": lfru, "belady": belady}
    keys["mru"] = lambda r, page: -lru(r, page)
    ahead = {"none": 0, "next-layer": 1, "next-layer:depth=2": 2}[prefetch]
    retain = policy != "immediate"
    model = Reference(layers, experts, slots, bank_of, keys[policy], retain=retain, ahead=ahead)
    for layer, ids in events:
        model.event(layer, ids)
    return {name: n for name, n in model.counts.items() if name not in ("cold", "resized")}
