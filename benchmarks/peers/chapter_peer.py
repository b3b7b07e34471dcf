"""The chapter's algorithm as the chapter has it: float64, whole arrays with temporaries, samples in columns.

It follows the formulas and is not made faster: the batch is cut out of the columns of X, the gradient of the input is
computed and thrown away, and every update makes new arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.peer import Peer, columns
from catopt_xp.commands.bench import Rows, Workload

Floats = NDArray[np.float64]

BETA, BETA1, BETA2 = 0.9, 0.9, 0.999
RMSPROP_EPS, ADAM_EPS = 1e-6, 1e-8


class ChapterPeer(Peer):
    """The chapter's network and optimizers in NumPy. X is (n_x, m) float64: 2.4 GB for the reference workload.

    >>> peer = ChapterPeer(Workload(n_x=12, m=10, batch_size=4), threads=1)
    >>> peer.steps(4)
    >>> peer.losses().shape
    (4,)
    """

    name = "chapter"

    def __init__(self, workload: Workload, threads: int) -> None:
        super().__init__(workload, threads)
        self._X = columns(workload)  # (n_x, m)
        self._Y = workload.targets().astype(np.float64)  # (1, m)
        self._p = {name: values.astype(np.float64) for name, values in workload.weights().items()}
        self._first = {name: np.zeros_like(values) for name, values in self._p.items()}  # moving average of g
        self._second = {name: np.zeros_like(values) for name, values in self._p.items()}  # and of g*g
        self._t = 0
        self._layers = len(workload.hidden) + 1

    def _make(self, batches: list[Rows]) -> None:
        for rows in batches:
            X, Y = self._X[:, rows], self._Y[:, rows]
            gradients, loss = self._backward(self._forward(X), Y)
            self._t += 1
            for name, g in gradients.items():
                self._p[name] = self._p[name] - self._change(name, g)
            self._losses.append(loss)

    def _forward(self, X: Floats) -> list[Floats]:
        """The activations of every layer, X first; the last are probabilities, (1, n)."""
        activations = [X]
        for k in range(self._layers):
            Z = self._p[f"W{k}"] @ activations[-1] + self._p[f"b{k}"]
            last = k == self._layers - 1
            activations.append(1.0 / (1.0 + np.exp(-Z)) if last else np.maximum(Z, 0.0))
        return activations

    def _backward(self, activations: list[Floats], Y: Floats) -> tuple[dict[str, Floats], float]:
        """Gradients by name, and the mean binary cross-entropy."""
        n, Y_hat = Y.shape[1], activations[-1]
        loss = float(-np.mean(Y * np.log(Y_hat) + (1.0 - Y) * np.log(1.0 - Y_hat)))
        gradients: dict[str, Floats] = {}
        dZ = Y_hat - Y
        for k in reversed(range(self._layers)):
            A = activations[k]
            gradients[f"W{k}"] = dZ @ A.T / n
            gradients[f"b{k}"] = np.mean(dZ, axis=1, keepdims=True)
            dA = self._p[f"W{k}"].T @ dZ  # also that of the input, which nobody uses
            dZ = dA * (A > 0.0)
        return gradients, loss

    def _change(self, name: str, g: Floats) -> Floats:
        """The amount that the optimizer subtracts from a parameter with this gradient."""
        rate, t, optimizer = self.workload.rate, self._t, self.workload.optimizer
        if optimizer == "gd":
            return rate * g
        if optimizer == "momentum":
            self._first[name] = BETA * self._first[name] + (1.0 - BETA) * g
            return rate * self._first[name]
        if optimizer == "rmsprop":
            self._second[name] = BETA * self._second[name] + (1.0 - BETA) * g * g
            return rate * g / np.sqrt(self._second[name] / (1.0 - BETA**t) + RMSPROP_EPS)
        self._first[name] = BETA1 * self._first[name] + (1.0 - BETA1) * g
        self._second[name] = BETA2 * self._second[name] + (1.0 - BETA2) * g * g
        corrected = np.sqrt(self._second[name] / (1.0 - BETA2**t))
        return rate * (self._first[name] / (1.0 - BETA1**t)) / (corrected + ADAM_EPS)

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}
