"""The drawn cat and the drawn dog, with their heads from the front and from the side.

An animal is drawn from a `Look` (pose, coat, proportions), which is drawn at random before the class is known and means
the same for both classes. The class decides shape alone: pointed ears, slit pupils, whiskers, a small muzzle and a long
thin tail for a cat; hanging ears, round eyes, a long snout with a big nose, a tongue and a short thick tail for a dog.

Lengths are in head radii: the head lies around (0, 0), x to the right, y downwards.
"""

from __future__ import annotations

import numpy as np

from catopt_xp.data.drawn.pen import DARK, WHITE, Colour, Look, Pen

# Of ears against the fur, such that pictures of cats and of dogs are equally bright on average.
EAR_SHADE = {"cat": 0.7, "dog": 1.05}


# ---- heads from the front ----------------------------------------------------------------------------------


def _forehead(pen: Pen, look: Look, dx: float) -> None:
    """Markings of the face, the same for both classes."""
    mark = look.second if look.pattern in ("patches", "blaze") else look.fur.shade(0.62)
    if look.pattern == "stripes":
        for k in (-1, 0, 1):
            pen.stroke([(dx + 0.22 * k, -0.75), (dx + 0.16 * k, -0.4)], 0.1, mark)
    elif look.pattern == "patches":
        pen.oval(dx - 0.4, -0.15, 0.32, 0.38, mark, turn=0.3)
    elif look.pattern == "blaze":
        pen.blob([(dx, -0.8), (dx + 0.14, -0.2), (dx + 0.3, 0.5), (dx - 0.3, 0.5), (dx - 0.14, -0.2)], mark)


def _cat_eye(pen: Pen, look: Look, x: float, y: float, side: int) -> None:
    r = 0.21 * float(look.proportions[2])
    pen.blob(
        [
            (x - 1.25 * r, y + 0.2 * r * side),
            (x, y - r),
            (x + 1.25 * r, y - 0.2 * r * side),
            (x, y + 0.85 * r),
        ],
        look.iris,
        DARK,
    )
    pen.oval(x, y, 0.3 * r, 0.85 * r, DARK)
    pen.oval(x + 0.25 * r, y - 0.4 * r, 0.2 * r, 0.2 * r, WHITE)


def _dog_eye(pen: Pen, look: Look, x: float, y: float) -> None:
    r = 0.19 * float(look.proportions[2])
    pen.oval(x, y, r, r, look.iris, DARK)
    pen.oval(x, y, 0.52 * r, 0.52 * r, DARK)
    pen.oval(x + 0.25 * r, y - 0.4 * r, 0.22 * r, 0.22 * r, WHITE)


def _whiskers(pen: Pen, look: Look, x: float, y: float, side: int) -> None:
    colour = WHITE.mix(look.fur, 0.25) if sum(look.fur[:3]) < 420 else DARK.mix(look.fur, 0.3)
    for k in (-1, 0, 1):
        pen.stroke(
            [(x, y + 0.07 * k), (x + 0.5 * side, y + 0.13 * k - 0.04), (x + 1.0 * side, y + 0.3 * k + 0.04)],
            0.035,
            colour,
        )


def cat_face(pen: Pen, look: Look) -> None:
    """A cat that looks at us: pointed ears, slit pupils, a small muzzle, whiskers."""
    dx, ear, muzzle = 0.3 * look.turn, float(look.proportions[1]), float(look.proportions[3])
    for side in (-1, 1):
        tip = (side * 0.86 - 0.2 * dx, -0.55 - 0.95 * ear)
        pen.polygon([(side * 0.16, -0.75), tip, (side * 0.97, -0.15)], look.fur.shade(EAR_SHADE["cat"]), look.edge)
        pen.polygon([(side * 0.38, -0.8), (tip[0] * 0.97, tip[1] + 0.25), (side * 0.84, -0.45)], look.pink)
    pen.blob(
        [
            (0, -0.9),
            (-0.72, -0.68),
            (-1.02, 0.05),
            (-0.62, 0.7),
            (0, 0.88),
            (0.62, 0.7),
            (1.02, 0.05),
            (0.72, -0.68),
        ],
        look.fur,
        look.edge,
    )
    _forehead(pen, look, dx)
    for side in (-1, 1):
        _cat_eye(pen, look, dx + 0.4 * side, -0.12, side)
    for side in (-1, 1):
        pen.oval(1.2 * dx + 0.17 * side, 0.42, 0.23 * muzzle, 0.19 * muzzle, look.second)
    pen.polygon([(1.25 * dx - 0.12, 0.2), (1.25 * dx + 0.12, 0.2), (1.25 * dx, 0.34)], look.pink, look.edge)
    for side in (-1, 1):
        pen.stroke([(1.2 * dx, 0.34), (1.2 * dx + 0.08 * side, 0.52), (1.2 * dx + 0.24 * side, 0.52)], 0.04, DARK)
        _whiskers(pen, look, 1.2 * dx + 0.25 * side, 0.4, side)


