"""vLLM's serving benchmark for stock vLLM and FluxMoE at one budget: throughput, TTFT and TPOT.

python -m benchmarks http [--model shipped|mid] [--rates inf 4 …] [--rounds N] [--save FILE]

Both servers are OpenAI-compatible and consist of three processes. They are started one after the
other (never both at once, so that they do not compete for cores). The client is ``vllm bench
serve`` with its random dataset. Rounds alternate between the servers, and medians are reported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks import machine, models
from fluxmoe.backends.vllm.preflight import checks
from fluxmoe.backends.vllm.server import launch
from fluxmoe.config import parse
from fluxmoe.demo.model import DemoModel

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

#: Displayed results of ``vllm bench serve``: key, title, and True if more is better.
FIGURES = (
    ("output_throughput", "tokens/s", True),
    ("request_throughput", "requests/s", True),
    ("mean_ttft_ms", "TTFT mean, ms", False),
    ("p99_ttft_ms", "TTFT p99, ms", False),
    ("mean_tpot_ms", "TPOT mean, ms", False),
    ("p99_tpot_ms", "TPOT p99, ms", False),
    ("mean_e2el_ms", "request mean, ms", False),
)


def commands(model: DemoModel, budget: int, port: int) -> dict[str, list[str]]:
    """Make the command of each server; FluxMoE's is the command that ``fluxmoe serve`` runs."""
    options = {**model.options(max_num_seqs=64), "host": "127.0.0.1", "port": port}
    parsed = parse(
        {"model": str(model.folder), "memory": {"budget": budget}, "vllm": options},
        where="benchmark",
    )
    config = checks.resolved(parsed)
    paged = launch.command(config)
    stock = launch.command(config)
    for flag in launch.OWN_FLAGS:
        while flag in stock:
            at = stock.index(flag)
            del stock[at : at + 2]
    stock += ["--kv-cache-memory-bytes", str(budget - model.experts_total_bytes)]
    return {"stock vLLM": stock, "FluxMoE": paged}


@contextlib.contextmanager
def server(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Start a server, wait until it is ready, and end it afterwards."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**ENVIRONMENT, **launch.environment(ENVIRONMENT)}
        )
    try:
        for _ in range(600):
            if process.poll() is not None:
                sys.exit(f"the server ended: {shlex.join(command)}\n{log.read_text()[-3000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(120)


def client(folder: Path, port: int, rate: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run ``vllm bench serve`` once and return its JSON."""
    with tempfile.TemporaryDirectory() as results:
        options = [
            *("--model", str(folder), "--host", "127.0.0.1", "--port", str(port)),
            *("--dataset-name", "random", "--random-input-len", str(arguments.input)),
            *("--random-output-len", str(arguments.output), "--ignore-eos", "--seed", "0"),
            *("--num-prompts", str(arguments.requests), "--request-rate", rate),
            *("--num-warmups", "2", "--disable-tqdm", "--percentile-metrics", "ttft,tpot,e2el"),
            *("--save-result", "--result-dir", results, "--result-filename", "out.json"),
        ]
        # `vllm bench serve` itself does not start in the CPU build (the command requires a
        # distribution that is not installed), so this code calls the function that the command
        # would call.
        code = (
            "import argparse; from vllm.benchmarks.serve import add_cli_args, main;"
            "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
        )
        subprocess.run(
            [sys.executable, "-c", code, *options],
            check=True,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        outcome: dict[str, Any] = json.loads((Path(results) / "out.json").read_text())
    if outcome["completed"] != arguments.requests:
        sys.exit(f"only {outcome['completed']} of {arguments.requests} requests were answered")
    return {key: outcome[key] for key, _, _ in FIGURES}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("http", description=__doc__.partition("\n")[0])
    models.add_option(parser)
    parser.add_argument("--rates", nargs="+", default=["inf"], help="requests per second")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input", type=int, default=24, help="prompt tokens")
    parser.add_argument("--output", type=int, default=64, help="generated tokens")
    parser.add_argument("--sequences", type=int, default=3, help="requests in stock's KV cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args(argv)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = models.get(arguments.model, Path(scratch))
        budget = model.budget(arguments.sequences)
        for turn in range(arguments.rounds):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            for name, command in commands(model, budget, port).items():
                print(f"round {turn + 1} of {arguments.rounds}: {name}", file=sys.stderr)
                with server(command, port, Path(scratch) / "log"):
                    for rate in arguments.rates:
                        outcome = client(model.folder, port, rate, arguments)
                        runs.setdefault(rate, {}).setdefault(name, []).append(outcome)
    results = []
    for rate, sides in runs.items():
        table = Table(
            title=f"vllm bench serve, {arguments.requests} requests, rate {rate}, "
            f"budget {budget / 2**20:.0f} MiB (stock holds {arguments.sequences} requests)"
        )
        for column in ("figure", *sides, "better by"):
            table.add_column(column, justify="left" if column == "figure" else "right")
        for key, title, more in FIGURES:
            values = [median(run[key] for run in each) for each in sides.values()]
            gain = values[1] / values[0] if more else values[0] / values[1]
            table.add_row(title, *(f"{value:.1f}" for value in values), f"{gain:.2f}×")
        Console().print(table)
        results.append({"rate": rate, "budget_bytes": budget, **vars(arguments), "runs": sides})
        results[-1].pop("save")
    if arguments.save:
        machine.save(arguments.save, results)
