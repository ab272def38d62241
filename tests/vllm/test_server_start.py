"""``fluxmoe serve`` reports, immediately and without vLLM, problems that would stop the server."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fluxmoe import machine
from fluxmoe.backends.vllm import settings
from fluxmoe.backends.vllm.preflight import checks
from fluxmoe.errors import ConfigError
from fluxmoe.testing import checkpoints

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("serve") / "model", "qwen3-moe")


def serve(
    tmp_path: Path,
    model: object,
    *more: str,
    budget: str = "10MiB",
    vllm: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "config.yaml"
    wanted = {"model": str(model), "memory": {"budget": budget}, "vllm": vllm or {}}
    config.write_text(yaml.safe_dump(wanted | (settings or {})))
    # Runs that reach the start of vLLM fail there.
    program = "import os; os.execvpe = None; from fluxmoe.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "serve", str(config), *more],
        env={key: value for key, value in os.environ.items() if not key.startswith("VLLM_")} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    for words in says:
        assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", None])
def test_a_port_in_use(tmp_path: Path, model: Path, host: str | None) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        options = {"port": port, **({"host": host} if host else {})}
        done = serve(tmp_path, model, vllm=options)
        refused(done, f"error[FM101]: port {port} is in use; vllm.port; choose another port")
    assert "NoneType" in serve(tmp_path, model, vllm=options).stderr  # vLLM would start


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"port": "http"}, "it must be a whole number, not 'http'; vllm.port"),
        ({"port": 70000}, "it must be from 0 (any free port) to 65535, not 70000; vllm.port"),
        ({"port": True}, "it must be a whole number, not True; vllm.port"),
        ({"host": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid, port 8000"),
        ({"host": "192.0.2.1", "port": 0}, "cannot listen on 192.0.2.1"),
        ({"kv-transfer-config": {}}, "kv-transfer-config is set by FluxMoE"),
    ],
)
def test_addresses(tmp_path: Path, model: Path, options: dict[str, Any], says: str) -> None:
    refused(serve(tmp_path, model, vllm=options), "error[FM101]", says)


def test_a_budget_beyond_the_machine(tmp_path: Path, model: Path) -> None:
    refused(serve(tmp_path, model, budget="900TiB"), "of free memory; memory.budget")


@pytest.mark.parametrize("setting", [{"arbitration": "marginal"}, {"control": True}])
def test_latent_attention_with_a_moving_split(tmp_path: Path, setting: dict[str, Any]) -> None:
    model = checkpoints.write(tmp_path / "mla", "deepseek-v2")
    options = {"port": 0, "max-model-len": 64}
    done = serve(tmp_path, model, settings=setting, vllm=options)
    refused(done, "error[FM402]", "multi-head latent attention", "arbitration")
    assert "FM402" not in serve(tmp_path, model, vllm=options).stderr
    # With this variable, vLLM expands the latent vectors and uses ordinary attention.
    done = serve(tmp_path, model, settings=setting, vllm=options, VLLM_MLA_DISABLE="1")
    assert "FM402" not in done.stderr


def test_a_folder_instead_of_a_configuration(model: Path) -> None:
    program = "from fluxmoe.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    refused(done, "error[FM101]: the path is a folder", "give a YAML file")


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, model: Path) -> None:
    # The folder's place is taken by a file, because root in a container can write to any folder.
    (tmp_path / "file").touch()
    done = serve(tmp_path, model, vllm={"port": 0}, VLLM_CACHE_ROOT=str(tmp_path / "file" / "x"))
    refused(done, "cannot write to", "Not a directory", "VLLM_CACHE_ROOT")


def test_a_model_that_is_missing_or_damaged(tmp_path: Path) -> None:
    refused(serve(tmp_path, tmp_path / "model"), "error[FM406]: no such folder", str(tmp_path))
    model = checkpoints.write(tmp_path / "model", "qwen3-moe")
    os.truncate(model / "model.safetensors", 5000)
    refused(serve(tmp_path, model), "error[FM406]: damaged or truncated", "model.safetensors")
    # With random weights, no weight files are read.
    done = serve(tmp_path, model, vllm={"load-format": "dummy", "port": 0})
    assert "NoneType" in done.stderr


def test_the_printed_command_has_the_connector_and_keeps_the_cores(
    tmp_path: Path, model: Path
) -> None:
    words = shlex.split(serve(tmp_path, model, "--print-command").stdout)
    options = settings.engine_options({"memory": {"budget": 10 << 20}})
    assert words[words.index("--worker-cls") + 1] == options["worker_cls"]
    for flag in ("--additional-config", "--kv-transfer-config"):
        assert json.loads(words[words.index(flag) + 1]) == options[flag[2:].replace("-", "_")]
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU=1" in words
    given = {"VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    printed = serve(tmp_path, model, "--print-command", **given).stdout
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" not in printed


@pytest.mark.parametrize(("workers", "least"), [(1, 241), (2, 249)])
def test_a7_shared_memory_for_vllms_queues(
    monkeypatch: pytest.MonkeyPatch, workers: int, least: int
) -> None:
    for free in (None, least << 20):
        monkeypatch.setattr(machine, "shared_memory", lambda free=free: free)
        checks.require_shared_memory(workers)
    monkeypatch.setattr(machine, "shared_memory", lambda: 64 << 20)
    with pytest.raises(
        ConfigError, match=f"only 64 MiB is free, but vLLM needs {least} MiB; /dev/shm; .*1g"
    ):
        checks.require_shared_memory(workers)
