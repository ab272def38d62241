"""The virtual clock: the time that a replay would take on the machine described by a profile.

Demand copies block their layer: all pages that an event misses, and the reloads of an event that
runs in waves, are copied before the kernel runs. Prefetched pages are copied one at a time, in the
order proposed, while layers compute. A demand waits for the prefetch in progress and precedes the
prefetches that have not begun; a prefetched page that is used before its copy has begun is copied
immediately. The clock models ``TransferEngine`` with one copy thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fluxmoe.core.paging.books import ABSENT, LOADED, PAGES, RELOADED
from fluxmoe.core.paging.rule import EventRule
from fluxmoe.errors import ConfigError
from fluxmoe.sim.events import Events
from fluxmoe.sim.hardware import Profile

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timing:
    """Times measured by the virtual clock.

    Attributes:
        hardware: Name of the profile.
        seconds: Time from the beginning of the first step to the end of the last, in seconds.
        step_ms_mean, step_ms_p50, step_ms_p95: Mean, median and 95th percentile of the duration of
            a step, in milliseconds.
        stall_share: Fraction of ``seconds`` that layers spent waiting for pages.
        tokens_per_s: Tokens per second over all steps.
    """

    hardware: str
    seconds: float
    step_ms_mean: float
    step_ms_p50: float
    step_ms_p95: float
    stall_share: float
    tokens_per_s: float


class Clock:
    """Virtual clock of one replay.

    Args:
        profile: Profile of the machine.
        events: The trace; it must have a page size.

    Raises:
        ConfigError: The trace has no page size.
    """

    def __init__(self, profile: Profile, events: Events) -> None:
        size = events.meta.page_bytes
        if size is None:
            raise ConfigError(
                "the trace has no page size, which timing requires",
                where="--hardware",
            )
        self._profile, self._events = profile, events
        self._page = size / (profile.load_gbps * 1e9)
        self._call = profile.load_us * 1e-6
        #: ``[N]``, compute time in seconds of each event's layer after its pages have arrived.
        self.compute = _compute(profile, events, size)
        self.stall = np.zeros(len(events))
        self._now, self._link_free = 0.0, 0.0
        self._queue: deque[tuple[int, float]] = deque()  # page, time of proposal
        self._arrives: dict[int, float] = {}

    def demand_only(self, loaded: npt.NDArray[np.int32]) -> None:
        """Compute the stalls of all events at once, for a replay without prefetch.

        Args:
            loaded: Number of pages that each event loads, int32 ``[N]``.
        """
        self.stall = np.where(loaded > 0, self._call + loaded * self._page, 0.0)

    def watch(self, rule: EventRule, at: int) -> None:
        """Compute the stall of event ``at``, which ``rule`` has just run; queue its prefetches."""
        b = rule.table.books
        count = b.now[PAGES]
        pages, hit = b.pages[:count], b.hit[:count]
        begun = done = self._now
        self._advance(begun, b.slot_of)
        loads = count - int(np.count_nonzero(hit)) + int(b.now[RELOADED])
        if loads:
            done = max(done, self._link_free) + self._call + loads * self._page
            self._link_free = done
        for page in pages[hit].tolist():
            done = self._complete(page, done)
        if rule.prefetches:
            self._queue.extend((page, done) for page in b.loaded[: b.now[LOADED]].tolist())
        self.stall[at] = done - begun
        self._now = done + self.compute[at]

    def timing(self) -> Timing:
        """Summarise all steps."""
        profile, block = self._profile, self._events.block
        starts = np.flatnonzero(np.diff(block.step, prepend=block.step[:1] - 1))
        steps = np.add.reduceat(self.compute + self.stall, starts) + profile.step_us * 1e-6
        tokens = np.diff(block.offsets)[starts].sum() / self._events.meta.top_k
        total = float(steps.sum())
        middle, late = np.percentile(steps, [50, 95]).tolist()
        return Timing(
            hardware=profile.name,
            seconds=total,
            step_ms_mean=total / len(steps) * 1e3,
            step_ms_p50=middle * 1e3,
            step_ms_p95=late * 1e3,
            stall_share=float(self.stall.sum()) / total if total else 0.0,
            tokens_per_s=float(tokens) / total if total else 0.0,
        )

    def _advance(self, now: float, slot_of: npt.NDArray[np.int32]) -> None:
        """Begin the queued copies that the link can begin before ``now``."""
        while self._queue:
            page, proposed = self._queue[0]
            start = max(self._link_free, proposed)
            if start >= now:
                return
            self._queue.popleft()
            if slot_of[page] == ABSENT:
                continue  # evicted before its copy began
            self._link_free = self._arrives[page] = start + self._call + self._page

    def _complete(self, page: int, now: float) -> float:
        """Return the time at which a page used at ``now`` has arrived."""
        arrives = self._arrives.pop(page, None)
        if arrives is not None:
            return max(now, arrives)
        if any(page == queued for queued, _ in self._queue):
            self._queue = deque(entry for entry in self._queue if entry[0] != page)
            self._link_free = max(now, self._link_free) + self._call + self._page
            return self._link_free
        return now


def _compute(profile: Profile, events: Events, page_bytes: int) -> Floats:
    pairs = np.diff(events.block.offsets)
    tokens = pairs / events.meta.top_k
    read = events.sizes * (page_bytes / (profile.memory_gbps * 1e9))
    work = pairs * (2 * page_bytes / profile.weight_bytes / (profile.tflops * 1e12))
    experts = np.maximum(read, work) if profile.roofline else read + work
    seconds: Floats = experts + (profile.layer_us + tokens * profile.token_us) * 1e-6
    return seconds
