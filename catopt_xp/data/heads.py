"""The heads of the drawn cats and dogs, from the front and from the side.

Floor F2. Lengths are in head radii: a head lies around (0, 0), x to the right, y downwards.
"""

from __future__ import annotations

from catopt_xp.data.looks import DARK, WHITE, Look
from catopt_xp.data.pen import Pen

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
