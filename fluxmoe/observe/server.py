"""One request to a running server."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request

from fluxmoe.errors import ConfigError, EngineError

_TIMEOUT = 10.0


def address(url: str) -> str:
    """``http://host:port`` of what a user may have written.

    Raises:
        ConfigError: It is no address.
    """
    base = url if "://" in url else f"http://{url}"
    base = base.rstrip("/").removesuffix("/metrics")
    parts = urllib.parse.urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname or " " in base:
        raise ConfigError(
            f"{url!r} is no address of a server", where="URL", fix="write http://HOST:PORT"
        )
    return base


def ask(
    base: str, path: str, *, body: object | None = None, key: str | None = None
) -> tuple[int, bytes]:
    """Ask a server: GET, or POST if there is a body.

    Args:
        base: What ``address`` gives.
        path: Begins with a slash.
        body: Sent as JSON.
        key: The server's API key.

    Returns:
        HTTP status and answer.

    Raises:
        EngineError: Nothing answers there.
    """
    where = base + path
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(where, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise EngineError(
            f"no server answers: {getattr(error, 'reason', error)}",
            where=where,
            fix="start one with `fluxmoe serve`, or name its address as http://HOST:PORT",
        ) from error
