"""The shipped model: the claims of its card hold, and its output reads like text."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fluxmoe.demo.compare import PROMPTS, DemoWorkload
from fluxmoe.demo.model import SHIPPED, DemoModel

#: Public-domain text of the held-out part: three chapters of the Bible, and one by Jane Austen.
HELD_OUT = Path(__file__).with_name("held-out.txt").read_text()
WINDOW = 512


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SHIPPED / "measured.json").read_text())
    return found


def test_size_and_type() -> None:
    weights = SHIPPED / "model.safetensors"
    assert weights.stat().st_size <= 24 * 2**20
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_shape() -> None:
    config = json.loads((SHIPPED / "config.json").read_text())
    demo = DemoModel.read(SHIPPED)
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (demo.layers, demo.experts, demo.top_k) == (6, 64, 4)
    assert demo.hidden % 32 == demo.expert_hidden % 32 == 0  # for vLLM's MoE kernel for CPUs
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] >= 1024
    expert_bytes = 0
    with safe_open(SHIPPED / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if ".experts." in name:
                expert_bytes += 2 * math.prod(file.get_slice(name).get_shape())
    assert expert_bytes == demo.experts_total_bytes


@pytest.mark.parametrize("text", ["In the beginning", "“Ünïcödé” – ☃\n\ttab\0", HELD_OUT])
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_held_out_bits_per_byte(model: Any, tokenizer: Any, measured: dict[str, Any]) -> None:
    ids = torch.tensor(tokenizer(HELD_OUT)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[::3]
    with torch.inference_mode():
        loss = model(windows, labels=windows).loss
    mean = (measured["held_out"]["bible"] + measured["held_out"]["austen"]) / 2
    assert loss.item() / math.log(2) == pytest.approx(mean, abs=0.15)


def test_card_quotes_what_was_measured(measured: dict[str, Any]) -> None:
    card = (SHIPPED / "README.md").read_text()
    for source, bits in measured["held_out"].items():
        assert f"| {source} | {bits:.3f} |" in card
    for layer in measured["layers"]:
        assert f"| {layer['max_over_mean']:.2f} | {layer['entropy_bits']:.2f} |" in card


def test_routers_are_balanced(measured: dict[str, Any]) -> None:
    for layer in measured["layers"]:
        assert layer["max_over_mean"] < 3
        assert layer["entropy_bits"] > 5.5  # 6 if all 64 experts had the same load


def test_samples_read_as_text(model: Any, tokenizer: Any) -> None:
    """Most sampled words occur in the held-out text."""
    known = set(re.findall(r"[a-z]+", f"{HELD_OUT}".lower()))
    prompt = tokenizer(["And he said unto them, ", "She could not but think "], padding=True)
    ids = torch.tensor(prompt["input_ids"])
    mask = torch.tensor(prompt["attention_mask"])
    torch.manual_seed(0)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=160, do_sample=True, temperature=0.8,
        top_k=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    text = " ".join(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))
    assert sum(
        char.isascii() and (char.isprintable() or char == "\n") for char in text
    ) > 0.98 * len(text)
    words = [word for word in re.findall(r"[a-z]+", text.lower())][1:-1]
    assert 4 < len(text) / len(words) < 8
    assert sum(word in known for word in words) > 0.7 * len(words), text


def test_prompts() -> None:
    lines = PROMPTS.read_text().splitlines()
    assert len(lines) == len(set(lines)) >= 64
    assert max(map(len, lines)) + 100 <= DemoModel.read(SHIPPED).block_tokens
    assert DemoWorkload(len(lines) + 1).texts() == [*lines, lines[0]]
    requests = DemoWorkload(3, output_tokens=7).prompts(SHIPPED)
    assert [len(request.tokens) for request in requests] == [len(line) for line in lines[:3]]
    assert len({request.seed for request in requests}) == 3
