"""A pair of axes on a canvas, and functions that make a canvas and save it to a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxmoe.draw.canvas import Canvas, Png, Svg
from fluxmoe.errors import ConfigError, TraceError

INK, GREY, PALE, ACCENT = "#2f6fb4", "#8a8f98", "#dfe3e8", "#d1603d"
_KINDS: dict[str, type[Canvas]] = {".svg": Svg, ".png": Png}


def canvas_for(path: Path, width: int, height: int) -> Canvas:
    """Make an empty canvas of the kind that the file's suffix indicates.

    Raises:
        ConfigError: The suffix is neither ``.svg`` nor ``.png``.
        MissingDependencyError: The file is a PNG and Pillow is not installed.
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path} is neither .svg nor .png", where="--picture")
    return kind(width, height)


def save(canvas: Canvas, path: Path) -> None:
    """Write the picture; raise TraceError if the file cannot be written."""
    try:
        path.write_bytes(canvas.encode())
    except OSError as error:
        raise TraceError(f"cannot write the file: {error.strerror}", where=str(path)) from error


def round_up(value: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


@dataclass(slots=True)
class Plot:
    """A pair of axes; x and y are given as fractions of the axes, with y upwards."""

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
            canvas.line([self.at(0, y), self.at(1, y)], PALE)
            canvas.text(self.left - 7, self.at(0, y)[1] + 4, label, size=11, anchor="end",
                        colour=GREY)  # fmt: skip
        for x, label in xticks:
            where = self.at(x, 0)
            canvas.line([where, (where[0], where[1] + 4)], GREY)
            canvas.text(where[0], where[1] + 17, label, size=11, anchor="middle", colour=GREY)
        canvas.line([self.at(0, 1), self.at(0, 0), self.at(1, 0)], GREY)
        canvas.text(self.left + self.width / 2, self.top + self.height + 35, xlabel, size=12,
                    anchor="middle", colour=GREY)  # fmt: skip

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
        """Draw a dashed horizontal line."""
        self.canvas.line([self.at(0, y), self.at(1, y)], ACCENT, 1.4, dashed=True)
