"""Two servers started together on one fresh cache folder do not affect each other."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fluxmoe.backends.vllm.child.child import ENVIRONMENT, Prompt
from fluxmoe.backends.vllm.metrics import METRICS, PASSING
from tests.vllm.conftest import KV_BYTES, prompts

pytestmark = [pytest.mark.vllm, pytest.mark.full]


@dataclass
class Server:
    model: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def complete(self, prompt: Prompt, key: str = "") -> list[int]:
        body = {
            "model": self.model,
            "prompt": prompt.tokens,
            "max_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
            "seed": prompt.seed,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.url}/v1/completions"
        answer = httpx.post(url, json=body, timeout=120, headers=headers)
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Read FluxMoE's series by name and by FluxMoE's own labels."""
        own = {metric.name: metric.labels for metric in METRICS}
        text = httpx.get(f"{self.url}/metrics").text
        return {
            (sample.name, *(sample.labels[label] for label in own[sample.name])): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in own
        }

    def wait(self) -> None:
        deadline = time.monotonic() + 500
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.tail()
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)

    def tail(self) -> str:
        return self.log.read_text()[-3000:]

    def end(self) -> None:
        """End the server with all its processes, immediately. Idempotent."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            self.process.kill()
            self.process.wait()


def start(
    folder: Path,
    checkpoint: Path,
    cache: Path | None = None,
    change: Callable[[dict[str, Any]], None] = lambda settings: None,
) -> Server:
    """Start a server, optionally with a changed configuration and its own caches."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings: dict[str, Any] = {
        "model": str(checkpoint),
        "memory": {"budget": KV_BYTES + (2 << 20), "experts": {"target": "1MiB"}},
        "eviction": "lru",
        "vllm": {
            "max-model-len": 256,
            "max-num-seqs": 64,
            "block-size": 32,
            "enforce-eager": True,
            "host": "127.0.0.1",
            "port": port,
        },
    }
    change(settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    if cache is not None:
        environment.update(VLLM_CACHE_ROOT=str(cache), NUMBA_CACHE_DIR=str(cache / "numba"))
    program = "from fluxmoe.cli import main; main()"
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "serve", str(folder / "config.yaml")],
            stdout=out,
            stderr=out,
            env={**os.environ, **environment},
        )
    return Server(str(checkpoint), f"http://127.0.0.1:{port}", process, log)


@pytest.fixture(scope="module")
def pair(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    folder = tmp_path_factory.mktemp("pair")
    servers = [start(folder / name, checkpoint, folder / "cache") for name in ("one", "other")]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.end()


def test_two_servers_on_one_cache(pair: list[Server]) -> None:
    one, other = pair
    # The metrics exist before the first request.
    assert other.metrics()["fluxmoe_tenant_frames", "kv", "committed"] > 0
    requests = prompts(12, seed=9)
    with ThreadPoolExecutor(8) as pool:  # both at the same time
        answers = [pool.map(server.complete, requests) for server in pair]
        first, second = map(list, answers)
    assert first == second
    assert [len(tokens) for tokens in first] == [prompt.max_tokens for prompt in requests]

    shown = other.metrics()
    plain = {metric.name for metric in METRICS if metric.kind != "histogram"}
    assert {name for name, *_ in shown} == plain - PASSING
    assert shown["fluxmoe_expert_misses_total", "capacity"] > 0
    assert shown["fluxmoe_transfer_bytes_total", "host", "demand"] > 0
    assert shown["fluxmoe_tenant_frames", "kv", "committed"] > 0

    one.end()
    assert [other.complete(prompt) for prompt in requests] == first
    again = other.metrics()
    counters = {metric.name for metric in METRICS if metric.kind == "counter"}
    for series, value in shown.items():
        if series[0] in counters:
            assert again[series] >= value, series
    assert again["fluxmoe_expert_hits_total",] > shown["fluxmoe_expert_hits_total",]
