"""Real Hugging Face models, small and random, and what they answer unpaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fluxmoe.backends.torch import layout
from fluxmoe.testing import checkpoints

Load = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Spinning threads of tests that run side by side cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def write(architecture: str = "qwen3-moe", **settings: Any) -> Path:
        name = "-".join([architecture, *map(str, settings.values())])
        return checkpoints.write(folder / name, architecture, **settings)

    return write


@pytest.fixture(scope="session")
def load(checkpoint: Callable[..., Path]) -> Load:
    """``load(architecture, implementation, **settings)``: a model of its own."""

    def load(
        architecture: str = "qwen3-moe",
        implementation: str = "grouped_mm",
        dtype: Any = "auto",
        **settings: Any,
    ) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint(architecture, **settings),
            dtype=dtype,
            experts_implementation=implementation,
        ).eval()

    return load


def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, padded at the left."""
    ids = torch.randint(3, 1000, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :9] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: Any, new_tokens: int = 8) -> tuple[torch.Tensor, ...]:
    """Logits of all prompt tokens, the generated tokens, and the logits of every decode step."""
    with torch.inference_mode():
        logits = model(**prompts()).logits
        generated = model.generate(
            **prompts(),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return logits, generated.sequences, *generated.logits


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    """Bit for bit."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def sizes(model: Any) -> tuple[int, int, int]:
    """Experts per layer, pages, and bytes of a page."""
    geometry, page_class = layout.describe(layout.experts_of(model))
    return geometry.experts_per_layer, geometry.num_pages, page_class.nbytes