def dog_face(pen: Pen, look: Look) -> None:
    """A dog that looks at us: hanging ears, round eyes, a long snout with a big nose, the tongue out."""
    dx, ear, muzzle = 0.3 * look.turn, float(look.proportions[1]), float(look.proportions[3])
    pen.blob(
        [
            (0, -0.95),
            (-0.62, -0.8),
            (-0.86, -0.1),
            (-0.6, 0.6),
            (0, 0.95),
            (0.6, 0.6),
            (0.86, -0.1),
            (0.62, -0.8),
        ],
        look.fur,
        look.edge,
    )
    _forehead(pen, look, dx)
    for side in (-1, 1):
        low = 0.15 + 0.6 * ear
        pen.blob(
            [
                (0.42 * side, -0.88),
                (0.85 * side, -0.85),
                (1.22 * side, -0.1),
                (1.2 * side, low),
                (0.86 * side, low - 0.1),
                (0.74 * side, -0.2),
            ],
            look.fur.shade(EAR_SHADE["dog"]),
            look.edge,
        )
        _dog_eye(pen, look, dx + 0.34 * side, -0.2)
    nose = 1.5 * dx
    pen.band([(nose + 0.02, 0.6), (nose + 0.06, 0.9), (nose + 0.08, 1.15)], 0.36, 0.28, look.pink, look.edge)
    wide = 0.46 * muzzle
    pen.blob(
        [
            (dx - 0.2, -0.02),
            (nose - wide, 0.45),
            (nose - 0.3, 0.78),
            (nose, 0.68),
            (nose + 0.3, 0.78),
            (nose + wide, 0.45),
            (dx + 0.2, -0.02),
        ],
        look.second,
        look.edge,
    )
    pen.oval(nose, 0.26, 0.22 * muzzle, 0.16 * muzzle, DARK)
    for side in (-1, 1):
        pen.stroke([(nose, 0.4), (nose + 0.06 * side, 0.6), (nose + 0.32 * side, 0.6)], 0.045, DARK)


# ---- heads from the side -----------------------------------------------------------------------------------


def cat_profile(pen: Pen, look: Look) -> None:
    """A cat from the side, looking to the right."""
    ear, muzzle = float(look.proportions[1]), float(look.proportions[3])
    pen.polygon([(0.1, -0.7), (0.45, -0.6 - 0.8 * ear), (0.65, -0.5)], look.fur.shade(0.75), look.edge)
    pen.oval(0.74, 0.32, 0.36 * muzzle, 0.3, look.second, look.edge)
    pen.blob(
        [
            (0.1, -0.86),
            (-0.7, -0.6),
            (-0.9, 0.1),
            (-0.5, 0.75),
            (0.3, 0.76),
            (0.72, 0.45),
            (0.82, 0.05),
            (0.65, -0.5),
        ],
        look.fur,
        look.edge,
    )
    pen.polygon([(-0.62, -0.55), (-0.3, -0.6 - 0.95 * ear), (0.2, -0.75)], look.fur, look.edge)
    pen.polygon([(-0.45, -0.62), (-0.28, -0.5 - 0.75 * ear), (0.02, -0.75)], look.pink)
    if look.pattern == "stripes":
        for k in range(3):
            pen.stroke(
                [(-0.6 + 0.16 * k, 0.3 - 0.2 * k), (-0.25 + 0.16 * k, 0.4 - 0.2 * k)],
                0.1,
                look.fur.shade(0.62),
            )
    _cat_eye(pen, look, 0.42, -0.14, 1)
    pen.polygon([(1.0, 0.14), (1.13, 0.2), (1.02, 0.32)], look.pink, look.edge)
    pen.stroke([(1.02, 0.36), (0.88, 0.48), (0.66, 0.45)], 0.04, DARK)
    _whiskers(pen, look, 0.82, 0.36, -1)
    _whiskers(pen, look, 0.9, 0.36, 1)


def dog_profile(pen: Pen, look: Look) -> None:
    """A dog from the side, looking to the right."""
    ear, muzzle = float(look.proportions[1]), float(look.proportions[3])
    tip = 0.8 + 0.75 * muzzle
    pen.band([(tip - 0.4, 0.5), (tip - 0.35, 0.8), (tip - 0.4, 1.05)], 0.3, 0.24, look.pink, look.edge)
    pen.blob(
        [(0.1, -0.25), (0.7, -0.05), (tip, 0.08), (tip + 0.06, 0.38), (tip - 0.3, 0.6), (0.4, 0.72)],
        look.second,
        look.edge,
    )
    pen.blob(
        [
            (0.0, -0.82),
            (-0.62, -0.6),
            (-0.8, 0.1),
            (-0.5, 0.7),
            (0.2, 0.72),
            (0.62, 0.3),
            (0.62, -0.2),
            (0.45, -0.62),
        ],
        look.fur,
        look.edge,
    )
    if look.pattern == "stripes":
        for k in range(3):
            pen.stroke(
                [(0.1 + 0.12 * k, -0.72 + 0.06 * k), (0.1 + 0.1 * k, -0.45 + 0.04 * k)],
                0.1,
                look.fur.shade(0.62),
            )
    pen.oval(tip, 0.12, 0.17, 0.14, DARK)
    pen.stroke([(tip - 0.02, 0.42), (tip - 0.4, 0.5), (0.6, 0.46)], 0.045, DARK)
    _dog_eye(pen, look, 0.32, -0.26)
    low = 0.1 + 0.65 * ear
    pen.blob(
        [(-0.62, -0.62), (-0.12, -0.68), (0.05, 0.0), (-0.1, low), (-0.42, low + 0.05), (-0.62, 0.1)],
        look.fur.shade(EAR_SHADE["dog"]),
        look.edge,
    )


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
