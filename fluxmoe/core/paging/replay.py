"""Replay of many events: a compiled loop over a trace that calls the event rule's functions.

``EventRule.run`` switches between Python and compiled code several times per event so that it can
call a policy. If the policy is a compiled kernel, or needs no call for most events, these switches
cost more than the rule itself; ``replay`` makes as few of them as the policy allows. The rule is
not duplicated: the pager also uses ``open_event``, ``victims`` and the functions that ``admit``
calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxmoe.core.compiled.directory import directory, opener
from fluxmoe.core.compiled.jit import jit
from fluxmoe.core.paging.books import LAYER, MISSES, PAGES, RELOADED, Books, open_books
from fluxmoe.core.paging.event import admit, candidates, open_event
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.core.paging.victims import FAILED, open_chooser, victims
from fluxmoe.core.types import EventList, Int64s, Phase

Int32s = npt.NDArray[np.int32]
Watcher = Callable[[EventRule, int], None]


def _typed(*arrays: npt.NDArray[Any]) -> EventList:
    """Make an event list with the dtypes of ``EventList``; copy an array only if needed."""
    kinds: tuple[type[np.generic], ...] = (
        np.int32,
        np.int16,
        np.int8,
        np.int64,
        np.int32,
        np.int64,
        np.int64,
        np.int32,
        np.bool_,
    )
    pairs = zip(arrays, kinds, strict=True)
    return EventList(*(np.ascontiguousarray(array, kind) for array, kind in pairs))


#: Opens the event list of a directory in compiled code.
open_events = opener(_typed(*[np.zeros(0)] * 9))


def replay(
    rule: EventRule,
    events: EventList,
    begin: int,
    end: int,
    missed: Int32s,
    watch: Watcher | None = None,
    *,
    reloaded: Int32s | None = None,
) -> None:
    """Run events ``begin`` … ``end - 1``.

    Args:
        rule: The event rule, which must have run ``begin`` events.
        events: The trace.
        begin, end: Range of events to run. A caller that shows progress runs several ranges.
        missed: Filled with the number of misses of each event; int32 ``[N]``.
        watch: Called after each event with the rule and the event's index, for data other than
            ``missed``; costs at least one call into Python per event.
        reloaded: Filled with the number of reloads of each event that runs in waves; int32
            ``[N]``; None if the caller does not need these numbers.

    Raises:
        CapacityError: An event does not fit into its bank, and ``events.starts`` is empty.
        PolicyFaultError: A policy failed in strict mode.
    """
    if reloaded is None:
        reloaded = np.zeros(end, np.int32)
    quiet = watch is None and rule.eviction.scored and not rule.prefetches
    while begin < end:
        if quiet and rule.eviction.kernel is not None:
            begin = _with_kernel(rule, events, begin, end, missed, reloaded)
        elif quiet:
            begin = _with_scores(rule, events, begin, end, missed, reloaded)
        else:
            begin = _event_by_event(rule, events, begin, end, missed, reloaded, watch)


def _with_kernel(
    rule: EventRule, events: EventList, begin: int, end: int, missed: Int32s, reloaded: Int32s
) -> int:
    """Run to ``end``, or through the first event that runs in waves or in which the kernel fails.

    Returns:
        The index of the next event to run.
    """
    kernel = rule.eviction.kernel
    assert kernel is not None
    table = rule.table
    at = _run_kernel(
        *rule.scoring,
        kernel.entry,
        events,
        begin,
        end,
        missed,
        rule.scratch,
    )
    if at < end:
        table.phase = Phase(int(events.phase[at]))
        if table.exceeded:
            _in_waves(rule, events, at, reloaded)
        else:  # calls the kernel again, but through the guard, which contains the failure
            rule.admit()
        at += 1
    return at


def _in_waves(rule: EventRule, events: EventList, at: int, reloaded: Int32s) -> None:
    """Admit the open event ``at``, which needs more pages than its bank has slots."""
    if not events.starts.size:
        rule.admit()  # raises an error
    pairs = slice(*events.offsets[at : at + 2].tolist())
    rule.admit_waves(events.ids[pairs], events.starts[pairs], np.zeros(0, np.int32))
    reloaded[at] = rule.table.books.now[RELOADED]


def _with_scores(
    rule: EventRule, events: EventList, begin: int, end: int, missed: Int32s, reloaded: Int32s
) -> int:
    """Run all events, with one call into Python for each event that is short of slots."""
    table, guard, pages = rule.table, rule.eviction, rule.scratch
    future = rule.chooser.future
    at, last = begin - 1, -1
    chosen, events = np.zeros(0, np.int64), _typed(*events)
    listed = directory(events)
    while True:
        at, short, n = _run_until_short(
            table.directory, future, listed, at, end, chosen, missed, pages
        )
        if at >= end:
            return end
        if events.phase[at] != last:
            last = events.phase[at]
            table.phase = Phase(int(last))
        if table.exceeded:
            _in_waves(rule, events, at, reloaded)
            chosen = chosen[:0]
        elif guard.stable:
            chosen = rule.victims(table.bank(table.layer), short, protect=False)
        else:
            chosen = guard.choose(pages[:n], short)


def _event_by_event(
    rule: EventRule,
    events: EventList,
    begin: int,
    end: int,
    missed: Int32s,
    reloaded: Int32s,
    watch: Watcher | None,
) -> int:
    """Run all events through ``EventRule.run``, which makes every call to the policies."""
    table, now, future = rule.table, rule.table.books.now, rule.chooser.future
    experts = table.geometry.experts_per_layer
    for at in range(begin, end):
        step, layer = int(events.step[at]), int(events.layer[at])
        table.phase = Phase(int(events.phase[at]))
        if events.later.size:
            look_ahead(future, events, at, experts)
        pairs = slice(*events.offsets[at : at + 2].tolist())
        starts = events.starts[pairs] if events.starts.size else None
        guesses = None
        if events.guess_offsets.size:
            guesses = events.guesses[slice(*events.guess_offsets[at : at + 2].tolist())]
        rule.run(step, layer, events.ids[pairs], guesses, starts)
        missed[at], reloaded[at] = now[MISSES], now[RELOADED]
        if watch is not None:
            watch(rule, at)
    return end


@jit
def look_ahead(future: Int64s, events: EventList, at: int, experts: int) -> None:
    """Set the next use of the event's pages in ``future`` ``[P]``, the input of oracles.

    Must run before the event, which marks its pages as accessed and may score them at once. The
    next use of all other pages stays the same, because the event does not use them.
    """
    first = np.int64(events.layer[at]) * experts
    for i in range(events.offsets[at], events.offsets[at + 1]):
        future[first + events.ids[i]] = events.later[i]


@jit
def _open(b: Books, future: Int64s, events: EventList, at: int, missed: Int32s) -> int:
    """Open an event; return the number of slots that it needs beyond the free slots."""
    if events.later.size:
        look_ahead(future, events, at, b.tokens.size)
    ids = events.ids[events.offsets[at] : events.offsets[at + 1]]
    misses = open_event(b, events.step[at], events.layer[at], ids, ids[:0])
    missed[at] = misses
    return int(misses - b.num_free[b.bank_of[events.layer[at]]])


@jit
def exceeded(b: Books) -> bool:
    """Return True if the open event needs more pages than its bank has slots."""
    return bool(b.now[PAGES] > b.num_slots[b.bank_of[b.now[LAYER]]])


@jit
def _run_kernel(
    books: Int64s,
    heap: Int64s | None,
    chooser: Int64s,
    entry: int,
    events: EventList,
    begin: int,
    end: int,
    missed: Int32s,
    scratch: Int64s,
) -> int:
    """Run events to ``end``, or to an event that Python must admit.

    Python admits an event in which the kernel failed, and an event that needs more pages than its
    bank has slots.

    Returns:
        The index of that event, which is still open, or ``end``.
    """
    b, future = open_books(books), open_chooser(chooser).future
    for at in range(begin, end):
        short, found = _open(b, future, events, at, missed), 0
        if exceeded(b):
            return at
        if short > 0:
            # Without prefetching, no page is protected. For a plain False, which has a different
            # type, numba would compile ``victims`` again, which takes ten seconds.
            bank = b.bank_of[b.now[LAYER]]
            spare = np.bool_(False)
            found = victims(books, heap, chooser, entry, bank, short, spare, scratch)  # type: ignore[arg-type]
            if found == FAILED:
                return at
        admit(b, scratch[:found])
    return end


@jit
def _run_until_short(
    books: Int64s,
    future: Int64s,
    listed: Int64s,
    at: int,
    end: int,
    chosen: Int64s,
    missed: Int32s,
    pages: Int64s,
) -> tuple[int, int, int]:
    """Finish event ``at`` with the victims ``chosen``; run to the next event short of slots.

    An event that needs more pages than its bank has slots counts as short of slots.

    Returns:
        The index of that event, which is still open, or ``end``; the number of slots that it lacks;
        and the number of candidates in ``pages``.
    """
    # Python calls this function for each event that is short of slots, so it takes directories
    # (see ``compiled.directory``).
    b, events = open_books(books), open_events(listed)
    if chosen.size:
        admit(b, chosen)
    for i in range(at + 1, end):
        short = _open(b, future, events, i, missed)
        if short > 0 or exceeded(b):
            return i, short, candidates(b, b.bank_of[b.now[LAYER]], False, pages)
        admit(b, chosen[:0])
    return end, 0, 0
