"""All examples run unchanged and are listed in examples/README.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fluxmoe.demo.model import SHIPPED

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
PROGRAMS = ["choose.py", "page_model.py"]
WITH_VLLM = ["vllm_offline.py"]


def do(*command: str) -> str:
    """Run an example from the root of the checkout, as described in the list."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FLUXMOE_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fluxmoe(*words: str) -> str:
    return do(sys.executable, "-c", "from fluxmoe.cli import main; main()", *words)


def test_every_file_is_in_the_list() -> None:
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    there = {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md"}
    assert set(listed) == there
    assert len(listed) == len(there)
    assert {name for name in there if name.endswith(".py")} == {"mru.py", *PROGRAMS, *WITH_VLLM}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run(name: str) -> None:
    printed = do(sys.executable, str(FOLDER / name))
    if name == "choose.py":
        assert printed.count("belady") == 3
    else:
        assert "the simulator counts the same" in printed


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_VLLM)
def test_programs_with_vllm_run(name: str) -> None:
    printed = do(sys.executable, str(FOLDER / name))
    assert re.search(r"\d+ of 384 pages fit, \d+% hits", printed)


@pytest.mark.slow
def test_the_policy_conforms() -> None:
    assert "mru" in fluxmoe("plugin", "check", "examples/mru.py")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_are_valid(path: Path) -> None:
    assert "memory:" in fluxmoe("config", "show", str(path))
    assert "marginal" in fluxmoe("config", "show", "examples/serve.yaml")


def test_the_server_can_be_started_from_anywhere() -> None:
    words = fluxmoe("serve", "examples/serve.yaml", "--print-command").split()
    assert Path(words[words.index("--model") + 1]).samefile(SHIPPED)
