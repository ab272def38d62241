"""Two workers in separate processes, one of which fails or dies during a move."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fluxmoe.backends.vllm.child.child import ChildEngine, Generation
from fluxmoe.errors import EngineError
from tests.vllm.conftest import KV_BYTES
from tests.vllm.test_arbitration import (
    FEW,
    TRAFFIC,
    books,
    config,
    disturb,
    fail_commits,
    in_step,
    same,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.full]

OPTIONS = {**FEW, "tensor_parallel_size": 2}
PROMPTS = TRAFFIC[:16]


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[ChildEngine]:
    with pytest.MonkeyPatch.context() as patch:
        # This allows sending the faults, which are functions, to the workers.
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        with ChildEngine(
            checkpoint, three_processes=True, kv_cache_memory_bytes=KV_BYTES, **OPTIONS
        ) as engine:
            yield engine


@pytest.fixture(scope="module")
def stock(engine: ChildEngine) -> Generation:
    """Return stock's answers; ``engine`` is paged afterwards."""
    run = engine.generate(PROMPTS)
    engine.restart(fluxmoe=config(), **OPTIONS)
    return run


def of_rank(worker: Any, rank: int, fault: Any, *args: Any) -> None:
    if worker._side._moves._rank == rank:
        fault(worker, *args)


def undisturbed(worker: Any) -> None:
    """Undo ``disturb``."""
    del worker._side.receive, worker._side.report


def die_in_a_move(worker: Any, after: int) -> None:
    """End the process in the middle of an order, after ``after`` other orders."""
    mover = worker._side._moves
    apply, left = mover.apply, iter(range(after, -1, -1))

    def dying(action: Any) -> None:
        apply(action)
        if not next(left):
            os.kill(os.getpid(), signal.SIGKILL)

    mover.apply = dying


def undone(engine: ChildEngine) -> int:
    """Count rolled-back moves in the log of the scheduler's process."""
    return Path(engine._log).read_text().count("arbitration: a move was undone")


def test_one_worker_that_fails_or_does_not_hear_costs_no_token(
    engine: ChildEngine, stock: Generation
) -> None:
    same(engine.generate(PROMPTS), stock)
    in_step(engine, workers=2)
    assert undone(engine) == 0
    engine.call("rpc", of_rank, 1, fail_commits, 4)
    same(engine.generate(PROMPTS), stock)
    assert undone(engine) > 5
    engine.call("rpc", of_rank, 1, fail_commits, 0)
    engine.call("rpc", of_rank, 0, disturb, 0.3)  # only this worker's messages are disturbed
    before = engine.call("everyone")[0]["orders"]
    same(engine.generate(PROMPTS), stock)
    everyone = engine.call("everyone")
    assert everyone[0]["orders"] > before + 10
    # One worker may have executed an order that has not reached the other, but both have correct
    # books.
    assert abs(everyone[0]["orders"] - everyone[1]["orders"]) <= 1
    engine.call("rpc", books)
    engine.call("rpc", of_rank, 0, undisturbed)


@pytest.mark.timeout(600)  # the engine must not wait for a missing answer
def test_a_worker_that_dies_in_a_move_ends_the_engine_and_leaves_nothing(
    engine: ChildEngine, stock: Generation
) -> None:
    parent = psutil.Process(engine._process.pid)
    family = parent.children(recursive=True)
    assert len(family) >= 3  # scheduler, two workers
    engine.call("rpc", of_rank, 1, die_in_a_move, 6)
    with pytest.raises(EngineError, match=r"[Dd]ie|dead|[Ee]ngine"):
        engine.generate(PROMPTS)
    engine.close()
    _, alive = psutil.wait_procs(family, 30)
    assert not alive
