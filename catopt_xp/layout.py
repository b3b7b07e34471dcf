"""Which networks can be built: layer sizes and the activations that go with them. Floor F1, on `functional`."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from catopt_xp.functional import HIDDEN_ACTIVATIONS, OUTPUT_ACTIVATIONS


def checked_layout(neuron_cnt: Sequence[int], activation_func: Sequence[str]) -> tuple[list[int], list[str]]:
    """Units of every layer and the activation of every one after the input, as plain numbers and names.

    Raises ValueError for a network that cannot be built.

    >>> checked_layout((4, 3, 1), ("relu", "sigmoid"))
    ([4, 3, 1], ['relu', 'sigmoid'])
    """
    try:
        units, names = [operator.index(n) for n in neuron_cnt], [str(name) for name in activation_func]
    except TypeError as error:
        raise ValueError(
            f"DeepNetwork: neuron_cnt is {neuron_cnt!r}; give whole numbers, one for each layer"
        ) from error
    if len(units) != len(names) + 1 or not names:
        raise ValueError(
            f"DeepNetwork: {len(units)} layer sizes and {len(names)} activations; "
            "give one activation for every layer after the input"
        )
    if min(units) < 1:
        raise ValueError(f"DeepNetwork: layer sizes are {units}; every layer needs at least one unit")
    for name in names[:-1]:
        if name not in HIDDEN_ACTIVATIONS:
            raise ValueError(f"DeepNetwork: unknown activation {name!r}; choose {', '.join(HIDDEN_ACTIVATIONS)}")
    if names[-1] not in OUTPUT_ACTIVATIONS:
        raise ValueError(f"DeepNetwork: the last activation is {names[-1]!r}; choose {', '.join(OUTPUT_ACTIVATIONS)}")
    if names[-1] == "softmax" and units[-1] < 2:
        raise ValueError("DeepNetwork: a softmax output needs at least two units; use sigmoid for one")
    return units, names
