"""Custom policies give the same answers as stock vLLM, and the budget is never exceeded.

test_identity_matrix.py compares all built-in policies with stock vLLM.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from tests.vllm.conftest import BATCHES, EAGER, PAGES, Outputs, config, outputs

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("threads", [0, 2])
def test_other_numbers_of_copy_threads(
    eager: ChildEngine, stock_outputs: Outputs, threads: int
) -> None:
    fluxmoe = config(
        PAGES - 5,
        prefetch={"kind": "next-layer", "depth": 2},
        copy_threads=threads,
        memory={"banks": 2},
    )
    eager.restart(fluxmoe=fluxmoe, **EAGER)
    assert outputs(eager) == stock_outputs
    stats = eager.call("stats")
    assert (stats["banks"], stats["slots"]) == (2, PAGES - 5)
    assert stats["prefetch_hits"] > 0


def test_a_policy_of_three_lines(
    eager: ChildEngine, stock_outputs: Outputs, tmp_path: Path
) -> None:
    plugin = tmp_path / "mru.py"
    plugin.write_text(
        "import fluxmoe\n"
        "class MostRecentlyUsed(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages):\n"
        "        return -view.last_use[pages]\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register):\n"
        "    register('mru', MostRecentlyUsed)\n"
    )
    fluxmoe = config(20, eviction="mru", plugins=[str(plugin)], strict_policies=True)
    eager.restart(fluxmoe=fluxmoe, **EAGER)
    assert outputs(eager) == stock_outputs


def test_a_policy_that_fails_costs_no_token(
    eager: ChildEngine, stock_outputs: Outputs, tmp_path: Path
) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "import fluxmoe\n"
        "class Broken(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages):\n"
        "        raise RuntimeError('no idea')\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register):\n"
        "    register('broken', Broken)\n"
    )
    fluxmoe = config(20, eviction="broken", plugins=[str(plugin)])
    eager.restart(fluxmoe=fluxmoe, **EAGER)
    assert outputs(eager) == stock_outputs
    assert eager.call("stats")["policy_faults"] > 0


def test_the_budget_holds_in_every_step(eager: ChildEngine) -> None:
    fluxmoe = config(20, prefetch="next-layer", copy_threads=1)
    eager.restart(fluxmoe=fluxmoe, **EAGER)
    budget = fluxmoe["memory"]["budget"]
    run = eager.generate(BATCHES[2], watch=True)
    assert run.steps >= 20
    # After each step, the mapped frames, the KV buffer's real size and all books were checked.
    assert 0.9 * budget < run.peak_committed <= budget
    assert run.stats["budget_bytes"] <= budget


def test_a_prompt_that_comes_after_another_finds_what_that_one_left(eager: ChildEngine) -> None:
    eager.restart(fluxmoe=config(20), **EAGER, enable_prefix_caching=True)
    said = [3 + i % 90 for i in range(eager.info["block_size"] + 8)]
    prompts = [Prompt(said, 4, after=2), Prompt([5] * 9, 4), Prompt(said, 3, after=1)]
    together = eager.generate([replace(prompt, after=None) for prompt in prompts])
    run = eager.generate(prompts)
    assert run.cached == [eager.info["block_size"], 0, 0]
    assert run.tokens == together.tokens
    assert run.steps >= 4 + 3 + 4
    assert together.steps < run.steps
