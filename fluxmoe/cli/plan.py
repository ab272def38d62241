"""``fluxmoe plan``: estimate the best split of a memory budget and the benefit of paging."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import output, table
from fluxmoe.cli.shared.hardware import HERE, profile_of, with_store
from fluxmoe.cli.shared.options import AsCsv, AsJson, Force, stores
from fluxmoe.errors import ConfigError

if TYPE_CHECKING:
    from fluxmoe.dimensions import Model
    from fluxmoe.plan.advice import Plan, Point
    from fluxmoe.sim.hardware import Profile

#: Default number of tokens per request, if the model allows that many.
_CONTEXT = 4096
#: Approximate number of rows of the table.
_ROWS = 9


def plan(
    model: Annotated[
        str, typer.Argument(help="Folder or Hugging Face name of a model; weights are not read.")
    ],
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Budget for experts plus KV cache, such as 24GiB.")
    ],
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help="Hardware profile; this-machine is measured on first use."
        ),
    ] = HERE,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per request, including the answer; default: 4096.",
            metavar="TOKENS",
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Number of concurrent requests.")] = 64,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Trace of this model, from which to take miss ratios."),
    ] = None,
    store: Annotated[
        str,
        typer.Option(
            metavar="host|file|FOLDER",
            help="Where all experts are kept; the disk of a page file is measured.",
        ),
    ] = "host",
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the plan to this file (.svg or .png)."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Show the best split of a budget and the benefit of paging, without loading the model."""
    from fluxmoe import dimensions as models
    from fluxmoe.arguments import require_new
    from fluxmoe.config import size
    from fluxmoe.findings import Findings
    from fluxmoe.plan import advice, cost
    from fluxmoe.plan import picture as pictures
    from fluxmoe.sim.events import Events
    from fluxmoe.trace import TraceReader

    found = Findings()
    budget = found.result(size, memory, where="--memory")
    if picture is not None:
        with found.check():
            require_new(picture, replace=force, by="--force")
    shape = found.result(models.read, model)
    tokens = None if shape is None else found.result(_tokens, context, shape)
    if shape is not None and budget is not None and tokens is not None:
        with found.check():
            advice.require_room(shape, cost.PlannedWorkload(tokens, requests), budget)
    profile = None if hardware == HERE else found.result(profile_of, hardware)
    with found.check():
        stores(store)
        if hardware != HERE and store != "host":
            raise ConfigError(
                f"the profile {hardware} states where its pages are kept",
                where="--store",
                fix=f"omit --store, or measure this machine with --hardware {HERE}",
            )
    meta = None if trace is None else found.result(lambda: TraceReader(trace).meta)
    if meta is not None and shape is not None:
        with found.check():
            cost.require_shape(meta, shape)
    found.require()
    assert budget is not None
    assert shape is not None
    assert tokens is not None
    if profile is None:  # last, because the measurements take time
        profile = with_store(profile_of(HERE), store, shape.page_bytes)
    work = cost.PlannedWorkload(tokens, requests)
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
    if not output.printed(as_json, as_csv, _as_json(made), _lines(made)):
        _print(made, profile)


def _tokens(context: int | None, model: Model) -> int:
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


def _lines(plan: Plan) -> list[dict[str, object]]:
    """List the points of the curve, followed by the named points."""
    points = {"": plan.curve, **{name: (point,) for name, point in _named(plan)}}
    return [{"split": name, **asdict(point)} for name in points for point in points[name]]


def _print(plan: Plan, profile: Profile) -> None:
    model = plan.model
    output.say(
        f"{model.name}: {model.architecture}, {model.moe_layers} layers x "
        f"{model.experts} experts of {sizes.shown(model.page_bytes)}, top {model.top_k}"
    )
    output.say(f"Hardware: {profile.name}: {profile.description}")
    table.show(
        f"{sizes.shown(plan.memory)} for experts and KV cache",
        ["split"],
        ["experts", "resident", "KV cache", "requests", "step ms", "waiting", "tokens/s"],
        [[name, *_cells(point)] for name, point in _rows(plan)],
        keys=2,
    )
    for sentence in plan.advice:
        output.say(f"• {sentence}")
    output.say(f"Assumed: {plan.assumption}.", style="dim")


def _named(plan: Plan) -> list[tuple[str, Point]]:
    named = [("at start", plan.automatic), ("recommended", plan.recommended)]
    return named if plan.resident is None else [*named, ("no paging", plan.resident)]


def _rows(plan: Plan) -> list[tuple[str, Point]]:
    """Select some points of the curve, and add all named points."""
    every = max(1, (len(plan.curve) - 1) // (_ROWS - 1))
    rows = {point.resident_pages: ("", point) for point in plan.curve[::every]}
    names: dict[int, list[str]] = {}
    for name, point in _named(plan):
        names.setdefault(point.resident_pages, []).append(name)
        rows[point.resident_pages] = (", ".join(names[point.resident_pages]), point)
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
