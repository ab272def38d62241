"""E11: without an engine, the endpoint for limits refuses invalid requests and gives a reason."""

from __future__ import annotations

import json

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fluxmoe.backends.vllm.server.control import LARGEST, limits
from fluxmoe.backends.vllm.settings import LIMITS_PATH

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def door():
    app = Starlette()
    app.add_route(LIMITS_PATH, limits, methods=["GET", "POST"])
    return TestClient(app, raise_server_exceptions=False)


def nested(depth: int, begin: str, end: str) -> str:
    return begin * depth + "1" + end * depth


BODIES = {
    **{f"lists, {n}": nested(n, "[", "]") for n in (1, 500, 990, 1000, 2000)},
    **{f"lists in budget, {n}": f'{{"budget": {nested(n, "[", "]")}}}' for n in (1, 990, 2000)},
    **{f"maps in kv, {n}": '{"kv": ' + nested(n, '{"a":', "}") + "}" for n in (1, 200, 600)},
    **{f"maps, {n}": nested(n, '{"a":', "}") for n in (1, 200, 800)},
    "long": '{"budget": "' + "9" * LARGEST + '"}',
    "very long": " " * 10**7,
    "digits": '{"budget": ' + "9" * (LARGEST - 12) + "}",
    "infinite": '{"budget": Infinity}',
    "no number": '{"budget": NaN}',
    "too large": '{"budget": 1e400}',
    "surrogate": '{"budget": "\\ud800"}',
    "surrogate key": '{"\\ud800": 1}',
    "markup": '{"[/red]": "[/red]"}',
    "null": "null",
    "empty": "",
    "bytes": b"\xff\xfe{",
    "many": json.dumps({str(n): 1 for n in range(400)}),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_e11_whatever_is_sent_gets_a_reason(door, body):
    answer = door.post(LIMITS_PATH, content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"].startswith("FM") and error["message"].isprintable()
    assert len(answer.content) < 100 * 1024


def test_a_server_whose_state_has_no_engine_client(door):
    answer = door.get(LIMITS_PATH)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "FM403"
    assert "engine_client" in answer.json()["error"]["message"]
