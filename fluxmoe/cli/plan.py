"""``fluxmoe plan``: what fits a memory budget, the best split, and whether paging pays."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluxmoe import sizes
from fluxmoe.cli import output

if TYPE_CHECKING:
    from fluxmoe.dimensions import Model
    from fluxmoe.plan.advice import Plan, Point

#: Default tokens per request, if the model allows that many.
_CONTEXT = 4096
#: Rows of the table.
_ROWS = 9


def plan(
    model: Annotated[
        str, typer.Argument(help="Model folder or Hugging Face name; weights are not read.")
    ],
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Budget for experts and KV cache, such as 24GiB.")
    ],
    hardware: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Hardware profile.")
    ] = "h100-pcie5",
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens per request, answer included; default: 4096.", metavar="TOKENS"
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Number of concurrent requests.")] = 64,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Recorded trace of this model, for its miss ratios."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the plan (.svg or .png).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what fits, which split is best, and whether paging pays, without loading the model."""
    from fluxmoe import dimensions as models
    from fluxmoe.config import size
    from fluxmoe.plan import advice, cost
    from fluxmoe.plan import picture as pictures
    from fluxmoe.sim import hardware as profiles
    from fluxmoe.sim.events import Events

    budget = size(memory, where="--memory")
    profile = profiles.load(hardware)
    shape = models.read(model)
    work = cost.PlannedWorkload(_tokens(context, shape), requests)
    curve = cost.even_curve(shape.pages)
    assumption = (
        "all experts are equally likely, so that memory for x % of them gives a hit rate of x %; "
        "--trace is more accurate"
    )
    if trace is not None:
        curve = cost.traced_curve(Events.load(trace), shape)
        assumption = f"hits as in {trace.name}, with a policy that suits it"
    made = advice.make(shape, profile, work, budget, curve, assumption)
    if picture is not None:
        pictures.draw(made, picture)
    if as_json:
        output.print_json(_as_json(made))
    else:
        _print(made)


def _tokens(context: int | None, model: Model) -> int:
    from fluxmoe.errors import ConfigError

    if context is None:
        return min(_CONTEXT, model.longest or _CONTEXT)
    if model.longest and context > model.longest:
        raise ConfigError(
            f"{context} tokens are more than the model's maximum of {model.longest}",
            where="--context",
            fix="lower it",
        )
    return context


def _as_json(plan: Plan) -> dict[str, object]:
    data = asdict(plan)
    data["model"] |= {"pages": plan.model.pages, "experts_bytes": plan.model.experts_bytes}
    work = data.pop("work")
    return {"context": work["tokens"], "requests": work["requests"], **data}


def _print(plan: Plan) -> None:
    from rich.table import Table
    from rich.text import Text

    model, console = plan.model, output.console()
    console.print(
        Text.assemble(
            (model.name, "bold"),
            f": {model.architecture}, {model.moe_layers} layers x {model.experts} experts of "
            f"{sizes.shown(model.page_bytes)}, top {model.top_k}",
        )
    )
    table = Table(
        "",
        title=f"{sizes.shown(plan.memory)} for experts and KV cache, {plan.hardware}",
        title_justify="left",
    )
    for column in ("experts", "resident", "KV cache", "requests", "step ms", "waiting", "tokens/s"):
        table.add_column(column, justify="right")
    for name, point in _rows(plan):
        table.add_row(name, *_cells(point))
    console.print(table)
    for sentence in plan.advice:
        console.print(f"• {sentence}", highlight=False)
    console.print(f"Assumed: {plan.assumption}.", highlight=False, style="dim")


def _rows(plan: Plan) -> list[tuple[str, Point]]:
    """Some splits from the curve, and the named ones."""
    every = max(1, (len(plan.curve) - 1) // (_ROWS - 1))
    rows = {point.resident_pages: ("", point) for point in plan.curve[::every]}
    rows[plan.automatic.resident_pages] = ("at start", plan.automatic)
    if plan.resident is not None:
        rows[plan.resident.resident_pages] = ("no paging", plan.resident)
    rows[plan.recommended.resident_pages] = ("recommended", plan.recommended)
    return [rows[pages] for pages in sorted(rows)]


def _cells(point: Point) -> list[str]:
    return [
        sizes.shown(point.expert_bytes),
        f"{point.resident_share:.1%}",
        sizes.shown(point.kv_bytes),
        str(point.requests),
        f"{point.step_ms:.1f}",
        f"{point.stall_ms / point.step_ms:.0%}",
        f"{point.tokens_per_s:.1f}",
    ]
