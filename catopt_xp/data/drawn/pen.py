"""A pen for smooth closed shapes, and how a drawn animal looks apart from its class: pose, coat and proportions.

Curves go through a few points and are placed by a turn, a size and a mirror. A look is drawn at random before the class
is known and means the same for both classes.
"""

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


DARK = Colour(38, 32, 30)
WHITE = Colour(245, 242, 236)
FURS = (
    Colour(214, 138, 66),
    Colour(128, 128, 132),
    Colour(132, 92, 60),
    Colour(222, 194, 152),
    Colour(62, 58, 60),
    Colour(232, 228, 220),
    Colour(96, 66, 48),
    Colour(124, 138, 156),
)
IRISES = (Colour(150, 176, 74), Colour(206, 164, 58), Colour(112, 160, 196), Colour(132, 86, 46))
VIEWS = ("portrait", "sitting", "standing", "lying")


@dataclass(frozen=True)
class Look:
    """Everything about a drawn animal but its class."""

    view: str  # one of VIEWS
    profile: bool  # the head from the side, facing right
    turn: float  # of the head to the side, -1..1 (frontal heads)
    roll: float  # of the head, radians
    fur: Colour
    second: Colour  # of muzzle, chest and markings
    pink: Colour  # of ears, nose or tongue
    iris: Colour
    pattern: str  # "plain", "stripes", "patches" or "blaze"
    proportions: NDArray[np.float64]  # (8,) factors around 1: head, ears, eyes, muzzle, legs, tail, body, marks
    swing: float  # of tail and legs, -1..1

    @property
    def edge(self) -> Colour:
        """The outline's colour."""
        return self.fur.shade(0.45)

    @classmethod
    def random(cls, rng: np.random.Generator) -> Look:
        """Draw a look; the distribution knows nothing of cats and dogs."""
        fur, second = (FURS[k] for k in rng.choice(len(FURS), size=2, replace=False))
        tint = rng.normal(0.0, 12.0, size=(2, 3))
        view = VIEWS[rng.choice(len(VIEWS), p=(0.5, 0.26, 0.14, 0.1))]
        return cls(
            view=view,
            profile=bool(rng.random() < (0.15 if view in ("portrait", "sitting") else 0.5)),
            turn=float(rng.uniform(-1, 1)),
            roll=float(rng.normal(0.0, 0.16)),
            fur=Colour(*(np.array(fur[:3]) + tint[0])),
            second=Colour(*(np.array(second[:3]) + tint[1])).mix(WHITE, 0.35),
            pink=Colour(226, 146, 146).shade(float(rng.uniform(0.85, 1.1))),
            iris=IRISES[rng.integers(len(IRISES))],
            pattern=("plain", "stripes", "patches", "blaze")[rng.integers(4)],
            proportions=np.exp(rng.normal(0.0, 0.09, size=8)),
            swing=float(rng.uniform(-1, 1)),
        )
