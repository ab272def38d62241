"""The cells of the identity matrix, and the selection that ``make test`` runs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from fluxmoe import plugins

#: The model trained for this project, if its checkpoint is in the package.
SHIPPED = "shipped"
#: Random checkpoints: plain, and with shared experts from Qwen2-MoE on; the first layer is dense
#: from GLM4-MoE on; DeepSeek has multi-head latent attention (MLA).
RANDOM = ("mixtral", "olmoe", "qwen3-moe", "qwen2-moe", "glm4-moe", "deepseek-v2", "deepseek-v3")
MLA = ("deepseek-v2", "deepseek-v3")

VLLM_MODES = ("vllm eager", "vllm compiled", "vllm three-process")
TORCH_MODES = ("torch eager", "torch grouped_mm", "torch batched_mm", "torch compiled")

#: Slots as a share of all pages, and banks. A bank needs at least one layer's experts.
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
        """What the unpaged run depends on: cells that share it are compared with the same one."""
        return self.model, self.mode, self.prefix_caching, self.chunked_prefill


def policies() -> tuple[list[str], list[str]]:
    """Eviction and prefetch policies that can serve, of those built in: no oracles."""
    known = [policy for policy in plugins.load() if policy.plugin == "fluxmoe"]
    eviction = [
        policy.name
        for policy in known
        if policy.kind == "eviction" and not getattr(policy.factory, "needs_future", False)
    ]
    return eviction, [policy.name for policy in known if policy.kind == "prefetch"]


def settings(model: str) -> list[tuple[bool, bool]]:
    """Prefix caching and chunked prefill. vLLM forces both off for MLA on a CPU."""
    if model in MLA:
        return [(False, False)] * 4
    return [(True, True), (False, False), (True, False), (False, True)]


def full(models: Sequence[str], modes: Sequence[str]) -> Iterator[Cell]:
    """Every model x mode x eviction policy x prefix caching x chunked prefill.

    Prefetch, slots and banks are dealt out so that each model meets all their combinations in each
    mode. Torch has neither cache nor chunks, and takes all combinations with every policy instead;
    compiled, where one takes long, it takes one.
    """
    evictions, prefetches = policies()
    shapes = list(product(prefetches, SIZES))
    for mode in modes:
        dealt = {model: _dealt(shapes, f"{model} {mode}") for model in models}
        if mode in VLLM_MODES:
            # Settings last in the order of nesting: a run that is cut short has seen every policy.
            for turn, model, eviction in product(range(4), models, evictions):
                prefix, chunked = settings(model)[turn]
                prefetch, (slots, banks) = next(dealt[model])
                yield Cell(model, mode, eviction, prefetch, slots, banks, prefix, chunked)
        elif mode == "torch compiled":
            for model, eviction in product(models, evictions):
                prefetch, (slots, banks) = next(dealt[model])
                yield Cell(model, mode, eviction, prefetch, slots, banks)
        else:
            for model, eviction, shape in product(models, evictions, shapes):
                prefetch, (slots, banks) = shape
                yield Cell(model, mode, eviction, prefetch, slots, banks)


def covering(models: Sequence[str], modes: Sequence[str]) -> list[Cell]:
    """What ``make test`` runs.

    vLLM eager: every model with every eviction policy, and all pairs of model, eviction, prefetch,
    size, prefix caching and chunked prefill that exist. Compiled: every eviction policy.
    Three-process: two models. Where a start takes long, each model keeps to one setting of vLLM.
    """
    evictions, prefetches = policies()
    shapes = list(product(prefetches, SIZES))
    chosen = []
    for number, model in enumerate(models):
        both = settings(model)
        # Two of the four settings: each of prefix caching and chunked prefill both on and off.
        mine = both[:2] if number % 2 else both[2:]
        dealt = _dealt(shapes, f"covering {model}")
        for turn, eviction in enumerate(evictions):
            prefix, chunked = mine[(turn + number // 2) % 2]
            prefetch, (slots, banks) = next(dealt)
            cell = Cell(model, VLLM_MODES[0], eviction, prefetch, slots, banks, prefix, chunked)
            chosen.append(cell)
    dealt = _dealt(shapes, "covering compiled")
    # A shared expert, a dense first layer and a router in fp32 make GLM4-MoE the touchy one.
    fused = [model for model in (SHIPPED, "glm4-moe") if model in models]
    for turn, eviction in enumerate(evictions):
        prefetch, (slots, banks) = next(dealt)
        model = fused[turn % len(fused)]
        on = model == fused[-1]
        chosen.append(Cell(model, VLLM_MODES[1], eviction, prefetch, slots, banks, on, not on))
    chosen.append(Cell("glm4-moe", VLLM_MODES[2], "next-use", "next-layer", "half", 2, True, True))
    chosen.append(Cell("deepseek-v2", VLLM_MODES[2], "lfru", "none", "one layer", 1, False, False))
    return [cell for cell in chosen if cell.mode in modes]


def _dealt(
    shapes: list[tuple[str, tuple[str, int]]], seed: str
) -> Iterator[tuple[str, tuple[str, int]]]:
    """The shapes over and over, each round in an order of its own, the same in every run."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(shapes, len(shapes))
