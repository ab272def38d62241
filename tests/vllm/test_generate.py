"""``fluxmoe generate --backend vllm``: stock vLLM's tokens, and the statistics of paging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
from tests.commandline import here
from tests.vllm.conftest import EAGER, KV_BYTES

pytestmark = pytest.mark.vllm

OPTIONS = ["--backend", "vllm", "--prompt-ids", "7,8,9"]


def run(*arguments: object) -> tuple[int, str, str]:
    """Run the command, and return its exit status, standard output and standard error."""
    done = here("generate", *arguments)
    return done.returncode or 0, done.stdout, done.stderr


def test_it_stops_where_transformers_does_and_says_what_stock_says(
    eager: ChildEngine, checkpoint: Path, tmp_path: Path
) -> None:
    eager.restart(kv_cache_memory_bytes=KV_BYTES, **EAGER)
    stock = eager.generate([Prompt([7, 8, 9], 24)]).tokens[0]
    end = stock[12]
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    more = ["--memory", "1200KiB", "--eviction", "lru", "--max-new-tokens", 24, "--json"]
    status, out, err = run(model, *OPTIONS, *more)
    assert status == 0, err
    result = json.loads(out)
    assert result["token_ids"] == stock[: stock.index(end) + 1]
    assert result["backend"] == "vllm"
    assert isinstance(result["text"], str)
    stats = result["stats"]
    assert stats["misses"] > 0
    assert stats["slots"] < stats["pages"] == 64
    assert stats["committed_bytes"] <= stats["budget_bytes"] == 1200 << 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--memory", "lots"], "error[FM101]: memory.budget"),
        (["--memory", "-1GiB"], "error[FM101]: memory.budget"),
        (["--eviction", "lur"], "known eviction policies"),
        (["--plugin", "nothing.py"], "error[FM202]: no such file"),
    ],
)
def test_what_can_be_seen_before_the_engine_starts(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.setattr(ChildEngine, "__init__", None)  # never called
    status, out, err = run(checkpoint, *OPTIONS, *arguments)
    assert (status, out) == (2, "")
    assert says in err
