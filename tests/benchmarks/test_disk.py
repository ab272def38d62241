"""The model of ``benchmarks disk``: its routing is that of the trace, and its tokens count up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fluxmoe
from benchmarks.disk import command, model
from benchmarks.disk.engines import Task
from fluxmoe.trace import shipped
from fluxmoe.trace.reader import TraceReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write(tmp_path_factory.mktemp("disk"), 16)


def test_routing_and_tokens(folder: Path, tmp_path: Path) -> None:
    wanted = {}
    for step, layer, _, routed in TraceReader(shipped.path(model.TRACE)).events():
        if step == 40:
            break
        wanted[step, layer] = routed.tolist()
    made = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with fluxmoe.page(made) as paged:
        with paged.record(tmp_path / "t.parquet"), torch.no_grad():
            out = made.generate(torch.tensor([[0, 1, 2]]), max_new_tokens=37, do_sample=False)
        assert out[0].tolist() == list(range(40))
    found: dict[tuple[int, int], list[int]] = {}
    at = {layer: 0 for layer in range(made.config.num_hidden_layers)}
    top_k = made.config.num_experts_per_tok
    for _, layer, _, routed in TraceReader(tmp_path / "t.parquet").events():
        for token in routed.reshape(-1, top_k).tolist():
            found[at[layer], layer] = token
            at[layer] += 1
    for (step, layer), experts in wanted.items():
        if step < 39:
            assert found[step, layer] == experts


def test_a_batch_starts_at_different_steps() -> None:
    prompts = Task("", "", 0, batch=16, new=5, peers="").prompts()
    assert len({tuple(prompt) for prompt in prompts}) == 16
    assert max(map(max, prompts)) + 5 < model.TOKENS


def test_the_interval_of_a_median() -> None:
    median, low, high = command.interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (median, low <= 3 <= high) == (3.0, True)
    assert high <= 100
