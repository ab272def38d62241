"""Tokens per second of a model that is larger than memory, against other engines on the same disk.

    python -m benchmarks disk [--rounds 7] [--batch 1] [--peers FOLDER] [--save FILE]

A checkpoint with 3.4 GiB of experts, whose routing is that of a recorded trace (``model``), is
decoded by each engine in turn, in a control group that may use 2100 MiB of memory, page cache
included; before each run, its files leave the page cache. A round runs each engine once, so that
the ratios of a round compare neighbours in time. Printed are medians over the rounds and, for the
ratios, an interval that contains the median with 90 % confidence (bootstrap).

The limit of FluxMoE in vLLM is the disk: the time of a step with all experts in memory, plus
the time in which ``fio`` (random reads of 1 MiB, depth 16) reads the bytes that the step lacked.
Needed are the right to make control groups, ``fio`` and, for the peers::

    pip install --no-deps --target FOLDER accelerate gguf llama-cpp-py-sync
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.disk import model
from benchmarks.disk.engines import ENGINES, Task
from fluxmoe.backends.vllm.child.child import ENVIRONMENT
from fluxmoe.sizes import parse
from tests.cgroup import limited

_PEERS = [name for name in ENGINES if not name.startswith("FluxMoE")]
_OURS = [name for name in ENGINES if name.startswith("FluxMoE")]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("disk", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=13, help="tokens per prompt")
    parser.add_argument("--limit", default="2100MiB", help="memory of the control group")
    parser.add_argument("--memory", default="1088MiB", help="FluxMoE's budget")
    parser.add_argument("--intermediate", type=int, default=1536, help="inner size of an expert")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--peers", default="", metavar="FOLDER", help="packages of the peers")
    parser.add_argument("--files", type=Path, metavar="FOLDER", help="keep the model's files here")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write JSON with the machine")
    arguments = parser.parse_args(argv)
    if shutil.which("fio") is None:
        parser.error("fio is needed to measure the disk: install it, for example with apt")
    with tempfile.TemporaryDirectory() as scratch:
        files = arguments.files or Path(scratch)
        try:
            results = compare(arguments, files)
        except pytest.skip.Exception as refused:
            parser.error(str(refused))
    show(results)
    if arguments.save:
        machine.save(arguments.save, results)


def compare(arguments: argparse.Namespace, files: Path) -> dict[str, Any]:
    """Write the model, and run all rounds."""
    sys.path.append(arguments.peers)
    folder = model.write(files / "model", arguments.intermediate)
    if "transformers, mmap" in arguments.engines:
        model.write_stacked(folder, files / "stacked.bin")
    if "llama.cpp, mmap" in arguments.engines:
        model.write_gguf(folder, files / "model.gguf")
    limit, memory = int(parse(arguments.limit)), int(parse(arguments.memory))
    task = Task(str(folder), str(files), memory, arguments.batch, arguments.new, arguments.peers)
    results: dict[str, Any] = {"limit": limit, "memory": memory, "batch": task.batch, "rounds": []}
    for name in arguments.engines:  # page files and compiled code are made once
        if name in _OURS:
            run(name, replace(task, new=2), None)
    if "FluxMoE in vLLM" in arguments.engines:
        everything = replace(task, memory=8 << 30)
        alone = run("FluxMoE in vLLM", everything, None)
        alone = run("FluxMoE in vLLM", everything, None)
        results["step_seconds_in_memory"] = alone["seconds"] / (task.new - 1)
    for number in range(arguments.rounds):
        found = {name: run(name, task, limit) for name in arguments.engines}
        results["rounds"].append({"fio": fio(files), **found})
        print(
            f"round {number + 1}:", json.dumps(results["rounds"][-1]), file=sys.stderr, flush=True
        )
    return results


def run(name: str, task: Task, limit: int | None) -> dict[str, Any]:
    """Run an engine in a process of its own, with cold files."""
    forget(Path(task.files))
    command = [sys.executable, "-m", "benchmarks.disk.engines", name, json.dumps(asdict(task))]
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, **ENVIRONMENT},
    }
    if limit is None:
        done = subprocess.run(command, **options)
    else:
        with limited(limit) as join:
            done = subprocess.run(command, preexec_fn=join, **options)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    if not row["right"]:
        sys.exit(f"{name} computed other tokens")
    row["tokens_per_s"] = row["tokens"] / row["seconds"]
    return row


def forget(folder: Path) -> None:
    """Drop all files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 1 << 20:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fio(files: Path) -> float:
    """Measure random reads of 1 MiB at depth 16 from FluxMoE's page file, in bytes per second."""
    pages = max((path for path in files.glob("*/*") if path.suffix == ".pages"), key=_size)
    done = subprocess.run(
        ["fio", "--name=read", f"--filename={pages}", "--rw=randread", "--bs=1m", "--direct=1",
         "--iodepth=16", "--ioengine=libaio", "--readonly", "--runtime=5", "--time_based",
         "--output-format=json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"])


def _size(path: Path) -> int:
    return path.stat().st_size


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the bounds of its 90 % interval."""
    random = np.random.default_rng(0)
    draws = random.choice(values, (10_000, len(values)))
    low, high = np.percentile(np.median(draws, 1), (5, 95))
    return statistics.median(values), float(low), float(high)


def show(results: dict[str, Any]) -> None:
    rounds, out = results["rounds"], Console()
    names = [name for name in rounds[0] if name != "fio"]
    table = Table(
        title=f"batch {results['batch']}, {results['limit'] >> 20} MiB of memory for each engine",
        title_justify="left",
    )
    for column in ("engine", "tokens/s", "MiB read", "hits", "stall"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name in names:
        rows = [each[name] for each in rounds]
        rate = statistics.median(row["tokens_per_s"] for row in rows)
        read = statistics.median(row.get("disk_bytes", row["read_bytes"]) for row in rows)
        more = ["", ""]
        if "hits" in rows[0]:
            hits = sum(row["hits"] for row in rows)
            stall = sum(row["stall_seconds"] for row in rows) / sum(row["seconds"] for row in rows)
            more = [f"{hits / (hits + sum(row['misses'] for row in rows)):.0%}", f"{stall:.0%}"]
        table.add_row(name, f"{rate:.2f}", f"{read / 2**20:.0f}", *more)
    out.print(table)
    for ours in (name for name in names if name in _OURS):
        for peer in (name for name in names if name in _PEERS):
            ratio = interval(
                [each[ours]["tokens_per_s"] / each[peer]["tokens_per_s"] for each in rounds]
            )
            out.print("{} / {}: {:.2f} ({:.2f} to {:.2f})".format(ours, peer, *ratio))
        stalls = [
            each[ours]["disk_bytes"] / each[ours]["stall_seconds"] / each["fio"] for each in rounds
        ]
        out.print("{}: bytes per second of waiting / fio: {:.2f} ({:.2f} to {:.2f})".format(
            ours, *interval(stalls)))  # fmt: skip
    if "step_seconds_in_memory" in results:
        alone, ours = results["step_seconds_in_memory"], "FluxMoE in vLLM"
        steps = rounds[0][ours]["tokens"] / results["batch"]
        shares = [
            (alone * steps + each[ours]["disk_bytes"] / each["fio"]) / each[ours]["seconds"]
            for each in rounds
        ]
        out.print("{} / its limit: {:.2f} ({:.2f} to {:.2f})".format(ours, *interval(shares)))
