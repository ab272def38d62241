"""``GET`` and ``POST /v1/fluxmoe/limits`` on vLLM's server, if ``control`` is on.

The middleware adds a route instead of responding itself, so that vLLM's API key check for paths
below ``/v1`` applies. (vLLM's endpoint plugins would be an alternative, but vLLM loads them only if
``VLLM_PLUGINS`` is set, and this variable excludes all plugins that it does not list.)
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from fluxmoe.backends.vllm.compat.engine import client_of, collective_rpc, is_idle, run_a_step
from fluxmoe.backends.vllm.server.hangup import App, Receive, Scope, Send
from fluxmoe.backends.vllm.settings import LIMITS_PATH
from fluxmoe.config import parse_limits
from fluxmoe.errors import ConfigError, UnsupportedVersionError

#: Maximum bytes of a body. No valid limits are longer, and the server waits until a body is read.
LARGEST = 4096


class Control:
    """ASGI middleware (``vllm serve --middleware``) that adds the route to vLLM's server."""

    def __init__(self, app: App) -> None:
        self._app, self._added = app, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._added:
            self._added = True
            scope["app"].add_route(LIMITS_PATH, limits, methods=["GET", "POST"])
        await self._app(scope, receive, send)


async def limits(request: Request) -> JSONResponse:
    """Set the limits in the body, if any, and return the current limits and split."""
    wanted: Any = None
    if request.method == "POST":
        body = await request.body()
        if len(body) > LARGEST:
            return _refused("FM101", f"the body is larger than {LARGEST} bytes; send a few limits")
        try:
            wanted = json.loads(body)
        except (ValueError, RecursionError):
            return _refused("FM101", "the body is not valid JSON; send a map such as {}")
        if not isinstance(wanted, dict):
            return _refused("FM101", 'the body is not a map such as {"kv": {"max": "4GiB"}}')
        try:  # validated here, because text that is not valid UTF-8 would not reach the workers
            parse_limits(wanted, where="limits")
        except ConfigError as error:
            return _refused(error.code, "; ".join(each.text for each in error.problems()))
    try:
        client = client_of(request.app.state)
        answers = await collective_rpc(client, "fluxmoe_limit", wanted)
    except UnsupportedVersionError as error:
        return _refused(error.code, error.text, 500)
    for answer in answers:
        if "error" in answer:
            return _refused(answer["error"]["code"], answer["error"]["message"])
    if wanted is not None and is_idle(client):
        await run_a_step(client, f"fluxmoe-limit-{uuid.uuid4()}")
    return JSONResponse(answers[0])


def _refused(code: str, message: str, status: int = 400) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status)
