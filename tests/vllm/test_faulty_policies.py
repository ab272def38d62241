"""Policies that fail in every method and in every way change no token and end no engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.backends.vllm.metrics import DECISION
from fluxmoe.words import LIMIT
from tests.vllm.conftest import EAGER, Outputs, config, outputs, prompts
from tests.vllm.test_server_pair import start

pytestmark = pytest.mark.vllm

MUMBLES = str(Path(__file__).with_name("mumbles.py"))
PLUGIN = str(Path(__file__).parents[1] / "plugins" / "faulty.py")


@pytest.mark.slow
def test_many_faults_in_all_policies_change_no_token(
    eager: ChildEngine, stock_outputs: Outputs
) -> None:
    settings = config(
        20,
        plugins=[PLUGIN],
        eviction="everything",
        prefetch="fetches-nonsense",
        arbitration="splits-nonsense",
        policy_limits={"strikes": 1000},  # lets each policy try all its faults
    )
    eager.restart(fluxmoe=settings, **EAGER)
    assert outputs(eager) == stock_outputs
    run = eager.generate(prompts(8, seed=3))
    assert run.stats["policy_faults"] > 100
    assert run.stats["misses"] > 0
    assert eager.call("arbitration")["faults"] > 10


@pytest.mark.slow
@pytest.mark.full
def test_a_reason_that_nothing_can_print_holds_up_no_request(
    checkpoint: Path, tmp_path: Path
) -> None:
    """A text that cannot be encoded would block the channel from the scheduler to the server."""

    def mumbling(settings: dict[str, Any]) -> None:
        settings |= {"arbitration": "mumbles", "plugins": [MUMBLES]}
        settings["vllm"]["max-num-seqs"] = 8

    server = start(tmp_path / "server", checkpoint, change=mumbling)
    try:
        server.wait()
        requests = prompts(8, tokens=60)
        for _ in range(3):
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(server.complete, requests))
            assert [len(tokens) for tokens in answers] == [p.max_tokens for p in requests]
        reasons = [series[-1] for series in server.metrics() if series[0] == DECISION]
        assert reasons
        for reason in reasons:
            assert reason.startswith("step ") and " \\ud800\\x00\\x1b[2Jxxx" in reason
            assert len(reason) == LIMIT and reason.isprintable()
    finally:
        server.end()
