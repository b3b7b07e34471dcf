"""What follows on the first layer, in one compiled call: forward, loss, backward and update.

In the reference network that is a thousand parameters. NumPy's calls for them take as long as a tenth of the pass over
four and a half million: each costs a microsecond or more before it computes. This knows the chapter's kind of network,
relu and a sigmoid output, without dropout: every further case would be compiled, and waited for, at the first use on a
machine. The others, and wide ones, for which whole products win, go by the network's own formulas, which these repeat
along rows of samples.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.engines.cpu.jit import Compiled
from catopt_xp.engines.cpu.lanes import combine, dot, flush_subnormals, restore
from catopt_xp.engines.cpu.rules import update
from catopt_xp.engines.panels import STRIP, aligned_zeros, padded
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer

Floats = NDArray[Any]
Rule = tuple[Any, tuple[float, ...]]  # an optimizer's numbers, and its decay, as `update` takes them

MOST_WEIGHTS = 8192  # of all layers behind the first: with more, whole products win
COLUMNS = 16  # rows of samples are padded to whole vectors, of any processor


def _step(
    Z: Any,
    scale: Any,
    layers: Any,
    targets: Any,
    rows: Any,
    p: Any,
    moments: Any,
    weights: Any,
    A: Any,
    D: Any,
    g: Any,
    d: Any,
    numbers: Any,
    l2: Any,
    shrink: Any,
) -> Any:
    """One step of the rest; returns the loss.

    Z (units, n): the first layer's products before scaling. layers (·, 4): width, and where weights, biases and rows
    begin. A, D: rows of samples, padded: each layer's outputs, the last one's before its sigmoid, and dZ; behind A's
    lies a row of ones. d (n, at least units): the first layer's dZ, scaled.
    """
    before = flush_subnormals()
    units, n = Z.shape
    columns = (n + COLUMNS - 1) & -COLUMNS
    last = len(layers) - 1

    # Forward. Beyond n stands what the biases make of 0: finite, and met by zeros of dZ alone.
    for u in range(units):
        for j in range(columns):
            A[u * columns + j] = Z[u, j] * scale if j < n else 0.0
    for k in range(last + 1):
        for o in range(layers[k, 0]):
            at = (layers[k, 3] + o) * columns
            if k:
                count, below = layers[k - 1, 0], layers[k - 1, 3] * columns
                combine(p, layers[k, 1] + o * count, 1, A, below, columns, count, A, at, columns)
            for j in range(at, at + columns):
                z = A[j] + p[layers[k, 2] + o]
                A[j] = z if z > 0 or z != z or k == last else 0.0  # a NaN stays one

    # Loss, and dZ = (A - Y)/n of the last layer.
    loss = 0.0
    for o in range(layers[last, 0]):
        at = (layers[last, 3] + o) * columns
        for j in range(columns):
            D[at + j] = 0.0
            if j < n:
                z, y = A[at + j], targets[o, rows[j]]
                e = math.exp(-abs(z))
                loss += (z if z > 0 or z != z else 0.0) - y * z + math.log1p(e)
                D[at + j] = ((1.0 if z >= 0 else e) / (1.0 + e) - y) / n

    # Backward.
    ones = (layers[last, 3] + layers[last, 0]) * columns
    for e in range(ones, ones + columns):
        A[e] = 1.0
    for k in range(last, -1, -1):
        above = layers[k, 3] * columns
        for o in range(layers[k, 0]):
            g[layers[k, 2] + o] = dot(D, above + o * columns, A, ones, columns)
        for i in range(layers[k - 1, 0] if k else 0):
            count, at = layers[k - 1, 0], (layers[k - 1, 3] + i) * columns
            for o in range(layers[k, 0]):
                g[layers[k, 1] + o * count + i] = dot(D, above + o * columns, A, at, columns)
            combine(p, layers[k, 1] + i, count, D, above, columns, layers[k, 0], D, at, columns)
            for j in range(at, at + columns):
                D[j] = D[j] if A[j] > 0 else 0.0
    for j in range(n):
        for u in range(units):
            d[j, u] = D[u * columns + j] * scale

    for e in range(weights):  # biases have no decay
        g[e] += l2 * p[e]
        p[e] *= shrink
    update(p, moments, 0, g, 0, len(p), numbers, ())
    restore(before)
    return loss / n


STEP = Compiled(_step)


class Rest:
    """The layers behind the first product: their parameters and moments, packed, and room to work on a batch.

    `optimizer`: of `model`; `numbers`: of its rule, any values; `targets` (·, m): of the set; `most`: samples of the
    largest batch. While the packed state is in use, that of the model
    and the optimizer is out of date.
    """

    def __init__(self, model: DeepNetwork, optimizer: BaseOptimizer, numbers: Any, targets: Any, most: int) -> None:
        widths = model.neuron_cnt[1:]
        self.optimizer, self.dtype = optimizer, np.dtype(model.dtype)
        self.first = model.neuron_cnt[0] * widths[0]  # numbers of W0, which come before those of the rest
        sizes = [a * b for a, b in itertools.pairwise(widths)]
        self.n_weights, self.n_biases = sum(sizes), sum(widths)
        self.weights = padded(self.n_weights, STRIP)  # an update goes by whole strips
        weights_at = [0, *itertools.accumulate(sizes, initial=0)]
        biases_at, rows_at = (list(itertools.accumulate(widths, initial=start)) for start in (self.weights, 0))
        self.layers = np.array(list(zip(widths, weights_at, biases_at, rows_at, strict=False)), dtype=np.int64)
        size = self.weights + padded(self.n_biases, STRIP)
        self._p, *self._moments = (aligned_zeros(size, self.dtype) for _ in optimizer.flat_state())
        self._g = aligned_zeros(size, self.dtype)
        self._run = STEP.for_types(self._p, targets, numbers)
        room = (sum(widths) + 1) * padded(most, COLUMNS)
        self._A, self._D = (aligned_zeros(room, self.dtype) for _ in range(2))

    @staticmethod
    def knows(model: DeepNetwork) -> bool:
        """Whether this can stand for the rest of a network."""
        *hidden, output = model.activation_func
        weights = sum(a * b for a, b in itertools.pairwise(model.neuron_cnt[1:]))
        plain = not model.dropout and model.kernel_obstacle is None
        return plain and set(hidden) <= {"relu"} and output == "sigmoid" and weights <= MOST_WEIGHTS

    def step(self, Z: Floats, scale: Any, targets: Any, rows: NDArray[np.int64], rule: Rule, d: Floats) -> float:
        """Forward, loss, backward and update for a batch; the mean loss.

        `Z` (units, n): the first layer's products; times `scale` they are `W0 X`. `targets` (·, m); `rows` (n,);
        `d` (n, at least units) becomes that layer's dZ times scale.
        """
        numbers, decay = rule
        l2, shrink = decay or (0.0, 1.0)
        state = self._p, tuple(self._moments), self.weights
        room = self._A, self._D, self._g, d
        batch = np.ascontiguousarray(Z), scale, self.layers, targets, rows
        loss: float = self._run(*batch, *state, *room, numbers, l2, shrink)
        return loss

    def pack(self) -> None:
        """Takes the values over from the model and the optimizer."""
        for packed, flat in self._arrays():
            packed[...] = flat

    def unpack(self) -> None:
        """Gives the values back to the model and the optimizer."""
        for packed, flat in self._arrays():
            flat[...] = packed

    def _arrays(self) -> list[tuple[Floats, Floats]]:
        """The parameters and each moment, weights and biases apart: packed, and where model and optimizer have them."""
        pairs = []
        for packed, flat in zip([self._p, *self._moments], self.optimizer.flat_state(), strict=True):
            behind = self.first + self.n_weights
            pairs.append((packed[: self.n_weights], flat[self.first : behind]))
            pairs.append((packed[self.weights : self.weights + self.n_biases], flat[behind:]))
        return pairs
