"""Models whose experts exceed the memory that the engine's processes may use.

The negative control is the unpaged engine, which the system kills under the same limit.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxmoe import machine
from fluxmoe.testing import checkpoints
from tests.cgroup import limited

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SHAPE = {
    "hidden_size": 1024,
    "moe_intermediate_size": 768,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 8192,
}
LAYER = 64 * 3 * 1024 * 768 * 2


class Case(NamedTuple):
    """A model's number of layers, the memory for its experts, and the limit on all memory."""

    layers: int
    budget: str
    limit: int


#: Four times the budget: 1.2 GB of experts.
SMALL, SMALL_VLLM = Case(4, "288MiB", 1 << 30), Case(4, "288MiB", 1536 << 20)
#: 12 GB of experts.
LARGE = Case(40, "1792MiB", 3 << 30)

RUN = """
import json, sys
backend, model, budget, pages = sys.argv[1:]
stores = [{"kind": "file", "path": pages}]
ids = [5, 6, 7, 8]
if backend == "torch":
    import torch, transformers, fluxmoe
    torch.set_num_threads(1)
    if pages:
        model = fluxmoe.load(model, budget, stores=stores).model
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, 4:].tolist()
else:
    from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
    if pages:
        memory = {"budget": budget, "kv": {"target": "32MiB"}}
        more = {"fluxmoe": {"memory": memory, "stores": stores}}
    else:
        more = {"kv_cache_memory_bytes": 32 << 20}
    options = dict(enforce_eager=True, max_model_len=64, max_num_seqs=1, block_size=32)
    with ChildEngine(model, **options, **more) as engine:
        out = engine.generate([Prompt(ids, 8)]).tokens[0]
print(json.dumps(out))
"""


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of ``request.param`` layers, of which no two are equal; removed afterwards."""
    with limited(1 << 30):
        pass  # skips the test before the model is written
    layers: int = request.param
    needed = 3 * layers * LAYER
    if machine.free_disk(tmp_path) < needed:
        pytest.skip(f"the disk has no room for {needed >> 30} GiB")
    one = checkpoints.write(tmp_path / "one", "qwen3-moe", num_hidden_layers=1, **SHAPE)
    folder = tmp_path / "model"
    folder.mkdir()
    weights = load_file(one / "model.safetensors")
    index = {}
    for layer in range(layers):
        file = f"model-{layer:05}.safetensors"
        named = {
            name.replace("layers.0.", f"layers.{layer}."): torch.roll(weight, layer, 0).contiguous()
            for name, weight in weights.items()
            if "layers.0." in name or layer == 0
        }
        save_file(named, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(named, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config = json.loads((one / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    yield folder
    shutil.rmtree(tmp_path)


def run(
    backend: str, model: Path, budget: str, pages: str, limit: int | None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, backend, str(model), budget, pages]
    if limit is None:
        return subprocess.run(command, capture_output=True, text=True)
    with limited(limit) as join:
        return subprocess.run(command, capture_output=True, text=True, preexec_fn=join)


@pytest.mark.parametrize(
    ("backend", "case", "model"),
    [
        pytest.param("torch", SMALL, SMALL.layers, id="torch, small"),
        pytest.param(
            *("vllm", SMALL_VLLM, SMALL.layers),
            marks=[pytest.mark.full, pytest.mark.vllm],
            id="vllm, small",
        ),
        pytest.param("torch", LARGE, LARGE.layers, marks=pytest.mark.full, id="torch, 12 GB"),
        pytest.param(
            *("vllm", LARGE, LARGE.layers),
            marks=[pytest.mark.full, pytest.mark.vllm],
            id="vllm, 12 GB",
        ),
    ],
    indirect=["model"],
)
def test_it_runs_within_a_limit_that_kills_the_unpaged_engine(
    backend: str, case: Case, model: Path, tmp_path: Path
) -> None:
    pages = str(tmp_path / "pages")
    first, second = (run(backend, model, case.budget, pages, case.limit) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    stock = run(backend, model, "", "", case.limit)
    killed = -signal.SIGKILL
    assert stock.returncode == killed or f"exit code {killed}" in stock.stderr, stock.stderr
    answers = [json.loads(each.stdout.splitlines()[-1]) for each in (first, second)]
    if machine.memory().available > 1.5 * case.layers * LAYER:
        stock = run(backend, model, "", "", None)
        answers.append(json.loads(stock.stdout.splitlines()[-1]))
    assert all(answer == answers[0] and len(set(answer)) > 1 for answer in answers), answers
