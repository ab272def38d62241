"""Sampling from a Hugging Face model in batches, to record its routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fluxmoe.backends.torch.names import NAMES

NAMES.require("sampling")

from transformers import StoppingCriteria, StoppingCriteriaList


class _When(StoppingCriteria):
    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stop(), dtype=torch.bool)


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop: Callable[[], bool],
) -> list[list[int]]:
    """Continue a batch of prompts, padded on the left, without stopping at the end-of-text token.

    Args:
        model: A model of ``transformers``.
        prompts: Token ids, one list per row of the batch.
        max_new_tokens: Number of tokens to generate per prompt.
        temperature: Sampling temperature; 0 always picks the likeliest token.
        seed: Random seed.
        stop: Function that is called after every step and ends the run by returning True.

    Returns:
        The new tokens of each row.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    chosen = {"do_sample": True, "temperature": temperature} if temperature else {}
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        texts: torch.Tensor = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            top_k=0,
            top_p=1.0,
            stopping_criteria=StoppingCriteriaList([_When(stop)]),
            **{"do_sample": False, **chosen},
        )
    new: list[list[int]] = texts[:, longest:].tolist()
    return new
