"""Functions compiled by numba and kept on disk."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba

from catopt_xp.engines import panels
from catopt_xp.engines.cpu import lanes, rules, vectors
from catopt_xp.engines.cpu.rules import NUMBERS


class Compiled:
    """A function compiled for each kind of argument at its first call, and kept on disk.

    The function itself raises nothing.

    >>> def add(x, y):
    ...     return x + y
    >>> Compiled(add).for_types(1, 2)(3, 4)
    7
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        sources = "".join(map(inspect.getsource, (panels, vectors, lanes, rules)))
        self._sources = sources + "".join(optimizer.kernel for optimizer in NUMBERS)
        self._variants: dict[str, _Variant] = {}

    def for_types(self, *examples: Any) -> Callable[..., Any]:
        """The function for arguments whose types go by these; it takes others too, and is slower to start then."""
        kinds = " ".join(str(numba.typeof(example)) for example in examples)
        if kinds not in self._variants:
            # Kept code is found by name and by its own file's date; the name says what else it was made of. And it says
            # for which types: where two processes add to one index of numba's at once, each may find the other's code.
            stamp = hashlib.sha256((self._sources + kinds).encode()).hexdigest()[:16]
            twin = FunctionType(self.function.__code__, self.function.__globals__, self.function.__name__)
            twin.__module__, twin.__qualname__ = self.function.__module__, f"{self.function.__name__}_{stamp}"
            self._variants[kinds] = _Variant(twin)
        return self._variants[kinds]


class _Variant:
    """The function for some types; where its code cannot be kept, it is compiled anew in each process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        options = {"nogil": True, "error_model": "numpy"}
        self._fresh = numba.njit(function, **options)
        try:
            self._call = numba.njit(function, cache=True, **options)
        except RuntimeError:  # numba's word for "no folder to keep it in"
            self._call = self._fresh

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._call(*arguments)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            # A full disk, or damaged files of earlier runs: the function itself raises nothing, and has not begun.
            if self._call is self._fresh:
                raise
            self._call = self._fresh
            return self._call(*arguments)
