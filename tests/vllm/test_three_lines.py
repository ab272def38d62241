"""A three-line policy, as a file or an entry point, runs in the simulator, torch and vLLM.

The policy's source is the same everywhere. Where the policy runs in this process, a class attribute
counts the calls to it; in engines, the resident pages show its effect.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import fluxmoe
from fluxmoe import config as configuration
from fluxmoe import plugins
from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.sim.simulator import simulate
from fluxmoe.testing import GOLDEN
from tests.identity.torch_cells import answer, same
from tests.plugins.rig import install
from tests.vllm.conftest import EAGER, KV_BYTES, PAGE, config, prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SOURCE = """\
import fluxmoe

class MostRecentlyUsed(fluxmoe.EvictionPolicy):
    def score(self, view, pages):
        return -view.last_use[pages]

@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("three-lines", MostRecentlyUsed)
"""
ROOT = Path(__file__).parents[2]
TRACE = GOLDEN["mixed"]


@pytest.fixture(params=["file", pytest.param("entry point", marks=pytest.mark.full)])
def source(request, tmp_path, monkeypatch) -> list[str]:
    """Install the policy; return the value for ``plugins``."""
    if request.param == "file":
        monkeypatch.setenv("FLUXMOE_PLUGINS", "")
        (tmp_path / "my.py").write_text(SOURCE)
        return [str(tmp_path / "my.py")]
    site = tmp_path / "site"
    site.mkdir()
    (site / "three_lines_policy.py").write_text(SOURCE)
    install(site, "fluxmoe-three-lines", {"three-lines": "three_lines_policy"})
    install(site, "fluxmoe-broken", {"broken": "no_such_module"})  # broken, but not used
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{ROOT}")
    monkeypatch.setenv("FLUXMOE_PLUGINS", "three-lines,broken")
    return []


def test_three_lines_run_everywhere(source: list[str], checkpoint: Path, tmp_path: Path) -> None:
    # The policy in the simulator, from Python and from the command line.
    registry = plugins.load(source)
    assert registry.get("eviction", "three-lines").plugin == (source or ["three-lines"])[0]
    result = simulate(TRACE.events, "three-lines", "50%", registry=registry)
    assert result.policy_faults == 0
    assert TRACE.misses["belady"][1] < result.misses != TRACE.misses["lru"][1]
    command = [sys.executable, "-c", "from fluxmoe.cli import main; main()"]
    more = [part for name in source for part in ("--plugin", name)]
    shape = ["--layers", "4", "--experts", "8", "--top-k", "2"]
    shape += ["--steps", "20", "--batch", "2", "--seed", "1"]
    trace = str(tmp_path / "t.parquet")
    for arguments in (
        ["trace", "synth", *shape, "--out", trace],
        ["simulate", trace, "--policy", "three-lines", "--capacity", "50%", "--json", *more],
    ):
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["policy"] == "three-lines"

    # The policy in PyTorch.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    stock = answer(model)
    with fluxmoe.page(model, "1MiB", eviction="three-lines", plugins=source) as paged:
        assert same(answer(model), stock)
        assert (paged.stats()["policy_faults"], paged.stats()["misses"] > 0) == (0, True)

    # The policy in a YAML file, and in the engine that the file configures.
    file = tmp_path / "serve.yaml"
    settings = {**config(20, eviction="three-lines"), "plugins": source, "model": str(checkpoint)}
    file.write_text(json.dumps(settings))  # JSON is valid YAML
    loaded = configuration.load(file)
    eviction = plugins.load(loaded.plugins).policies(loaded).eviction
    assert type(eviction).__name__ == "MostRecentlyUsed"
    wanted = {key: value for key, value in settings.items() if key != "model"}
    with ChildEngine(checkpoint, kv_cache_memory_bytes=KV_BYTES, **EAGER) as engine:
        batch = prompts(8, seed=8)
        plain = engine.generate(batch)
        counted = {}
        for policy in ("three-lines", "lru"):
            engine.restart(fluxmoe={**wanted, "eviction": policy, "strict_policies": True}, **EAGER)
            run = engine.generate(batch)
            assert (run.tokens, run.logprobs) == (plain.tokens, plain.logprobs)
            assert run.stats["slots"] * PAGE == settings["memory"]["experts"]["target"]
            counted[policy] = run.stats["misses"]
        assert counted["three-lines"] != counted["lru"]  # the plugin chose the victims
