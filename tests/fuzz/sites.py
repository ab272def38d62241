"""Every external failure site of the core, failed in turn: on the 1st call, the 2nd …

Each run fails a site on one call. After that, the books must match the mappings, the run must
continue and agree with the model to its end, and nothing may leak. Errors raised by the core must
be its own, with a code; any other error ends the run as a failure.
"""

from __future__ import annotations

import errno
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import fluxmoe
from fluxmoe.core.memory import host
from fluxmoe.core.transfer.jobs import Job
from fluxmoe.cuda.fake import FakeDriver
from fluxmoe.cuda.fake import Refused as DriverRefused
from fluxmoe.errors import FluxMoEError, OutOfFramesError, StoreError, SubstrateError
from fluxmoe.testing.faults import FaultPlan
from tests.core.rig import Leaks
from tests.fuzz.run import MOVING_MEMORY, Run


class Refused(Exception):
    """An error that is raised within a stand-in for the system and never reaches the core."""


# --- sites below the protocols: the system's own calls --------------------------------------------


class _Libc:
    """The C library, except that ``mmap`` and ``fallocate`` may fail."""

    def __init__(self, real, plan: FaultPlan) -> None:
        self._real, self._plan = real, plan

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def mmap(self, *args):
        return host._MAP_FAILED if self._refused("mmap") else self._real.mmap(*args)

    def fallocate(self, *args):
        return -1 if self._refused("fallocate") else self._real.fallocate(*args)

    def _refused(self, site: str) -> bool:
        try:
            self._plan.reach(site)
        except Refused:
            host.ctypes.set_errno(errno.ENOMEM)
            return True
        return False


@contextmanager
def system_calls(plan: FaultPlan) -> Iterator[None]:
    real = host._libc
    host._libc = _Libc(real, plan)
    try:
        yield
    finally:
        host._libc = real


@contextmanager
def thread_starts(plan: FaultPlan) -> Iterator[None]:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("fluxmoe-copy"):
            plan.reach("thread start")
        real(thread)

    threading.Thread.start = start
    try:
        yield
    finally:
        threading.Thread.start = real


@contextmanager
def copy_threads(plan: FaultPlan) -> Iterator[None]:
    """Let copy threads die before or during a copy without reporting the failure."""
    real = Job.run

    def run(copy: Job) -> None:
        plan.reach("thread death, idle")
        try:
            plan.reach("thread death, copying")
        except SystemExit:
            with copy._lock:
                copy._begun = not copy._withdrawn
            raise
        real(copy)

    Job.run = run
    try:
        yield
    finally:
        Job.run = real


class _InCopyThreads(FaultPlan):
    """A plan in which reads in copy threads also reach a site of their own."""

    def reach(self, site: str) -> None:
        if site == "read" and threading.current_thread().name.startswith("fluxmoe-copy"):
            super().reach("read in a thread")
        super().reach(site)


# --- policies -------------------------------------------------------------------------------------

_HOOKS = ("on_access", "on_load", "on_evict", "score", "select", "retain", "propose")


def reaching(plan: FaultPlan) -> Callable[[object], object]:
    """Make a function that makes a policy reach a site in each method that the core calls."""

    def wrap(policy):
        kind = type(policy)
        hooks = [name for name in _HOOKS if getattr(kind, name, None) is not None]
        # Overriding `select` or `retain` changes how the core uses the policy.
        if isinstance(policy, fluxmoe.EvictionPolicy):
            hooks = [
                name
                for name in hooks
                if name not in ("select", "retain")
                or getattr(kind, name) is not getattr(fluxmoe.EvictionPolicy, name)
            ]
        methods = {name: _reaching(plan, name, getattr(kind, name)) for name in hooks}
        policy.__class__ = type(kind.__name__, (kind,), methods)
        return policy

    return wrap


def _reaching(plan: FaultPlan, name: str, method):
    def call(self, *args):
        plan.reach(f"policy {name}")
        return method(self, *args)

    return call


# --- in turn --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A failure site: the error, and the stand-in or fault plan that injects it."""

    error: Callable[[], BaseException]
    around: Callable[[FaultPlan], AbstractContextManager[None]] = lambda plan: nullcontext()
    plan: type[FaultPlan] = FaultPlan
    gpu: bool = False


