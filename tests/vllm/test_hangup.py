"""Unit tests of the middleware that ends requests when the server stops.

test_serve.py uses real servers.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from fluxmoe.backends.vllm.server import hangup
from fluxmoe.backends.vllm.server.hangup import EndWithServer

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"done"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangup, "PERIOD", 0.01)


class Server:
    """A server for one request, with vLLM's ``app.state``."""

    def __init__(self, app: Any) -> None:
        self.state = SimpleNamespace(server=SimpleNamespace(should_exit=False))
        self.sent: list[dict[str, Any]] = []
        self._app = EndWithServer(app)

    async def request(self, kind: str = "http") -> None:
        async def send(message: Any) -> None:
            self.sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request"}

        await self._app({"type": kind, "app": self}, receive, send)


def stopped_while(app: Any) -> Server:
    async def run() -> Server:
        server = Server(app)
        request = asyncio.ensure_future(server.request())
        await asyncio.sleep(0.05)
        assert not request.done()
        server.state.server.should_exit = True
        await asyncio.wait_for(request, 10)
        return server

    return asyncio.run(run())


def test_an_answered_request_is_not_touched() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.03)
        await send(START)
        await send(END)

    for kind in ("http", "lifespan"):
        server = Server(app)
        asyncio.run(server.request(kind))
        assert server.sent == [START, END]


def test_a_request_without_an_answer_gets_503() -> None:
    cancelled = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    server = stopped_while(app)
    assert cancelled == [True]
    assert server.sent[0]["status"] == 503
    assert b"shutting down" in server.sent[1]["body"]


def test_a_stream_is_cut_off() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await asyncio.Event().wait()

    assert stopped_while(app).sent == [START]


def test_what_the_app_raises_comes_through() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        asyncio.run(Server(app).request())


def test_cancelling_reaches_the_app() -> None:
    events = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            events.append("ended")

    async def run() -> None:
        request = asyncio.ensure_future(Server(app).request())
        await asyncio.sleep(0.03)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await asyncio.sleep(0)

    asyncio.run(run())
    assert events == ["ended"]
