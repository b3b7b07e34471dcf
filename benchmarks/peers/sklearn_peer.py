"""scikit-learn's MLPClassifier, the set as float32.

`partial_fit` takes the rows in their order, makes one update per mini-batch, and keeps its optimizer between calls. A
call gets several mini-batches, and checks of the input are off, so that a step costs as much as inside `fit`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import sklearn
from sklearn.neural_network import MLPClassifier

from benchmarks.peers.peer import Peer, floats
from catopt_xp.commands.bench import Rows, Workload

BETA = 0.9
ROWS_PER_CALL = 256  # or one mini-batch where that is more


class SklearnPeer(Peer):
    """scikit-learn with Adam, or gradient descent with or without momentum; it has no RMSProp."""

    name = "sklearn"

    def __init__(self, workload: Workload, threads: int) -> None:
        super().__init__(workload, threads)
        self._X, self._y = floats(workload), workload.targets().reshape(-1).astype(np.int64)
        self._buffer = np.empty((max(ROWS_PER_CALL, min(workload.batch_size, workload.m)), workload.n_x), np.float32)
        options: dict[str, Any] = {"solver": "adam", "learning_rate_init": workload.rate}
        if workload.optimizer == "gd":
            options |= {"solver": "sgd", "momentum": 0.0}
        if workload.optimizer == "momentum":  # a sum where the chapter has an average
            options |= {"solver": "sgd", "momentum": BETA, "learning_rate_init": workload.rate * (1.0 - BETA)}
        self._net = _NotingMLP(workload.hidden, alpha=0.0, shuffle=False, nesterovs_momentum=False, **options)
        self._net.batch_losses = []
        self._start()

    def _start(self) -> None:
        """Makes the network's arrays by a first call, and gives them the initial weights and a new optimizer."""
        net = self._net
        self._call([np.arange(1)])
        weights = self.workload.weights()
        for k, (W, b) in enumerate(zip(net.coefs_, net.intercepts_, strict=True)):
            W[...] = weights[f"W{k}"].T
            b[...] = weights[f"b{k}"].reshape(-1)
        del net._optimizer  # `partial_fit` makes a new one
        net.batch_losses.clear()

    def _make(self, batches: list[Rows]) -> None:
        # All mini-batches of a call have one length, but for the last.
        for size, equal in groupby(batches, len):
            run, at_once = list(equal), max(1, ROWS_PER_CALL // size)
            for start in range(0, len(run), at_once):
                self._call(run[start : start + at_once])
        self._losses += self._net.batch_losses
        self._net.batch_losses.clear()

    def _call(self, batches: list[Rows]) -> None:
        rows = np.concatenate(batches)
        X = self._X.take(rows, axis=0, out=self._buffer[: len(rows)], mode="clip")  # "clip" avoids a second copy
        self._net.batch_size = len(batches[0])
        with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
            self._net.partial_fit(X, self._y[rows], classes=np.arange(2))

    def versions(self) -> dict[str, str]:
        return {"scikit-learn": sklearn.__version__, "numpy": np.__version__}


class _NotingMLP(MLPClassifier):  # type: ignore[misc]
    """Keeps the loss of every mini-batch; `fit` and `partial_fit` only sum them up."""

    batch_losses: list[float]

    def _backprop(self, *arguments: Any) -> Any:
        results = super()._backprop(*arguments)
        self.batch_losses.append(float(results[0]))
        return results
