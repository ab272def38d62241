"""Speed of decoding pages into slots on the GPU, and of encoding them on the host.

    python -m benchmarks gpu decode [--shape NAME] [--save FILE]

``gb_s`` counts the bytes of raw weights. It is compared with the speed of a plain copy within
device memory, which moves 4 bytes per weight instead of 3.5. The speed of encoding on one core of
the host shows whether the GPU would have to encode instead; a checkpoint is encoded only once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu import device as gpu
from benchmarks.gpu.layers import SHAPES, make, pages, slots
from fluxmoe.cuda.kernels.pages import CompressedPages, RawSlots, decode_to_slots
from fluxmoe.stores.codec.fixed4 import Fixed4


def main(argv: list[str]) -> None:
    parser = gpu.arguments("decode", __doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all but tiny")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args(argv)
    device = gpu.require()
    timer = gpu.Timer(options.repeats)
    rows: list[dict[str, Any]] = []
    for name in options.shape or [name for name in SHAPES if name != "tiny"]:
        layer = make(SHAPES[name], device)
        for part, raw, packed in zip(("w13", "w2"), layer.raw, layer.compressed, strict=True):
            about = {"shape": name, "part": part}
            rows += [about | row for row in measure(slots(raw), pages(packed), timer)]
        del layer
    gpu.report(options, "pages decoded into slots", rows)
    if not all(row["identical"] for row in rows):
        raise SystemExit("results are NOT identical; see the table")


def measure(raw: RawSlots, packed: CompressedPages, timer: gpu.Timer) -> Iterator[dict[str, Any]]:
    """Measure decoding and copying; yield one row of the table per number of pages."""
    weights, host = raw.weights, encoding(raw.weights[0])
    target = RawSlots(torch.empty_like(weights))
    number = torch.arange(len(weights), dtype=torch.int32, device=weights.device)
    for count in sorted({1, min(8, len(weights)), len(weights)}):
        some, several = number[:count], number.new_tensor([count])

        def decoding(some: torch.Tensor = some, several: torch.Tensor = several) -> None:
            decode_to_slots(packed, some, some, several, target)

        copy_us = timer(lambda count=count: target.weights[:count].copy_(weights[:count]))
        target.weights.zero_()
        us = timer(decoding)
        got = target.weights[:count].view(torch.int16)
        nbytes = count * weights[0].numel() * 2
        yield {
            "pages": count,
            "decode_us": us,
            "gb_s": nbytes / us / 1e3,
            "copy_gb_s": nbytes / copy_us / 1e3,
            "raw/coded": weights.numel() * 2 / packed.data.numel(),
            "encode_host_gb_s": host,
            "identical": torch.equal(got, weights[:count].view(torch.int16)),
        }


def encoding(page: torch.Tensor) -> float:
    """Measure the speed of encoding on one core in GB/s, best of three."""
    raw = page.cpu().view(torch.uint8).numpy().reshape(-1)
    codec, times = Fixed4(page.shape[1]), []
    for _ in range(3):
        begin = time.perf_counter()
        codec.encode(raw)
        times.append(time.perf_counter() - begin)
    return len(raw) / min(times) / 1e9
