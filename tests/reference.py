"""The event rule once more, in plain Python sets and dictionaries, for the tests only.

Written from the text of the rule, point by point, and as slowly as it likes. It shares nothing
with ``fluxmoe``: no import, no data structure, no trick.
"""

from bisect import bisect_right
from collections import defaultdict

NEVER = 10**18


def banks_of(num_layers, banks):
    """Consecutive layers are spread over the banks."""
    return [layer * banks // num_layers for layer in range(num_layers)]


def shares(capacity, num_layers, banks):
    """Slots in proportion to the layers of a bank, whole slots."""
    bank_of = banks_of(num_layers, banks)
    ends = [bank_of.index(bank) for bank in range(banks)] + [num_layers]
    return [
        capacity * ends[b + 1] // num_layers - capacity * ends[b] // num_layers
        for b in range(banks)
    ]


def next_layers(depth):
    """All experts of the next ``depth`` layers; the last layer is followed by the first."""

    def propose(layer, num_layers, experts):
        for ahead in range(1, min(depth, num_layers - 1) + 1):
            following = (layer + ahead) % num_layers
            yield from (following * experts + expert for expert in range(experts))

    return propose


PREFETCH = {
    "none": lambda layer, num_layers, experts: (),
    "next-layer": next_layers(1),
    "next-layer:depth=2": next_layers(2),
}


def replay(events, num_layers, experts, policy, capacity, prefetch="none", banks=1):
    """Counters of a trace.

    Args:
        events: A list of (layer, experts routed to, in any order and with repeats).
        policy: lru, lfu, lfru, belady, immediate or mru.
        capacity: Slots over all banks.
    """
    uses = defaultdict(list)  # page -> the events that use it
    for number, (layer, ids) in enumerate(events):
        for expert in set(ids):
            uses[layer * experts + expert].append(number)

    last_use = defaultdict(lambda: -1)
    use_count = defaultdict(int)
    resident, leaving, fresh = set(), set(), set()
    protected = set()
    bank_of, slots = banks_of(num_layers, banks), shares(capacity, num_layers, banks)
    count = dict.fromkeys(
        ("events", "accesses", "hits", "misses", "prefetch_hits", "evictions", "released",
         "loads_demand", "loads_prefetch"), 0)  # fmt: skip

    def bank(page):
        return bank_of[page // experts]

    def wait(page, now):
        """lfru: the events until a page is expected to be used."""
        own, running = page // experts, events[now][0]
        distance = own - running if own > running else own - running + num_layers
        turns = sum(number % num_layers == own for number in range(now + 1))
        tries = max(1.0, (turns + 1) / (use_count[page] + 0.5))
        missed = (now - last_use[page]) // num_layers
        return distance + (tries - 1 + 0.3 * missed) * num_layers

    def score(page, now):
        following = uses[page]
        where = bisect_right(following, now)
        return {
            "lru": last_use[page],
            "immediate": last_use[page],
            "mru": -last_use[page],
            "lfu": use_count[page],
            "lfru": -wait(page, now),
            "belady": -(following[where] if where < len(following) else NEVER),
        }[policy]

    def has_room(b):
        return sum(bank(page) == b for page in resident) < slots[b]

    def evict_one(b, now, pinned, spare):
        """Point 4: one victim of bank ``b``; False if nothing may be evicted."""
        candidates = [page for page in resident if bank(page) == b and page not in pinned]
        unprotected = [page for page in candidates if page not in protected]
        pool = unprotected or ([] if spare else candidates)
        if not pool:
            return False
        victim = min(pool, key=lambda page: (score(page, now), page))
        resident.discard(victim)
        protected.discard(victim)
        fresh.discard(victim)
        count["evictions"] += 1
        return True

    for now, (layer, ids) in enumerate(events):
        # Point 6: the layer before has run.
        count["released"] += len(leaving & resident)
        for gone in (resident, protected, fresh):
            gone -= leaving
        leaving = set()

        # Points 1, 2 and 3.
        pages = {layer * experts + expert for expert in ids}
        protected = {page for page in protected if page // experts != layer}
        hits = pages & resident
        misses = sorted(pages - resident)
        count["events"] += 1
        count["accesses"] += len(pages)
        count["hits"] += len(hits)
        count["misses"] += len(misses)
        count["prefetch_hits"] += len(hits & fresh)
        fresh -= hits
        for page in pages:
            last_use[page] = now
            use_count[page] += 1

        # Points 4 and 5. All victims first: none of this event's pages may be one.
        mine = bank_of[layer]
        free = slots[mine] - sum(bank(page) == mine for page in resident)
        for _ in range(len(misses) - free):
            assert evict_one(mine, now, pages, spare=False)
        resident.update(misses)
        count["loads_demand"] += len(misses)
        if policy == "immediate":
            leaving = set(pages)

        # Point 7. What is proposed and resident already is kept.
        proposals = list(PREFETCH[prefetch](layer, num_layers, experts))
        wanted = [page for page in proposals if page not in resident]
        protected |= set(proposals) - set(wanted)
        for page in wanted:
            if has_room(bank(page)) or evict_one(bank(page), now, pages, spare=True):
                resident.add(page)
                protected.add(page)
                fresh.add(page)
                count["loads_prefetch"] += 1
    return count
