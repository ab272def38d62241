"""The cells of the identity matrix."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from fluxmoe import plugins

#: The model trained for this project, if its checkpoint is in the package.
SHIPPED = "shipped"
#: Random checkpoints. Those from Qwen2-MoE to DeepSeek have shared experts, and GLM4-MoE and
#: DeepSeek have a dense first layer; DeepSeek has multi-head latent attention (MLA). Hybrids have
#: layers that keep a state instead of keys and values.
HYBRID = ("qwen3-next", "qwen3.5-moe", "lfm2-moe", "granite-hybrid")
MLA = ("deepseek-v2", "deepseek-v3")
#: Models with Mamba-2 layers. With prefix caching, vLLM's CPU kernel for Mamba-2 raises an
#: IndexError for a prompt that is longer than a block.
MAMBA2 = ("granite-hybrid",)
RANDOM = ("mixtral", "olmoe", "qwen3-moe", "qwen2-moe", "glm4-moe", *MLA, *HYBRID)

VLLM_MODES = ("vllm eager", "vllm compiled", "vllm three-process")
TORCH_MODES = ("torch eager", "torch grouped_mm", "torch batched_mm", "torch compiled")

#: Slots as a share of all pages, and number of banks. A bank needs slots for one layer's experts.
SIZES = (("one layer", 1), ("half", 1), ("half", 2), ("all", 1), ("all", 2))


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination. ``prefix_caching`` and ``chunked_prefill`` are None under torch."""

    model: str
    mode: str
    eviction: str
    prefetch: str
    slots: str
    banks: int
    prefix_caching: bool | None = None
    chunked_prefill: bool | None = None

    def __str__(self) -> str:
        parts = [self.model, self.mode, self.eviction, self.prefetch, self.slots]
        parts.append(f"{self.banks} bank{'s' * (self.banks > 1)}")
        if self.prefix_caching is not None:
            parts.append("prefix " + ("on" if self.prefix_caching else "off"))
            parts.append("chunked " + ("on" if self.chunked_prefill else "off"))
        return ", ".join(parts)

    @property
    def stock(self) -> tuple[str, str, bool | None, bool | None]:
        """Settings of the unpaged run; cells with equal settings share this run."""
        return self.model, self.mode, self.prefix_caching, self.chunked_prefill


@cache
def policies() -> tuple[list[str], list[str]]:
    """List the built-in eviction and prefetch policies that can serve.

    Oracles are excluded, and so is ``gate``, which ``test_gate`` of each backend covers.
    """
    known = [policy for policy in plugins.load() if policy.plugin == "fluxmoe"]
    eviction = [
        policy.name
        for policy in known
        if policy.kind == "eviction" and not getattr(policy.factory, "needs_future", False)
    ]
    prefetch = [policy.name for policy in known if policy.kind == "prefetch"]
    return eviction, [name for name in prefetch if name != "gate"]


def settings(model: str) -> list[tuple[bool, bool]]:
    """List settings of prefix caching and chunked prefill.

    vLLM disables both for MLA on a CPU, and caches prefixes of hybrids only with chunked prefill.
    """
    if model in MLA:
        return [(False, False)] * 4
    if model in MAMBA2:
        return [(False, True), (False, False)] * 2
    if model in HYBRID:
        return [(True, True), (False, False), (False, True), (False, False)]
    return [(True, True), (False, False), (True, False), (False, True)]


def full(models: Sequence[str], modes: Sequence[str]) -> Iterator[Cell]:
    """List every combination of model, mode, eviction policy, prefix caching and chunked prefill.

    Prefetch, slots and banks are distributed so that each model gets all their combinations in each
    mode. Torch has neither prefix caching nor chunked prefill; instead, each eviction policy
    gets all combinations of prefetch, slots and banks, or only one in compiled mode, which is
    slow.
    """
    evictions, _ = policies()
    for mode in modes:
        dealt = {model: _dealt(f"{model} {mode}") for model in models}
        if mode in VLLM_MODES:
            # Settings vary in the outermost loop, so a run that is cut short has covered every
            # policy.
            for turn, model, eviction in product(range(4), models, evictions):
                prefix, chunked = settings(model)[turn]
                prefetch, (slots, banks) = next(dealt[model])
                yield Cell(model, mode, eviction, prefetch, slots, banks, prefix, chunked)
        elif mode == "torch compiled":
            for model, eviction in product(models, evictions):
                prefetch, (slots, banks) = next(dealt[model])
                yield Cell(model, mode, eviction, prefetch, slots, banks)
        else:
            for model, eviction, shape in product(models, evictions, _shapes()):
                prefetch, (slots, banks) = shape
                yield Cell(model, mode, eviction, prefetch, slots, banks)


def product_of(models: Sequence[str], modes: Sequence[str]) -> Iterator[Cell]:
    """List all combinations of all values."""
    evictions, _ = policies()
    for model, mode, eviction, shape in product(models, modes, evictions, _shapes()):
        prefetch, (slots, banks) = shape
        for setting in dict.fromkeys(settings(model)) if mode in VLLM_MODES else [(None, None)]:
            yield Cell(model, mode, eviction, prefetch, slots, banks, *setting)


def _shapes() -> list[tuple[str, tuple[str, int]]]:
    """List all combinations of a prefetch policy with slots and banks."""
    return list(product(policies()[1], SIZES))


def _dealt(seed: str) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the shapes repeatedly, each round in a different but reproducible order."""
    rng, shapes = random.Random(seed), _shapes()
    while True:
        yield from rng.sample(shapes, len(shapes))
