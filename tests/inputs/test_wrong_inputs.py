"""Wrong inputs (faults A and B): quick errors, a line with a code per problem, no side effects."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import fluxmoe
from fluxmoe.errors import FluxMoEError
from fluxmoe.testing import checkpoints
from tests.commandline import command, here, succeeds, synth

CASES = yaml.safe_load(Path(__file__).with_name("wrong.yaml").read_text())
#: Maximum processor time for an answer, in seconds.
LIMIT = 10
PLUGINS = {
    "syntax.py": "def\n",
    "raises.py": "raise RuntimeError('no')\n",
    "silent.py": "x = 1\n",
    "crash.py": """
import fluxmoe
class Crash(fluxmoe.EvictionPolicy):
    \"\"\"Fails.\"\"\"
    def score(self, view, pages):
        return view.lastuse[pages]
@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("crash", Crash)
""",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, traces, plugins and configurations, most of them damaged."""
    folder = tmp_path_factory.mktemp("inputs")
    model = checkpoints.write(folder / "model", "qwen3-moe")
    checkpoints.write(folder / "dense", "qwen3-dense")
    checkpoints.write(folder / "mla", "deepseek-v2")
    (folder / "empty").mkdir()
    for name in ("cut", "lacking", "quantised"):
        shutil.copytree(model, folder / name)
    os.truncate(folder / "cut/model.safetensors", 5000)
    settings = json.loads((model / "config.json").read_text())
    more = {"num_experts": 99}
    (folder / "lacking/config.json").write_text(json.dumps({**settings, **more}))
    more = {"quantization_config": {"quant_method": "fp8"}}
    (folder / "quantised/config.json").write_text(json.dumps({**settings, **more}))
    for name, text in PLUGINS.items():
        (folder / name).write_text(text)
    succeeds(
        *synth(layers=2, experts=16, top_k=2, batch=1, steps=40), "--out", folder / "good.parquet"
    )
    # Compile in advance; otherwise the first case would wait.
    succeeds("simulate", folder / "good.parquet", "--policy", "lru", "--capacity", 8, "--jobs", 1)
    (folder / "broken.yaml").write_text("memory: {budget: [\n")
    (folder / "twice.yaml").write_text("memory: {budget: 1GiB}\nmemory: {budget: 2GiB}\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(VALID))
    return folder


VALID: dict[str, Any] = {
    "model": "model",
    "memory": {"budget": "10MiB"},
    "vllm": {"max-model-len": 128, "enforce-eager": True},
}


def changed(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``change``, key by key."""
    both = {
        key: changed(base[key], value)
        if isinstance(value, dict) and isinstance(base.get(key), dict)
        else value
        for key, value in change.items()
    }
    return {**base, **both}


@pytest.fixture
def workplace(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Use the folder as the working directory, and require that it is unchanged afterwards."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FLUXMOE_PLUGINS", "")
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    before = contents(files)
    yield files
    assert contents(files) == before


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every file except Python's caches."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@contextmanager
def soon() -> Iterator[None]:
    """Interrupt a call that takes more processor time than ``LIMIT``."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer after {LIMIT} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def answer(case: dict[str, Any], folder: Path, config: Path) -> list[str]:
    """Return the lines of the error, without the command line's decoration of the codes."""
    if "python" in case:
        with pytest.raises(FluxMoEError) as caught, soon():
            eval(case["python"], {"fluxmoe": fluxmoe})
        return str(caught.value).splitlines()
    if "command" in case:
        words = case["command"]
    else:
        config.write_text(yaml.safe_dump(changed(VALID, case["config"])))
        words = ["config", "check", config]
    with soon():
        done = here(*words)
    assert (done.returncode, done.stdout) == (2, ""), done
    return [re.sub(r"^error\[(FM\d+)\]", r"\1", line) for line in done.stderr.splitlines()]


def compare(lines: list[str], case: dict[str, Any]) -> None:
    assert len(lines) == len(case["says"]), lines
    for line, said in zip(lines, case["says"], strict=True):
        code, words = said.split(" ", 1)
        assert line.startswith(f"{code}: ") and words in line, lines


def named(case: dict[str, Any]) -> str:
    return str(next(iter(case.values())))[:60]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_wrong_input(case: dict[str, Any], workplace: Path) -> None:
    config = workplace / "changed.yaml"
    try:
        lines = answer(case, workplace, config)
    finally:
        config.unlink(missing_ok=True)
    compare(lines, case)


#: Runs a case in a separate process, within ``LIMIT`` seconds of processor time, and fails if the
#: case starts a process or imports an engine. ``page`` gets a model, so its engine may be imported;
#: a program with a model has imported it before.
ALONE = f"""
import math, resource, subprocess, sys, time, os
if "page(" in sys.argv[2]:
    from fluxmoe import page
resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + {LIMIT},) * 2)
def watch(event, args):
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec"):
        raise SystemExit(f"a process was started: {{args}}")
sys.addaudithook(watch)
try:
    if sys.argv[1] == "python":
        import fluxmoe
        try:
            eval(sys.argv[2])
        except fluxmoe.FluxMoEError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
    else:
        from fluxmoe.cli import main
        main(sys.argv[2:])
finally:
    imported = {{"vllm", "transformers"}} & set(sys.modules)
    if imported and "page(" not in sys.argv[2]:
        print("imported:", imported, file=sys.stderr)
"""


def alone(*arguments: object) -> list[str]:
    done = command(*arguments, program=ALONE)
    assert (done.returncode, done.stdout) == (2, ""), done
    return [re.sub(r"^error\[(FM\d+)\]", r"\1", line) for line in done.stderr.splitlines()]


@pytest.mark.parametrize("case", [case for case in CASES if len(case["says"]) > 1], ids=named)
def test_all_at_once_before_an_engine_is_imported(case: dict[str, Any], workplace: Path) -> None:
    if "config" not in case:
        kind = "python" if "python" in case else "command"
        words = [case[kind]] if kind == "python" else case[kind]
        compare(alone(kind, *words), case)
        return
    config = workplace / "changed.yaml"
    config.write_text(yaml.safe_dump(changed(VALID, case["config"])))
    try:
        for verb in (["config", "check"], ["serve"]):
            compare(alone("command", *verb, config), case)
    finally:
        config.unlink()


def test_an_engine_that_is_imported_is_noticed(workplace: Path) -> None:
    said = alone("python", "__import__('transformers') and fluxmoe.load(7)")
    assert said[-1] == "imported: {'transformers'}"
    with pytest.raises(AssertionError):
        compare(said, {"says": ["FM101 path"]})
    with pytest.raises(AssertionError, match="a process was started"):
        alone("python", "subprocess.run(['true'])")


def test_the_configuration_that_is_changed_is_valid(workplace: Path) -> None:
    assert "ok" in succeeds("config", "check", "config.yaml")


def test_there_are_enough() -> None:
    assert len(CASES) >= 60
    assert {next(iter(case)) for case in CASES} == {"config", "command", "python"}
