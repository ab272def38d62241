"""An engine leaves nothing behind, neither in its own process nor in the parent process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from fluxmoe.backends.vllm.child.child import ENVIRONMENT, ChildEngine, Prompt
from fluxmoe.errors import EngineError
from tests.vllm.conftest import EAGER, KV_BYTES
from tests.vllm.test_arbitration import family

pytestmark = pytest.mark.vllm

#: A program that uses the child's engine class and then inspects its own process.
SCRIPT = """
import gc, json, os, sys, threading
from fluxmoe.backends import op
from fluxmoe.backends.vllm.child.inside import Engine, Prompt

def left():
    gc.collect()
    files = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass  # the one that lists the folder
    return {
        "fds": len(files),
        "memfds": sum("memfd:fluxmoe" in file for file in files),
        "mappings": sum("memfd:fluxmoe" in line for line in open("/proc/self/maps")),
        "copy_threads": sum(t.name.startswith("fluxmoe-copy") for t in threading.enumerate()),
        "pagers": len(op._pagers),
    }

def engine(**options):
    fluxmoe = {
        "memory": {"budget": "10MiB", "frame": 4096, "experts": {"target": 20 * 49152}},
        "prefetch": "next-layer",
        "copy_threads": 2,
    }
    return Engine(sys.argv[1], fluxmoe, {**json.loads(sys.argv[2]), **options})

states = []
for _ in range(3):
    running = engine()
    running.generate([Prompt([5, 6, 7], 5)] * 4, False, True)
    states.append(left())
    running.stop()
    running._engine.engine_core.shutdown()  # once more: does no harm
    del running
    states.append(left())
for _ in range(2):
    try:
        engine(scheduler_cls="no.such.scheduler")  # fails long after the experts were moved out
    except ModuleNotFoundError:
        pass  # the exception holds the worker as long as it is handled
    states.append(left())
sys.__stdout__.write("states: " + json.dumps(states))
"""


@pytest.fixture(scope="module")
def states(checkpoint: Path) -> list[dict[str, int]]:
    """The states of a process during and after three runs, and after two failed starts."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), json.dumps(EAGER)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "states: " in result.stdout, result.stderr
    found: list[dict[str, int]] = json.loads(result.stdout.partition("states: ")[2])
    assert len(found) == 8
    return found


def test_a_running_engine_has_something_to_leak(states: list[dict[str, int]]) -> None:
    for running in states[0:6:2]:
        assert running["memfds"] == 6  # two arenas, and the board's file and mapping at each end
        assert running["mappings"] >= 2
        assert running["copy_threads"] == 2
        assert running["pagers"] == 1


def test_a_stopped_engine_leaves_nothing(states: list[dict[str, int]]) -> None:
    for stopped in states[1:6:2]:
        assert {**stopped, "fds": 0} == dict.fromkeys(stopped, 0)
    assert states[5]["fds"] <= states[1]["fds"]


def test_an_engine_that_failed_to_start_leaves_nothing(states: list[dict[str, int]]) -> None:
    """vLLM releases neither such a worker nor its process group; only FluxMoE's part is tested."""
    for failed in states[6:]:
        assert {**failed, "fds": 0} == dict.fromkeys(failed, 0)
    assert states[7]["fds"] <= states[6]["fds"]


# --- processes -----------------------------------------------------------------------------------

LONG = [Prompt([5, 6, 7], 200) for _ in range(64)]


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for this test's temporary files only, because other tests may run engines too."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # tempfile reads the variable again
    return folder


def test_an_engine_that_is_killed(checkpoint: Path, logs: Path) -> None:
    with ChildEngine(checkpoint, kv_cache_memory_bytes=KV_BYTES, **EAGER) as engine:
        (log,) = logs.glob("fluxmoe-engine-*")
        pid = engine._process.pid
        assert pid is not None
        killed = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
        killed.start()
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"ended unexpectedly \(exit code -9\)"):
            while True:
                engine.generate(LONG)
        assert time.monotonic() - started < 10
        # Every later call fails as well, without hanging.
        with pytest.raises(EngineError, match="ended unexpectedly"):
            engine.generate(LONG)
        with pytest.raises(EngineError, match="ended unexpectedly"):
            engine.restart(**EAGER)
    assert not log.exists()
    assert not psutil.pid_exists(pid)
    engine.close()


@pytest.mark.full
def test_three_processes_go_together_when_one_is_killed(checkpoint: Path) -> None:
    """The three-process test in ``test_arbitration`` checks the same for a closed engine."""
    engine = ChildEngine(checkpoint, three_processes=True, kv_cache_memory_bytes=KV_BYTES, **EAGER)
    processes = family(engine)
    assert len(processes) >= 3
    assert len(engine.generate([Prompt([5, 6, 7], 4)]).tokens[0]) == 4
    processes[0].kill()
    with pytest.raises(EngineError, match="ended unexpectedly"):
        engine.generate(LONG)
    engine.close()
    assert psutil.wait_procs(processes, timeout=20)[1] == []


PARENT = """
import json, sys
from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt

if __name__ == "__main__":
    engine = ChildEngine(sys.argv[1], kv_cache_memory_bytes=8 << 20, **json.loads(sys.argv[2]))
    print(engine._process.pid, flush=True)
    while True:
        engine.generate([Prompt([5, 6, 7], 200) for _ in range(64)])
"""


def test_a_parent_that_is_killed_takes_its_engine_along(
    checkpoint: Path, tmp_path: Path, logs: Path
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(checkpoint), json.dumps(EAGER)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            engine = psutil.Process(int(parent.stdout.readline()))
            time.sleep(0.5)  # until generation is running
            assert parent.poll() is None
            assert engine.is_running()
        finally:
            parent.kill()
    try:
        engine.wait(10)
        assert not list(logs.glob("fluxmoe-engine-*"))
    finally:
        if engine.is_running():
            engine.kill()


def test_an_interrupted_call_does_not_delay_the_end(checkpoint: Path) -> None:
    """If Ctrl-C reaches the parent but not the child, the exit must not wait for the call."""
    # Without this handler, tests that a shell runs in the background would ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt(checkpoint)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(checkpoint: Path) -> None:
    with ChildEngine(checkpoint, kv_cache_memory_bytes=KV_BYTES, **EAGER) as engine:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(30):
                engine.generate(LONG)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert not engine._process.is_alive()
