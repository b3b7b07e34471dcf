"""A pen for smooth closed shapes: curves through a few points, placed by a turn, a size and a mirror. Floor F2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from PIL import ImageDraw

Points = NDArray[np.float64]
"""(n, 2): x to the right, y downwards."""


class Colour(NamedTuple):
    """Red, green, blue in 0..255, and the opacity."""

    red: float
    green: float
    blue: float
    opacity: float = 255.0

    def shade(self, factor: float) -> Colour:
        """The colour made darker (below 1) or lighter (above 1)."""
        return Colour(self.red * factor, self.green * factor, self.blue * factor, self.opacity)

    def mix(self, other: Colour, part: float) -> Colour:
        """The colour with `part` (0..1) of another one."""
        return Colour(*(a + part * (b - a) for a, b in zip(self, other, strict=True)))

    def ink(self) -> tuple[int, int, int, int]:
        """The four whole numbers in 0..255 that Pillow takes."""
        red, green, blue, opacity = (min(255, max(0, round(value))) for value in self)
        return red, green, blue, opacity


@cache
def _spline_weights(steps: int) -> Points:
    """Catmull-Rom weights of four neighbours at `steps` places between the middle two: (steps, 4)."""
    t = np.arange(steps) / steps
    return 0.5 * np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], axis=1)


def _spline(p: Points, steps: int) -> Points:
    """The curve through all of the points (n, 2) but the first and the last: ((n - 3) * steps, 2)."""
    neighbours = np.stack([p[:-3], p[1:-2], p[2:-1], p[3:]], axis=1)  # (n - 3, 4, 2)
    curve: Points = (_spline_weights(steps) @ neighbours).reshape(-1, 2)
    return curve


def closed_curve(points: ArrayLike, steps: int = 6) -> Points:
    """A smooth closed curve through the points (n, 2): (n * steps, 2)."""
    p = np.asarray(points, dtype=np.float64)
    return _spline(np.concatenate([p[-1:], p, p[:2]]), steps)


def open_curve(points: ArrayLike, steps: int = 6) -> Points:
    """A smooth curve from the first of the points (n, 2) to the last: ((n - 1) * steps + 1, 2)."""
    p = np.asarray(points, dtype=np.float64)
    return np.concatenate([_spline(np.concatenate([p[:1], p, p[-1:]]), steps), p[-1:]])


def ribbon(points: ArrayLike, start: float, end: float) -> Points:
    """The outline of a smooth band along the points, `start` wide at first and `end` wide at last."""
    middle = open_curve(points)
    along = np.concatenate([middle[1:2] - middle[:1], middle[2:] - middle[:-2], middle[-1:] - middle[-2:-1]])
    across = along[:, ::-1] * (-1.0, 1.0) / np.maximum(np.hypot(along[:, :1], along[:, 1:]), 1e-9)
    half = (start + (end - start) * np.arange(len(middle)) / (len(middle) - 1))[:, None] / 2
    return np.concatenate([middle + half * across, (middle - half * across)[::-1]])


_CIRCLE: Points = np.stack([np.cos(np.arange(28) * math.tau / 28), np.sin(np.arange(28) * math.tau / 28)], axis=1)


@dataclass(frozen=True)
class Pen:
    """Draws in its own coordinates: pixels = points @ matrix + offset."""

    canvas: ImageDraw.ImageDraw
    matrix: Points  # (2, 2)
    offset: Points  # (2,)
    line: float  # outline width in pixels

    def moved(self, x: float, y: float, size: float = 1.0, turn: float = 0.0, mirror: bool = False) -> Pen:
        """A pen whose origin lies at (x, y) of this one, turned by `turn` radians, `size` times as large."""
        cos, sin = size * math.cos(turn), size * math.sin(turn)
        local = np.array([[cos, sin], [-sin, cos]])
        if mirror:
            local[0] *= -1
        return Pen(self.canvas, local @ self.matrix, np.array([x, y]) @ self.matrix + self.offset, self.line)

    def polygon(self, points: ArrayLike, fill: Colour, edge: Colour | None = None) -> None:
        """Fill a polygon with straight sides; `edge` draws its outline too."""
        pixels = np.asarray(points) @ self.matrix + self.offset
        corners = pixels.ravel().tolist()
        self.canvas.polygon(corners, fill=fill.ink())
        if edge is not None:
            self.canvas.line(corners + corners[:4], fill=edge.ink(), width=max(1, round(self.line)))

    def blob(self, points: ArrayLike, fill: Colour, edge: Colour | None = None) -> None:
        """Fill the smooth closed curve through the points."""
        self.polygon(closed_curve(points), fill, edge)

    def band(self, points: ArrayLike, start: float, end: float, fill: Colour, edge: Colour | None = None) -> None:
        """Fill a smooth band along the points."""
        self.polygon(ribbon(points, start, end), fill, edge)

    def oval(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: Colour,
        edge: Colour | None = None,
        turn: float = 0.0,
    ) -> None:
        """Fill an ellipse of half axes `width` and `height` around (x, y)."""
        cos, sin = math.cos(turn), math.sin(turn)
        points = _CIRCLE * (width, height) @ np.array([[cos, sin], [-sin, cos]]) + (x, y)
        self.polygon(points, fill, edge)

    def stroke(self, points: ArrayLike, width: float, fill: Colour) -> None:
        """Draw a smooth line of `width` (own units; at least one pixel)."""
        pixels = open_curve(points) @ self.matrix + self.offset
        scale = math.sqrt(abs(float(np.linalg.det(self.matrix))))
        self.canvas.line(pixels.ravel().tolist(), fill=fill.ink(), width=max(1, round(width * scale)))
