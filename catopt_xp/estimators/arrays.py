"""What an estimator takes and answers: samples, labels and weights as arrays of any library."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.xp import Array, Backend, asnumpy, backend_of, dtype_name, get_backend

CHECK_NUMBERS = 1 << 24  # looked at together when values are checked
LARGE_STEP = 2e7  # operations of a step from which a GPU gains: one takes some 0.6 ms there, however small


def is_foreign(X: Any) -> bool:
    """Whether X is an array of another library than NumPy: one that is exchanged by DLPack or CUDA's interface.

    >>> is_foreign([[1.0]]), is_foreign(np.zeros(1))
    (False, False)
    """
    exchanged = hasattr(X, "__dlpack__") or hasattr(X, "__cuda_array_interface__")
    return exchanged and not isinstance(X, np.ndarray | np.generic)


def home_of(X: Any, device: str | Backend) -> Backend | None:
    """The backend where X lies, if it is a GPU's array, or one of the library of `device`; None for host data."""
    if not is_foreign(X):
        return None
    library = _library_of(X)
    if isinstance(device, Backend) and library is device.xp:
        return device
    if not hasattr(X, "__cuda_array_interface__"):
        return None
    return backend_of(X) if library.__name__ == "cupy" else get_backend(f"cuda:{X.device.index or 0}")  # PyTorch's


def backend_for(operations: float) -> Backend:
    """Where steps of so many operations are fast: on the GPU that "auto" stands for, or on the CPU if they are small.

    >>> backend_for(1e6).device
    'cpu'
    """
    return get_backend("cpu" if operations < LARGE_STEP else _usual_device(os.environ.get("CATOPT_XP_DEVICE")))


@functools.cache
def _usual_device(wish: str | None) -> str:
    """The device of "auto", with this wish in the environment; looking for it takes a tenth of a second."""
    return get_backend("auto").device


def as_host(X: Any, name: str = "X") -> Any:
    """X as host data that scikit-learn checks: an array of another library as NumPy's, anything else as it is.

    NumPy's arrays come aligned, and in the machine's byte order, without which scikit-learn would make float64 of
    float32.
    Raises TypeError for an array that its library does not hand out, ValueError, naming it, for masked values.

    >>> as_host(np.zeros(1, dtype=">f4")).dtype
    dtype('float32')
    """
    if isinstance(X, np.ndarray):
        if isinstance(X, np.ma.MaskedArray) and np.ma.is_masked(X):
            raise ValueError(
                f"{name} has masked values, which are no numbers: fill them first, as {name}.filled(0) does"
            )
        return X if X.dtype.isnative and X.flags.aligned else np.array(X, dtype=X.dtype.newbyteorder("="))
    if not is_foreign(X):
        return X
    try:
        return asnumpy(X)
    except (BufferError, RuntimeError) as error:
        raise TypeError(f"a {type(X).__name__} of {X.dtype} cannot be read by NumPy ({error}); convert it") from error


def in_kind_of(values: Array, X: Any, device: str | Backend) -> Any:
    """An answer in the library of X, where X lies, if it is an array of another library; else as NumPy's.

    `device`: as for `home_of`. Answers that other libraries cannot hold, such as names of classes, stay NumPy's.
    """
    if not is_foreign(X) or (isinstance(values, np.ndarray) and values.dtype.kind not in "biufc"):
        return asnumpy(values)
    home, library = home_of(X, device), _library_of(X)
    if home is None:
        return library.from_dlpack(asnumpy(values))
    values = home.asarray(values)
    return values if home.xp is library else library.from_dlpack(values)


def _library_of(X: Any) -> Any:
    """The module that X is an array of: whoever holds X has imported it."""
    if hasattr(X, "__array_namespace__"):
        return X.__array_namespace__()
    return sys.modules[type(X).__module__.partition(".")[0]]


def checked_samples(X: Array, home: Backend, pixels: bool) -> Array:
    """Rows of numbers (m, n_x) on a device as they are trained on: float32, float64, or uint8 where they are `pixels`.

    Other numbers become float64. Raises TypeError or ValueError, saying in a line what is wrong.
    """
    X = home.asarray(X)
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X has shape {tuple(X.shape)}; give (samples, features), at least one of each")
    kind = dtype_name(X)
    if not kind.startswith(("bool", "int", "uint", "float")):
        raise TypeError(f"X holds {kind}; give real numbers")
    if pixels:
        if kind != "uint8":
            raise ValueError(f"X holds {kind}; with pixels=True give uint8")
        return X
    with home.activate():
        X = X if kind in ("float32", "float64") else home.asarray(X, dtype="float64")
        rows = max(1, CHECK_NUMBERS // X.shape[1])
        starts = range(0, X.shape[0], rows)
        finite = [home.xp.all(home.xp.isfinite(X[a : min(a + rows, X.shape[0]), :])) for a in starts]
        if not all(bool(part) for part in finite):  # sync
            raise ValueError("X contains NaN or infinity; replace them first")
    return X


HostArray = NDArray[Any]


@dataclass
class Labels:
    """The classes of a classifier, (k,) and sorted, and whether a sample may have several (`multilabel`).

    One output with a sigmoid tells two classes (or the only one), k of them a sample's labels; a softmax of k outputs
    tells more classes.

    >>> labels = Labels(np.array(["cat", "dog", "owl"]))
    >>> labels.encode(np.array(["owl", "cat"]))
    array([[2, 0]])
    >>> labels.decode(np.array([[0.2, 0.9], [0.7, 0.1], [0.1, 0.0]]))
    array(['dog', 'cat'], dtype='<U3')
    """

    classes: HostArray
    multilabel: bool = False

    @property
    def output(self) -> str:
        """The network's last activation."""
        return "softmax" if len(self.classes) > 2 and not self.multilabel else "sigmoid"

    @property
    def units(self) -> int:
        """The network's outputs."""
        return len(self.classes) if self.multilabel or len(self.classes) > 2 else 1

    def encode(self, y: HostArray) -> HostArray:
        """Labels (m,), or (m, k) of 0 and 1, as a network takes them: (1, m) or (k, m) whole numbers."""
        return y.T if self.multilabel else np.searchsorted(self.classes, y).reshape(1, -1)

    def decode(self, probabilities: HostArray) -> Any:
        """The most probable labels, (m,) or (m, k), from a network's answer (outputs, m)."""
        if self.multilabel:
            return (probabilities.T > 0.5).astype(np.int64)
        if self.units > 1:
            return self.classes[np.argmax(probabilities, axis=0)]
        second = (probabilities[0] > 0.5) & (len(self.classes) > 1)
        return self.classes[second.astype(np.int64)]

    def probabilities(self, answer: Any, xp: Any) -> Any:
        """The probability of every class, (m, k), from a network's answer (outputs, m), in the array module xp."""
        if self.multilabel or self.units > 1:
            return answer.T
        return xp.stack([1.0 - answer[0, :], answer[0, :]], axis=1)
