"""Many runs over one trace (policies × capacities × prefetchers), in one or several processes.

Worker processes are spawned, so that they inherit no threads. They map the trace's arrays from
files that the parent wrote, so that all processes share the memory.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxmoe import plugins
from fluxmoe.core.types import EventList
from fluxmoe.plugins import PolicySpec, Registry
from fluxmoe.sim.events import Events
from fluxmoe.sim.hardware import Profile
from fluxmoe.sim.simulator import Result, Simulation
from fluxmoe.trace import TraceMeta

Progress = Callable[[int], None]

#: Minimum number of accesses (tokens × top-k, over all runs) at which starting processes pays off.
_WORTH_IT = 20_000_000


@dataclass(frozen=True, slots=True)
class SimulationRun:
    """One run; the settings that all runs share are in ``RunPlan``."""

    policy: PolicySpec
    capacity: str
    prefetch: PolicySpec = "none"


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Runs over one trace.

    Attributes:
        runs: The runs, in the order of the results.
        plugins: Files or modules with policies, which the worker processes load.
        banks, strict, hardware: Arguments of ``simulate``.
    """

    runs: Sequence[SimulationRun]
    plugins: Sequence[str] = ()
    banks: int = 1
    strict: bool = True
    hardware: Profile | None = None

    def simulation(self, run: SimulationRun, events: Events, registry: Registry) -> Simulation:
        """Make and validate one run. Raises the same errors as ``simulate``."""
        return Simulation(
            events,
            run.policy,
            run.capacity,
            run.prefetch,
            registry=registry,
            banks=self.banks,
            strict=self.strict,
            hardware=self.hardware,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run's result and its hit rate over time; ``oracle`` is True if the policy is an oracle.

    ``timeline`` is float64 ``[bins]``: the hit rate in equal parts of the trace.
    """

    result: Result
    oracle: bool
    timeline: npt.NDArray[np.float64]


def default_jobs(events: Events, runs: int) -> int:
    """Return the default number of processes.

    The default is the number of runs or of cores, whichever is smaller, or 1 for little work.
    """
    if events.ids.size * runs < _WORTH_IT:
        return 1
    return min(runs, len(os.sched_getaffinity(0)))


def execute(
    plan: RunPlan,
    events: Events,
    registry: Registry,
    *,
    jobs: int = 1,
    bins: int = 0,
    progress: Progress = lambda events: None,
) -> list[Outcome]:
    """Execute all runs.

    Args:
        plan: The runs.
        events: The trace.
        registry: Policies known in this process.
        jobs: Number of processes.
        bins: Number of bins in the timeline; 0 = no timeline.
        progress: Called with the number of events run since the last call.

    Raises:
        UnknownPolicyError, ConfigError, CapacityError: A run is invalid; none is started.
        PolicyFaultError: A policy failed in strict mode.
    """
    if jobs <= 1 or len(plan.runs) <= 1:
        # All runs are created before the first starts, so that an invalid run is reported at once.
        made = [plan.simulation(run, events, registry) for run in plan.runs]
        return [_outcome(simulation, events, bins, progress) for simulation in made]
    for run in plan.runs:
        plan.simulation(run, events, registry)
    with tempfile.TemporaryDirectory(prefix="fluxmoe-") as folder:
        for name, column in events.block._asdict().items():
            np.save(Path(folder) / f"{name}.npy", column)
        start = multiprocessing.get_context("spawn")
        arguments = folder, events.meta, plan, bins
        with ProcessPoolExecutor(jobs, start, _begin, arguments) as pool:
            waiting = {pool.submit(_work, index): index for index in range(len(plan.runs))}
            found: dict[int, Outcome] = {}
            try:
                for future in as_completed(waiting):
                    found[waiting[future]] = future.result()
                    progress(len(events))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [found[index] for index in range(len(plan.runs))]


class _Worker:
    """State of a worker process between runs."""

    def __init__(self, folder: str, meta: TraceMeta, plan: RunPlan, bins: int) -> None:
        # The files are mapped, so that all processes share the memory, and the mappings are
        # private (copy on write), so that numba gets ordinary writable arrays.
        columns = {
            file.stem: np.asarray(np.load(file, mmap_mode="c"))
            for file in Path(folder).glob("*.npy")
        }
        self.events = Events(meta, EventList(**columns))
        self.plan, self.bins = plan, bins
        self.registry = plugins.load(plan.plugins)


_worker: _Worker | None = None


def _begin(folder: str, meta: TraceMeta, plan: RunPlan, bins: int) -> None:
    global _worker
    _worker = _Worker(folder, meta, plan, bins)


def _work(index: int) -> Outcome:
    assert _worker is not None
    simulation = _worker.plan.simulation(_worker.plan.runs[index], _worker.events, _worker.registry)
    return _outcome(simulation, _worker.events, _worker.bins, lambda events: None)


def _outcome(simulation: Simulation, events: Events, bins: int, progress: Progress) -> Outcome:
    result = simulation.run(progress)
    return Outcome(result, simulation.oracle, _timeline(simulation.missed, events, bins))


def _timeline(missed: npt.NDArray[np.int32], events: Events, bins: int) -> npt.NDArray[np.float64]:
    parts = np.unique(np.linspace(0, len(events), min(bins, len(events)) + 1).astype(np.int64))[:-1]
    if len(parts) == 0:
        return np.zeros(0)
    accesses = np.add.reduceat(events.sizes.astype(np.int64), parts)
    misses = np.add.reduceat(missed.astype(np.int64), parts)
    rate: npt.NDArray[np.float64] = 1.0 - misses / np.maximum(accesses, 1)
    return rate
