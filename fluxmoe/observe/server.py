"""HTTP requests to a running server."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request

from fluxmoe.errors import ConfigError, EngineError

_TIMEOUT = 10.0


def address(url: str) -> str:
    """Normalise an address to ``http://host:port``.

    Raises:
        ConfigError: The address is not valid.
    """
    base = url if "://" in url else f"http://{url}"
    base = base.rstrip("/").removesuffix("/metrics")
    try:
        parts = urllib.parse.urlsplit(base)
        valid = parts.scheme in ("http", "https") and parts.hostname and " " not in base
    except ValueError:  # brackets that do not enclose a valid address
        valid = False
    if not valid:
        raise ConfigError(
            f"not a valid server address: {url!r}", where="URL", fix="write http://HOST:PORT"
        )
    return base


def ask(
    base: str, path: str, *, body: object | None = None, key: str | None = None
) -> tuple[int, bytes]:
    """Send a request to a server: GET, or POST if ``body`` is given.

    Args:
        base: Address returned by ``address``.
        path: Path, starting with a slash.
        body: Value to send as JSON.
        key: The server's API key.

    Returns:
        The HTTP status and the body of the response.

    Raises:
        EngineError: The server did not respond.
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
            f"no response from the server: {getattr(error, 'reason', error)}",
            where=where,
            fix="start a server with `fluxmoe serve` or check the address (http://HOST:PORT)",
        ) from error
