"""``fluxmoe limit``: set limits on a running server's memory split."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import output
from fluxmoe.cli.shared.options import AsJson


def limit(
    url: Annotated[str, typer.Argument(help="Address of the server.")] = "http://127.0.0.1:8000",
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Maximum for experts plus KV cache.")
    ] = None,
    experts_min: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Minimum for the experts.")
    ] = None,
    experts_max: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Maximum for the experts.")
    ] = None,
    kv_min: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Minimum for the KV cache.")
    ] = None,
    kv_max: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Maximum for the KV cache.")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Remove all limits.")] = False,
    api_key: Annotated[
        str | None, typer.Option(help="API key of the server; default: $VLLM_API_KEY.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set limits on a running server's memory split; limits that are omitted are removed.

    Without options, show the current limits. The server must run with control: true.
    """
    from fluxmoe import config
    from fluxmoe.backends.vllm.settings import LIMITS_PATH
    from fluxmoe.errors import ConfigError, EngineError
    from fluxmoe.observe import server

    wanted: dict[str, Any] = {
        "budget": budget,
        "experts": {"min": experts_min, "max": experts_max},
        "kv": {"min": kv_min, "max": kv_max},
    }
    wanted = {key: _given(value) for key, value in wanted.items() if _given(value)}
    if wanted and reset:
        raise ConfigError(
            "--reset cannot be combined with limits", where="--reset", fix="give one or the other"
        )
    body = None
    if wanted or reset:
        # Checked here too, so that an invalid size is reported even without a server.
        body = config.parse_limits({} if reset else wanted, where="limits").model_dump(mode="json")
    base = server.address(url)
    key = api_key or os.environ.get("VLLM_API_KEY")
    status, answer = server.ask(base, LIMITS_PATH, body=body, key=key)
    if status != 200:
        raise _refused(status, answer, base)
    try:
        told: dict[str, Any] = json.loads(answer)
        if as_json:
            output.print_json(told)
        else:
            _print(told)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EngineError(
            "the answer is not FluxMoE's", where=base, fix="give the address of a vLLM server"
        ) from error


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value


def _print(told: dict[str, Any]) -> None:
    split, limits = told["split"], told["limits"]
    print(f"experts have {sizes.shown(split['experts'])}, the KV cache "
          f"{sizes.shown(split['kv'])}, of {sizes.shown(told['budget'])}")  # fmt: skip
    words = [
        ("budget", limits["budget"]),
        *(
            (f"{name}.{end}", limits[name][end])
            for name in ("experts", "kv")
            for end in ("min", "max")
        ),
    ]
    given = [f"{name} {sizes.exact(size)}" for name, size in words if size is not None]
    print("limits: " + (", ".join(given) if given else "none"))


def _refused(status: int, answer: bytes, base: str) -> Exception:
    from fluxmoe.backends.vllm.settings import LIMITS_PATH
    from fluxmoe.errors import ConfigError, EngineError

    where = base + LIMITS_PATH
    if status == 401:
        return ConfigError("the server requires an API key", where=where, fix="give --api-key")
    if status in (404, 405):
        return EngineError(
            "the server does not accept limits", where=where, fix="start it with control: true"
        )
    try:
        said = str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        said = f"the server answered with status {status}"
    return ConfigError(said, where=where) if status == 400 else EngineError(said, where=where)
