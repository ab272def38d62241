"""The statistics of a trace as a picture of six panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxmoe.errors import ConfigError, TraceError
from fluxmoe.sim.canvas import Canvas, Png, Svg
from fluxmoe.sim.statistics import Statistics

_KINDS: dict[str, type[Canvas]] = {".svg": Svg, ".png": Png}
_WIDTH, _HEIGHT, _HEAD = 1260, 800, 64
_INK, _GREY, _PALE = "#2f6fb4", "#8a8f98", "#dfe3e8"
_ACCENT = "#d1603d"


def draw(statistics: Statistics, path: Path, title: str) -> None:
    """Write the picture.

    Args:
        statistics: What to draw.
        path: An ``.svg`` or ``.png`` file.
        title: Its heading.

    Raises:
        ConfigError: Another kind of file.
        MissingDependencyError: A PNG, and Pillow is not installed.
        TraceError: The file cannot be written.
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path} is neither .svg nor .png", where="--picture")
    canvas = kind(_WIDTH, _HEIGHT)
    meta = statistics.meta
    canvas.text(24, 28, title, size=18)
    canvas.text(
        24,
        50,
        f"{meta.num_layers} layers x {meta.experts_per_layer} experts, top {meta.top_k}; "
        f"{statistics.steps} steps, {statistics.events} events "
        f"({statistics.prefill_events} prefill), {statistics.routed} routed experts",
        colour=_GREY,
    )
    for index, panel in enumerate((_popularity, _skew, _overlap, _working_sets, _reuse, _unions)):
        width, height = _WIDTH / 3, (_HEIGHT - _HEAD) / 2
        left, top = index % 3 * width, _HEAD + index // 3 * height
        panel(_Plot(canvas, left + 58, top + 40, width - 84, height - 92), statistics)
    try:
        path.write_bytes(canvas.encode())
    except OSError as error:
        raise TraceError(f"cannot write it: {error.strerror}", where=str(path)) from error


@dataclass(slots=True)
class _Plot:
    """A pair of axes; x and y are given as shares of them, y upwards."""

    canvas: Canvas
    left: float
    top: float
    width: float
    height: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.left + x * self.width, self.top + (1 - y) * self.height

    def frame(
        self,
        title: str,
        xlabel: str,
        xticks: Sequence[tuple[float, str]],
        yticks: Sequence[tuple[float, str]],
    ) -> None:
        canvas = self.canvas
        canvas.text(self.left, self.top - 14, title, size=14)
        for y, label in yticks:
            canvas.line([self.at(0, y), self.at(1, y)], _PALE)
            canvas.text(self.left - 7, self.at(0, y)[1] + 4, label, size=11, anchor="end",
                        colour=_GREY)  # fmt: skip
        for x, label in xticks:
            where = self.at(x, 0)
            canvas.line([where, (where[0], where[1] + 4)], _GREY)
            canvas.text(where[0], where[1] + 17, label, size=11, anchor="middle", colour=_GREY)
        canvas.line([self.at(0, 1), self.at(0, 0), self.at(1, 0)], _GREY)
        canvas.text(self.left + self.width / 2, self.top + self.height + 35, xlabel, size=12,
                    anchor="middle", colour=_GREY)  # fmt: skip

    def curve(
        self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.6,
        *, dashed: bool = False,
    ) -> None:  # fmt: skip
        if len(points) > 1:
            self.canvas.line([self.at(*p) for p in points], colour, width, dashed=dashed)
        for point in points if len(points) == 1 else ():
            x, y = self.at(*point)
            self.canvas.box(x - 3, y - 3, 6, 6, colour)

    def bars(self, heights: Sequence[float | None], colour: str) -> None:
        slot = 1 / len(heights)
        for index, height in enumerate(heights):
            if height is not None:
                x, y = self.at(index * slot + slot * 0.12, height)
                self.canvas.box(x, y, slot * 0.76 * self.width, height * self.height, colour)

    def level(self, y: float) -> None:
        """A dashed line across."""
        self.canvas.line([self.at(0, y), self.at(1, y)], _ACCENT, 1.4, dashed=True)


def _percent(top: float = 1.0, count: int = 4) -> list[tuple[float, str]]:
    return [(i / count, f"{top * i / count:.3g} %") for i in range(count + 1)]


def _round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def _layer_ticks(layers: int) -> list[tuple[float, str]]:
    every = max(1, math.ceil(layers / 12))
    return [((layer + 0.5) / layers, str(layer)) for layer in range(0, layers, every)]


def _popularity(plot: _Plot, statistics: Statistics) -> None:
    rows = [sorted(row, reverse=True) for row in statistics.popularity]
    experts = len(rows[0])
    top = _round_up(max(max(row) for row in rows) * 100)
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
    plot.curve([(x, y * 100 / top) for x, y in zip(xs, mean, strict=True)], _INK, 2)
    plot.level(100 / experts / top)


def _skew(plot: _Plot, statistics: Statistics) -> None:
    plot.frame(
        "Share of the most popular tenth of the experts",
        "layer (dashed: all alike)",
        _layer_ticks(len(statistics.layers)),
        _percent(100),
    )
    plot.bars([layer.top_share for layer in statistics.layers], _INK)
    experts = statistics.meta.experts_per_layer
    plot.level(max(1, round(experts / 10)) / experts)


def _overlap(plot: _Plot, statistics: Statistics) -> None:
    plot.frame(
        "Experts in common with the request's last token",
        "layer (dashed: by chance)",
        _layer_ticks(len(statistics.layers)),
        _percent(100),
    )
    overlaps = [layer.overlap for layer in statistics.layers]
    plot.bars(overlaps, _INK)
    if not any(overlap is not None for overlap in overlaps):
        plot.canvas.text(*plot.at(0.5, 0.5), "no consecutive tokens", anchor="middle", colour=_GREY)
    plot.level(statistics.meta.top_k / statistics.meta.experts_per_layer)


def _working_sets(plot: _Plot, statistics: Statistics) -> None:
    sets, pages = statistics.working_sets, statistics.meta.geometry.num_pages
    last = max(len(sets) - 1, 1)
    plot.frame(
        "Working set: pages used within a window",
        "window, steps (solid: mean; dashed: largest)",
        [(i / last, str(one.steps)) for i, one in enumerate(sets)],
        _percent(100),
    )
    plot.curve([(i / last, s.max_pages / pages) for i, s in enumerate(sets)], _GREY, dashed=True)
    plot.curve([(i / last, s.mean_pages / pages) for i, s in enumerate(sets)], _INK, 2)


def _reuse(plot: _Plot, statistics: Statistics) -> None:
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
    plot.curve(points, _INK, 2)


def _unions(plot: _Plot, statistics: Statistics) -> None:
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
    plot.bars([union.mean_experts / experts for union in unions], _INK)
    uniform = [union.uniform / experts for union in unions]
    plot.curve(list(zip(centres, uniform, strict=True)), _ACCENT, 1.4, dashed=True)


def _power(exponent: int) -> str:
    value = 1 << exponent
    return (
        f"{value >> 20}M" if value >= 1 << 20 else f"{value >> 10}k" if value >> 10 else f"{value}"
    )
