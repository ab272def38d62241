"""A5, A11, C11: when a server ends, at any time, all its processes end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from fluxmoe.backends.vllm.child.child import Prompt
from tests.vllm.test_server_pair import Server, start

pytestmark = pytest.mark.vllm

PATIENCE = 240.0


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path) -> Iterator[Server]:
    server = start(tmp_path / "server", checkpoint)
    try:
        yield server
    finally:
        server.end()


def family_of(server: Server) -> list[psutil.Process]:
    """List the server, vLLM's engine and worker, and Python's shared memory tracker."""
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    assert len(family) == 4
    return family


def segments(family: list[psutil.Process]) -> set[Path]:
    """List shared memory files mapped by the processes."""
    maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in family]
    return {
        Path(line.split()[-1]) for text in maps for line in text.splitlines() if "/dev/shm/" in line
    }


def all_end(family: list[psutil.Process]) -> None:
    left = psutil.wait_procs(family, timeout=PATIENCE)[1]
    for process in left:
        process.kill()
    assert not left


@pytest.mark.slow
def test_a5_sigkill_of_a_serving_server_ends_its_engine_and_worker(server: Server) -> None:
    server.wait()
    family = family_of(server)
    shared = segments(family)
    assert shared
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(server.complete, Prompt([9, 9], 250))
        time.sleep(0.3)  # the engine runs or has answered the request; both must work
        server.process.kill()
        server.process.wait()
        if not request.cancel():
            assert isinstance(request.exception(), httpx.TransportError | None)
    all_end(family)
    assert not [path for path in shared if path.exists()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(signal.SIGTERM, id="a11-sigterm"),
        pytest.param(signal.SIGINT, marks=pytest.mark.full, id="c11-ctrl-c"),
    ],
)
def test_a_signal_while_the_engine_starts(server: Server, sent: signal.Signals) -> None:
    """SIGTERM is sent only to the server, as by ``docker stop``, and Ctrl-C to all processes."""
    deadline = time.monotonic() + PATIENCE
    while "Loading safetensors" not in server.log.read_text():
        assert server.process.poll() is None and time.monotonic() < deadline, server.tail()
        time.sleep(0.05)
    family = family_of(server)
    shared = segments(family)
    for process in family if sent is signal.SIGINT else family[:1]:
        process.send_signal(sent)
    assert server.process.wait(PATIENCE) == 128 + sent
    all_end(family)
    log = server.log.read_text()
    assert f"fluxmoe: ended by {sent.name} while the server was starting" in log
    assert "Traceback" not in log
    assert "Application startup complete" not in log
    assert not [path for path in shared if path.exists()]


PARENT = """
import multiprocessing, signal, sys, time
from fluxmoe.backends.vllm import orphan

def child(obeys):
    if not obeys:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    orphan.PATIENCE = 0.1
    orphan.end_with_parent()
    print("ready", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    name, obeys = sys.argv[1], sys.argv[2] == "True"
    process = multiprocessing.get_context("spawn").Process(target=child, args=(obeys,), name=name)
    process.start()
    print(process.pid, flush=True)
    process.join()
"""


@pytest.mark.parametrize(
    ("name", "obeys", "ends"),
    [
        ("EngineCore", True, True),
        ("VllmWorker-0", False, True),  # SIGTERM is not enough
        ("mine", True, False),  # a user's process that contains the engine
    ],
)
def test_a5_only_vllms_own_processes_end_with_their_parent(
    tmp_path: Path, name: str, obeys: bool, ends: bool
) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), name, str(obeys)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        left = psutil.wait_procs([child], timeout=PATIENCE if ends else 1)[1]
        for process in left:
            process.kill()
        assert bool(left) is not ends
