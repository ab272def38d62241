"""``fluxmoe top``: live view of a server's memory split, hit rates and moves."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fluxmoe import sizes
from fluxmoe.cli import output

if TYPE_CHECKING:
    from rich.console import Group

    from fluxmoe.observe.snapshot import Rates, Snapshot

_BAR = 48
_DIRECTIONS = {"to_kv": "memory moves to the KV cache", "to_experts": "memory moves to the experts"}


def top(
    url: Annotated[str, typer.Argument(help="Address of the server.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between frames.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one snapshot as JSON.")] = False,
) -> None:
    """Show a running server's memory split, hit rates, moves, and the reasons for the moves."""
    from fluxmoe.observe import snapshot

    first = snapshot.fetch(url)
    if as_json:
        output.print_json({**asdict(first), "rates": asdict(snapshot.rates(first))})
    elif once:
        output.console().print(frame(first, snapshot.rates(first)))
    else:
        _watch(url, first, interval)


def _watch(url: str, first: Snapshot, interval: float) -> None:
    """Show frames until Ctrl-C; if the server does not answer, wait for it."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from fluxmoe.errors import EngineError
    from fluxmoe.observe import snapshot

    now, taken = first, time.monotonic()
    shown = frame(now, snapshot.rates(now))
    try:
        with Live(shown, console=output.console(), auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    after, moment = snapshot.fetch(url), time.monotonic()
                except EngineError as error:
                    live.update(Group(shown, Text(f"{error.what}; waiting", "red")), refresh=True)
                    continue
                shown = frame(after, snapshot.rates(after, now, moment - taken))
                live.update(shown, refresh=True)
                now, taken = after, moment
    except KeyboardInterrupt:
        return


def frame(now: Snapshot, rates: Rates) -> Group:
    """Render one frame; rates are since the previous frame, or since the server's start."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    free = max(now.budget_bytes - now.expert_bytes - now.kv_bytes, 0)
    memory = Table.grid(padding=(0, 2))
    for name, nbytes, colour, more in (
        ("experts", now.expert_bytes, "cyan", f"{now.slots} of {now.pages} pages"),
        ("KV cache", now.kv_bytes, "magenta", f"{now.kv_usage:.0%} in use"),
        ("free", free, "white", ""),
    ):
        share = nbytes / max(now.budget_bytes, 1)
        bar = "█" * round(share * _BAR)
        memory.add_row(
            name, Text(f"{bar:<{_BAR}}", colour), sizes.shown(nbytes), f"{share:.0%}", more
        )
    since = f"last {rates.seconds:.0f} s" if rates.seconds else "since the start"
    numbers = Table.grid(padding=(0, 3))
    numbers.add_row("requests", f"{now.running} running, {now.waiting} waiting",
                    "preempted", str(now.preemptions))  # fmt: skip
    numbers.add_row("expert hit rate", _share(rates.hit_rate),
                    "prefix hit rate", _share(rates.prefix_rate))  # fmt: skip
    numbers.add_row("time per token", "–" if rates.token_ms is None else f"{rates.token_ms:.1f} ms",
                    "tokens", _per_s(rates, f"{rates.tokens_per_s:.1f}", now.tokens))  # fmt: skip
    loaded = _per_s(rates, sizes.shown(rates.loaded_per_s), sizes.shown(now.loaded_bytes))
    waited = f"{rates.stall_share:.0%}" if rates.seconds else f"{now.stall_seconds:.1f} s"
    numbers.add_row("pages loaded", loaded, "waited for them", waited)
    moves = f"{now.moves_to_kv} to the KV cache, {now.moves_to_experts} to the experts"
    numbers.add_row("moves", moves, "failed", str(now.moves_failed))
    lines = [f"{_DIRECTIONS.get(told.direction, told.direction)} ({told.policy})"
             + (f": {told.reason}" if told.reason else "") for told in now.decisions]  # fmt: skip
    return Group(
        Text.assemble(
            (now.model, "bold"), f"  {now.url}  budget {sizes.shown(now.budget_bytes)}"
        ),
        memory,
        "",
        Text(since, "dim"),
        numbers,
        *([Text(f"policies failed {now.faults} times: see the server's log", "yellow")]
          if now.faults else []),
        "",
        Text("Last decisions", "bold"),
        *[Text(f"• {line}") for line in lines or ["none: the split is still the initial one"]],
    )  # fmt: skip


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _per_s(rates: Rates, rate: str, total: object) -> str:
    return f"{rate}/s" if rates.seconds else str(total)
