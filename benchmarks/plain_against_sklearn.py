"""Seconds per epoch of the plain engine on the CPU against scikit-learn's MLPClassifier, interleaved in one run.

The reference workload: [150528, 30, 20, 20, 1], Adam at 1e-5, float32, 2000 samples. Ours reads uint8 pixels; theirs
is given the same pixels as float32 in [0, 1], converted beforehand. Evaluation, set-up and input checks are in neither
time.

    python benchmarks/plain_against_sklearn.py [--batch-sizes 8,64,128,2000] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_info

import catopt_xp
from catopt_xp.data.order import epoch_order
from catopt_xp.engines import PlainEngine
from catopt_xp.engines.plain import Settings

N_X, M, HIDDEN = 224 * 224 * 3, 2000, (30, 20, 20)


class TimedMLP(MLPClassifier):
    """scikit-learn's classifier, noting the time at the end of each epoch."""

    def _update_no_improvement_count(self, *args: object) -> None:
        self.epoch_ends_.append(time.perf_counter())
        super()._update_no_improvement_count(*args)


def theirs(X: np.ndarray, y: np.ndarray, batch_size: int, epochs: int, shuffle: bool) -> list[float]:
    """Seconds of each epoch but the first, which includes the set-up."""
    options = {"learning_rate_init": 1e-5, "alpha": 0.0, "max_iter": epochs + 1, "tol": 0.0, "shuffle": shuffle}
    net = TimedMLP(HIDDEN, batch_size=batch_size, **options)
    net.epoch_ends_ = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a timing stops before it converges, on purpose
        net.fit(X, y)
    return np.diff(net.epoch_ends_).tolist()


class Ours:
    """The plain engine, warm."""

    def __init__(self, X: np.ndarray, y: np.ndarray, batch_size: int) -> None:
        model = catopt_xp.DeepNetwork([N_X, *HIDDEN, 1], ["relu", "relu", "relu", "sigmoid"])
        backend = catopt_xp.get_backend("cpu")
        optimizer = catopt_xp.Adam(model.save(), 1e-5)
        targets = y.reshape(1, -1).astype(np.float32)
        self.engine = PlainEngine(model, optimizer, X, targets, backend, Settings(batch_size))
        self.epochs = 0
        for _ in self.engine.steps(0, np.arange(M), first=self.engine.batches - 1):  # warm
            pass

    def epoch(self, shuffle: bool) -> float:
        order = epoch_order(M, self.epochs, shuffle="epoch" if shuffle else "none")
        self.epochs += 1
        start = time.perf_counter()
        for _ in self.engine.steps(self.epochs, order):
            pass
        self.engine.fetch_losses()
        return time.perf_counter() - start


def compare(X: np.ndarray, y: np.ndarray, batch_size: int, rounds: int, shuffle: bool) -> dict[str, float]:
    floats = X.astype(np.float32)
    floats /= 255
    ours, ours_seconds, their_seconds = Ours(X, y, batch_size), [], []
    for _ in range(rounds):
        their_seconds += theirs(floats, y, batch_size, 1, shuffle)
        ours_seconds.append(ours.epoch(shuffle))
    a, b = statistics.median(ours_seconds), statistics.median(their_seconds)
    ratio = statistics.median(t / o for t, o in zip(their_seconds, ours_seconds, strict=True))
    how = "shuffled" if shuffle else "in order"
    print(
        f"batch {batch_size:5d} {how}: plain {a:7.3f} s, scikit-learn {b:7.3f} s per epoch, ratio {ratio:.2f}",
        flush=True,
    )
    return {
        "batch_size": batch_size,
        "shuffle": shuffle,
        "plain_s": a,
        "sklearn_s": b,
        "ratio": ratio,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", default="8,64,128,2000")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (M, N_X), dtype=np.uint8)
    y = rng.integers(0, 2, M)
    rows = []
    for size in map(int, arguments.batch_sizes.split(",")):
        # An epoch of batch 8 takes scikit-learn a quarter of a minute: three rounds of it are enough.
        rounds = min(arguments.rounds, 3) if size < 32 else arguments.rounds
        rows.append(compare(X, y, size, rounds, shuffle=True))
        if size == M:  # scikit-learn copies the whole set to shuffle it: without, the steps alone are compared
            rows.append(compare(X, y, size, rounds, shuffle=False))
    if arguments.json:
        machine = {
            "cpu": catopt_xp.device_report().to_dict(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "catopt_xp": catopt_xp.__version__,
            "blas": [{k: pool[k] for k in ("internal_api", "version", "num_threads")} for pool in threadpool_info()],
        }
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
