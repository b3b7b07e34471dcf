"""What a state is compared by, and schedules of every kind, for the tests of saving and loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from catopt_xp.optim.schedules import (
    const_lr,
    get_cosine_func,
    get_hyperbola_func,
    get_staircase_func,
    get_table_func,
    with_warmup,
)

SCHEDULES = [
    const_lr,
    get_hyperbola_func(0.2),
    with_warmup(with_warmup(get_cosine_func(9.5, 0.1), 2), 0.3, 0.5),
    get_table_func({3: 1e-3, 0.1: 5e-324}),
    get_staircase_func(1 / 3, 0.1),
]


def bits(arrays: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes by name: -0.0 is not 0.0."""
    return {k: (x.dtype.str, x.shape, x.tobytes()) for k, x in arrays.items() if isinstance(x, np.ndarray)}
