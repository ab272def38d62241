"""Cost of the event rule on the device: one kernel per layer, with only hits and with misses.

python -m benchmarks gpu events [--save FILE]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import device as gpu
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.types import Geometry
from fluxmoe.cuda.kernels.paging import by_score, resolve_event, upload

LAYERS, EXPERTS, TOP_K = 48, 128, 8


def main(argv: list[str]) -> None:
    parser = gpu.arguments("events", __doc__)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args(argv)
    device = gpu.require()
    timer = gpu.Timer(options.repeats)
    rows: list[dict[str, Any]] = []
    for share in (1.0, 0.5):
        rows += measure(share, timer, device)
    gpu.report(options, f"one event on the device, {LAYERS} × {EXPERTS} pages", rows)


def measure(share: float, timer: gpu.Timer, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield one row per batch size, with slots for ``share`` of all pages, all full at first."""
    pages = LAYERS * EXPERTS
    table = PageTable(Geometry(LAYERS, EXPERTS), [max(int(pages * share), EXPERTS)])
    books = upload(table.books, device)
    rng = np.random.default_rng(0)
    books.order.copy_(torch.from_numpy(by_score(rng.random(pages))))
    everyone = torch.arange(EXPERTS, dtype=torch.int32, device=device)[None]
    layers = itertools.cycle(range(LAYERS))
    for _ in range(LAYERS):
        resolve_event(books, next(layers), everyone)
    for tokens in (1, 8, 64, 512):
        routed = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])
        ids = torch.from_numpy(routed.astype(np.int32)).to(device)
        before, event = books.counts.tolist(), int(books.event)
        us = timer(lambda ids=ids: resolve_event(books, next(layers), ids))
        events = int(books.event) - event
        counted = zip(books.counts.tolist(), before, strict=True)
        hits, misses, evictions = ((now - then) / events for now, then in counted)
        yield {
            "slots": table.slots[0],
            "tokens": tokens,
            "us": us,
            "hits": hits,
            "misses": misses,
            "evictions": evictions,
        }
