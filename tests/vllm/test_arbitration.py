"""Changes to the split while vLLM serves: the tokens are stock's, even with faults."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import psutil
import pytest

from fluxmoe.backends.vllm.child.child import ChildEngine, Generation, Prompt
from tests.vllm.conftest import KV_BYTES, OPTIONS, PAGE

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DICE = str(Path(__file__).with_name("dice.py"))
COMPILED = {**OPTIONS, "max_num_seqs": 8, "enable_prefix_caching": True}
FEW = {**COMPILED, "enforce_eager": True}


def traffic(count: int, seed: int = 0) -> list[Prompt]:
    """Make requests with short and long answers, greedy or sampled, many with shared prefixes."""
    rng = random.Random(seed)
    shared = [[rng.randrange(3, 1000) for _ in range(64)] for _ in range(4)]
    return [
        Prompt(
            rng.choice(shared)[: rng.choice([0, 32, 64])]
            + [rng.randrange(3, 1000) for _ in range(rng.randint(1, 30))],
            rng.choice([3, 20, 60, 140]),
            temperature=1.0 if index % 2 else 0.0,
            seed=index if index % 2 else None,
            logprobs=True,
        )
        for index in range(count)
    ]


TRAFFIC = traffic(60)


def config(arbitration: str = "dice", **settings: Any) -> dict[str, Any]:
    """Make a configuration whose budget holds 40 of 64 experts and 32 KV blocks.

    Eight sequences could use more KV blocks.
    """
    memory = {"budget": 40 * PAGE + (1 << 20), "experts": {"target": 20 * PAGE}}
    return {"memory": memory, "arbitration": arbitration, "plugins": [DICE], **settings}


def same(run: Generation, stock: Generation) -> None:
    assert run.tokens == stock.tokens
    assert run.logprobs == stock.logprobs


# --- called in the engine's process --------------------------------------------------------------


def fail_commits(worker: Any, every: int) -> None:
    """Make every ``every``-th mapping of memory fail; 0 stops the failures."""
    from fluxmoe.errors import SubstrateError

    substrate = worker._runtime.memory.substrate
    plain = type(substrate).commit.__get__(substrate)
    calls = iter(range(1, 10**9))

    def commit(address: int, frames: Any) -> None:
        if every and next(calls) % every == 0:
            raise SubstrateError("injected: no more mappings")
        plain(address, frames)

    substrate.commit = commit


def disturb(worker: Any, rate: float) -> None:
    """Lose, duplicate and delay orders, and lose answers."""
    rng, side = random.Random(3), worker._side
    receive, report = side.receive, side.report
    late: list[Any] = []

    def badly(order: Any) -> None:
        late.append(order)
        if rng.random() >= rate:
            receive(order)
        if rng.random() < rate:
            receive(rng.choice(late[-9:]))

    def mute() -> Any:
        told = report()
        return None if rng.random() < rate else told

    side.receive, side.report = badly, mute


def books(worker: Any) -> tuple[dict[str, int], int]:
    """Return mapped frames per tenant, and bytes allocated by the system."""
    worker._runtime.check()
    return worker._runtime.memory.frames(), worker._runtime.memory.substrate.allocated()


# --- one process ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(eager: ChildEngine) -> ChildEngine:
    eager.restart(kv_cache_memory_bytes=KV_BYTES, **FEW)
    return eager


@pytest.fixture(scope="module")
def stock(engine: ChildEngine) -> Generation:
    return engine.generate(TRAFFIC)


def test_the_traffic_is_worth_comparing(engine: ChildEngine, stock: Generation) -> None:
    assert engine.info["prefix_caching"]
    assert sum(stock.cached) > 500
    assert stock.peak_running == 8
    assert len({tuple(tokens) for tokens in stock.tokens}) > 50


def test_tokens_are_stocks_while_the_split_changes_all_the_time(
    engine: ChildEngine, stock: Generation
) -> None:
    fluxmoe = config()
    engine.restart(fluxmoe=fluxmoe, **FEW)
    run = engine.generate(TRAFFIC, watch=True)  # checks all books and allocated bytes in each step
    same(run, stock)
    budget = fluxmoe["memory"]["budget"]
    assert 0.9 * budget < run.peak_committed <= budget
    assert sum(run.cached) > 0
    state = engine.call("arbitration")
    assert min(state["changes"].values()) >= 40
    assert sum(state["changes"].values()) >= 200
    assert state["failures"] == state["faults"] == 0
    frames, allocated = engine.call("rpc", books)
    assert frames == state["frames"]
    assert allocated == engine.call("stats")["committed_bytes"]


def test_what_vllm_shows_of_its_kv_cache_is_right(engine: ChildEngine) -> None:
    assert engine.call("kv_usage") == 0.0  # held blocks do not count as used
    assert engine.call("reset_prefix_cache")


def test_commits_that_fail_are_rolled_back(engine: ChildEngine, stock: Generation) -> None:
    before = engine.call("arbitration")
    engine.call("rpc", fail_commits, 5)
    same(engine.generate(TRAFFIC), stock)
    state = engine.call("arbitration")
    assert state["failures"] > before["failures"] + 10
    engine.call("rpc", fail_commits, 0)
    same(engine.generate(TRAFFIC, watch=True), stock)
    after = engine.call("arbitration")
    assert after["failures"] <= state["failures"] + 1
    assert engine.call("rpc", books)[0] == after["frames"]


def test_messages_that_are_lost_doubled_or_late_do_no_harm(
    engine: ChildEngine, stock: Generation
) -> None:
    before = engine.call("arbitration")
    engine.call("rpc", disturb, 0.3)
    same(engine.generate(TRAFFIC, watch=True), stock)
    state = engine.call("arbitration")
    assert sum(state["changes"].values()) > sum(before["changes"].values()) + 30
    assert state["failures"] == before["failures"]


def test_a_lowered_budget_is_kept_to_while_requests_run(
    engine: ChildEngine, stock: Generation
) -> None:
    engine.restart(fluxmoe=config(), **FEW)
    full = engine.call("rpc", books)[1]
    engine.call("limit", 0.75)
    same(engine.generate(TRAFFIC), stock)
    assert engine.call("rpc", books)[1] <= 0.76 * full


def test_memory_that_is_wanted_back_when_every_block_is_in_use(
    engine: ChildEngine, stock: Generation
) -> None:
    engine.restart(fluxmoe=config("spite", strict_policies=True), **FEW)
    same(engine.generate(TRAFFIC, watch=True), stock)
    state = engine.call("arbitration")
    assert state["failures"] == 0 and min(state["changes"].values()) > 0
    assert int(engine.call("told")[-1].split()[1]) > 5
    assert engine.call("rpc", books)[0] == state["frames"]


def test_a_broken_policy_costs_no_token(engine: ChildEngine, stock: Generation) -> None:
    engine.restart(fluxmoe=config("broken"), **FEW)
    same(engine.generate(TRAFFIC[:20]), engine_stock(stock, 20))
    state = engine.call("arbitration")
    assert state["faults"] == 16
    assert sum(state["changes"].values()) == 0


def engine_stock(stock: Generation, count: int) -> Generation:
    """Return stock's first ``count`` answers, which do not depend on the other requests."""
    return Generation(stock.tokens[:count], stock.logprobs[:count], [], 0.0, 0, 0)


