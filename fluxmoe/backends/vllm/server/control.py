"""``GET`` and ``POST /v1/fluxmoe/limits`` on vLLM's server, where ``control`` is on.

A route and not an answer of the middleware itself: so it lies behind vLLM's own check of the API
key, which guards what begins with ``/v1``. (vLLM's endpoint plugins would be a seam of their own,
but are loaded only if ``VLLM_PLUGINS`` is set, which then shuts out all plugins it does not name.)
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from fluxmoe.backends.vllm.compat.engine import collective_rpc, is_idle, run_a_step
from fluxmoe.backends.vllm.server.hangup import App, Receive, Scope, Send
from fluxmoe.config import parse_limits
from fluxmoe.errors import ConfigError

PATH = "/v1/fluxmoe/limits"


class Control:
    """ASGI middleware (``vllm serve --middleware``) that adds the route to vLLM's server."""

    def __init__(self, app: App) -> None:
        self._app, self._added = app, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._added:
            self._added = True
            scope["app"].add_route(PATH, limits, methods=["GET", "POST"])
        await self._app(scope, receive, send)


async def limits(request: Request) -> JSONResponse:
    """Set the limits in the body, or tell which are set, and the present split."""
    wanted: Any = None
    if request.method == "POST":
        try:
            wanted = json.loads(await request.body())
        except (ValueError, RecursionError):
            return _refused("FM101", "the body is no JSON; send a map such as {}")
        if not isinstance(wanted, dict):
            return _refused("FM101", 'the body is no map; send one such as {"kv": {"max": "4GiB"}}')
        try:  # here: text that has no UTF-8 would not even reach the workers
            parse_limits(wanted, where="limits")
        except ConfigError as error:
            return _refused(error.code, str(error))
    client = request.app.state.engine_client
    answers = await collective_rpc(client, "fluxmoe_limit", wanted)
    for answer in answers:
        if "error" in answer:
            return _refused(answer["error"]["code"], answer["error"]["message"])
    if wanted is not None and is_idle(client):
        await run_a_step(client, f"fluxmoe-limit-{uuid.uuid4()}")
    return JSONResponse(answers[0])


def _refused(code: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, 400)
