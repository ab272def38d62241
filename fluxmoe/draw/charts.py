"""Line charts as SVG fragments that take their colours from the enclosing page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 46


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        label: Name of the line.
        slot: Number of the line's colour on the page, from 1; 0 = the optimum's colour, dashed.
        points: (x, y, tooltip) of each point.
    """

    label: str
    slot: int
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart whose axes begin and end with their first and last tick.

    Attributes:
        title, x_label: Title of the chart, and label of the x axis.
        lines: Lines of the chart.
        x_ticks, y_ticks: (value, text) of each tick, ascending.
        dots: True to mark each point.
    """

    title: str
    x_label: str
    lines: Sequence[Line]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    dots: bool = True

    def svg(self) -> str:
        """Render the chart as an ``<svg>`` element."""
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">'
        ]
        for value, text in self.y_ticks:
            y = self._y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" {_level(y)}/>')
            parts.append(_text(_LEFT - 8, y + 4, text, "end"))
        for value, text in self.x_ticks:
            parts.append(_text(self._x(value), HEIGHT - _BOTTOM + 18, text, "middle"))
        parts.append(
            _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, self.x_label, "middle", "label")
        )
        for line in self.lines:
            at = [(self._x(x), self._y(y), text) for x, y, text in line.points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in at)
            parts.append(f'<polyline class="line c{line.slot}" points="{path}"/>')
            for x, y, text in at if self.dots or len(at) == 1 else ():
                title = f"<title>{escape(text)}</title>"
                parts.append(
                    f'<circle class="dot c{line.slot}" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}'
                    "</circle>"
                )
        return "".join([*parts, "</svg>"])

    def _x(self, value: float) -> float:
        first, last = self.x_ticks[0][0], self.x_ticks[-1][0]
        return _LEFT + (value - first) / ((last - first) or 1) * (WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        first, last = self.y_ticks[0][0], self.y_ticks[-1][0]
        share = (value - first) / ((last - first) or 1)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _level(y: float) -> str:
    return f'y1="{y:.1f}" y2="{y:.1f}"'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    at = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text class="{kind}" {at} text-anchor="{anchor}">{escape(text)}</text>'
