"""The computed pictures in docs/pictures; the other pictures are drawn by hand.

``python -m tests.docs.pictures`` regenerates them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial

from fluxmoe import dimensions as models
from fluxmoe.draw.charts import HEIGHT, WIDTH, Chart, Line
from fluxmoe.plan import advice, cost
from fluxmoe.sim import hardware
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace import shipped

from .pages import ROOT, blocks

FOLDER = ROOT / "docs" / "pictures"

POLICIES = ("belady", "lru", "lfu", "next-use")
TRACES = {
    "decode-1": "Decode, 1 request",
    "decode-8": "Decode, 8 requests",
    "decode-64": "Decode, 64 requests",
    "prefill": "Prefill",
}
#: Capacities, in percent of all pages, that have room for the shipped model's largest event.
SHARES = range(20, 101, 5)

#: Results of the measured phases.
PHASES = "2026-11-23-phases.json"

#: The colours follow the browser's setting, as those of the site do.
_STYLE = """\
:root { --ink: #1c1e21; --soft: #5c6067; --rule: #d9dbde;
  --c0: #1c1e21; --c1: #2a6fbb; --c2: #c8541d; --c3: #1d8a5f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #aeb2b9; --rule: #43474d;
  --c0: #e8e8e6; --c1: #6aa9ee; --c2: #f0894f; --c3: #4fc08d; } }
text { font-family: Helvetica, Arial, sans-serif; fill: var(--ink); }
.title { font-size: 21px; font-weight: bold; }
.key { font-size: 19px; }
.tick, .label { fill: var(--soft); font-size: 19px; }
.grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.c0 { stroke: var(--c0); stroke-dasharray: 6 4; }
.c1 { stroke: var(--c1); }
.c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); }
"""
_HEAD = 72


def hit_rates(trace: str, title: str) -> str:
    """Plot the hit rate against the capacity for a shipped trace."""
    events = Events.load(shipped.path(trace))
    lines = []
    for slot, policy in enumerate(POLICIES):
        rates = [simulate(events, policy, f"{share}%").hit_rate for share in SHARES]
        lines.append(
            Line(policy, slot, [(s, 100 * r, "") for s, r in zip(SHARES, rates, strict=True)])
        )
    percent = [(value, str(value)) for value in (0, 25, 50, 75, 100)]
    title += ": hit rate, %"
    return _sheet(Chart(title, "slots, % of all pages", lines, percent, percent, dots=False))


def promise(requests: int) -> str:
    """Plot the planner's prediction for one model and one budget."""
    (settings,) = (
        block.body
        for block in blocks(ROOT / "docs" / "guides" / "plan.md")
        if "config.json" in block.body
    )
    with tempfile.TemporaryDirectory() as folder:
        # A snippet on the planning page writes the model that the page uses.
        exec(settings.replace('Path("', f'Path("{folder}/'), {})
        model = models.read(f"{folder}/qwen3-30b")
    plan = advice.make(
        model,
        hardware.load("h100-pcie5"),
        cost.PlannedWorkload(1024, requests),
        68 * 10**9,
        cost.even_curve(model.pages),
        "",
    )
    assert plan.resident is not None
    base = plan.resident.tokens_per_s
    lines = [
        Line("no paging", 0, [(0, 1, ""), (100, 1, "")]),
        Line(
            "paging", 1, [(100 * p.resident_share, p.tokens_per_s / base, "") for p in plan.curve]
        ),
    ]
    shares = [(value, str(value)) for value in (0, 25, 50, 75, 100)]
    ratios = [(value / 4, f"{value / 4:.2f}") for value in range(6)]
    title = f"{requests} requests: tokens/s, ratio"
    return _sheet(Chart(title, "experts resident, %", lines, shares, ratios, dots=False))


def demands() -> str:
    """Plot the measured speed of each phase with each split."""
    results = json.loads((ROOT / "benchmarks" / "results" / PHASES).read_text())["results"]
    rates = {
        int(name.split()[1][:-1]): row
        for name, row in results["tokens_per_s"].items()
        if name.startswith("fixed")
    }
    lines = []
    for slot, label in enumerate(("contexts", "chat", "quiet", "prefixes")):
        best = max(row[slot] for row in rates.values())
        points = [(share, 100 * row[slot] / best, "") for share, row in sorted(rates.items())]
        lines.append(Line(label, slot, points))
    shares = [(share, str(share)) for share in sorted(rates)]
    percent = [(value, str(value)) for value in (0, 25, 50, 75, 100)]
    title = "tokens/s, % of each phase's best"
    return _sheet(Chart(title, "experts resident, %", lines, shares, percent, dots=False))


def _sheet(chart: Chart) -> str:
    """Render a chart with a title and a legend as the text of a file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + _HEAD}">',
        f"<style>\n{_STYLE}</style>",
        f'<text class="title" x="56" y="22">{chart.title}</text>',
    ]
    for number, line in enumerate(chart.lines):
        x = 56 + 142 * number
        parts.append(f'<line class="line c{line.slot}" x1="{x}" x2="{x + 32}" y1="46" y2="46"/>')
        parts.append(f'<text class="key" x="{x + 40}" y="52">{line.label}</text>')
    at = f'<svg y="{_HEAD}" width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join([*parts, chart.svg().replace("<svg", at, 1), "</svg>\n"])


#: Every computed picture and the function that draws it.
MADE: dict[str, Callable[[], str]] = {
    **{
        f"hit-rate-{trace}.svg": partial(hit_rates, trace, title) for trace, title in TRACES.items()
    },
    "phases.svg": demands,
    **{f"plan-{requests}.svg": partial(promise, requests) for requests in (16, 256)},
}


if __name__ == "__main__":
    for name, draw in MADE.items():
        (FOLDER / name).write_text(draw())
