"""Each process of an engine loads plugins, makes each policy and parses the budget at most once.

An automatic budget is resolved only once for all processes.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from fluxmoe import config as configuration
from fluxmoe import plugins
from fluxmoe.backends.vllm import handover
from fluxmoe.backends.vllm.child.child import ENVIRONMENT, ChildEngine
from fluxmoe.cli import main
from tests.plugins.counted import ALL, SETTINGS, counts
from tests.vllm.conftest import EAGER, config, prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    return tmp_path / "counted"


def left(worker: Any) -> int:
    return len(handover._left)


def test_in_one_process(counted: Path, checkpoint: Path) -> None:
    with ChildEngine(checkpoint, fluxmoe=config(20, **SETTINGS), **EAGER) as engine:
        engine.generate(prompts(2))
        assert list(counts(counted).values()) == [ALL]
        assert engine.call("rpc", left) == 0
        engine.restart(fluxmoe=config(20, **{**SETTINGS, "arbitration": "fixed"}), **EAGER)
        assert list(counts(counted).values()) == [ALL + ALL - Counter(arbitration=1)]
        assert engine.call("rpc", left) == 0


@pytest.mark.full
def test_in_three_processes(counted: Path, checkpoint: Path) -> None:
    options = {"fluxmoe": config(20, **SETTINGS), "three_processes": True, **EAGER}
    with ChildEngine(checkpoint, **options) as engine:
        engine.generate(prompts(2))
        found = counts(counted).values()
    # The scheduler, which needs only the arbitration policy, and the worker.
    assert sorted(found, key=Counter.total) == [Counter(("execute", "arbitration")), ALL]


@pytest.mark.parametrize(
    "arguments", [["serve", "{}", "--print-command"], ["config", "check", "{}"]]
)
def test_before_an_engine_starts(
    counted: Path, checkpoint: Path, tmp_path: Path, arguments: list[str]
) -> None:
    file = tmp_path / "c.yaml"
    settings = {"model": str(checkpoint), **config(20, **SETTINGS)}
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as exit_:
        main([word.format(file) for word in arguments])
    assert not exit_.value.code
    (found,) = counts(counted).values()
    assert found <= ALL


def test_what_is_left_is_taken_once_and_dies_with_its_engine() -> None:
    class Engine:
        """A replacement for a VllmConfig."""

    parsed = configuration.parse({"memory": {"budget": 1}, **SETTINGS}, where="")
    policy = plugins.load(parsed.plugins).arbitration(parsed)
    engine, other = Engine(), Engine()
    handover.leave(engine, parsed, policy)
    handover.leave(other, parsed, policy)
    assert handover.take(engine) == (parsed, policy)
    assert len(handover._left) == 1
    del other
    gc.collect()
    assert not handover._left


RESOLVING = """
import json, sys
from fluxmoe import sizes
from fluxmoe.backends import budget
budget_text, settings = sys.argv[1], json.loads(sys.argv[2])
done = {"parsed": 0, "resolved": 0}
parse, weight_bytes = sizes.parse, budget.weight_bytes
def counted_parse(value):
    done["parsed"] += value == budget_text
    return parse(value)
def counted_bytes(model):
    done["resolved"] += 1
    return weight_bytes(model)
sizes.parse, budget.weight_bytes = counted_parse, counted_bytes
"""

IN_PROCESS = """
from vllm import LLM
from fluxmoe.backends.vllm import engine_options
options = settings.pop("options")
LLM(model=settings.pop("model"), skip_tokenizer_init=True, **options, **engine_options(settings))
print(json.dumps(done))
"""

SERVE = """
from fluxmoe.cli import main
try:
    main(["serve", settings["file"], "--print-command"])
except SystemExit as end:
    print(json.dumps(done))
    sys.exit(end.code)
"""


def resolving(program: str, budget: str, settings: dict[str, Any]) -> tuple[dict[str, int], str]:
    """Run a program; return how often it parsed and resolved the budget, and its output."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVING + program, budget, json.dumps(settings)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    *printed, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(printed)


@pytest.mark.parametrize(
    ("budget", "counted"),
    [("12MiB", {"parsed": 1, "resolved": 0}), ("auto", {"parsed": 0, "resolved": 1})],
)
def test_a_budget_is_resolved_once(
    checkpoint: Path, tmp_path: Path, budget: str, counted: dict[str, int]
) -> None:
    memory = {"budget": budget, "kv": {"max": "8MiB"}}
    settings = {"model": str(checkpoint), "memory": memory, "arbitration": "kv-first"}
    found, _ = resolving(IN_PROCESS, budget, {**settings, "options": EAGER})
    assert found == counted
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(settings))
    found, command = resolving(SERVE, budget, {"file": str(file)})
    assert found == counted
    words = shlex.split(command)
    told = json.loads(words[words.index("--additional-config") + 1])["fluxmoe"]
    assert isinstance(told["memory"]["budget"], int)  # so no worker resolves it again