@pytest.mark.parametrize("policy", ["kv-first", "rho", "marginal"])
def test_policies_move_memory_and_no_token(
    engine: ChildEngine, stock: Generation, policy: str
) -> None:
    engine.restart(fluxmoe=config(policy, strict_policies=True), **FEW)
    same(engine.generate(TRAFFIC, watch=True), stock)
    assert engine.call("arbitration")["failures"] == 0


# --- compiled, more processes, more workers ------------------------------------------------------


def test_compiled(engine: ChildEngine) -> None:
    few = TRAFFIC[:24]
    engine.restart(kv_cache_memory_bytes=KV_BYTES, **COMPILED)
    stock = engine.generate(few)
    engine.restart(fluxmoe=config(), **COMPILED)
    same(engine.generate(few), stock)
    assert sum(engine.call("arbitration")["changes"].values()) >= 60


def in_step(engine: ChildEngine, workers: int) -> None:
    """Assert that all workers have carried out the same orders, and at least 100 of them."""
    everyone = engine.call("everyone")
    assert len(everyone) == workers
    assert everyone[0]["orders"] >= 100  # two for each move
    for key in ("orders", "slots", "kv_bytes", "expert_bytes", "committed_bytes"):
        assert len({stats[key] for stats in everyone}) == 1, key


def family(engine: ChildEngine) -> list[psutil.Process]:
    """List the processes of an engine that has at least three: client, scheduler and workers."""
    client = psutil.Process(engine._process.pid)
    found = []
    for process in (client, *client.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper process has just ended
            # Multiprocessing's resource tracker is left out, because it outlives the others.
            if "resource_tracker" not in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_scheduler_and_worker_in_processes_of_their_own(checkpoint: Path) -> None:
    """See also ``test_move_faults`` (two workers) and ``test_leaks`` (a killed client)."""
    few = TRAFFIC[:16]
    with ChildEngine(
        checkpoint, three_processes=True, kv_cache_memory_bytes=KV_BYTES, **FEW
    ) as engine:
        stock = engine.generate(few)
        engine.restart(fluxmoe=config(), **FEW)
        same(engine.generate(few), stock)
        in_step(engine, workers=1)
        processes = family(engine)
        assert len(processes) >= 3
    assert psutil.wait_procs(processes, timeout=20)[1] == []
