"""Measurement of this machine's hardware profile: the times of model steps and of page copies.

Steps are measured with all experts resident, and copies with slots for one layer's experts; the
profile predicts the cases in between. Like the profile's fields, the model fitted to the step times
consists of a constant, a cost per token and a cost per expert used.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fluxmoe.backends.torch import layout
from fluxmoe.backends.torch.paging import page
from fluxmoe.backends.torch.pretrained import unpaged

BATCHES = (1, 2, 4, 8, 16, 32, 64)
_PROMPT, _WARM, _REPEATS, _COPIES = 8, 4, 3, 200
#: Minimum and maximum number of steps that are timed, and the seconds that they should take.
_FEWEST, _STEPS, _SECONDS = 8, 48, 0.5
#: Bandwidth or TFLOPS assumed if a cost is too small to measure.
_FAST = 1e6

Floats = npt.NDArray[np.float64]


def measure(folder: str | Path, *, threads: int = 1) -> dict[str, Any]:
    """Measure a model on the torch backend. A small model takes about ten seconds.

    Args:
        folder: Folder or name of a Hugging Face checkpoint.
        threads: Number of torch threads, both in the measurement and in the runs to be predicted.

    Returns:
        The fields of a ``sim.hardware.Profile``.

    Raises:
        NoExpertsError, UnsupportedError: The model cannot be paged.
        CheckpointError: The checkpoint cannot be loaded.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = unpaged(str(folder))
        steps = _steps(model)
        copies, page_bytes, layers = _copies(model)
    finally:
        torch.set_num_threads(before)
    step_us, token_us, expert_us = _fit(*steps)
    load_us, page_us = _fit(*copies)
    return dict(
        name="this-cpu",
        description=f"measured with {Path(folder).name}, torch backend, threads: {threads}",
        load_gbps=_gbps(page_bytes, page_us),
        load_us=load_us,
        memory_gbps=_gbps(page_bytes, expert_us),
        tflops=_FAST,
        roofline=False,
        step_us=step_us,
        token_us=token_us / layers,
    )


def decode(
    model: Any, batch: int, steps: int, *, seed: int = 0, prompt: int = _PROMPT
) -> Iterator[None]:
    """Continue random prompts with sampled tokens, one step per item; the prefill comes first.

    The same arguments give the same tokens, whether the model is paged or not.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (batch, prompt), generator=generator)
    past = None
    with torch.no_grad():
        for _ in range(steps + 1):
            out = model(input_ids=tokens, past_key_values=past, use_cache=True)
            past = out.past_key_values
            odds = torch.softmax(out.logits[:, -1].float(), dim=-1)
            tokens = torch.multinomial(odds, 1, generator=generator)
            yield


def room(model: Any, pages: int) -> int:
    """Compute the bytes of ``pages`` pages of a model, not rounded up to whole frames."""
    _, page_class = layout.describe(layout.experts_of(model))
    return pages * page_class.nbytes


def _steps(model: Any) -> tuple[Floats, Floats]:
    """Measure steps with all experts resident: rows (1, tokens, experts used), and µs per row."""
    geometry, _ = layout.describe(layout.experts_of(model))
    rows, times = [], []
    with page(model, room(model, geometry.num_pages), eviction="lru") as handle:
        for batch in BATCHES:
            count, best = 0, math.inf
            for _ in range(_REPEATS):  # each with the same tokens, and so the same experts
                run = decode(model, batch, _WARM + _STEPS)
                next(run)
                warm = _seconds(run, _WARM)
                count = count or min(max(int(_SECONDS / warm), _FEWEST), _STEPS)
                before = handle.stats()["accesses"]
                best = min(best, _seconds(run, count))
                experts = (handle.stats()["accesses"] - before) / count
            rows.append((1.0, float(batch), experts))
            times.append(best * 1e6)
    return np.asarray(rows), np.asarray(times)


def _seconds(run: Iterator[None], steps: int) -> float:
    """Take ``steps`` steps; return the seconds per step."""
    started = time.perf_counter()
    for _ in itertools.islice(run, steps):
        pass
    return (time.perf_counter() - started) / steps


def _copies(model: Any) -> tuple[tuple[Floats, Floats], int, int]:
    """Measure events that miss all their pages: rows (1, pages), and µs per row above a hit."""
    layers = layout.experts_of(model)
    geometry, page_class = layout.describe(layers)
    experts = geometry.experts_per_layer
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= experts]
    rows, times = [], []
    with page(model, room(model, experts), eviction="lru") as handle:
        pager = handle.pager
        for size in sizes:
            missing: list[float] = []
            hitting: list[float] = []
            slots = np.zeros(size, np.int32)
            for turn in range(_COPIES):
                # A page is used again only after all other pages.
                layer = turn % geometry.num_layers
                first = turn // geometry.num_layers * size
                ids = np.sort((first + np.arange(size)) % experts).astype(np.int32)
                for seconds in missing, hitting:
                    started = time.perf_counter()
                    pager.acquire(layer, ids, slots)
                    seconds.append(time.perf_counter() - started)
            rows.append((1.0, float(size)))
            extra = statistics.median(missing) - statistics.median(hitting)
            times.append(max(extra, 1e-9) * 1e6)
    return (np.asarray(rows), np.asarray(times)), page_class.nbytes, geometry.num_layers


def _fit(rows: Floats, times: Floats) -> list[float]:
    """Fit non-negative costs to the times with the least relative error."""
    best, error = np.zeros(rows.shape[1]), np.inf
    scaled = rows / times[:, np.newaxis]
    for used in itertools.product((False, True), repeat=rows.shape[1]):
        mask = np.asarray(used)
        costs = np.zeros(rows.shape[1])
        if mask.any():
            costs[mask] = np.linalg.lstsq(scaled[:, mask], np.ones(len(times)), rcond=None)[0]
        off = float(np.square(scaled @ costs - 1.0).sum())
        if costs.min() >= 0 and off < error:
            best, error = costs, off
    return [float(cost) for cost in best]


def _gbps(page_bytes: int, microseconds: float) -> float:
    return min(page_bytes / microseconds / 1e3, _FAST) if microseconds else _FAST
