"""A picture of a trace's statistics, in six panels."""

from __future__ import annotations

import math
from pathlib import Path

from fluxmoe.draw.plot import ACCENT, GREY, INK, Plot, canvas_for, round_up, save
from fluxmoe.trace.statistics import Statistics

_WIDTH, _HEIGHT, _HEAD = 1260, 800, 64


def draw(statistics: Statistics, path: Path, title: str) -> None:
    """Write the picture.

    Args:
        statistics: Statistics to draw.
        path: An ``.svg`` or ``.png`` file.
        title: Heading of the picture.

    Raises:
        ConfigError: The file is neither ``.svg`` nor ``.png``.
        MissingDependencyError: The file is a PNG and Pillow is not installed.
        TraceError: The file cannot be written.
    """
    canvas = canvas_for(path, _WIDTH, _HEIGHT)
    meta = statistics.meta
    canvas.text(24, 28, title, size=18)
    canvas.text(
        24,
        50,
        f"{meta.num_layers} layers x {meta.experts_per_layer} experts, top {meta.top_k}; "
        f"{statistics.steps} steps, {statistics.events} events "
        f"({statistics.prefill_events} prefill), {statistics.routed} routed experts",
        colour=GREY,
    )
    for index, panel in enumerate((_popularity, _skew, _overlap, _working_sets, _reuse, _unions)):
        width, height = _WIDTH / 3, (_HEIGHT - _HEAD) / 2
        left, top = index % 3 * width, _HEAD + index // 3 * height
        panel(Plot(canvas, left + 58, top + 40, width - 84, height - 92), statistics)
    save(canvas, path)


def _percent(top: float = 1.0, count: int = 4) -> list[tuple[float, str]]:
    return [(i / count, f"{top * i / count:.3g} %") for i in range(count + 1)]


def _layer_ticks(layers: int) -> list[tuple[float, str]]:
    every = max(1, math.ceil(layers / 12))
    return [((layer + 0.5) / layers, str(layer)) for layer in range(0, layers, every)]


def _popularity(plot: Plot, statistics: Statistics) -> None:
    rows = [sorted(row, reverse=True) for row in statistics.popularity]
    experts = len(rows[0])
    top = round_up(max(max(row) for row in rows) * 100)
    xs = [rank / max(experts - 1, 1) for rank in range(experts)]
    plot.frame(
        "Share of an expert, the most popular first",
        "rank (light: each layer; dark: mean; dashed: all alike)",
        [(x, str(round(x * (experts - 1)) + 1)) for x in (0, 0.25, 0.5, 0.75, 1)],
        _percent(top),
    )
    for row in rows:
        plot.curve([(x, y * 100 / top) for x, y in zip(xs, row, strict=True)], "#b9cde6", 1)
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    plot.curve([(x, y * 100 / top) for x, y in zip(xs, mean, strict=True)], INK, 2)
    plot.level(100 / experts / top)


def _skew(plot: Plot, statistics: Statistics) -> None:
    plot.frame(
        "Share of the most popular tenth of the experts",
        "layer (dashed: all alike)",
        _layer_ticks(len(statistics.layers)),
        _percent(100),
    )
    plot.bars([layer.top_share for layer in statistics.layers], INK)
    experts = statistics.meta.experts_per_layer
    plot.level(max(1, round(experts / 10)) / experts)


def _overlap(plot: Plot, statistics: Statistics) -> None:
    plot.frame(
        "Experts in common with the request's last token",
        "layer (dashed: by chance)",
        _layer_ticks(len(statistics.layers)),
        _percent(100),
    )
    overlaps = [layer.overlap for layer in statistics.layers]
    plot.bars(overlaps, INK)
    if not any(overlap is not None for overlap in overlaps):
        plot.canvas.text(*plot.at(0.5, 0.5), "no consecutive tokens", anchor="middle", colour=GREY)
    plot.level(statistics.meta.top_k / statistics.meta.experts_per_layer)


def _working_sets(plot: Plot, statistics: Statistics) -> None:
    sets, pages = statistics.working_sets, statistics.meta.geometry.num_pages
    last = max(len(sets) - 1, 1)
    plot.frame(
        "Working set: pages used within a window",
        "window, steps (solid: mean; dashed: largest)",
        [(i / last, str(one.steps)) for i, one in enumerate(sets)],
        _percent(100),
    )
    plot.curve([(i / last, s.max_pages / pages) for i, s in enumerate(sets)], GREY, dashed=True)
    plot.curve([(i / last, s.mean_pages / pages) for i, s in enumerate(sets)], INK, 2)


def _reuse(plot: Plot, statistics: Statistics) -> None:
    reuse = statistics.reuse
    bins = max(len(reuse.histogram), 1)
    plot.frame(
        "Reuse: how soon a page is used again",
        f"events (a step has up to {statistics.meta.num_layers})",
        [(i / bins, _power(i)) for i in range(0, bins + 1, max(1, bins // 8))],
        _percent(100),
    )
    plot.bars([count / max(reuse.reuses, 1) for count in reuse.histogram] or [None], "#b9cde6")
    points, sofar = [(0.0, 0.0)], 0
    for index, count in enumerate(reuse.histogram):
        sofar += count
        points.append(((index + 1) / bins, sofar / max(reuse.reuses, 1)))
    plot.curve(points, INK, 2)


def _unions(plot: Plot, statistics: Statistics) -> None:
    unions, experts = statistics.unions, statistics.meta.experts_per_layer
    centres = [(index + 0.5) / len(unions) for index in range(len(unions))]
    labels = [
        f"{u.tokens_to}" if u.tokens_from == u.tokens_to else f"{u.tokens_from}-{u.tokens_to}"
        for u in unions
    ]
    plot.frame(
        "Union: distinct experts of an event",
        "tokens of the event (dashed: uniform, independent)",
        list(zip(centres, labels, strict=True)),
        [(i / 4, f"{experts * i / 4:.4g}") for i in range(5)],
    )
    plot.bars([union.mean_experts / experts for union in unions], INK)
    uniform = [union.uniform / experts for union in unions]
    plot.curve(list(zip(centres, uniform, strict=True)), ACCENT, 1.4, dashed=True)


def _power(exponent: int) -> str:
    value = 1 << exponent
    return (
        f"{value >> 20}M" if value >= 1 << 20 else f"{value >> 10}k" if value >> 10 else f"{value}"
    )
