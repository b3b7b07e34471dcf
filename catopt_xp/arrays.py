"""Arrays as they are given: taken as they lie, or refused in a line that names the argument. Floor F1."""

from __future__ import annotations

from typing import Any

from catopt_xp.backend import Array, Backend, NumpyBackend
from catopt_xp.io.console import one_line
from catopt_xp.parameters import is_real


def as_array(x: Any, name: str, backend: Backend | None = None, wanted: str = "give real numbers") -> Array:
    """`x`, an array of any library, a list or a number, as an array of real numbers of `backend` (None: NumPy).

    `name`: of the argument, and `wanted`: what to do, for messages. Raises TypeError or ValueError in one line for what
    is no array, holds anything else, or has masked values.

    >>> as_array([1, 2], "Y")
    array([1, 2])
    >>> as_array(["cat"], "Y")
    Traceback (most recent call last):
    TypeError: Y holds <U3; give real numbers
    """
    try:
        array = (backend or NumpyBackend()).asarray(x)
    except (TypeError, ValueError, BufferError) as error:  # lists of unequal lengths, a mask, memory that is not shared
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name} cannot be taken as an array ({one_line(error)}); {wanted}") from error
    if not is_real(array):
        raise TypeError(f"{name} holds {str(array.dtype).rpartition('.')[2]}; {wanted}")
    return array


__all__ = ["as_array"]
