"""Arrays in every form that memory allows, each equal to its plain copy: C-contiguous, native, aligned, writable."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

Array = np.ndarray[Any, Any]

WHOLE = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
FLOATS = ["float16", "float32", "float64", "longdouble"]
NO_NUMBERS = ["complex64", "complex128", "object", "U3", "S3", "datetime64[s]", "timedelta64[s]", "V4", "f4,f4"]


class Own(np.ndarray[Any, Any]):
    """A subclass without anything of its own."""


class Holder:
    """What is no array and hands one out."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.array, dtype=dtype)


def _fill(place: Array, x: Array) -> Array:
    place[...] = x
    return place


def every_other(x: Array) -> Array:
    """With gaps along each axis."""
    room = np.zeros([2 * n + 1 for n in x.shape], x.dtype)
    return _fill(room[(..., *(slice(1, 2 * n + 1, 2) for n in x.shape))], x)


def backwards(x: Array) -> Array:
    """With negative strides."""
    turned = (..., *(slice(None, None, -1),) * x.ndim)
    return x[turned].copy(order="C")[turned]


def misaligned(x: Array) -> Array:
    """A byte behind where numbers of this type may begin."""
    room = np.zeros(x.nbytes + 1, np.uint8)
    return _fill(np.ndarray(x.shape, x.dtype, room.data, offset=1), x)


def big_endian(x: Array) -> Array:
    return x.astype(x.dtype.newbyteorder(">"))


def read_only(x: Array) -> Array:
    copied = x.copy()
    copied.flags.writeable = False
    return copied


def field(x: Array) -> Array:
    """One of two fields of records, a byte beside the other."""
    records = np.zeros(x.shape, [("before", "u1"), ("x", x.dtype)])
    records["x"] = x
    return records["x"]


def mapped(x: Array) -> Array:
    """A memory map, from an odd byte of a file on."""
    with tempfile.TemporaryFile() as file:
        return _fill(np.memmap(file, x.dtype, "w+", offset=7, shape=x.shape), x) if x.size else x.copy()


def written_in_memory(x: Array) -> Array:
    """A memory map of which changes stay in memory."""
    with tempfile.TemporaryFile() as file:
        file.write(x.tobytes())
        file.flush()
        return np.memmap(file, x.dtype, "c", shape=x.shape) if x.size else x.copy()


def matrix(x: Array) -> Any:
    """NumPy's matrix, which has two dimensions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.matrix(x) if x.ndim == 2 else x.copy()


# Forms of which the elements can be written too, and those that are for reading.
WRITABLE: dict[str, Callable[[Array], Any]] = {
    "plain": np.copy,
    "fortran": lambda x: x.copy(order="F"),
    "every other": every_other,
    "backwards": backwards,
    "fortran, backwards": lambda x: backwards(x.copy(order="F").T).T,
    "misaligned": misaligned,
    "misaligned fortran": lambda x: misaligned(x.T).T,
    "big-endian": big_endian,
    "big-endian, every other": lambda x: every_other(big_endian(x)),
    "big-endian, misaligned": lambda x: misaligned(big_endian(x)),
    "field": field,
    "mapped": mapped,
    "written in memory": written_in_memory,
    "subclass": lambda x: x.copy().view(Own),
    "nothing masked": lambda x: np.ma.masked_array(x.copy()),
    "matrix": matrix,
}
FORMS = WRITABLE | {
    "read-only": read_only,
    "read-only, fortran": lambda x: read_only(x.T).T,
    "holder": Holder,
}


def plain(x: Any) -> Array:
    """The plain copy of anything."""
    array = np.asarray(x)
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def repeated(row: Array, count: int, axis: int) -> Array:
    """The same numbers again and again along an axis, by a stride of 0."""
    return np.broadcast_to(np.expand_dims(row, axis), np.insert(row.shape, axis, count))


forms = st.sampled_from(sorted(FORMS))
dtypes = st.sampled_from([*WHOLE, *FLOATS])
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def numbers(dtype: str, shape: tuple[int, ...], seed: int, size: float = 1.0) -> Array:
    """Numbers of a type, those of floats around 0, of `size`."""
    rng = np.random.default_rng(seed)
    least = 0 if np.dtype(dtype).kind in "ub" else -100
    floats = np.dtype(dtype).kind == "f"
    drawn = size * rng.standard_normal(shape) if floats else rng.integers(least, 2 if dtype == "bool" else 101, shape)
    return np.array(drawn, dtype=dtype)


def no_numbers(dtype: str, shape: tuple[int, ...]) -> Array:
    """What is no real number, though much of it could be read as one."""
    if dtype in ("U3", "S3"):
        return np.full(shape, "1", dtype)
    return np.ones(shape, "u1").astype(dtype) if dtype == "object" else np.zeros(shape, dtype)


# --- answers to them --------------------------------------------------------------------------------------------------

Answer = dict[str, Any]


def same(here: Answer, there: Answer) -> bool:
    """Equal in every bit, whatever the byte order; a NaN is a NaN."""
    pairs = [(plain(here[k]), plain(there[k])) for k in here] if here.keys() == there.keys() else []
    return bool(pairs) and all(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def answers_of(ask: Callable[..., Answer], *arrays: Any) -> Answer:
    """The answer to arrays, which it leaves as they are."""
    before = [plain(x) for x in arrays]
    with np.errstate(all="ignore"):
        answer = ask(*arrays)
    for x, was in zip(arrays, before, strict=True):
        assert np.array_equal(plain(x), was, equal_nan=was.dtype.kind in "fc"), "an input was written to"
    return answer


def assert_as_plain(ask: Callable[..., Answer], *arrays: Any) -> None:
    here = answers_of(ask, *arrays)
    assert same(here, answers_of(ask, *map(plain, arrays))), "other bits than those of the plain copies"
