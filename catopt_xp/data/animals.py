"""The drawn cat and the drawn dog.

Floor F2. An animal is drawn from a `Look` (pose, coat, proportions), which is drawn at random before the class is known
and means the same for both classes. The class decides shape alone: pointed ears, slit pupils, whiskers, a
small muzzle and a long thin tail for a cat; hanging ears, round eyes, a long snout with a big nose, a tongue
and a short thick tail for a dog.

Lengths are in head radii: the head lies around (0, 0), x to the right, y downwards.
"""

from __future__ import annotations

import numpy as np

from catopt_xp.data.heads import cat_face, cat_profile, dog_face, dog_profile
from catopt_xp.data.looks import Look
from catopt_xp.data.pen import Colour, Pen

# By view: the middle of the figure; where its shadow lies (x, y) and how far that reaches to each side.
CENTRES = {"portrait": (0.0, 0.3), "sitting": (0.0, 1.0), "standing": (-1.3, 1.0), "lying": (-0.9, 0.5)}
SHADOWS = {
    "portrait": (0.0, 4.0, 1.6),
    "sitting": (0.0, 3.45, 1.7),
    "standing": (-1.5, 3.5, 2.3),
    "lying": (-1.0, 2.0, 2.8),
}


def draw_animal(pen: Pen, look: Look, is_cat: bool) -> None:
    """Draw body, tail and head; consumes no random numbers, so a class cannot shift the rest of a picture."""
    x, y, width = SHADOWS[look.view]
    pen.oval(x, y, width, 0.3, Colour(0, 0, 0, 80))
    BODIES[look.view](pen, look, is_cat)
    head = pen.moved(0, 0, float(look.proportions[0]), look.roll)
    if look.profile:
        (cat_profile if is_cat else dog_profile)(head, look)
    else:
        (cat_face if is_cat else dog_face)(head, look)


# ---- bodies ------------------------------------------------------------------------------------------------


def _tail(pen: Pen, look: Look, is_cat: bool) -> None:
    """A tail from the pen's origin to the left: long and even for a cat, short and tapering for a dog."""
    tail = pen.moved(0, 0, float(look.proportions[5]), 0.5 * look.swing)
    if is_cat:
        tail.band(
            [(0.1, 0.1), (-0.7, -0.1), (-1.1, -0.8), (-0.9, -1.6), (-1.3, -2.1)],
            0.3,
            0.24,
            look.fur,
            look.edge,
        )
    else:
        tail.band([(0.1, 0.1), (-0.6, -0.35), (-1.0, -0.95), (-0.95, -1.4)], 0.62, 0.12, look.fur, look.edge)


def _leg(pen: Pen, x: float, top: float, foot: float, shift: float, fur: Colour, look: Look) -> None:
    """One leg with its paw; `shift` moves the paw to the side."""
    pen.band([(x, top), (x + 0.4 * shift, (top + foot) / 2), (x + shift, foot)], 0.55, 0.36, fur, look.edge)
    pen.oval(x + shift + 0.08, foot, 0.3, 0.17, look.second if look.pattern == "blaze" else fur, look.edge)


def _coat(pen: Pen, look: Look, x: float, y: float, width: float, height: float) -> None:
    """Markings within the oval around (x, y)."""
    mark = look.second if look.pattern == "patches" else look.fur.shade(0.62)
    size = float(look.proportions[7])
    if look.pattern == "stripes":
        for k in range(5):
            at = x + width * (0.36 * k - 0.72)
            pen.stroke([(at, y - 0.75 * height), (at + 0.08, y), (at - 0.04, y + 0.3 * height)], 0.13 * size, mark)
    elif look.pattern == "patches":
        for dx, dy, radius in ((-0.5, -0.3, 0.34), (0.25, 0.2, 0.4), (0.5, -0.45, 0.22)):
            pen.oval(x + dx * width, y + dy * height, radius * width * size, radius * height, mark)


