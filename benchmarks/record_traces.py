"""Record the traces of the demo's model that are shipped in ``fluxmoe/trace/assets``.

    python -m benchmarks.record_traces [--model FOLDER] [--prompts FILE] [--out FOLDER]

Rerun this command, on one thread, whenever that model changes, and commit the result. The decode
traces start after the prompts and contain only decode steps; the prefill trace contains the prefill
of texts sampled from the model. All traces have a column ``predicted``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import fluxmoe
from fluxmoe.backends.torch.pretrained import unpaged
from fluxmoe.backends.torch.sampling import sample
from fluxmoe.cli.shared import models
from fluxmoe.core.types import Phase
from fluxmoe.trace import TraceReader, shipped

ASSETS = Path(fluxmoe.__file__).parent / "demo" / "assets"
TEMPERATURE, SEED = 0.8, 2026
#: Batch size → (tokens per request, recorded steps), for eight batches, three batches and one
#: batch.
DECODE = {1: (250, 1992), 8: (250, 747), 64: (200, 199)}
#: Lengths of the prompts, which are recorded in turn, and number of prompts of each length.
PREFILL_LENGTHS, PREFILL_EACH = (8, 16, 32, 64, 128, 192), 12


def main() -> None:
    parser = argparse.ArgumentParser("record_traces", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=_only_model(), help="checkpoint")
    parser.add_argument("--prompts", type=Path, default=ASSETS / "prompts.txt")
    parser.add_argument("--out", type=Path, default=shipped.FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models.quiet()
    tokenizer = models.tokenizer(str(arguments.model), required=True)
    lines = [line for line in arguments.prompts.read_text().splitlines() if line.strip()]
    prompts = [models.encode(tokenizer, line) for line in lines]
    model = unpaged(str(arguments.model))
    model.config.name_or_path = arguments.model.name  # not its path on this machine
    arguments.out.mkdir(parents=True, exist_ok=True)
    with fluxmoe.page(model, "4GiB", eviction="lru") as paged:
        texts: list[list[int]] = []
        for batch in DECODE:
            texts = decode(paged, prompts, batch, arguments.out)
        prefill(paged, [p + t for p, t in zip(prompts, texts, strict=False)], arguments.out)
    for name in shipped.NAMES:
        file = arguments.out / f"{name}.parquet"
        print(f"{file.name}: {TraceReader(file).num_rows} rows, {file.stat().st_size} bytes")


def decode(paged: Any, prompts: list[list[int]], batch: int, out: Path) -> list[list[int]]:
    """Record decode with sampling at one batch size; return the texts of the first batch."""
    tokens, steps = DECODE[batch]
    first: list[list[int]] = []
    with paged.record(
        out / f"decode-{batch}.parquet",
        predict=True,
        phase=Phase.DECODE,
        max_steps=steps,
        replace=True,
    ) as recorder:
        for start in range(0, len(prompts) - batch + 1, batch):
            if recorder.done:
                break
            recorder.first_request = start
            texts = run(paged, prompts[start : start + batch], tokens, SEED + start, recorder)
            first = first or texts
    return first


def prefill(paged: Any, texts: list[list[int]], out: Path) -> None:
    """Record one prompt per step, cycling through the lengths."""
    longest = max(PREFILL_LENGTHS)
    usable = [text for text in texts if len(text) >= longest]
    with paged.record(
        out / "prefill.parquet", predict=True, phase=Phase.PREFILL, replace=True
    ) as recorder:
        for index in range(PREFILL_EACH * len(PREFILL_LENGTHS)):
            recorder.first_request = index
            length = PREFILL_LENGTHS[index % len(PREFILL_LENGTHS)]
            text = usable[index % len(usable)]
            run(paged, [text[:length]], 1, SEED, recorder)


def run(paged: Any, prompts: list[list[int]], tokens: int, seed: int, recorder: Any) -> Any:
    return sample(
        paged.model,
        prompts,
        max_new_tokens=tokens,
        temperature=TEMPERATURE,
        seed=seed,
        stop=lambda: bool(recorder.done),
    )


def _only_model() -> Path | None:
    found = sorted(path.parent for path in ASSETS.glob("*/config.json"))
    return found[0] if len(found) == 1 else None


if __name__ == "__main__":
    main()
