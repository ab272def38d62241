"""``fluxmoe generate`` with the torch backend, and ``import fluxmoe`` without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.commandline import here
from tests.torch.conftest import Load


def run(*arguments: object) -> tuple[int, str, str]:
    """Run the command; return its exit status, standard output and standard error."""
    done = here("generate", *arguments)
    return done.returncode or 0, done.stdout, done.stderr


def test_json(load: Load, checkpoint: Callable[..., Path]) -> None:
    options = ("--memory", "1MiB", "--eviction", "lru", "--max-new-tokens", 6, "--json")
    status, out, _ = run(checkpoint(), "--prompt-ids", "5,6,7", *options)
    result = json.loads(out)
    with torch.inference_mode():
        stock = load().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
    assert status == 0
    assert result["prompt_ids"] + result["token_ids"] == stock[0].tolist()
    assert result["stats"]["slots"] == 21
    assert result["stats"]["misses"] > 0
    assert isinstance(result["text"], str)


def test_text(checkpoint: Callable[..., Path]) -> None:
    status, out, _ = run(checkpoint(), "--prompt", "Once", "--max-new-tokens", 3)
    assert status == 0
    assert out.startswith("Once")
    assert "64 of 64 pages" in out


def test_without_tokenizer(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint(), bare, ignore=shutil.ignore_patterns("tokenizer*"))
    status, out, _ = run(bare, "--prompt-ids", "5,6", "--max-new-tokens", 3)
    assert status == 0
    assert len(out.splitlines()[0].split(",")) == 3
    status, out, err = run(bare, "--prompt", "Once")
    assert (status, out) == (2, "")
    assert "tokenizer" in err
    assert "--prompt-ids" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "one of --prompt and --prompt-ids"),
        (["--prompt", "a", "--prompt-ids", "1"], "one of --prompt and --prompt-ids"),
        (["--prompt-ids", "1,x"], "write 1,2,3"),
        (["--prompt-ids", "9999"], "0…1023"),
        (["--prompt", ""], "at least one"),
        (["--prompt-ids", "1", "--memory", "1KiB"], "at least 192KiB"),
        (["--prompt-ids", "1", "--eviction", "lur"], "known eviction policies"),
    ],
)
def test_errors(
    checkpoint: Callable[..., Path],
    arguments: list[str],
    says: str,
) -> None:
    status, out, err = run(checkpoint(), *arguments)
    assert (status, out) == (2, "")
    assert says in err


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, _, err = run(tmp_path / "nothing", "--prompt-ids", "1")
    assert status == 2
    assert "error[FM406]: no such folder" in err
    status, _, err = run("no-such/name", "--prompt-ids", "1")  # could be a name on the Hub
    assert status == 2
    assert "neither a folder nor a downloaded model" in err


def test_import_fluxmoe_needs_no_torch() -> None:
    program = """
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "numba"]))
import fluxmoe
try:
    fluxmoe.page
except fluxmoe.FluxMoEError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install 'fluxmoe[hf]'" in done.stdout