def _portrait_body(pen: Pen, look: Look, is_cat: bool) -> None:
    w = float(look.proportions[6])
    pen.blob(
        [
            (-0.55 * w, 0.3),
            (-1.1 * w, 1.4),
            (-1.6 * w, 3.0),
            (0, 4.2),
            (1.6 * w, 3.0),
            (1.1 * w, 1.4),
            (0.55 * w, 0.3),
        ],
        look.fur,
        look.edge,
    )
    pen.oval(0, 1.9, 0.5 * w, 0.9, look.second)
    _coat(pen, look, 0, 2.3, 1.2 * w, 0.8)


def _sitting_body(pen: Pen, look: Look, is_cat: bool) -> None:
    w = float(look.proportions[6])
    _tail(pen.moved(-1.0 * w, 3.1), look, is_cat)
    pen.blob(
        [
            (-0.55 * w, 0.4),
            (-0.95 * w, 1.8),
            (-1.3 * w, 3.0),
            (0, 3.45),
            (1.3 * w, 3.0),
            (0.95 * w, 1.8),
            (0.55 * w, 0.4),
        ],
        look.fur,
        look.edge,
    )
    _coat(pen, look, 0, 2.2, 0.9 * w, 1.0)
    for side in (-1, 1):
        pen.oval(0.95 * w * side, 2.95, 0.5, 0.5, look.fur, look.edge, turn=0.4 * side)
    pen.oval(0, 1.5, 0.42 * w, 0.6, look.second)
    for side in (-1, 1):
        _leg(pen, 0.36 * w * side, 1.7, 3.4, 0.05 * look.swing, look.fur, look)


def _standing_body(pen: Pen, look: Look, is_cat: bool) -> None:
    foot = 2.2 + 1.2 * float(look.proportions[4])
    step = 0.35 * look.swing
    far = look.fur.shade(0.75)
    _leg(pen, -0.55, 1.5, foot - 0.1, -step, far, look)
    _leg(pen, -2.6, 1.5, foot - 0.1, step, far, look)
    _tail(pen.moved(-3.3, 1.0), look, is_cat)
    outline = [
        (0.45, 0.3),
        (0.4, 1.3),
        (-0.4, 1.95),
        (-1.8, 1.85),
        (-3.0, 2.0),
        (-3.5, 1.4),
        (-3.1, 0.7),
        (-1.5, 0.6),
        (-0.6, 0.1),
    ]
    pen.blob(outline, look.fur, look.edge)
    _coat(pen, look, -1.7, 1.2, 1.4, 0.6)
    pen.oval(0.05, 1.2, 0.27, 0.5, look.second)
    _leg(pen, -0.1, 1.6, foot, step, look.fur, look)
    _leg(pen, -3.0, 1.6, foot, -step, look.fur, look)


def _lying_body(pen: Pen, look: Look, is_cat: bool) -> None:
    w = float(look.proportions[6])
    _tail(pen.moved(-3.0 * w, 1.5, turn=-0.5), look, is_cat)
    outline = [
        (0.5, 0.3),
        (0.8, 1.5),
        (-0.2, 1.95),
        (-2.4, 2.0),
        (-3.3, 1.6),
        (-3.0, 0.85),
        (-1.6, 0.5),
        (-0.6, 0.2),
    ]
    pen.blob(np.array(outline) * (w, 1), look.fur, look.edge)
    _coat(pen, look, -1.5 * w, 1.15, 1.2, 0.5)
    pen.oval(-2.4 * w, 1.45, 0.75, 0.55, look.fur, look.edge)
    pen.oval(0.25, 1.2, 0.36, 0.5, look.second)
    for k in range(2):
        pen.band(
            [(0.1 + 0.4 * k, 1.6), (0.9, 1.8 + 0.1 * k), (1.7 + 0.1 * k, 1.85 + 0.1 * k)],
            0.5,
            0.36,
            look.fur,
            look.edge,
        )


BODIES = {
    "portrait": _portrait_body,
    "sitting": _sitting_body,
    "standing": _standing_body,
    "lying": _lying_body,
}
