"""MLPClassifier of catopt_xp against scikit-learn's: the same curves, and how long a fit takes.

Curves: from the same random_state and parameters, the largest relative difference of `loss_curve_` over all epochs, and
predictions on the test half that differ, for each solver on digits and on a set of twenty classes (float64).
Fits: seconds from the arrays to the fitted estimator, in turns in one process, medians; the accuracy on samples that
were not trained on. Both make the same epochs; what is compiled is compiled before.

    python -m benchmarks.estimator_against_sklearn [--parts curves,fits] [--sets digits,...] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from sklearn import neural_network as theirs
from sklearn.datasets import load_digits, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from catopt_xp.backend.machine import cpu_model, thread_count
from catopt_xp.commands.bench import describe_code, describe_machine
from catopt_xp.estimators import mlp as ours
from catopt_xp.io.files import write_whole

Array = np.ndarray[Any, Any]
Sets = tuple[Array, Array, Array, Array]  # samples and labels to train on, and to test by

RATES: dict[str, dict[str, Any]] = {
    "constant": {"learning_rate_init": 0.02},
    "invscaling": {"learning_rate": "invscaling", "power_t": 0.3, "learning_rate_init": 0.2},
    "adaptive": {"learning_rate": "adaptive", "learning_rate_init": 0.1, "tol": 0.05, "n_iter_no_change": 2},
}
VELOCITIES: dict[str, dict[str, Any]] = {
    "no momentum": {"momentum": 0},
    "momentum": {"nesterovs_momentum": False},
    "Nesterov": {"nesterovs_momentum": True},
}
SOLVERS: dict[str, dict[str, Any]] = {
    f"sgd, {rate}, {velocity}": {"solver": "sgd"} | RATES[rate] | VELOCITIES[velocity]
    for rate in RATES
    for velocity in VELOCITIES
} | {"adam": {}, "lbfgs": {"solver": "lbfgs"}}


def digits() -> Sets:
    """1797 images of 8 x 8, half of them to train on."""
    X, y = load_digits(return_X_y=True)
    return halves(X / 16, y)


def twenty_classes() -> Sets:
    """4000 samples of 40 features, half of them to train on."""
    options = {"n_informative": 20, "n_classes": 20, "n_clusters_per_class": 1, "random_state": 0}
    return halves(*make_classification(4000, 40, **options))


def halves(X: Array, y: Array) -> Sets:
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, random_state=0)
    return X, y, X_test, y_test


def whole_digits() -> Sets:
    """1500 images to train on, in float64 as scikit-learn has them."""
    X, y = load_digits(return_X_y=True)
    return X[:1500] / 16, y[:1500], X[1500:] / 16, y[1500:]


def drawn(m: int, n_x: int, classes: int, dtype: str, test: int, strength: float) -> Callable[[], Sets]:
    """Normal samples; each class has a mean of its own in a tenth of the features, so large in each."""

    def draw() -> Sets:
        rng = np.random.default_rng(0)
        X, y = rng.standard_normal((m + test, n_x), dtype=np.float32), rng.integers(0, classes, m + test)
        X[:, : n_x // 10] += strength * rng.standard_normal((classes, n_x // 10), dtype=np.float32)[y]
        X = X.astype(dtype, copy=False)
        return X[:m], y[:m], X[m:], y[m:]

    return draw


@dataclass
class Fit:
    """A set, and the parameters of a fit on it."""

    draw: Callable[[], Sets]
    given: dict[str, Any]


SMALL = {"hidden_layer_sizes": (100,), "learning_rate_init": 1e-3}
WIDE = {"hidden_layer_sizes": (30, 20, 20), "learning_rate_init": 1e-4}
FITS = {
    "digits": Fit(whole_digits, SMALL | {"max_iter": 100}),
    "digits, batch 64": Fit(whole_digits, SMALL | {"max_iter": 40, "batch_size": 64}),
    "digits, three layers": Fit(whole_digits, WIDE | {"max_iter": 100, "learning_rate_init": 1e-3}),
    "10000 x 784, float64": Fit(drawn(10_000, 784, 10, "float64", 2000, 0.3), SMALL | {"max_iter": 8}),
    "10000 x 784, float32": Fit(drawn(10_000, 784, 10, "float32", 2000, 0.3), SMALL | {"max_iter": 8}),
    "10000 x 784, float32, batch 64": Fit(
        drawn(10_000, 784, 10, "float32", 2000, 0.3), SMALL | {"max_iter": 5, "batch_size": 64}
    ),
    "2000 x 150528, float32": Fit(drawn(2000, 150_528, 2, "float32", 500, 0.05), WIDE | {"max_iter": 10}),
    "2000 x 150528, float32, batch 64": Fit(
        drawn(2000, 150_528, 2, "float32", 500, 0.05), WIDE | {"max_iter": 10, "batch_size": 64}
    ),
}


@dataclass
class Curve:
    """One line of the table of curves."""

    solver: str
    set: str
    engine: str
    epochs: int
    largest_relative_difference: float
    predictions_that_differ: int


@dataclass
class Line:
    """One line of the table of fits."""

    set: str
    epochs: int
    sklearn_seconds: float
    seconds: float
    ratio: float
    sklearn_accuracy: float
    accuracy: float
    engine: str


def curve(solver: str, name: str, data: Sets, engine: str) -> Curve:
    """Both curves of a solver on a set."""
    X, y, X_test, _ = data
    given: dict[str, Any] = {"hidden_layer_sizes": (50, 20), "max_iter": 40, "random_state": 0} | SOLVERS[solver]
    there = theirs.MLPClassifier(**given).fit(X, y)
    here = ours.MLPClassifier(**given, engine="auto" if solver == "lbfgs" else engine).fit(X, y)
    if solver == "lbfgs":  # which leaves no curve: its loss in the end
        expected, found = np.array([there.loss_]), np.array([here.loss_])
    else:
        expected, found = np.array(there.loss_curve_), np.array(here.loss_curve_)
    same = len(expected) == len(found) and there.n_iter_ == here.n_iter_
    off = float(np.abs(found / expected - 1).max()) if same else math.inf
    differ = int((there.predict(X_test) != here.predict(X_test)).sum())
    return Curve(solver, name, engine if solver != "lbfgs" else "", there.n_iter_, off, differ)


def fit(name: str, rounds: int) -> Line:
    """Both estimators on a set, in turns."""
    X, y, X_test, y_test = FITS[name].draw()
    # Nothing stops before `max_iter`: the epochs are the same, whatever a loss rounds to.
    given = FITS[name].given | {"random_state": 0, "tol": 0.0, "n_iter_no_change": np.inf}
    models = {"sklearn": theirs.MLPClassifier(**given), "ours": ours.MLPClassifier(**given)}
    ours.MLPClassifier(**given | {"max_iter": 1}).fit(X, y)  # compiles
    times: dict[str, list[float]] = {who: [] for who in models}
    for _ in range(rounds):
        for who, model in models.items():
            start = time.perf_counter()
            model.fit(X, y)
            times[who].append(time.perf_counter() - start)
    seconds = {who: statistics.median(values) for who, values in times.items()}
    right = {who: float(model.score(X_test, y_test)) for who, model in models.items()}
    return Line(
        set=name,
        epochs=models["ours"].n_iter_,
        sklearn_seconds=seconds["sklearn"],
        seconds=seconds["ours"],
        ratio=seconds["sklearn"] / seconds["ours"],
        sklearn_accuracy=right["sklearn"],
        accuracy=right["ours"],
        engine=models["ours"].engine_,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="curves,fits", help="which, by comma")
    parser.add_argument("--sets", help="names of fits that begin so, by semicolon (all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    parts = args.parts.split(",")
    told = f"scikit-learn {sklearn.__version__}, numpy {np.__version__}"
    print(f"{cpu_model()}, {thread_count()} threads, {told}")
    curves, lines = [], []
    if "curves" in parts:
        print(f"\n{'solver':<30}{'set':<17}{'engine':<8}{'epochs':>7}{'largest difference':>20}{'predictions':>13}")
        for name, data in (("digits", digits()), ("twenty classes", twenty_classes())):
            for solver in SOLVERS:
                for engine in ("plain", "panels")[: 1 if solver == "lbfgs" else 2]:
                    c = curve(solver, name, data, engine)
                    curves.append(c)
                    numbers = f"{c.epochs:>7}{c.largest_relative_difference:>20.1e}{c.predictions_that_differ:>13}"
                    print(f"{solver:<30}{name:<17}{c.engine:<8}{numbers}", flush=True)
    if "fits" in parts:
        print(f"\n{'set':<34}{'epochs':>7}{'sklearn, s':>12}{'ours, s':>9}{'ratio':>7}{'accuracy of both':>19}  engine")
        for name in FITS:
            if args.sets is None or any(name.startswith(begin) for begin in args.sets.split(";")):
                line = fit(name, args.rounds)
                lines.append(line)
                times = f"{line.sklearn_seconds:>12.3f}{line.seconds:>9.3f}{line.ratio:>7.2f}"
                right = f"{line.sklearn_accuracy:>10.4f}{line.accuracy:>9.4f}"
                print(f"{name:<34}{line.epochs:>7}{times}{right}  {line.engine}", flush=True)
    if args.json:
        versions = {"scikit-learn": sklearn.__version__, "numpy": np.__version__, "numba": version("numba")}
        facts: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "code": describe_code()}
        facts |= {"machine": describe_machine(), "versions": versions, "threads": thread_count()}
        facts |= {"rounds": args.rounds, "curves": list(map(asdict, curves)), "fits": list(map(asdict, lines))}
        text = json.dumps(facts, indent=1) + "\n"
        write_whole(args.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
