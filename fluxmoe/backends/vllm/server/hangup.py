"""Middleware that ends requests in flight when the server stops.

On SIGTERM, vLLM 0.32 ends its engine and then waits until all connections are closed. A request
that the engine has not answered never closes its connection, so about one in three shutdowns during
generation hangs forever, in stock vLLM as well (vllm-project/vllm pull request 36964).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Seconds between checks, for each request, of whether the server is stopping. A request that the
#: engine has answered has one such interval to send its response.
PERIOD = 0.5

_GONE = json.dumps(
    {"error": {"message": "the server is shutting down", "type": "ServiceUnavailable", "code": 503}}
).encode()


class EndWithServer:
    """ASGI middleware (``vllm serve --middleware``) that ends requests the engine left unanswered.

    Requests that have received no byte get status 503, and streams are cut off. A draining server
    (``--shutdown-timeout``) is not affected, because vLLM sets the server's exit flag only after
    the engine has ended.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        request = asyncio.ensure_future(self._app(scope, receive, noting))
        try:
            while not request.done():
                stopping = _stops(scope)
                await asyncio.wait({request}, timeout=PERIOD)
                if stopping and not request.done():
                    break
        except asyncio.CancelledError:
            request.cancel()
            raise
        if request.done():
            request.result()  # raises the request's error, if any
            return
        request.cancel()
        await asyncio.wait({request})
        if not started:
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": _GONE})


def _stops(scope: Scope) -> bool:
    # vLLM stores its uvicorn server there, and sets the flag after the engine has been shut down.
    return bool(getattr(getattr(scope["app"].state, "server", None), "should_exit", False))
