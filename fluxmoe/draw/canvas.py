"""A canvas for lines, boxes and text, as SVG or as PNG (with Pillow). All sizes are in pixels."""

from __future__ import annotations

import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from fluxmoe.errors import MissingDependencyError

Point = tuple[float, float]

_FONT = "Helvetica, Arial, sans-serif"


class Canvas(ABC):
    """A white drawing area.

    Args:
        width, height: Size in pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height

    @abstractmethod
    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Draw a filled rectangle with the upper left corner (x, y); ``colour`` is ``#rrggbb``."""

    @abstractmethod
    def line(
        self, points: Sequence[Point], colour: str, width: float = 1, *, dashed: bool = False
    ) -> None:
        """Draw a polyline."""

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 12,
        anchor: str = "start",
        colour: str = "#222222",
    ) -> None:
        """Draw a line of text; (x, y) is the start, middle or end of its baseline."""
        self._write(x, y, text, size, anchor, colour)

    @abstractmethod
    def _write(self, x: float, y: float, text: str, size: int, anchor: str, colour: str) -> None:
        pass

    @abstractmethod
    def encode(self) -> bytes:
        """Return the file contents."""


class Svg(Canvas):
    """A canvas for an SVG file."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(width, height)
        self._parts: list[str] = []
        self.box(0, 0, width, height, "#ffffff")

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{colour}"/>'
        )

    def line(
        self, points: Sequence[Point], colour: str, width: float = 1, *, dashed: bool = False
    ) -> None:
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{where}" fill="none" stroke="{colour}" '
            f'stroke-width="{width}"{dashes}/>'
        )

    def _write(self, x: float, y: float, text: str, size: int, anchor: str, colour: str) -> None:
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{colour}">{escape(text)}</text>'
        )

    def encode(self) -> bytes:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" '
            f'height="{self.height}" viewBox="0 0 {self.width} {self.height}" '
            f'font-family="{_FONT}">'
        )
        return "\n".join([head, *self._parts, "</svg>\n"]).encode(errors="backslashreplace")


class Png(Canvas):
    """A canvas for a PNG file, which has two pixels per canvas pixel in each direction.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """

    _SCALE = 2

    def __init__(self, width: int, height: int) -> None:
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise MissingDependencyError(
                "Pillow is needed for PNG pictures",
                fix="pip install 'fluxmoe[report]' or write an .svg",
            ) from error
        super().__init__(width, height)
        self._image = Image.new("RGB", (width * self._SCALE, height * self._SCALE), "#ffffff")
        self._draw = ImageDraw.Draw(self._image)
        self._font: Any = ImageFont.load_default

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        corners = [x, y, x + max(width, 0), y + max(height, 0)]
        self._draw.rectangle([c * self._SCALE for c in corners], fill=colour)

    def line(
        self, points: Sequence[Point], colour: str, width: float = 1, *, dashed: bool = False
    ) -> None:
        scaled = [(x * self._SCALE, y * self._SCALE) for x, y in points]
        thick = max(1, round(width * self._SCALE))
        for start, end in itertools.pairwise(scaled):
            for piece in _dashes(start, end) if dashed else [(start, end)]:
                self._draw.line(piece, fill=colour, width=thick)

    def _write(self, x: float, y: float, text: str, size: int, anchor: str, colour: str) -> None:
        self._draw.text(
            (x * self._SCALE, y * self._SCALE),
            text,
            fill=colour,
            font=self._font(size * self._SCALE),
            anchor={"start": "ls", "middle": "ms", "end": "rs"}[anchor],
        )

    def encode(self) -> bytes:
        file = io.BytesIO()
        self._image.save(file, "PNG", optimize=True)
        return file.getvalue()


def _dashes(start: Point, end: Point, on: float = 10, off: float = 8) -> list[tuple[Point, Point]]:
    length = max(((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5, 1e-9)

    def at(distance: float) -> Point:
        share = min(distance / length, 1.0)
        return (start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]))

    count = int(length // (on + off)) + 1
    return [(at(i * (on + off)), at(i * (on + off) + on)) for i in range(count)]
