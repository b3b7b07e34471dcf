"""Labels: their shape, their values, and the form in which training keeps them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from catopt_xp.backend.xp import Array, Backend, as_array, backend_of, dtype_name

HostArray = np.ndarray[Any, Any]

WANTED = "labels are numbers (map class names to 0, 1, … first)"


def as_rows(labels: Any, name: str = "Y") -> HostArray:
    """Labels of any library or a list as a host array (·, m); (m,) becomes (1, m), a number (1, 1).

    Raises TypeError or ValueError, naming the argument, for what is no array of numbers.

    >>> as_rows([0, 1]).shape
    (1, 2)
    """
    rows = np.atleast_1d(as_array(labels, name, wanted=WANTED))
    return rows.reshape(1, -1) if rows.ndim == 1 else rows


def check_labels(labels: HostArray, output: str, units: int, dtype: str, name: str = "Y") -> HostArray:
    """Labels as training keeps them; ValueError names the first bad one.

    A sigmoid output takes 0 and 1, (units, m), and gets them in `dtype`; a softmax output takes class numbers
    0 … units-1, (1, m), and gets int64.

    >>> check_labels(np.array([[0, 1, 2]]), "sigmoid", 1, "float32")
    Traceback (most recent call last):
    ValueError: Y has the label 2 (sample 2); a sigmoid output takes 0 and 1
    """
    if output not in ("sigmoid", "softmax"):
        raise ValueError(f"an {output} output predicts numbers; MLPRegressor trains such a network")
    rows = units if output == "sigmoid" else 1
    if labels.ndim != 2 or labels.shape[0] != rows:
        raise ValueError(f"{name} has shape {labels.shape}; this network's {output} output takes ({rows}, m)")
    if labels.dtype.kind not in "buif":
        raise TypeError(f"{name} holds {labels.dtype}; {WANTED}")
    if output == "sigmoid":
        good, wanted = (labels == 0) | (labels == 1), "0 and 1"
    else:
        good, wanted = np.isin(labels, np.arange(units)), f"whole numbers from 0 to {units - 1}"
    if not good.all():
        sample = int(np.argmin(good.all(axis=0)))
        label = labels[:, sample][~good[:, sample]][0]
        raise ValueError(f"{name} has the label {label} (sample {sample}); a {output} output takes {wanted}")
    return labels.astype(dtype if output == "sigmoid" else np.int64)


def labels_for(Y: Any, Y_hat: Any, rows: int | None = None) -> tuple[Backend, Array, Array]:
    """Where probabilities (n_out, m) lie, their labels, and themselves as floats: 0 and 1 may come as integers.

    `rows`: of the labels, None for those of the probabilities; one row may come as (m,). Raises ValueError or
    TypeError, naming the argument, for shapes and values that do not fit.
    """
    backend = backend_of(Y_hat)
    Y_hat, Y = as_array(Y_hat, "Y_hat", backend), as_array(Y, "Y", backend, WANTED)
    kind = dtype_name(Y_hat)
    Y_hat = backend.asarray(Y_hat, dtype=kind if kind.startswith("float") else "float32")
    if Y_hat.ndim != 2 or 0 in Y_hat.shape:
        raise ValueError(f"Y_hat has shape {tuple(Y_hat.shape)}; give (n_out, m), a column for each sample")
    expected = (rows or Y_hat.shape[0], Y_hat.shape[1])
    if Y.ndim == 1 and expected[0] == 1:
        Y = backend.xp.reshape(Y, (1, -1))
    if tuple(Y.shape) != expected:
        raise ValueError(f"Y has shape {tuple(Y.shape)}, expected {expected} for Y_hat of shape {tuple(Y_hat.shape)}")
    return backend, Y, Y_hat


def weight_row(weights: Any, m: int, backend: Backend, dtype: Any) -> Array | None:
    """Weights of m samples as the losses take them, (1, m) in this dtype on this device; None stays None.

    Raises ValueError or TypeError unless they are m numbers.
    """
    if weights is None:
        return None
    weights = as_array(weights, "weights", backend)
    if tuple(weights.shape) != (m,):
        raise ValueError(f"weights has shape {tuple(weights.shape)}, expected ({m},): a number for each sample")
    return backend.asarray(backend.xp.reshape(weights, (1, -1)), dtype=dtype)


def sample_weights(sample_weight: Any, class_weight: Any, Y: HostArray | None, m: int) -> HostArray | None:
    """What m samples weigh, by themselves and by their classes: (m,) float64 on the host; None: all weigh 1.

    `sample_weight`: (m,) numbers, or None. `class_weight`: None; "balanced", which weighs a class by
    `m / (classes * its samples)`; or {class: weight}, 1 for a class left out; a list of these for several rows of
    labels. `Y`: labels (m,) or (rows, m), numbers or names; the weights of a sample's classes are multiplied.

    Raises ValueError or TypeError, naming the argument, for what cannot be used.

    >>> sample_weights([1, 2, 2], {"dog": 3}, np.array(["dog", "cat", "dog"]), 3)
    array([3., 2., 6.])
    """
    weights = None if sample_weight is None else _checked_weights(sample_weight, m)
    if class_weight is None:
        return weights
    rows = np.atleast_2d(np.asarray(Y))
    by_class: HostArray = np.prod([_class_weights(*pair) for pair in _by_row(class_weight, rows)], axis=0)
    return by_class if weights is None else weights * by_class


def check_class_weight(class_weight: Any) -> None:
    """Raises ValueError unless this is None, "balanced", {class: weight} or a list of such dicts."""
    given = class_weight if isinstance(class_weight, list) else [class_weight]
    balanced = isinstance(class_weight, str) and class_weight == "balanced"
    if class_weight is not None and not balanced and not all(isinstance(one, Mapping) for one in given):
        raise ValueError(f'class_weight is {class_weight!r}; give None, "balanced" or {{class: weight}}')


def _checked_weights(sample_weight: Any, m: int) -> HostArray:
    weights: HostArray = np.asarray(as_array(sample_weight, "sample_weight"), dtype=np.float64)
    if weights.shape != (m,):
        raise ValueError(f"sample_weight has shape {weights.shape}; give ({m},), a number for each sample")
    if not np.isfinite(weights).all():
        raise ValueError("sample_weight contains NaN or infinity; replace them first")
    if not weights.any():
        raise ValueError("sample_weight is zero for every sample; there is nothing to learn")
    return weights


def _by_row(class_weight: Any, rows: HostArray) -> list[tuple[Any, HostArray]]:
    """The class weights of each row of labels, and that row."""
    check_class_weight(class_weight)
    if isinstance(class_weight, str) and class_weight == "balanced":
        return [(class_weight, row) for row in rows]
    given = class_weight if isinstance(class_weight, list) else [class_weight]
    if len(given) != len(rows):
        told = f"class_weight has {len(given)} dicts for {len(rows)} labels of a sample"
        raise ValueError(f'{told}; give a list of one for each, or "balanced"')
    return list(zip(given, rows, strict=True))


def _class_weights(given: Any, row: HostArray) -> HostArray:
    """The weight of each sample's class, (m,) float64."""
    classes, places, counts = np.unique(row, return_inverse=True, return_counts=True)
    if given == "balanced":
        weights = row.size / (len(classes) * counts)
        return weights[places]
    missing = [one for one in classes.tolist() if one not in given]
    if missing and len(classes) - len(missing) != len(given):
        unknown = [one for one in given if one not in classes.tolist()]
        raise ValueError(f"class_weight has weights of {unknown}, the labels have the classes {classes.tolist()}")
    told = [given.get(one, 1.0) for one in classes.tolist()]
    if not all(isinstance(weight, Real) and math.isfinite(weight) for weight in told):
        raise ValueError(f"class_weight is {dict(given)}; give finite numbers")
    return np.array(told, dtype=np.float64)[places]
