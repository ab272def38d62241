"""Compression ratios and speeds of the codecs for bf16 weights on one core, next to a plain copy.

    python -m benchmarks codec [--json] [--save FILE]

There are three kinds of pages: the shipped model's experts, and normally distributed weights in
pages of the same size and in pages as large as those of a 30B model. Each kind has too many pages
for any cache. Copying, decoding and encoding alternate, and each processes all pages in every
round. Speeds are those of the best round, in GB of uncoded weights per second. Ratios are medians
over the rounds; each compares two times measured one after the other. Times are CPU times of this
thread, so other work on the machine affects only caches and memory. Targets are written once before
the first round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from fluxmoe import plugins
from fluxmoe.core.types import Bytes
from fluxmoe.demo.model import SHIPPED
from fluxmoe.errors import MissingDependencyError
from fluxmoe.stores.codec.base import Codec
from fluxmoe.stores.survey import parts_of

#: Bytes of an expert's w13 and w2 in the shipped model and in Qwen3-30B-A3B.
SMALL, LARGE = (40_960, 20_480), (6_291_456, 3_145_728)
TOTAL = 96 << 20
ROUNDS = 7


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("codec", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write results as JSON")
    arguments = parser.parse_args(argv)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    shipped = [part for _, _, part in parts_of(SHIPPED)]
    kinds = {
        "shipped model": shipped * -(-TOTAL // sum(map(len, shipped))),
        "normal, small pages": normal(SMALL),
        "normal, large pages": normal(LARGE),
    }
    rows = []
    for kind, parts in kinds.items():
        for name in ("fixed4", "zipnn"):
            try:
                codec = plugins.load().create("codec", name)
            except MissingDependencyError:
                continue
            rows.append({"weights": kind, "codec": name, **measure(codec, parts)})
    if arguments.save:
        machine.save(arguments.save, rows)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)


def normal(page: tuple[int, ...]) -> list[Bytes]:
    """Make parts of pages from normally distributed weights."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(16 << 20, np.float32) * 0.02
    pool = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    starts = rng.integers(0, (len(pool) - max(page)) // 2, TOTAL // sum(page)) * 2
    return [lined_up(pool[start : start + nbytes]) for start in starts for nbytes in page]


def lined_up(data: Bytes) -> Bytes:
    """Copy data to memory that is aligned to a cache line, as slots are."""
    room = np.empty(len(data) + 64, np.uint8)
    begin = -room.ctypes.data % 64
    copy = room[begin : begin + len(data)]
    copy[:] = data
    return copy


def measure(codec: Codec, parts: list[Bytes]) -> dict[str, Any]:
    """Measure the compression ratio, the speeds, and the speeds relative to a plain copy."""
    parts = [lined_up(part) for part in parts]
    blocks = [lined_up(codec.encode(part)) for part in parts]
    outs = [lined_up(np.full_like(part, 1)) for part in parts]
    works: dict[str, Callable[[int], object]] = {
        "copy": lambda i: np.copyto(outs[i], parts[i]),
        "decode": lambda i: codec.decode(blocks[i], outs[i]),
        "encode": lambda i: codec.encode(parts[i]),
    }
    times: dict[str, list[float]] = {work: [] for work in works}
    for _ in range(ROUNDS):
        for work, do in works.items():
            started = time.thread_time()
            for i in range(len(parts)):
                do(i)
            times[work].append(time.thread_time() - started)
            if work == "decode":
                assert all(np.array_equal(a, b) for a, b in zip(outs, parts, strict=True))
    nbytes = sum(map(len, parts))
    of_copy = {
        work: statistics.median(c / t for c, t in zip(times["copy"], times[work], strict=True))
        for work in ("decode", "encode")
    }
    return {
        "page_parts": len(parts),
        "bytes": nbytes,
        "ratio": round(nbytes / sum(map(len, blocks)), 4),
        **{f"{work}_gb_s": round(nbytes / min(times[work]) / 1e9, 2) for work in works},
        **{f"{work}_of_copy": round(value, 3) for work, value in of_copy.items()},
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="one core; GB/s of uncoded weights", title_justify="left")
    for column in ("weights", "codec", "ratio", "copy", "decode", "of copy", "encode", "of copy"):
        table.add_column(column, justify="left" if column in ("weights", "codec") else "right")
    for row in rows:
        table.add_row(
            row["weights"],
            row["codec"],
            f"{row['ratio']:.3f}",
            f"{row['copy_gb_s']:.1f}",
            f"{row['decode_gb_s']:.1f}",
            f"{row['decode_of_copy']:.2f}",
            f"{row['encode_gb_s']:.1f}",
            f"{row['encode_of_copy']:.2f}",
        )
    Console(width=100).print(table)
