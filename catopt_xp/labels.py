"""Labels: their shape, their values, and the form in which training keeps them. Floor F1."""

from __future__ import annotations

from typing import Any

import numpy as np

from catopt_xp.backend import asnumpy

HostArray = np.ndarray[Any, Any]


def as_rows(labels: Any) -> HostArray:
    """Labels of any library or a list as a host array (·, m); (m,) becomes (1, m).

    >>> as_rows([0, 1]).shape
    (1, 2)
    """
    rows = np.atleast_1d(asnumpy(labels))
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
        raise TypeError(f"{name} holds {labels.dtype}; labels are numbers (map class names to 0, 1, … first)")
    if output == "sigmoid":
        good, wanted = (labels == 0) | (labels == 1), "0 and 1"
    else:
        good, wanted = np.isin(labels, np.arange(units)), f"whole numbers from 0 to {units - 1}"
    if not good.all():
        sample = int(np.argmin(good.all(axis=0)))
        label = labels[:, sample][~good[:, sample]][0]
        raise ValueError(f"{name} has the label {label} (sample {sample}); a {output} output takes {wanted}")
    return labels.astype(dtype if output == "sigmoid" else np.int64)
