"""Fixtures that make small random Hugging Face models, and helpers for tests of these models."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fluxmoe.backends.torch import layout
from fluxmoe.testing import checkpoints
from tests.identity.torch_cells import answer, prompts, same

Load = Callable[..., Any]

__all__ = ["Load", "answer", "held", "prompts", "same", "sizes"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, because spinning threads slow down tests that run in parallel."""
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
    """A function ``load(architecture, implementation, dtype, **settings)``, which makes a model."""

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


def sizes(model: Any) -> tuple[int, int, int]:
    """Return the number of experts per layer, the number of pages, and the bytes of a page."""
    geometry, page_class = layout.describe(layout.experts_of(model))
    return geometry.experts_per_layer, geometry.num_pages, page_class.nbytes


def held() -> tuple[int, int, int]:
    """Count this process's open files, mapped frames and copy threads."""
    gc.collect()
    return (
        len(os.listdir("/proc/self/fd")),
        Path("/proc/self/maps").read_text().count("memfd:"),
        sum(thread.name.startswith("fluxmoe-copy") for thread in threading.enumerate()),
    )
