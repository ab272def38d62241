"""A compiled paged model gives the same output as the compiled unpaged model, bit for bit.

Each compilation takes seconds, so the models have one or two layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import fluxmoe
from tests.torch.conftest import Load, prompts, sizes

pytestmark = pytest.mark.slow


def test_compiled_as_one_graph(load: Load) -> None:
    model = load("glm4-moe", num_hidden_layers=2)  # because its fp32 router is the most sensitive
    experts, _, page_bytes = sizes(model)

    def compiled() -> list[torch.Tensor]:
        torch._dynamo.reset()
        call = torch.compile(model, fullgraph=True)
        ids = prompts()["input_ids"]
        with torch.no_grad():
            return [call(ids.roll(shift), use_cache=False).logits for shift in range(4)]

    stock = compiled()
    with fluxmoe.page(model, experts * page_bytes, eviction="immediate") as paged:
        assert all(map(torch.equal, compiled(), stock))
        assert paged.stats()["misses"] > 2 * experts
        call = torch.compile(model, fullgraph=True)  # compiled code must not outlive the arenas
    with torch.no_grad():
        after = call(prompts()["input_ids"], use_cache=False).logits
    assert torch.equal(after, stock[0])


def generate_with_static_cache(model: Any) -> list[torch.Tensor]:
    """Generate with transformers' loop: eager prefill, compiled decode steps."""
    compiled = CompileConfig(fullgraph=True, mode="default", dynamic=False)
    compiled._compile_all_devices = True  # otherwise, transformers compiles only on GPUs
    vars(model).pop("_compiled_call", None)
    found = model.generate(
        **prompts(),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="static",
        compile_config=compiled,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return [found.sequences, *found.logits]


def decode_with_dynamic_cache(model: Any) -> list[torch.Tensor]:
    """Decode in a custom loop; the cache grows, so shapes become symbolic in the second step."""
    cache, call = DynamicCache(config=model.config), torch.compile(model, fullgraph=True)
    found = [model(prompts()["input_ids"], past_key_values=cache).logits]
    for _ in range(4):
        next_ids = found[-1][:, -1:].argmax(-1)
        found.append(call(next_ids, past_key_values=cache).logits)
    return found


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("decode", "implementation", "layers"),
    [
        pytest.param(generate_with_static_cache, "grouped_mm", 2, marks=pytest.mark.full),
        (decode_with_dynamic_cache, "batched_mm", 1),
    ],
)
def test_decoding_with_a_cache(load: Load, decode: Any, implementation: str, layers: int) -> None:
    model = load("qwen3-moe", implementation, num_hidden_layers=layers)
    experts, pages, page_bytes = sizes(model)

    def anew() -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch.inference_mode():
            found = decode(model)
        assert compiled_graphs() > 0
        return found

    stock = anew()
    with fluxmoe.page(model, experts * page_bytes, eviction="immediate") as paged:
        assert all(map(torch.equal, anew(), stock))
        assert paged.stats()["misses"] > experts
        if pages > experts:  # code compiled for fewer slots is not used for more
            before = compiled_graphs()
            paged.resize(pages * page_bytes)
            with torch.inference_mode():
                assert all(map(torch.equal, decode(model), stock))
            assert compiled_graphs() > before
