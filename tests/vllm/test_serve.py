"""``fluxmoe serve``: the server's three processes give the same answers as stock vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from fluxmoe.backends.vllm.child.child import ENVIRONMENT, ChildEngine, Prompt
from tests.vllm.conftest import EAGER, KV_BYTES, prompts

pytestmark = pytest.mark.vllm

SERVER_ENVIRONMENT = {
    **os.environ,
    **{k: v for k, v in ENVIRONMENT.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"},
}


#: Seconds after which a request or a process counts as hanging, on a slow and busy machine.
PATIENCE = 240


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fluxmoe.cli import main; main()", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def write_config(path: Path, checkpoint: Path, **settings: Any) -> Path:
    config = {
        "model": str(checkpoint),
        "memory": {"budget": KV_BYTES + (2 << 20), "experts": {"target": "1MiB"}},
        "eviction": "lru",
        "vllm": {"max-model-len": 256, "max-num-seqs": 64, "block-size": 32, "enforce-eager": True},
        **settings,
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = write_config(folder / "config.yaml", checkpoint)
    data = yaml.safe_load(config.read_text())
    data["vllm"].update({"port": port, "host": "127.0.0.1"})
    config.write_text(yaml.safe_dump(data))
    printed = run("serve", str(config), "--print-command")
    assert printed.returncode == 0, printed.stderr
    log = folder / "log"
    with log.open("w") as out:
        # The test runs the printed line, which must therefore be complete.
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec env {printed.stdout.strip()}"],
            stdout=out,
            stderr=out,
            env=SERVER_ENVIRONMENT,
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 180
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.5)
    yield {"url": url, "model": str(checkpoint), "process": process, "log": log}
    process.kill()
    process.wait()


def body(server: dict[str, Any], prompt: Prompt, **extra: Any) -> dict[str, Any]:
    return {
        "model": server["model"],
        "prompt": prompt.tokens,
        "max_tokens": prompt.max_tokens,
        "temperature": prompt.temperature,
        "seed": prompt.seed,
        "ignore_eos": True,
        "return_token_ids": True,
        **extra,
    }


def complete(server: dict[str, Any], prompt: Prompt) -> list[int]:
    answer = httpx.post(f"{server['url']}/v1/completions", json=body(server, prompt), timeout=120)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def test_served_tokens_are_stock_tokens(server: dict[str, Any], eager: ChildEngine) -> None:
    requests = prompts(24, seed=5)
    eager.restart(kv_cache_memory_bytes=KV_BYTES, **EAGER)
    expected = eager.generate(requests).tokens
    with ThreadPoolExecutor(8) as pool:  # clients are concurrent, so batches vary
        assert list(pool.map(lambda prompt: complete(server, prompt), requests)) == expected
    # The first requests are repeated and now use the prefix cache.
    assert [complete(server, prompt) for prompt in requests[:4]] == expected[:4]


def test_streams_and_clients_that_hang_up(server: dict[str, Any]) -> None:
    prompt = Prompt([5, 6, 7, 8], 120)
    whole = complete(server, prompt)
    url = f"{server['url']}/v1/completions"
    for _ in range(3):
        with httpx.stream("POST", url, json=body(server, prompt, stream=True)) as stream:
            next(stream.iter_lines())  # the client disconnects after the first token
    streamed: list[int] = []
    with httpx.stream("POST", url, json=body(server, prompt, stream=True), timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                streamed += json.loads(line[6:])["choices"][0]["token_ids"] or []
    assert streamed == whole


def test_sigterm_in_the_middle_ends_everything(server: dict[str, Any]) -> None:
    """The last test with this server, which ends here."""
    process = psutil.Process(server["process"].pid)
    family = [process, *process.children(recursive=True)]
    assert len(family) > 1
    url, prompt = f"{server['url']}/v1/completions", Prompt([9, 9], 250)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(httpx.post, url, json=body(server, prompt), timeout=PATIENCE)
        streamed = body(server, prompt, stream=True)
        with httpx.stream("POST", url, json=streamed, timeout=PATIENCE) as stream:
            lines = stream.iter_lines()
            next(lines)  # the engine has both requests now
            server["process"].send_signal(signal.SIGTERM)
            assert psutil.wait_procs(family, timeout=PATIENCE)[1] == []
            with contextlib.suppress(httpx.RemoteProtocolError):  # cut off in the middle
                list(lines)
        # The other request gets an answer or an error, so that no client is left waiting.
        assert request.result().status_code in (200, 500, 503)


def test_the_printed_command_has_everything(tmp_path: Path) -> None:
    vllm = {"max-model-len": 256, "enforce-eager": True, "middleware": ["mine.A", "mine.B"]}
    config = write_config(tmp_path / "c.yaml", tmp_path / "model", plugins=[], vllm=vllm)
    words = shlex.split(run("serve", str(config), "--print-command").stdout)
    assert words[words.index("--model") + 1] == str(tmp_path / "model")
    assert words[words.index("--worker-cls") + 1].endswith("PagedCPUWorker")
    settings = json.loads(words[words.index("--additional-config") + 1])["fluxmoe"]
    assert settings["memory"]["experts"]["target"] == 1 << 20
    assert settings["eviction"] == {"kind": "lru"}
    assert words[words.index("--max-model-len") + 1] == "256"
    assert "--enforce-eager" in words
    assert words[words.index("--disable-access-log-for-endpoints") + 1] == "/metrics"  # C7
    middleware = [words[i + 1] for i, word in enumerate(words) if word == "--middleware"]
    assert middleware == ["fluxmoe.backends.vllm.server.hangup.EndWithServer", "mine.A", "mine.B"]


def test_an_option_replaces_the_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    config = write_config(tmp_path / "below/c.yaml", tmp_path, stores=[{"kind": "host"}])
    monkeypatch.chdir(tmp_path)
    words = shlex.split(run("serve", str(config), "--store", "x", "--print-command").stdout)
    settings = json.loads(words[words.index("--additional-config") + 1])["fluxmoe"]
    assert [store["path"] for store in settings["stores"]] == [str(tmp_path / "x")]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eviction": "nonsense"}, "FM201"),
        ({"memory": {}}, "memory.budget"),
        ({"vllm": {"worker-cls": "mine"}}, "vllm.worker-cls"),
        ({"vllm": {"kv_cache_memory_bytes": 5}}, "kv-cache-memory-bytes is set by FluxMoE"),
        ({"model": None}, "no model given"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"plugins": ["nosuch.py"]}, "FM202"),
    ],
)
def test_bad_configurations(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    config = write_config(tmp_path / "c.yaml", tmp_path, **settings)
    done = run("serve", str(config), "--print-command")
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