#: Calls of the CUDA driver.
DRIVER = (
    *("cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"),
    *("cuMemUnmap", "cuMemRelease", "cuMemAddressFree", "cuCtxSynchronize"),
    *("cuMemHostAlloc", "cuMemFreeHost", "cuMemcpyBatchAsync"),
    *("cuMemcpyDtoDAsync", "cuStreamCreateWithPriority", "cuStreamSynchronize"),
    *("cuStreamWaitEvent", "cuEventCreate", "cuEventRecord", "cuEventQuery", "cuEventSynchronize"),
    *("cuEventElapsedTime", "cuEventDestroy", "cuStreamDestroy"),
)

SITES = {
    **dict.fromkeys(
        ["reserve", "commit", "decommit", "release"], Site(lambda: SubstrateError("injected"))
    ),
    **dict.fromkeys(["mmap", "fallocate"], Site(Refused, system_calls)),
    "frames": Site(lambda: OutOfFramesError("injected")),
    "read": Site(lambda: StoreError("injected")),
    "read in a thread": Site(lambda: OSError(5, "injected"), plan=_InCopyThreads),
    "thread start": Site(lambda: RuntimeError("can't start new thread"), thread_starts),
    "thread death, idle": Site(SystemExit, copy_threads),
    "thread death, copying": Site(SystemExit, copy_threads),
    **dict.fromkeys(
        DRIVER, Site(lambda: DriverRefused(FakeDriver.CUresult.CUDA_ERROR_UNKNOWN), gpu=True)
    ),
    **{f"policy {name}": Site(lambda: ValueError("injected")) for name in _HOOKS},
}


#: Sites whose failure raises no error: the core skips the call, replaces it, or retries it later.
SURVIVED = {
    *(site for site in SITES if "thread" in site),
    *("cuMemAddressFree", "cuMemcpyDtoDAsync", "cuStreamWaitEvent"),
}


@dataclass
class Outcome:
    """Result of failing one site.

    ``errors`` has the codes of the errors that the core raised; the other faults raised no error.
    """

    injected: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    operations: int = 0


#: Maximum number of seeds to try, because a run that never reaches the site shows nothing.
_TRIES = 100


def fail_everywhere(name: str, *, runs: int, operations: int, most: int) -> Outcome:
    """Call ``fail_in_turn`` with one seed after another until ``runs`` of them reach the site."""
    total, found = Outcome(), 0
    for seed in range(_TRIES):
        outcome = fail_in_turn(name, seed, operations, most)
        total.injected += outcome.injected
        total.errors += outcome.errors
        total.operations += outcome.operations
        found += outcome.injected > 0
        if found == runs:
            return total
    raise AssertionError(f"only {found} of {_TRIES} runs reach {name!r}")


def fail_in_turn(name: str, seed: int, operations: int, most: int) -> Outcome:
    """Fail a site on its 1st, 2nd … call in the run of ``seed``, one run for each.

    If the site is reached more than ``most`` times, fail the first ``most / 2`` calls and as many
    others.
    """
    site, outcome = SITES[name], Outcome()
    passages = range(1, _run(site, name, None, seed, operations).passed[name] + 1)
    if len(passages) > most:
        rest = random.Random(seed).sample(passages[most // 2 :], most - most // 2)
        passages = [*passages[: most // 2], *sorted(rest)]
    for nth in passages:
        leaks = Leaks()
        try:
            plan = _run(site, name, nth, seed, operations, outcome)
            leaks.assert_none()
        except Exception as error:
            error.add_note(f"site {name!r} failed on call {nth}, seed {seed}, {operations} ops")
            raise
        outcome.injected += plan.struck[name]
    return outcome


def _run(
    site: Site,
    name: str,
    nth: int | None,
    seed: int,
    operations: int,
    outcome: Outcome | None = None,
) -> FaultPlan:
    plan, outcome = site.plan(), outcome or Outcome()
    if nth is not None:
        plan.arm(name, site.error(), nth)
    with site.around(plan):
        try:
            wrap, kinds = reaching(plan), MOVING_MEMORY
            run = Run(seed, plan=plan, threads=2, wrap=wrap, kinds=kinds, gpu=site.gpu)
        except FluxMoEError as error:  # at startup, so nothing was created
            assert plan.struck[name]
            outcome.errors[error.code] += 1
            return plan
        try:
            while run.operations < operations:
                struck = plan.struck[name]
                run.step()
                if plan.struck[name] > struck:
                    run.verify()
            run.verify()
        finally:
            run.close()
    outcome.errors += run.errors
    outcome.operations += run.operations
    return plan
