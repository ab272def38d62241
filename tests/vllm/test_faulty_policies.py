"""Policies that fail in every method, one way after the other: the same tokens, still there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxmoe.backends.vllm.child.child import ChildEngine
from tests.vllm.conftest import EAGER, Outputs, config, outputs, prompts

pytestmark = pytest.mark.vllm

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
        policy_limits={"strikes": 1000},  # or they would be out before they had tried everything
    )
    eager.restart(fluxmoe=settings, **EAGER)
    assert outputs(eager) == stock_outputs
    run = eager.generate(prompts(8, seed=3))
    assert run.stats["policy_faults"] > 100
    assert run.stats["misses"] > 0
    assert eager.call("arbitration")["faults"] > 10
