"""A training set as it lies on the device: sample-major, checked once, never copied when it already fits.

`X` is (n_x, m) to the outside; in memory its transpose is the C-contiguous array that rows are gathered from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from catopt_xp.backend.xp import Array, Backend, as_array, asnumpy, backend_of
from catopt_xp.nn.labels import as_rows, check_labels

PIXELS_OR_NUMBERS = "give uint8 pixels or real numbers"
CHECK_ROWS = 256  # rows looked at together when values are checked: no copy of the set is ever made for it


class SampleLayout(NamedTuple):
    """What a network takes: `n_x` features (None: any), labels for its `output` activation of so many `units`.

    `dtype`: of the network; numbers that are no uint8 pixels are converted into it.
    """

    n_x: int | None
    output: str
    units: int
    dtype: str


@dataclass
class ResidentSet:
    """`samples` (m, n_x), uint8 or float, and `targets` (·, m), on one device; `notices`: what was done to them."""

    samples: Array
    targets: Array
    notices: list[str] = field(default_factory=list)

    @property
    def m(self) -> int:
        """Samples in the set."""
        return int(self.samples.shape[0])

    @property
    def whole(self) -> tuple[Any, Array]:
        """What an engine evaluates: all samples, and all targets."""
        return self.samples, self.targets

    def close(self) -> None:
        """Ends what goes on in the background; here that is nothing."""


def make_resident(X: Any, Y: Any, backend: Backend, layout: SampleLayout, name: str = "X") -> ResidentSet:
    """Checks a set and places it on a device.

    `X`: (n_x, m), uint8 pixels or numbers; `Y`: labels, see `check_labels`; `layout`: what the network takes; `name`: X
    or dev_X, for messages. Raises TypeError or ValueError saying what is wrong and where.
    """
    source = backend_of(X)
    X = as_array(X, name, source, PIXELS_OR_NUMBERS)
    labels = labels_of(X, Y, layout.n_x, name)
    samples, notices = _sample_major(X, layout.dtype, source, name)
    notices += _check_values(samples, source, name)
    targets = check_labels(labels, layout.output, layout.units, layout.dtype, name.replace("X", "Y"))
    return ResidentSet(backend.asarray(samples), backend.asarray(targets), notices)


def labels_of(X: Array, Y: Any, n_x: int | None, name: str) -> np.ndarray[Any, Any]:
    """Y as a host array (·, m), one label for each sample of X (n_x, m). Raises ValueError where shapes do not fit."""
    labels_name = name.replace("X", "Y")
    if Y is None:
        raise ValueError(f"{name} is given without {labels_name}; pass both")
    labels = as_rows(Y, labels_name)
    if X.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(X.shape)}; give (n_x, m), a sample in each column")
    turned = f"; samples go in columns: pass {name}.T" if X.shape[0] in labels.shape else ""
    if X.shape[1] != labels.shape[1]:
        raise ValueError(f"{name} has {X.shape[1]} samples and {labels_name} has {labels.shape[1]}{turned}")
    if 0 in X.shape:
        raise ValueError(f"{name} has shape {tuple(X.shape)}: there is nothing to train on")
    if n_x is not None and X.shape[0] != n_x:
        raise ValueError(f"{name} has {X.shape[0]} features, the network takes {n_x}")
    return labels


def _sample_major(X: Array, dtype: str, source: Backend, name: str) -> tuple[Array, list[str]]:
    """X as (m, n_x), C-contiguous, uint8 or `dtype`: itself where it already is, one copy where it is not."""
    text = str(X.dtype).rpartition(".")[2]  # with the byte order, where it is not the machine's
    samples, kept = X.T, text in ("uint8", dtype)
    wanted = getattr(source.xp, text if kept else dtype)
    notices = [] if kept else [f"{name} was converted from {text} to {dtype}, once"]
    if not hasattr(samples, "flags"):  # the standard knows no memory layout
        return source.xp.astype(samples, wanted, copy=False), notices
    if kept and not samples.flags.c_contiguous:
        size = samples.nbytes / 1e6
        notices.append(
            f"{name} was copied once into sample-major memory ({size:.0f} MB); a C-contiguous {name}.T is not"
        )
    elif kept and not getattr(samples.flags, "aligned", True):
        notices.append(f"{name} was copied once into aligned memory")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is named then
        if isinstance(samples, np.ndarray):
            return np.require(samples, wanted, ["C_CONTIGUOUS", "ALIGNED"]), notices
        return source.xp.ascontiguousarray(samples, dtype=wanted), notices


def _check_values(samples: Array, source: Backend, name: str) -> list[str]:
    """Refuses NaN and infinity, naming the first; says when numbers look like pixels that are not stored as such."""
    if str(samples.dtype).endswith("uint8"):
        return []
    xp, low, high = source.xp, math.inf, -math.inf
    for start in range(0, samples.shape[0], CHECK_ROWS):
        part = samples[start : min(samples.shape[0], start + CHECK_ROWS), :]
        least, most = float(xp.min(part)), float(xp.max(part))  # sync
        if not (math.isfinite(least) and math.isfinite(most)):
            row, column = (int(i[0]) for i in np.nonzero(~np.isfinite(asnumpy(part))))
            raise ValueError(
                f"{name} is not finite at feature {column}, sample {start + row}; replace NaN and infinity first"
            )
        low, high = min(low, least), max(high, most)
    if low >= 0.0 and 1.0 < high <= 255.0:
        told = f"{name} runs from {low:g} to {high:g} and is taken as it is; pixels stored as uint8 are seen as X/255"
        return [told]
    return []
