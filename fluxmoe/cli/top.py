"""``fluxmoe top``: a live view of a server's memory split, hit rates and moves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import output

if TYPE_CHECKING:
    from rich.console import Group, JustifyMethod
    from rich.table import Table

    from fluxmoe.core.arbitration.messages import Decision
    from fluxmoe.observe.snapshot import PolicyState, Rates, Snapshot

#: Minimum width of the screen, and maximum width of the bar, which is longer on wider terminals.
_LEAST, _BAR = 80, 48
_DIRECTIONS = {"to_kv": "memory moves to the KV cache", "to_experts": "memory moves to the experts"}


def top(
    url: Annotated[str, typer.Argument(help="Address of the server.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="Print one screen and exit.")] = False,
    interval: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds between updates; also the interval over which rates are computed.",
        ),
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one snapshot as JSON.")] = False,
) -> None:
    """Show a running server's memory split, its hit rates, and the moves with their reasons."""
    from fluxmoe.observe import snapshot

    first, taken = snapshot.fetch(url), time.monotonic()
    if not (as_json or once):
        _watch(url, first, taken, interval)
        return
    time.sleep(interval)
    now = snapshot.fetch(url)
    rates = snapshot.rates(now, first, time.monotonic() - taken)
    if as_json:
        output.print_json({**asdict(now), "rates": asdict(rates)})
    else:
        console = output.console()
        console.print(frame(now, rates, console.width))


def _watch(url: str, now: Snapshot, taken: float, interval: float) -> None:
    """Update the screen until Ctrl-C; if the server does not answer, wait for it."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from fluxmoe.errors import EngineError
    from fluxmoe.observe import snapshot

    console = output.console()
    shown = frame(now, snapshot.rates(now), console.width)
    try:
        with Live(shown, console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    after, moment = snapshot.fetch(url), time.monotonic()
                except EngineError as error:
                    live.update(Group(shown, Text(f"{error.what}; waiting", "red")), refresh=True)
                    continue
                shown = frame(after, snapshot.rates(after, now, moment - taken), console.width)
                live.update(shown, refresh=True)
                now, taken = after, moment
    except KeyboardInterrupt:
        return


def frame(now: Snapshot, rates: Rates, width: int) -> Group:
    """Render one screen.

    Args:
        now: The server's state.
        rates: Changes since the previous screen, or since the server's start.
        width: Columns of the terminal. Only the bar's width depends on this number, and no column's
            width depends on the values, so that the columns do not move between updates.
    """
    from rich.console import Group
    from rich.text import Text

    names = ", ".join(policy.name for policy in now.policies)
    warnings = [
        Text(f"{policy.kind} policy {policy.name} {said}", "yellow")
        for policy in now.policies
        if (said := _trouble(policy))
    ]
    limits = ", ".join(f"{name} {sizes.shown(size)}" for name, size in now.limits.items())
    lines = [_told(told) for told in now.decisions]
    since = f"last {rates.seconds:.0f} s" if rates.seconds else "since the start"
    return Group(
        Text.assemble((now.model, "bold"), f"  {now.url}  budget {sizes.shown(now.budget_bytes)}"),
        Text(f"FluxMoE {now.version}: {names}", "dim"),
        _memory(now, width),
        *([f"operator limits: {limits}"] if limits else []),
        "",
        Text(since, "dim"),
        _numbers(now, rates),
        *warnings,
        "",
        Text("Last decisions", "bold"),
        *[Text(f"• {line}") for line in lines or ["none: the split is still the initial one"]],
    )


def _memory(now: Snapshot, width: int) -> Table:
    from rich.text import Text

    length = min(_BAR, max(width, _LEAST) - (_LEAST - 24))
    table = _grid(8, length, 9, 4, 18, right=(2, 3))
    free = max(now.budget_bytes - now.expert_bytes - now.kv_bytes, 0)
    for name, nbytes, colour, more in (
        ("experts", now.expert_bytes, "cyan", f"{now.slots} of {now.pages} pages"),
        ("KV cache", now.kv_bytes, "magenta", f"{now.kv_usage:.0%} in use"),
        ("free", free, "white", ""),
    ):
        share = nbytes / max(now.budget_bytes, 1)
        bar = "█" * round(share * length)
        table.add_row(name, Text(bar, colour), sizes.shown(nbytes), f"{share:.0%}", more)
    return table


def _numbers(now: Snapshot, rates: Rates) -> Table:
    table = _grid(15, 29, 15, 15)
    table.add_row("requests", f"{now.running} running, {now.waiting} waiting",
                  "preempted", str(now.preemptions))  # fmt: skip
    table.add_row("expert hit rate", _share(rates.hit_rate),
                  "prefix hit rate", _share(rates.prefix_rate))  # fmt: skip
    table.add_row("time per token", "–" if rates.token_ms is None else f"{rates.token_ms:.1f} ms",
                  "tokens", _per_s(rates, f"{rates.tokens_per_s:.1f}", now.tokens))  # fmt: skip
    loaded = _per_s(rates, sizes.shown(rates.loaded_per_s), sizes.shown(now.loaded_bytes))
    waited = f"{rates.stall_share:.0%}" if rates.seconds else f"{now.stall_seconds:.1f} s"
    table.add_row("pages loaded", loaded, "waited for them", waited)
    moves = f"{now.moves_to_kv} to KV, {now.moves_to_experts} to experts"
    table.add_row("moves", moves, "failed", str(now.moves_failed))
    return table


def _grid(*widths: int, right: Sequence[int] = ()) -> Table:
    """Make a table of columns with fixed widths, separated by two spaces."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for at, width in enumerate(widths):
        justify: JustifyMethod = "right" if at in right else "left"
        table.add_column(width=width, no_wrap=True, justify=justify)
    return table


def _trouble(policy: PolicyState) -> str:
    if policy.replaced:
        return f"was replaced after {policy.faults} faults: {policy.replaced}"
    return f"failed {policy.faults} times: see the server's log" if policy.faults else ""


def _told(told: Decision) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(told.time))
    direction = _DIRECTIONS.get(told.direction, told.direction)
    reason = f": {told.reason}" if told.reason else ""
    return f"{at} {direction} ({told.policy}){reason}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _per_s(rates: Rates, rate: str, total: object) -> str:
    return f"{rate}/s" if rates.seconds else str(total)
