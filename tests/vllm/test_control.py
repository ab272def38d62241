"""Operator limits, set while vLLM serves, are enforced, reported, and rejected if impossible."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from fluxmoe.backends.vllm.child.child import ChildEngine
from fluxmoe.cli import main
from fluxmoe.observe import snapshot
from tests.vllm.conftest import KV_BYTES
from tests.vllm.test_arbitration import FEW, TRAFFIC, books, config, same
from tests.vllm.test_server_pair import Server, start

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FIXED = {**config("fixed"), "control": True}
KEY = "secret of the tests"


def limit(engine: ChildEngine, **limits: Any) -> dict[str, Any]:
    answer: dict[str, Any] = engine.call("rpc", "fluxmoe_limit", limits)
    return answer


def test_limits_while_requests_run_change_no_token(eager: ChildEngine) -> None:
    few = TRAFFIC[:24]
    eager.restart(kv_cache_memory_bytes=KV_BYTES, **FEW)
    stock = eager.generate(few)
    eager.restart(fluxmoe=FIXED, **FEW)
    begun, budget = limit(eager)["split"], FIXED["memory"]["budget"]
    same(eager.generate(few, watch=True), stock)
    assert limit(eager)["split"] == begun  # no tenant requested a change
    for limits in (
        {"kv": {"max": budget // 4}},
        {"experts": {"max": budget // 3}},
        {"kv": {"min": budget // 2}},
        {"budget": budget * 3 // 4},
        {},
    ):
        assert "error" not in limit(eager, **limits)
        same(eager.generate(few, watch=True), stock)
        state = eager.call("arbitration")
        split, (frames, allocated) = limit(eager)["split"], eager.call("rpc", books)
        assert frames == state["frames"]
        assert allocated == sum(split.values()) <= limits.get("budget", budget)
        for tenant in ("experts", "kv"):
            bounds = limits.get(tenant, {})
            assert bounds.get("min", 0) <= split[tenant] <= bounds.get("max", budget), limits
    assert state["faults"] == state["failures"] == 0
    assert sum(state["changes"].values()) > 4
    assert "limits set by the operator" in eager.call("told")[-1]

    for wrong, message in (
        ({"kv": {"max": 1}}, "kv.max; use"),
        ({"budget": 2 * budget}, "budget; use"),
        ({"experts": {"min": budget}, "kv": {"min": budget}}, "exceed the budget"),
        ({"kv": {"max": "much"}}, "not a valid size"),
        ({"kvs": 1}, "unknown key"),
    ):
        assert message in limit(eager, **wrong)["error"]["message"]
    assert limit(eager)["limits"]["kv"] == {"min": None, "max": None}
    eager.restart(fluxmoe=config("fixed"), **FEW)
    assert "control: true" in limit(eager, budget="1MiB")["error"]["message"]


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("control")

    def controlled(settings: dict[str, Any]) -> None:
        settings["control"] = True
        settings["vllm"] |= {"api-key": KEY, "max-num-seqs": 8}

    server = start(folder / "server", checkpoint, change=controlled)
    try:
        server.wait()
        yield server
    finally:
        server.end()


def fluxmoe(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        main(list(words))
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_command_and_the_door(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = fluxmoe("limit", server.url, "--kv-max", "1MiB")
    assert code == 2 and "requires an API key" in err
    assert httpx.get(f"{server.url}/v1/fluxmoe/limits").status_code == 401
    door = {"headers": {"Authorization": f"Bearer {KEY}"}}
    body = httpx.post(f"{server.url}/v1/fluxmoe/limits", content=b"x", **door)  # type: ignore[arg-type]
    assert body.status_code == 400 and "not valid JSON" in body.text
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    code, out, err = fluxmoe("limit", server.url)
    assert (code, err) == (0, "") and "limits: none" in out

    # An idle engine gives the memory up at once, instead of waiting for the next request.
    before = snapshot.fetch(server.url)
    code, out, err = fluxmoe("limit", server.url, "--budget", "2MiB", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["limits"]["budget"] == 2 << 20
    held = lambda: (lambda s: s.expert_bytes + s.kv_bytes)(snapshot.fetch(server.url))  # noqa: E731
    eventually(lambda: held() <= 2 << 20)
    assert before.expert_bytes + before.kv_bytes > 2 << 20
    assert "limits set by the operator" in snapshot.fetch(server.url).decisions[-1].reason
    assert "budget 2MiB" in fluxmoe("limit", server.url)[1]
    assert snapshot.fetch(server.url).limits == {"budget.max": 2 << 20}  # C7

    code, _, err = fluxmoe("limit", server.url, "--kv-max", "1B")
    assert code == 2 and "kv.max; use" in err
    code, _, err = fluxmoe("limit", server.url, "--kv-max", "much")
    assert code == 2 and "kv.max: not a valid size" in err
    assert fluxmoe("limit", server.url, "--reset")[0] == 0
    assert "limits: none" in fluxmoe("limit", server.url)[1]
    eventually(lambda: snapshot.fetch(server.url).limits == {})
    assert "GET /metrics" not in server.log.read_text()


def test_limits_while_the_server_is_busy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    few = TRAFFIC[:16]
    expected = [server.complete(prompt, KEY) for prompt in few]
    done = threading.Event()

    def fiddle() -> int:
        rounds = 0
        while not done.is_set() or rounds < 4:
            for words in (["--kv-max", "1MiB"], ["--kv-min", "3MiB"], ["--budget", "4MiB"]):
                assert fluxmoe_quiet(server, *words) == 200
                time.sleep(0.05)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(9) as pool:
        fiddling = pool.submit(fiddle)
        answers = list(pool.map(lambda prompt: server.complete(prompt, KEY), few * 3))
        done.set()
        assert fiddling.result() >= 4
    assert answers == expected * 3
    now = snapshot.fetch(server.url)
    assert now.moves_to_kv > 2 and now.moves_to_experts > 2
    assert now.moves_failed == sum(policy.faults for policy in now.policies) == 0


def fluxmoe_quiet(server: Server, option: str, size: str) -> int:
    """Set a limit without ``fluxmoe()``, which redirects the output and is not thread-safe."""
    tenant, _, end = option.removeprefix("--").partition("-")
    limits = {tenant: {end: size}} if end else {tenant: size}
    answer = httpx.post(
        f"{server.url}/v1/fluxmoe/limits",
        json=limits,
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    )
    return answer.status_code


def test_a_server_without_control_has_no_door(checkpoint: Path, tmp_path: Path) -> None:
    from fluxmoe import config as fluxmoe_config
    from fluxmoe.backends.vllm.preflight import checks
    from fluxmoe.backends.vllm.server import launch

    settings = {"model": str(checkpoint), "memory": {"budget": "8MiB"}}
    plain = launch.arguments(checks.resolved(fluxmoe_config.parse(settings, where="")))
    assert launch.CONTROL not in plain
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**settings, "control": True}))
    assert launch.CONTROL in launch.arguments(
        checks.resolved(fluxmoe_config.load(tmp_path / "c.yaml"))
    )
