"""Run the cells of the identity matrix.

    python -m benchmarks identity [--mode MODE]... [--model MODEL]... [--shard K/N] [--save FOLDER]
    python -m benchmarks identity --select
    python -m benchmarks identity --limits [--save FOLDER]
    python -m benchmarks identity --report

Cells that are already in the folder's files are not run again, so a run can be interrupted.
``--select`` writes the table of the cells for ``make test``, and ``--report`` writes the tables of
the committed results to docs/concepts/identity.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.identity import cells, limits, models, record, report, selection
from tests.identity.cells import Cell
from tests.identity.outcome import Outcome
from tests.identity.vllm_cells import engines
from tests.journal import shard

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "identity.md"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "identity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", action="append", choices=report.MODES)
    parser.add_argument("--model", action="append", choices=[cells.SHIPPED, *cells.RANDOM])
    parser.add_argument("--select", action="store_true", help="select cells for make test")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="K/N", help="each N-th cell")
    parser.add_argument("--limits", action="store_true", help="try features without CPU support")
    parser.add_argument(
        "--report", action="store_true", help="write the tables of docs/concepts/identity.md"
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write and resume there")
    arguments = parser.parse_args(argv)
    if arguments.report:
        PAGE.write_text(report.fill(PAGE.read_text(), tables()))
        return
    if arguments.select:
        selection.write()
        return
    with tempfile.TemporaryDirectory() as scratch:
        save: Path = arguments.save or Path(scratch) / "results"
        if arguments.limits:
            (save / "limits.jsonl").unlink(missing_ok=True)
            record.begin(save / "limits.jsonl")
            for trial in limits.TRIALS:
                found = limits.attempt(trial, Path(scratch))
                record.save_limit(save / "limits.jsonl", found)
                print(f"{found.name}: {found.vllm or 'runs'} | {found.fluxmoe or 'runs'}")
            return
        wanted = arguments.model or models.names(), arguments.mode or report.MODES
        number, shards = arguments.shard
        chosen = list(dict.fromkeys(cells.full(*wanted)))[number - 1 :: shards]
        results = run(chosen, Path(scratch), save)
    print(report.plain(report.summary(results)))
    failed = report.failures(results)
    if failed:
        sys.exit("\n".join(["not identical:", *failed]))


def run(chosen: list[Cell], scratch: Path, save: Path) -> dict[Cell, Outcome]:
    """Run the cells without an identical result in ``save``, which gets one file per mode."""
    results: dict[Cell, Outcome] = {}
    begun = set()
    with ExitStack() as stack:
        runners: dict[str, Callable[[Cell], Outcome]] = {}
        for number, cell in enumerate(chosen, 1):
            path = save / f"{cell.mode.replace(' ', '-')}.jsonl"
            done = record.load(path).get(cell)
            if done is None or not done.ok:
                backend = cell.mode.split()[0]
                if backend not in runners:
                    runners[backend] = _runner(backend, scratch, stack)
                done = runners[backend](cell)
                if path not in begun:
                    record.begin(path)
                    begun.add(path)
                record.append(path, cell, done)
                verdict = "identical" if done.ok else "NOT IDENTICAL " + done.error.split("\n")[0]
                print(f"[{number}/{len(chosen)}] {cell}: {verdict}", flush=True)
            results[cell] = done
    return results


def tables() -> list[str]:
    """Make the tables of docs/concepts/identity.md from the committed results."""
    results = record.committed()
    whole = set(cells.full(models.names(), report.MODES))
    return [
        report.progress(results, len(whole | set(results))),
        report.markdown(report.summary(results)),
        report.markdown(report.by_setting(results)),
        report.markdown(report.limits(record.limits())),
    ]


def _runner(backend: str, scratch: Path, stack: ExitStack) -> Callable[[Cell], Outcome]:
    if backend == "vllm":
        return stack.enter_context(engines(scratch)).run
    import torch

    from tests.identity.torch_cells import Models

    torch.set_num_threads(1)
    return Models(scratch).run
