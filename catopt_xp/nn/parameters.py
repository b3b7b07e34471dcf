"""All parameters of a network in one flat array, with a named view for each.

The same class holds parameters, gradients and moments, so that an update, a norm, a copy to another device
or a file is one operation on one array, whatever the number of layers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from catopt_xp.backend.xp import Array, Backend, backend_of, dtype_name, is_real

Shapes = Mapping[str, tuple[int, ...]]


def is_bias(name: str) -> bool:
    """True for `b0`, `b1`, …: the parameters that weight decay and L2 leave alone.

    >>> is_bias("b0"), is_bias("W0"), is_bias("beta")
    (True, False, False)
    """
    return re.fullmatch(r"b\d+", name) is not None


def common_dtype(arrays: Mapping[str, Any]) -> str:
    """The dtype's name of the first array, which is that of all in a network; float32 where there is none.

    >>> common_dtype({})
    'float32'
    """
    return next((dtype_name(x) for x in arrays.values()), "float32")


def layer_shapes(neuron_cnt: list[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's parameters: every weight matrix first, then every bias.

    >>> layer_shapes([3, 2, 1])
    {'W0': (2, 3), 'W1': (1, 2), 'b0': (2, 1), 'b1': (1, 1)}
    """
    pairs = list(itertools.pairwise(neuron_cnt))
    shapes: dict[str, tuple[int, ...]] = {f"W{k}": (n_out, n_in) for k, (n_in, n_out) in enumerate(pairs)}
    return shapes | {f"b{k}": (n_out, 1) for k, (_, n_out) in enumerate(pairs)}


def check_matches(source: Mapping[str, Any], shapes: Shapes, what: str) -> None:
    """Raises ValueError, naming the key, unless `source` has exactly the names and shapes of `shapes`, nothing masked.

    TypeError for what is no array of real numbers.

    >>> import numpy as np
    >>> check_matches({"W0": np.zeros((1, 2))}, {"W0": (2, 1)}, "checkpoint")
    Traceback (most recent call last):
    ValueError: checkpoint: W0 has shape (1, 2), expected (2, 1)
    """
    for name, shape in shapes.items():
        if name not in source:
            raise ValueError(f"{what}: {name} is missing (expected {', '.join(shapes)})")
        array = source[name]
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise TypeError(f"{what}: {name} is a {type(array).__name__}; give an array")
        if tuple(array.shape) != tuple(shape):
            raise ValueError(f"{what}: {name} has shape {tuple(array.shape)}, expected {tuple(shape)}")
        if not is_real(array):
            raise TypeError(f"{what}: {name} holds {dtype_name(array)}; give real numbers")
        if np.ma.is_masked(array):
            told = "has masked values, which are no numbers: fill them first, as x.filled(0) does"
            raise ValueError(f"{what}: {name} {told}")
    for name in source:
        if name not in shapes:
            raise ValueError(f"{what}: {name} is not a parameter here (expected {', '.join(shapes)})")


class Parameters(Mapping[str, Array]):
    """A read-only mapping `name -> live view`, over one flat array.

    `flat`: (n,) array of any float dtype on any device; `shapes`: the views, in order, which fill it exactly. Weights
    come before biases; `n_weights` counts the elements of the former. Assigning `parameters["W0"] = x` copies x into
    the live view. `deepcopy` and `pickle` keep views and flat array joined, and objects that share one joined too.

    Raises ValueError when the shapes do not fill `flat`, or when a weight follows a bias.

    >>> import numpy as np
    >>> p = Parameters(np.zeros(3), {"W0": (1, 2), "b0": (1, 1)})
    >>> p["W0"] = [[1.0, 2.0]]
    >>> p.flat, p.n_weights
    (array([1., 2., 0.]), 2)
    """

    def __init__(self, flat: Array, shapes: Shapes) -> None:
        self.flat = flat
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in shapes.items()}
        self.backend: Backend = backend_of(flat)
        self._views: dict[str, Array] = {}
        self.n_weights = 0
        start, bias_seen = 0, False
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            self._views[name] = self.backend.xp.reshape(flat[start:stop], shape)
            if is_bias(name):
                bias_seen = True
            elif bias_seen:
                raise ValueError(f"parameters: {name} follows a bias; weights come first")
            else:
                self.n_weights = stop
            start = stop
        if start != flat.shape[0]:
            raise ValueError(f"parameters: shapes hold {start} values, the flat array has {flat.shape[0]}")

    @classmethod
    def zeros(cls, shapes: Shapes, dtype: Any, backend: Backend) -> Parameters:
        """A new buffer of zeros on `backend`."""
        return cls(backend.zeros((sum(math.prod(s) for s in shapes.values()),), dtype), shapes)

    def zeros_like(self) -> Parameters:
        """A buffer of zeros with the same names, shapes, dtype and device."""
        return Parameters.zeros(self.shapes, self.flat.dtype, self.backend)

    def to(self, backend: Backend) -> Parameters:
        """A copy on another device (or on the same one)."""
        twin = Parameters.zeros(self.shapes, dtype_name(self.flat), backend)
        twin.copy_from(self, "copy")
        return twin

    def copy_from(self, source: Mapping[str, Any], what: str = "parameters") -> None:
        """Copies values of the same names and shapes, from any device, into the live arrays.

        Raises ValueError, naming the first key that is missing, foreign or of another shape, and TypeError for what is
        no array of real numbers; nothing is copied then.
        """
        check_matches(source, self.shapes, what)
        with self.backend.activate():
            if isinstance(source, Parameters):
                self.flat[...] = self._here(source.flat)
                return
            # All, before any is copied.
            values = {name: self._here(source[name]) for name in self._views}
            for name, view in self._views.items():
                view[...] = values[name]

    def _here(self, value: Any) -> Array:
        return self.backend.asarray(value, dtype=self.flat.dtype)

    def __getitem__(self, name: str) -> Array:
        return self._views[name]

    def __setitem__(self, name: str, value: Any) -> None:
        view = self._views[name]
        with self.backend.activate():
            array = self.backend.asarray(value)
            if not is_real(array):
                raise TypeError(f"parameters: {name} holds {dtype_name(array)}; give real numbers")
            view[...] = self._here(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
        return f"Parameters({inside}; {self.flat.dtype} on {self.backend.device})"

    # Views are not arrays of their own: rebuilding them from the flat array keeps copies joined.
    def __reduce__(self) -> tuple[Any, ...]:
        return Parameters, (self.flat, self.shapes)
