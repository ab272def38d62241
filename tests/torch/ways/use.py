"""A model on which a way is tried: first unpaged, for the right answer, and then paged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fluxmoe
from fluxmoe.errors import FluxMoEError
from tests.identity.torch_cells import prompts

IDS = prompts()["input_ids"]


@dataclass
class Use:
    """One use of a model.

    Attributes:
        model: The model.
        stock: A model with the same weights that is never paged.
        folder: An empty folder.
        checkpoint: The checkpoint from which the model was loaded.
        handle: The handle; None while the model is not paged.
        code: Error code of all refusals.
        refused: Number of refusals so far.
        stays_unpaged: True for the run that gives the right answer.
    """

    model: Any
    stock: Any
    folder: Path
    checkpoint: Path
    code: str
    stays_unpaged: bool = False
    handle: Any = None
    refused: int = 0

    def page(self) -> None:
        if not self.stays_unpaged:
            self.handle = fluxmoe.page(
                self.model, "2MiB" if self.model.dtype == torch.float32 else "1MiB"
            )

    def close(self) -> None:
        if self.handle is not None:
            self.handle.close()
            self.handle = None

    @property
    def layers(self) -> Any:
        return self.model.model.layers

    @property
    def experts(self) -> Any:
        return self.layers[1].mlp.experts

    @property
    def states(self) -> torch.Tensor:
        """Make hidden states ``[1, 6, hidden]``."""
        draw = torch.Generator().manual_seed(1)
        states = torch.randn(1, 6, self.model.config.hidden_size, generator=draw)
        return states.to(self.model.dtype)

    def run(self, model: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return (self.model if model is None else model)(IDS, use_cache=False).logits

    def other(self) -> Any:
        """Make another model with the same weights, which is not paged."""
        return copy.deepcopy(self.stock)

    def refuses(self, *attempts: Callable[[], object]) -> None:
        """Require that each attempt is refused with the code and a remedy."""
        for attempt in attempts:
            with pytest.raises(FluxMoEError) as caught:
                attempt()
            assert caught.value.code == self.code, caught.value
            assert caught.value.what
            assert caught.value.fix
            self.refused += 1


Way = Callable[[Use], Any]


def pages_itself(way: Way) -> Way:
    """Mark a way that starts with an unpaged model and pages the model itself."""
    way.pages_itself = True  # type: ignore[attr-defined]
    return way


def eager(way: Way) -> Way:
    """Mark a way that changes what runs inside the experts of a paged model."""
    way.implementation = "eager"  # type: ignore[attr-defined]
    return way


def slow(way: Way) -> Way:
    """Mark a way that takes more than about 10 seconds."""
    way.slow = True  # type: ignore[attr-defined]
    return way


def of_a_loaded_model(way: Way) -> Way:
    """Mark a way that applies only to models from ``fluxmoe.load``."""
    way.of_a_loaded_model = True  # type: ignore[attr-defined]
    return way
