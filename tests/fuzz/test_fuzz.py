"""Random operations against the model, several engines at once, and each fault site in turn.

``make test-full`` runs a million operations, and ``make test`` runs a quarter of a million.
"""

from __future__ import annotations

import logging

import pytest

from fluxmoe.core.memory.experts import ExpertTenant
from fluxmoe.core.paging import heap
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.policy.guards import EvictionGuard
from tests.fuzz import __main__ as command
from tests.fuzz.driver import Failure, attempt, fuzz, together
from tests.fuzz.run import Run
from tests.fuzz.sites import SITES, SURVIVED, fail_everywhere

RUNS, OPERATIONS, PARTS = 200, 5000, 8  # one million operations in total


@pytest.fixture(autouse=True)
def quiet():
    """Silence the log, because each of the many runs reports its faulty policies."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [0, 1, *(pytest.param(part, marks=pytest.mark.full) for part in range(2, PARTS))]
)
def test_a_million_operations(part):
    seeds = range(part, RUNS, PARTS)
    tally = fuzz(seeds, OPERATIONS)
    assert tally.operations >= RUNS * OPERATIONS // PARTS
    assert tally.calls["event"] > 10_000
    assert min(tally.calls[kind] for kind in ("resize", "kv", "verify", "wrong")) > 50
    assert min(tally.faults[site] for site in ("commit", "release", "read", "policy")) > 0


@pytest.mark.parametrize("first", [0, 1000])
def test_several_engines_at_once(first):
    seeds = range(first, first + 6)
    tally = together(seeds, 1500)
    assert tally.operations >= 6 * 1500
    assert tally.calls["watch"] > 100


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # threads die
@pytest.mark.parametrize("site", SITES)
def test_every_fault_site_in_turn(site):
    runs = 1 if SITES[site].gpu else 3  # the driver has many calls, and its runs are slow
    outcome = fail_everywhere(site, runs=runs, operations=300, most=10)
    assert outcome.injected >= runs
    # If the core cannot continue after a refused call, it raises an error. The engine copies pages
    # that a thread failed to copy, sometimes too late, depending on timing.
    assert outcome.errors or site in SURVIVED


@pytest.mark.parametrize("first", [0, 100])
def test_a_gpu_that_is_not_there(first):
    tally = fuzz(range(first, first + 10), 1000, gpu=True)
    assert tally.operations >= 10_000
    assert tally.errors["FM301"] and tally.errors["FM304"]


# --- the fuzzer detects bugs ----------------------------------------------------------------------


def unstable_ties(guard, pages, count):
    scores = guard._raw_scores(pages)
    return None if scores is None else pages[::-1][scores[::-1].argsort(kind="stable")[:count]]


def keep_pages_that_failed(table, pages):
    pass


def order_some(heap, b, pages, scores, update=heap.update):
    few = slice(None) if len(pages) < 4 else slice(1, None)
    update(heap, b, pages[few], scores[few])


def forget_a_frame(tenant, frames):
    tenant._pool.give(tenant.NAME, frames[1:])
    tenant._substrate.release(frames[1:])


BUGS = {
    "ties by the highest page": (EvictionGuard, "_lowest", unstable_ties),
    "pages that could not be read": (PageTable, "discard", keep_pages_that_failed),
    "pages missing in the heap": (heap, "update", order_some),
    "lost frames": (ExpertTenant, "_give_up", forget_a_frame),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_and_its_replay_shows_it_again(bug, monkeypatch, capsys):
    with monkeypatch.context() as planted:
        planted.setattr(*BUGS[bug])
        assert command.main(["--seed", "0", "--runs", "60", "--ops", "1000"]) == 1
        replay = capsys.readouterr().err.splitlines()[-1].split()
        assert replay[:4] == ["replay:", "python", "-m", "tests.fuzz"]
        with pytest.raises(Exception):  # noqa: B017 any exception
            command.main(replay[4:])
        seed, operations = int(replay[5]), int(replay[7])
        assert operations < 1000
    attempt(seed, 1000)  # no failure without the bug


def test_a_failure_is_shrunk_to_the_operation_that_causes_it(monkeypatch):
    done = Run.kv

    def kv(run):
        done(run)
        assert run.calls["kv"] < 3, "the third one"

    monkeypatch.setattr(Run, "kv", kv)
    with pytest.raises(Failure, match="the third one") as failure:
        fuzz([4], 3000)
    with pytest.raises(AssertionError, match="the third one"):
        attempt(4, failure.value.operations)
    attempt(4, failure.value.operations - 1)
