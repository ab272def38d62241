"""C4, C10: the log when a model is paged, and the handle's representation as text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import fluxmoe
from tests.torch.conftest import Load, prompts, sizes


def started(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """Return the lines of the only block in the log: name → value."""
    (block,) = (r.getMessage() for r in caplog.records if "pages the experts" in r.getMessage())
    headline, *lines = block.splitlines()
    assert headline.startswith(f"FluxMoE {fluxmoe.__version__} pages the experts of ")
    return {"headline": headline, **{line[2:14].strip(): line[15:] for line in lines}}


def test_c4_page_logs_one_block(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    model = load("qwen3-moe")
    experts, pages, nbytes = sizes(model)
    caplog.set_level(logging.INFO, "fluxmoe")
    with fluxmoe.page(model, 24 * nbytes, eviction="lru") as paged:
        said = started(caplog)
        slots, budget = paged.stats()["slots"], int(paged.stats()["budget_bytes"])
    assert f"{pages // experts} layers of {experts}, " in said["headline"]
    assert said["budget"] == f"{fluxmoe.sizes.shown(budget)} for experts"
    assert said["slots"] == f"{slots} of {pages} pages, in 1 bank"
    assert said["eviction"] == f"lru (FluxMoE {fluxmoe.__version__})"
    assert said["prefetch"] == f"none (FluxMoE {fluxmoe.__version__})"
    assert said["stores"] == f"host: {fluxmoe.sizes.shown(pages * nbytes)}"
    assert "note" not in said


def test_c4_load_says_where_policies_come_from_and_that_slots_are_few(
    checkpoint: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import fluxmoe\n"
        "__version__ = '7.1'\n"
        "class Mine(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages):\n"
        "        return view.last_use[pages]\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register):\n"
        "    register('mine', Mine)\n"
    )
    folder = checkpoint("qwen3-moe", num_experts_per_tok=8)
    store = {"kind": "host", "codec": "fixed4", "limit": "1GiB"}
    caplog.set_level(logging.INFO, "fluxmoe")
    with fluxmoe.load(
        folder, "800KiB", eviction="mine", plugins=[str(plugin)], stores=[store]
    ) as paged:
        slots = paged.stats()["slots"]
        assert slots < 4 * 8
    said = started(caplog)
    assert str(folder) in said["headline"]
    assert said["eviction"] == f"mine ({plugin} 7.1)"
    assert said["stores"].startswith("host with fixed4 up to 1.0 GiB: ")
    assert said["note"] == (
        "the slots are fewer than the 32 pages that a token uses (8 in each layer), so a policy "
        "such as lru would never hit"
    )


def test_c4_without_logging_nothing_is_printed(
    load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    with fluxmoe.page(load("qwen3-moe")):
        pass
    assert "pages the experts" not in "".join(capsys.readouterr())


def test_c10_a_handle_as_text(load: Load) -> None:
    model = load("qwen3-moe")
    _, pages, nbytes = sizes(model)
    with fluxmoe.page(model, 24 * nbytes) as paged:
        budget, slots = int(paged.stats()["budget_bytes"]), paged.stats()["slots"]
        head = f"PagedModel(Qwen3MoeForCausalLM, budget={fluxmoe.sizes.shown(budget)}, "
        assert repr(paged) == f"{head}slots={slots} of {pages}, hit_rate=unused)"
        with torch.no_grad():
            model(**prompts())
        hit_rate = paged.stats()["hit_rate"]
        assert repr(paged) == f"{head}slots={slots} of {pages}, hit_rate={hit_rate:.1%})"
    assert repr(paged) == "PagedModel(Qwen3MoeForCausalLM, closed)"
