"""Labels: their shape, their values, and the form in which training keeps them."""

from __future__ import annotations

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
