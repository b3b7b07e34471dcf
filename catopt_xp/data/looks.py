"""How a drawn animal looks, apart from its class: pose, coat and proportions.

Floor F2. A look is drawn at random before the class is known and means the same for both classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from catopt_xp.data.pen import Colour

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
