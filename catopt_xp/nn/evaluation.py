"""How a network's answers are judged: targets made of labels, losses, hits, and their means over a whole set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from catopt_xp.backend.xp import Array, Backend, as_array
from catopt_xp.nn.functional import OUTPUT_ACTIVATIONS, one_hot
from catopt_xp.nn.labels import WANTED, weight_row

EVALUATION_ROWS = 512  # samples per evaluated chunk: bounded memory, few launches


class Judge:
    """Compares an output layer's logits (n_out, m) with labels.

    `name`: of the output activation; `units`: n_out; `dtype`: of the logits, which lie on `backend`.
    """

    def __init__(self, name: str, units: int, dtype: Any, backend: Backend) -> None:
        self.name, self.units, self.dtype, self.backend = name, units, dtype, backend
        self.output = OUTPUT_ACTIVATIONS[name]
        self.rows = 1 if name == "softmax" else units  # of the labels
        self._classes = backend.asarray(np.arange(units, dtype=np.int64).reshape(-1, 1))

    def check_shape(self, Y: Array, m: int) -> None:
        """Raises ValueError unless Y holds the labels of m samples."""
        if tuple(Y.shape) != (self.rows, m):
            expected = f"({self.rows}, {m}): a column for each of {m} samples"
            raise ValueError(f"Y has shape {tuple(Y.shape)}, expected {expected}")

    def targets(self, Y: Array, logits: Array) -> Array:
        """Converts labels to what the loss takes: (n_out, m) of 0 and 1, or other numbers, in the logits' dtype."""
        Y = as_array(Y, "Y", self.backend, WANTED)
        self.check_shape(Y, logits.shape[1])
        if self.name == "softmax":
            labels = self.backend.asarray(Y, dtype=self.backend.xp.int64)
            return one_hot(labels, self._classes, logits, self.backend.xp)
        return self.backend.asarray(Y, dtype=self.dtype)

    def hits(self, logits: Array, targets: Array) -> Array:
        """Returns (m,) of 1 where the sample's label, or every one of its labels, is predicted, else 0."""
        xp = self.backend.xp
        if self.name == "softmax":
            right = xp.argmax(logits, axis=0) == xp.argmax(targets, axis=0)
        else:
            right = xp.all((logits > 0) == (targets > 0.5), axis=0)
        return self.backend.asarray(right, dtype=self.dtype)

    def means(self, logits_of: Callable[[slice], Array], Y: Array, weights: Array | None = None) -> tuple[float, float]:
        """Returns accuracy and mean loss over a set with labels Y (·, m) on this device, chunk by chunk.

        `logits_of`: gives (n_out, n) for a slice of samples, asked from the first to the last; `weights`: (m,), one for
        each sample; None: all are 1.
        """
        if not self.output.classifies:
            raise ValueError(f"evaluate: the {self.name} output predicts numbers, and has no accuracy")
        xp, m = self.backend.xp, Y.shape[1]
        row, size = weight_row(weights, m, self.backend, self.dtype), float(m)
        sums = []  # (hits, loss) of each chunk, and its weight; left on the device until the end
        for start in range(0, m, EVALUATION_ROWS):
            rows = slice(start, min(m, start + EVALUATION_ROWS))
            logits = logits_of(rows)
            targets = self.targets(Y[:, rows], logits)
            hits = self.hits(logits, targets)
            if row is None:
                loss = self.output.loss(logits, targets, xp, None)
                sums.append(xp.stack([xp.sum(hits), loss * (rows.stop - rows.start)]))
            else:
                part, weight = row[:, rows], xp.sum(row[:, rows])
                some = xp.where(weight == 0, xp.ones_like(part), part)  # a chunk may weigh nothing: no 0/0
                loss = self.output.loss(logits, targets, xp, some) * weight
                sums.append(xp.stack([xp.sum(hits * part[0, :]), loss, weight]))
        right, total, *weighed = self.backend.to_host(xp.stack(sums)).sum(axis=0, dtype=np.float64)  # sync
        size = float(weighed[0]) if weighed else size
        return float(right) / size, float(total) / size
