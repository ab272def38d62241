"""Each process of an engine loads plugins at most once and makes each policy at most once."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from fluxmoe import config as configuration
from fluxmoe import plugins
from fluxmoe.backends.vllm import handover
from fluxmoe.backends.vllm.child.child import ChildEngine
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


def test_in_three_processes(counted: Path, checkpoint: Path) -> None:
    options = {"fluxmoe": config(20, **SETTINGS), "three_processes": True, **EAGER}
    with ChildEngine(checkpoint, **options) as engine:
        engine.generate(prompts(2))
        found = counts(counted).values()
    # The worker, and the scheduler, which needs nothing but what arbitrates.
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
        """Stands for its VllmConfig."""

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
