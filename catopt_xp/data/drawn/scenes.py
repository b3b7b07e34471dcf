"""One drawn picture: a background with clutter, an animal, things in front of it, light and noise.

All of it but the animal's shape is drawn from distributions that do not know the class, so that colour,
brightness, size, place and background tell nothing about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from catopt_xp.data.drawn.animals import CENTRES, draw_animal
from catopt_xp.data.drawn.pen import Colour, Look, Pen

SMALLEST_CANVAS = 192  # pixels; a tiny picture is drawn at least this large, then reduced, so that thin parts survive


def draw_picture(entropy: list[int], is_cat: bool, img_shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw one picture.

    entropy: whole numbers that seed everything in the picture but the class.
    is_cat: a cat, else a dog.
    img_shape: (width, height) in pixels.
    Returns RGB pixels, (height, width, 3).

    >>> draw_picture([0, 1], True, (32, 24)).shape
    (24, 32, 3)
    """
    from PIL import Image, ImageDraw

    rng = np.random.Generator(np.random.PCG64(entropy))
    width, height = img_shape
    times = max(2, -(-SMALLEST_CANVAS // min(width, height)))  # drawn larger, then averaged: smooth edges
    size = (width * times, height * times)
    corners = 0.6 * np.array([[_colour(rng)[:3] for _ in range(3)] for _ in range(3)]) + 0.4 * np.array(
        _colour(rng)[:3]
    )
    backdrop = Image.fromarray(corners.astype(np.uint8)).resize(img_shape, Image.Resampling.BILINEAR)
    image = backdrop.resize(size, Image.Resampling.NEAREST)
    side = float(min(size))
    page = Pen(
        ImageDraw.Draw(image, "RGBA"),
        np.eye(2) * side,
        np.array(size, dtype=np.float64) / 2,
        max(1.0, side / 190),
    )
    span = (width / min(width, height) / 2, height / min(width, height) / 2)
    _background(page, rng, span)
    look, place = Look.random(rng), Place.random(rng, span)
    centre_x, centre_y = CENTRES[look.view]
    scale = place.size * (1.75 if look.view == "portrait" else 1.0)
    animal = page.moved(place.x, place.y, scale, place.lean, place.mirror)
    draw_animal(animal.moved(-centre_x, -centre_y), look, is_cat)
    _foreground(page, rng, span)
    return _expose(np.asarray(image.reduce(times)), rng)


@dataclass(frozen=True)
class Place:
    """Where an animal stands, in sides of the picture from its centre."""

    x: float
    y: float
    size: float  # head radius
    lean: float  # radians
    mirror: bool

    @classmethod
    def random(cls, rng: np.random.Generator, span: tuple[float, float]) -> Place:
        """Draw a place anywhere in a picture of half width and half height `span`."""
        return cls(
            x=float(rng.uniform(-0.15, 0.15)) * span[0],
            y=float(rng.uniform(-0.15, 0.15)) * span[1],
            size=float(np.exp(rng.uniform(np.log(0.12), np.log(0.19)))),
            lean=float(rng.normal(0.0, 0.1)),
            mirror=bool(rng.random() < 0.5),
        )


def _colour(rng: np.random.Generator, opacity: float = 255.0) -> Colour:
    red, green, blue = (float(value) for value in rng.uniform(20, 220, size=3))
    grey = (red + green + blue) / 3
    return Colour(red, green, blue, opacity).mix(Colour(grey, grey, grey, opacity), 0.6)


def _background(page: Pen, rng: np.random.Generator, span: tuple[float, float]) -> None:
    """A floor or a meadow, then things of the same kinds of shape that cats and dogs are made of."""
    horizon = float(rng.uniform(-0.15, 0.4))
    tilt = float(rng.normal(0.0, 0.05))
    far = span[0] + 0.1
    floor = [(-far, horizon - tilt), (far, horizon + tilt), (far, span[1] + 0.1), (-far, span[1] + 0.1)]
    page.polygon(floor, _colour(rng))
    for _ in range(rng.integers(5, 12)):
        _thing(page, rng, span, 255.0)


def _foreground(page: Pen, rng: np.random.Generator, span: tuple[float, float]) -> None:
    """Things that hide parts of the animal: a few shapes, grass or the bars of a fence."""
    for _ in range(rng.integers(0, 4)):
        _thing(page.moved(0, 0, 0.8), rng, span, float(rng.uniform(170, 255)))
    if rng.random() < 0.3:
        blade = Colour(70, 130, 60).mix(_colour(rng), 0.5)
        for x in rng.uniform(-span[0], span[0], size=26):
            top = span[1] - float(rng.uniform(0.05, 0.22))
            page.polygon([(x - 0.009, span[1]), (x + float(rng.normal(0, 0.04)), top), (x + 0.009, span[1])], blade)
    elif rng.random() < 0.2:
        bar = _colour(rng)
        for x in np.arange(-span[0], span[0], float(rng.uniform(0.14, 0.3))):
            page.polygon([(x, -span[1]), (x + 0.016, -span[1]), (x + 0.016, span[1]), (x, span[1])], bar)


def _thing(page: Pen, rng: np.random.Generator, span: tuple[float, float], opacity: float) -> None:
    """One piece of clutter: a ball, a box, a point, a flap, a cord, a stick or a plant."""
    x, y, turn = rng.uniform(-span[0], span[0]), rng.uniform(-span[1], span[1]), rng.uniform(-3.1, 3.1)
    pen = page.moved(float(x), float(y), float(np.exp(rng.uniform(np.log(0.05), np.log(0.2)))), float(turn))
    fill, kind, a = _colour(rng, opacity), int(rng.integers(7)), float(rng.uniform(0.4, 1.0))
    edge = fill.shade(0.5) if rng.random() < 0.6 else None
    if kind == 0:
        pen.oval(0, 0, 0.8, 0.8 * a, fill, edge)
        pen.oval(-0.2, -0.2 * a, 0.25, 0.25 * a, fill.mix(Colour(255, 255, 255), 0.4))
    elif kind == 1:
        pen.polygon([(-0.8, -a), (0.8, -a), (0.8, a), (-0.8, a)], fill, edge)
    elif kind == 2:
        pen.polygon([(-0.6 * a, 0.6), (0, -0.9), (0.6 * a, 0.6)], fill, edge)
    elif kind == 3:
        pen.blob(
            [(-0.3, -0.8), (0.3 * a, -0.8), (0.7 * a, 0.1), (0.5 * a, 0.9), (0, 0.8), (-0.2, -0.1)],
            fill,
            edge,
        )
    elif kind == 4:
        pen.band([(-1.5, 0), (-0.5, a), (0.5, -a), (1.5, 0.3)], 0.3, 0.2 * a, fill, edge)
    elif kind == 5:
        pen.band([(-1.6, 0), (0, 0.1 * a), (1.6, 0)], 0.22, 0.1, fill, edge)
    else:
        for spread in (-0.9, -0.45, 0.0, 0.45, 0.9):
            pen.band([(0, 0.8), (0.4 * spread, -0.2), (spread, -a)], 0.2, 0.04, fill, edge)


def _expose(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Light, colour cast, grain and pixel noise: pixels (height, width, 3) to the same."""
    height, width, _ = pixels.shape
    light = rng.normal(0.0, 0.07, size=(1, 1)).astype(np.float32)  # logarithm of the brightness
    for cells, strength in ((2, 0.12), (4, 0.1), (14, 0.07), (56, 0.07)):
        light = _stretched(light, (cells, cells))
        light += rng.standard_normal((cells, cells), dtype=np.float32) * np.float32(strength)
    light = np.exp(_stretched(light, (width, height)))
    gain = rng.normal(1.0, 0.05, size=3) * rng.uniform(1.1, 1.4)  # colour cast and contrast
    noisiness = np.float32(rng.uniform(6, 18) / 104)
    # Two rows of dice make noise of standard deviation 104, much cheaper than normal numbers.
    first, second = rng.integers(0, 256, size=(2, height, width * 3), dtype=np.uint8)
    noise = first.astype(np.float32) + second - np.float32(255)
    # Rows of width * 3 values: NumPy is slow where the last axis has three.
    gains = np.tile(gain.astype(np.float32), width)
    exposed = (pixels.reshape(height, -1) - np.float32(120)) * gains + np.float32(114)
    exposed = exposed * np.repeat(light, 3, axis=1) + noise * noisiness
    result: NDArray[np.uint8] = np.clip(np.rint(exposed), 0, 255).astype(np.uint8).reshape(pixels.shape)
    return result


def _stretched(field: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """A field (rows, columns), smoothly enlarged to `size` (width, height)."""
    from PIL import Image

    return np.array(Image.fromarray(field).resize(size, Image.Resampling.BILINEAR))
