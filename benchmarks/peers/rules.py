"""The chapter's update rules for whole arrays of any library, as the peers compute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BETA, BETA1, BETA2 = 0.9, 0.9, 0.999
RMSPROP_EPS, ADAM_EPS = 1e-6, 1e-8


def corrections(t: Any, optimizer: str) -> tuple[Any, Any]:
    """The divisors of the averages of g and of g*g at update number `t`, from 1; `t`: a number or an array.

    >>> corrections(1, "rmsprop")[1] == 1 - 0.9
    True
    """
    if optimizer == "rmsprop":
        return 1.0, 1 - BETA**t
    return (1 - BETA1**t, 1 - BETA2**t) if optimizer == "adam" else (1.0, 1.0)


def updated(
    p: Any, g: Any, first: Any, second: Any, divisors: Any, optimizer: str, rate: float, sqrt: Callable[[Any], Any]
) -> tuple[Any, Any, Any]:
    """The parameter and its moving averages (of g, of g*g) after an update; a rule without averages keeps them.

    `p`, `g`, `first`, `second`: arrays of one shape; `divisors`: `corrections` of this update; `optimizer`: a name of
    `OPTIMIZERS`; `rate`: per step; `sqrt`: the library's.

    >>> import math
    >>> updated(1.0, 0.5, 0.0, 0.0, corrections(1, "gd"), "gd", 0.1, math.sqrt)
    (0.95, 0.0, 0.0)
    """
    if optimizer == "gd":
        return p - rate * g, first, second
    if optimizer == "momentum":
        first = BETA * first + (1 - BETA) * g
        return p - rate * first, first, second
    if optimizer == "rmsprop":
        second = BETA * second + (1 - BETA) * g * g
        return p - rate * g / sqrt(second / divisors[1] + RMSPROP_EPS), first, second
    first = BETA1 * first + (1 - BETA1) * g
    second = BETA2 * second + (1 - BETA2) * g * g
    change = rate * (first / divisors[0]) / (sqrt(second / divisors[1]) + ADAM_EPS)
    return p - change, first, second


def correction_table(start: int, steps: int, optimizer: str) -> NDArray[np.float32]:
    """A table of `corrections` for the updates after the first `start`, (steps, 2), for programs that only read them.

    >>> correction_table(0, 2, "gd").tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    t = np.arange(start + 1, start + 1 + steps, dtype=np.float64)
    return np.stack([np.broadcast_to(c, (steps,)) for c in corrections(t, optimizer)], axis=1).astype(np.float32)
