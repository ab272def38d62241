"""``fluxmoe limit`` without a server, or with a server that is not FluxMoE's."""

import json
from contextlib import ExitStack

import pytest

from tests.commandline import fails, succeeds
from tests.web import served

SPLIT = {"experts": 3 << 20, "kv": 1 << 20}
NONE = {"budget": None, "experts": {"min": None, "max": None}, "kv": {"min": None, "max": None}}


@pytest.fixture
def door():
    """A server that answers every request with one status and body, and records the requests."""
    asked = []

    def start(status, body):
        def answer(request):
            length = int(request.headers.get("Content-Length") or 0)
            sent = json.loads(request.rfile.read(length)) if length else None
            key = request.headers.get("Authorization")
            asked.append((request.command, request.path, key, sent))
            return status, body if isinstance(body, bytes) else json.dumps(body).encode()

        return servers.enter_context(served(answer)), asked

    with ExitStack() as servers:
        yield start


def test_what_is_sent_and_shown(door, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    told = {"limits": {**NONE, "kv": {"min": 4096, "max": None}}, "split": SPLIT, "budget": 4 << 20}
    url, asked = door(200, told)
    shown = succeeds("limit", url)
    assert "experts have 3.0 MiB, the KV cache 1.0 MiB, of 4.0 MiB" in shown
    assert "limits: kv.min 4KiB" in shown
    path = "/v1/fluxmoe/limits"
    assert asked.pop() == ("GET", path, None, None)
    assert json.loads(succeeds("limit", url, "--kv-min", "4KiB", "--budget", 9, "--json")) == told
    sent = {**NONE, "budget": 9, "kv": {"min": 4096, "max": None}}
    assert asked.pop() == ("POST", path, None, sent)
    succeeds("limit", url, "--reset", "--api-key", "k")
    assert asked.pop() == ("POST", path, "Bearer k", NONE)
    monkeypatch.setenv("VLLM_API_KEY", "from the environment")
    succeeds("limit", url, "--experts-max", "auto")
    assert asked.pop() == ("POST", path, "Bearer from the environment", NONE)


def test_what_is_refused(door):
    fails("limit", "127.0.0.1:9", code="FM405", message="no response from the server")
    fails("limit", "x y", code="FM101", message="not a valid server address")
    fails("limit", "--kv-min", "2MiB", "--kv-max", "1MiB", code="FM101", message="min must not")
    fails("limit", "--kv-min", "lots", code="FM101", message=r"kv\.min: not a valid size")
    fails("limit", "--kv-min", "1MiB", "--reset", code="FM101", message="--reset; give one")
    for status, body, code, message in (
        (401, b"{}", "FM101", "API key.*--api-key"),
        (404, b"{}", "FM405", "does not accept limits.*control: true"),
        (400, {"error": {"message": "kv.max; give more"}}, "FM101", "kv.max; give more"),
        (500, b"oh", "FM405", "status 500"),
        (200, b"<html>", "FM405", "not FluxMoE's"),
        (200, {"split": {}}, "FM405", "not FluxMoE's"),
    ):
        fails("limit", door(status, body)[0], code=code, message=message)
