"""Copies of pages from pinned host memory to the device, one by one and with the gather kernel.

    python -m benchmarks gpu copies [--save FILE]

The peak is the speed of one copy of 1 GiB. ``gather`` reads the same pages through mapped memory,
as it would inside a CUDA graph. The target for copies is at least 90% of the peak.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import device as gpu
from fluxmoe.cuda.kernels.paging import gather_pages

WHOLE = 1 << 30
SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "4.5 MiB": 9 << 19, "9 MiB": 9 << 20}


def main(argv: list[str]) -> None:
    parser = gpu.arguments("copies", __doc__)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(argv)
    device = gpu.require()
    timer = gpu.Timer(options.repeats)
    whole = gpu.pinned(torch.empty(WHOLE, dtype=torch.uint8))
    target = torch.empty_like(whole, device=device)
    peak = len(whole) / timer(lambda: target.copy_(whole, non_blocking=True)) / 1e3
    rows: list[dict[str, Any]] = []
    for name, nbytes in SIZES.items():
        for count in (1, 8, 64):
            arena = target[: count * nbytes].view(count, nbytes)
            source = whole[: count * nbytes].view(count, nbytes)
            source.random_()
            order = torch.randperm(count).tolist()

            def copy(arena=arena, source=source, order=order) -> None:
                for slot, page in enumerate(order):
                    arena[slot].copy_(source[page], non_blocking=True)

            address = torch.tensor([page.data_ptr() for page in source], device=device)
            pages = torch.tensor(order, dtype=torch.int32, device=device)
            slots = torch.arange(count, dtype=torch.int32, device=device)
            several = torch.tensor([count], dtype=torch.int32, device=device)
            work = (address, pages, slots, several, arena)
            copied = timer(copy)
            arena.zero_()
            gathered = timer(lambda work=work: gather_pages(*work))
            same = torch.equal(arena.cpu(), source[order])
            speed = count * nbytes / copied / 1e3
            rows.append(
                {
                    "page": name, "pages": count, "copy_gb_s": speed, "peak_gb_s": peak,
                    "copy/peak": speed / peak, "gather_gb_s": count * nbytes / gathered / 1e3,
                    "identical": same,
                }
            )  # fmt: skip
    gpu.report(options, "pages from pinned host memory to the device", rows)
