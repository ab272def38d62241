"""A forked child of a process with an engine cannot use the engine and does not harm it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fluxmoe.backends.vllm.child.child import ENVIRONMENT, ChildEngine, Prompt
from fluxmoe.errors import UnsupportedError
from tests.vllm.conftest import EAGER, PAGES, config

pytestmark = pytest.mark.vllm

SCRIPT = """
import contextlib, gc, json, os, signal, sys, traceback
import numpy as np
from fluxmoe.backends.vllm.child.inside import Engine, Prompt
from fluxmoe.errors import UnsupportedError

class End(BaseException):
    pass

def forked(child):
    sys.stdout.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(120)
    try:
        child()
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(2)

def answer():
    # Neither pages nor prefixes are forgotten before: what a child does to them stays.
    run = engine.generate(prompts, False, False)
    engine.call("fluxmoe_check")
    return [run.tokens, run.logprobs]

def refused(use):
    try:
        use()
    except UnsupportedError as error:
        assert "forked" in str(error), error
    else:
        raise AssertionError("it was not refused")

def use():
    others = [Prompt([i, *range(300, 400)], 20) for i in range(3, 40)]
    refused(lambda: engine.generate(others, False, False))
    for call in "fluxmoe_stats", "fluxmoe_check", "fluxmoe_reset":
        refused(lambda: engine.call(call))
    assert "forked" in str(engine.call("fluxmoe_limit", {}))
    refused(lambda: engine.call("fluxmoe_record", folder + "/no"))
    os._exit(0)

def stop():
    engine.stop()
    os._exit(0)

def end():
    raise End

def main():
    global engine
    engine = Engine(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
    engine.call = lambda method, *args: engine._llm.collective_rpc(method, args=args)[0]
    stock = answer()
    assert answer() == stock  # from the prefix cache now, all pages are resident
    cases = {"use": use, "stop": stop, "sys.exit": lambda: sys.exit(0), "end": end}
    found = {name: [forked(case), answer() == stock] for name, case in cases.items()}
    engine.call("fluxmoe_record", folder + "/trace")
    status = forked(lambda: sys.exit(0))
    unharmed = answer() == stock
    engine.call("fluxmoe_record", None)
    found["recording"] = [status, unharmed and os.listdir(folder) == ["trace"]]
    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    substrate = worker._runtime.memory.substrate
    experts = worker._runtime.memory.experts._arenas[0][0].frame_at
    substrate.release(experts[experts >= 0])
    found["control"] = answer() == stock
    print("found: " + json.dumps(found), flush=True)
    os._exit(0)

prompts = [Prompt([index, *range(3, 80)], 8, logprobs=True) for index in range(3, 11)]
folder = sys.argv[4]
with contextlib.suppress(End):
    main()
"""


@pytest.fixture(scope="module")
def found(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("traces")
    settings = map(json.dumps, (config(PAGES), EAGER))
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), *settings, str(folder)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert "found: " in result.stdout, result.stderr
    return json.loads(result.stdout.partition("found: ")[2])


def test_a_child_that_uses_the_engine(found: Any) -> None:
    assert found["use"] == [0, True]


@pytest.mark.parametrize("case", ["stop", "sys.exit", "end", "recording"])
def test_a_child_that_ends(found: Any, case: str) -> None:
    status, unharmed = found[case]
    assert unharmed
    # As with stock vLLM, the child may crash, because torch's gloo waits for threads that a forked
    # child does not have.
    assert status in (0, -signal.SIGSEGV)


def test_harm_would_be_seen(found: Any) -> None:
    assert found["control"] is False


def test_a_forked_client_leaves_its_engine_alone(eager: ChildEngine) -> None:
    prompt = [Prompt([5, 6, 7], 4)]
    before = eager.generate(prompt).tokens
    if not (child := os.fork()):
        try:
            with pytest.raises(UnsupportedError, match="forked"):
                eager.generate(prompt)
            eager.close()
            eager._remove_log()  # like the end of a process
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert Path(eager._log).exists()
    assert eager.generate(prompt).tokens == before
