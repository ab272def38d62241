"""The cells of the identity matrix, and the selection that ``make test`` runs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

from fluxmoe import plugins

#: The model trained for this project, if its checkpoint is in the package.
SHIPPED = "shipped"
#: Random checkpoints: plain, and with shared experts from Qwen2-MoE on; the first layer is dense
#: from GLM4-MoE on; DeepSeek has multi-head latent attention (MLA). Hybrids have layers that keep
#: a state instead of keys and values.
HYBRID = ("qwen3-next", "qwen3.5-moe", "lfm2-moe", "granite-hybrid")
MLA = ("deepseek-v2", "deepseek-v3")
RANDOM = ("mixtral", "olmoe", "qwen3-moe", "qwen2-moe", "glm4-moe", *MLA, *HYBRID)

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
    def pairs(self) -> set[tuple[object, ...]]:
        """All pairs of its values, with their names."""
        values = [(name, getattr(self, name)) for name in self.__slots__]
        return set(combinations(values, 2))

    @property
    def stock(self) -> tuple[str, str, bool | None, bool | None]:
        """What the unpaged run depends on: cells that share it are compared with the same one."""
        return self.model, self.mode, self.prefix_caching, self.chunked_prefill


@cache
def policies() -> tuple[list[str], list[str]]:
    """Eviction and prefetch policies that can serve, of those built in.

    Not oracles, and not ``gate``: no engine has the predictions it passes on, so it is ``none``.
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
    """Prefix caching and chunked prefill.

    vLLM forces both off for MLA on a CPU, and caches prefixes of hybrids only in chunks.
    """
    if model in MLA:
        return [(False, False)] * 4
    if model in HYBRID:
        return [(True, True), (False, False), (False, True), (False, False)]
    return [(True, True), (False, False), (True, False), (False, True)]


def full(models: Sequence[str], modes: Sequence[str]) -> Iterator[Cell]:
    """Every model x mode x eviction policy x prefix caching x chunked prefill.

    Prefetch, slots and banks are dealt out so that each model meets all their combinations in each
    mode. Torch has neither cache nor chunks, and takes all combinations with every policy instead;
    compiled, where one takes long, it takes one.
    """
    evictions, _ = policies()
    for mode in modes:
        dealt = {model: _dealt(f"{model} {mode}") for model in models}
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
            for model, eviction, shape in product(models, evictions, _shapes()):
                prefetch, (slots, banks) = shape
                yield Cell(model, mode, eviction, prefetch, slots, banks)


def covering(models: Sequence[str], modes: Sequence[str]) -> list[Cell]:
    """What ``make test`` runs.

    vLLM eager: every model with every eviction policy, chosen so that they cover all pairs of
    values that there are; a hybrid, whose steps take long, meets one policy in each setting.
    Compiled: every eviction policy. Three-process: a model with shared experts. Hybrids take turns
    in these two. A model keeps to two of vLLM's settings, or to one where a start takes long: each
    needs a stock run.
    """
    evictions, _ = policies()
    seen: set[tuple[object, ...]] = set()
    chosen = []

    def choose(model: str, mode: str, eviction: str, kept: list[tuple[bool, bool]]) -> None:
        candidates = (
            Cell(model, mode, eviction, prefetch, slots, banks, prefix, chunked)
            for (prefetch, (slots, banks)), (prefix, chunked) in product(_shapes(), kept)
        )
        best = max(candidates, key=lambda cell: len(cell.pairs - seen))
        seen.update(best.pairs)
        if best.mode in modes:
            chosen.append(best)

    eager, compiled, three = VLLM_MODES
    for number, model in enumerate(name for name in models if name not in HYBRID):
        kept = settings(model)[:2] if number % 2 else settings(model)[2:]
        for eviction in evictions:
            choose(model, eager, eviction, kept)
    for number, model in enumerate(name for name in models if name in HYBRID):
        for turn, setting in enumerate(settings(model)[:2]):
            choose(model, eager, evictions[(2 * number + turn) % len(evictions)], [setting])
        mode = (compiled, three)[number % 2]
        choose(model, mode, evictions[number % len(evictions)], settings(model)[:1])
    # A shared expert, a dense first layer and a router in fp32 make GLM4-MoE the touchy one.
    touchy = [*([SHIPPED] if SHIPPED in models else []), "glm4-moe"]
    for turn, eviction in enumerate(evictions):
        number = turn % len(touchy)
        choose(touchy[number], compiled, eviction, [settings(touchy[number])[number]])
    choose("glm4-moe", three, evictions[-1], settings("glm4-moe")[:1])
    return chosen


def covering_torch(models: Sequence[str]) -> list[Cell]:
    """What ``make test`` runs under torch: three shapes for every model, implementation and policy.

    A hybrid, whose steps take long, meets one policy in each implementation.
    Compiled models are a test of their own, on one model.
    """
    chosen = []
    evictions = policies()[0]
    for model, mode, eviction in product(models, TORCH_MODES[:3], evictions):
        if model in HYBRID:
            turn = HYBRID.index(model) + TORCH_MODES.index(mode)
            if eviction != evictions[turn % len(evictions)]:
                continue
        rng = random.Random(f"covering {model} {mode} {eviction}")
        for prefetch, (slots, banks) in rng.sample(_shapes(), 3):
            chosen.append(Cell(model, mode, eviction, prefetch, slots, banks))
    return chosen


def _shapes() -> list[tuple[str, tuple[str, int]]]:
    """All combinations of a prefetch policy with slots and banks."""
    return list(product(policies()[1], SIZES))


def _dealt(seed: str) -> Iterator[tuple[str, tuple[str, int]]]:
    """The shapes over and over, each round in an order of its own, the same in every run."""
    rng, shapes = random.Random(seed), _shapes()
    while True:
        yield from rng.sample(shapes, len(shapes))
