"""MLPClassifier and MLPRegressor against scikit-learn's: from the same random state the same numbers, step by step.

Both are given the same parameters; what they leave is compared. In float64 the difference is that of sums made in
another order: seen are 1e-15 to 1e-13, relative, and the bound is 1e-11 for what training sums up over many steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from marks import some
from sklearn import neural_network as theirs
from sklearn.datasets import load_digits, make_classification, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from catopt_xp.estimators import mlp as ours

Array = np.ndarray[Any, Any]
BOUND = 1e-11
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

SOLVERS: dict[str, dict[str, Any]] = {
    "sgd": {"solver": "sgd", "momentum": 0, "learning_rate_init": 0.05},
    "sgd, momentum": {"solver": "sgd", "nesterovs_momentum": False, "learning_rate_init": 0.02},
    "sgd, nesterov": {"solver": "sgd", "learning_rate_init": 0.02},
    "sgd, invscaling": {"solver": "sgd", "learning_rate": "invscaling", "power_t": 0.3, "learning_rate_init": 0.2},
    "sgd, adaptive": {
        "solver": "sgd",
        "learning_rate": "adaptive",
        "learning_rate_init": 0.2,
        "tol": 0.2,
        "n_iter_no_change": 1,
    },
    "adam": {"learning_rate_init": 0.01},
    "adam, other betas": {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3, "learning_rate_init": 0.01},
}


def halves(X: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, random_state=0)
    return X, y, X_test, y_test


def digits() -> tuple[Array, Array, Array, Array]:
    X, y = load_digits(return_X_y=True)
    return halves(X[:1200] / 16, y[:1200])


def twenty_classes() -> tuple[Array, Array, Array, Array]:
    options = {"n_informative": 15, "n_classes": 20, "n_clusters_per_class": 1, "random_state": 0}
    return halves(*make_classification(1200, 30, **options))


SETS = {"digits": digits(), "twenty classes": twenty_classes()}
X, Y, X_TEST, Y_TEST = SETS["digits"]


def both(kind: str = "MLPClassifier", **given: Any) -> tuple[Any, Any]:
    """scikit-learn's estimator and ours with the same parameters, but for those that ours alone has."""
    given = {"hidden_layer_sizes": (20, 10), "max_iter": 12, "random_state": 3} | given
    own = {name: given.pop(name) for name in ("engine", "device") if name in given}
    return getattr(theirs, kind)(**given), getattr(ours, kind)(**given, **own)


def assert_same(here: Any, there: Any, bound: float = BOUND) -> None:
    """Weights, curves, scores and counters are the same; a None is a None."""
    for name in ("n_iter_", "t_", "n_outputs_", "n_layers_", "out_activation_", "n_features_in_"):
        assert getattr(here, name) == getattr(there, name), name
    for name in ("loss_", "loss_curve_", "best_loss_", "validation_scores_", "best_validation_score_"):
        expected = getattr(there, name, None)
        if expected is None:
            assert getattr(here, name, None) is None, name
        else:
            np.testing.assert_allclose(getattr(here, name), expected, rtol=bound, err_msg=name)
    for name in ("coefs_", "intercepts_"):
        for k, (a, b) in enumerate(zip(getattr(here, name), getattr(there, name), strict=True)):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= bound * np.abs(b).max(), f"{name}[{k}]"


# --- curves ---------------------------------------------------------------------------------------------------


PATHS = [(solver, name, engine) for solver in SOLVERS for name in SETS for engine in ("plain", "panels")]
# The panel engine compiles each rule anew: in every run it has one of each optimizer.
OFTEN = [path for path in PATHS if path[2] == "plain" or path[0] in ("adam", "sgd, nesterov")]


@pytest.mark.parametrize(("solver", "name", "engine"), some(PATHS, OFTEN, pytest.mark.hardening))
def test_every_solver_takes_the_path_of_scikit_learn(solver: str, name: str, engine: str) -> None:
    samples, labels, test_samples, _ = SETS[name]
    there, here = both(**SOLVERS[solver], engine=engine)
    assert_same(here.fit(samples, labels), there.fit(samples, labels))
    assert here.engine_ == engine
    assert len(here.loss_curve_) > 3
    np.testing.assert_array_equal(here.predict(test_samples), there.predict(test_samples))
    np.testing.assert_allclose(here.predict_proba(test_samples), there.predict_proba(test_samples), rtol=1e-9)


def test_the_cases_of_the_learning_rate_change_it() -> None:
    """The paths above differ, so a rule that is left out would be seen."""
    curves = {name: both(**given)[1].fit(X, Y).loss_curve_ for name, given in SOLVERS.items()}
    lengths = {name: len(curve) for name, curve in curves.items()}
    ends = {round(curve[-1], 6) for curve in curves.values()}
    assert len(ends) == len(SOLVERS), lengths
    constant = both(**SOLVERS["sgd, adaptive"] | {"learning_rate": "constant"})[1].fit(X, Y)
    assert len(constant.loss_curve_) < lengths["sgd, adaptive"]  # where the rate is not lowered, training ends


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), 7, (8, 6, 4)])
def test_activations_and_layers_are_those_of_scikit_learn(activation: str, hidden: Any) -> None:
    there, here = both(activation=activation, hidden_layer_sizes=hidden, learning_rate_init=0.01)
    assert_same(here.fit(X, Y), there.fit(X, Y))


EACH = [(batch_size, alpha) for batch_size in (1, 7, 600, "auto") for alpha in (0.0, 1.0)]
ALWAYS = [(7, 0.0), ("auto", 1.0)]


@pytest.mark.parametrize(("batch_size", "alpha"), some(EACH, ALWAYS, pytest.mark.hardening))
def test_penalty_and_batches_are_those_of_scikit_learn(batch_size: Any, alpha: float) -> None:
    given = {"alpha": alpha, "batch_size": batch_size, "max_iter": 2 if batch_size == 1 else 10}
    for engine in ("plain", "panels"):
        there, here = both(**given, engine=engine)
        assert_same(here.fit(X, Y), there.fit(X, Y))


@pytest.mark.parametrize("solver", ["adam", "sgd, nesterov"])
def test_a_first_layer_of_several_panels_takes_the_path_of_scikit_learn(solver: str) -> None:
    samples, labels = np.random.default_rng(0).standard_normal((60, 2500)), np.arange(60) % 4
    given = SOLVERS[solver] | {"batch_size": 16, "alpha": 0.5, "max_iter": 6, "learning_rate_init": 1e-3}
    for weights in (None, WEIGHTS[:60]):
        there, here = (model.fit(samples, labels, weights) for model in both(**given, engine="panels"))
        assert_same(here, there)


def test_without_shuffling_rows_come_as_they_are() -> None:
    there, here = both(shuffle=False, engine="panels")
    assert_same(here.fit(X, Y), there.fit(X, Y))


def test_float32_samples_are_trained_on_in_float32() -> None:
    there, here = (model.fit(X.astype(np.float32), Y) for model in both(engine="plain"))
    assert {x.dtype.name for x in (*here.coefs_, *here.intercepts_)} == {"float32"}
    assert here.predict_proba(X_TEST.astype(np.float32)).dtype == np.float32
    assert_same(here, there, bound=1e-4)


def test_losses_of_hopeless_predictions_are_cut_as_scikit_learn_cuts_them() -> None:
    there, here = (model.fit(X * 1e3, Y) for model in both(max_iter=3))
    assert here.loss_curve_[0] > 5
    assert_same(here, there)
    single, exact = (model.fit((X * 1e3).astype(np.float32), Y) for model in both(max_iter=1))
    np.testing.assert_allclose(exact.loss_, single.loss_, rtol=1e-3)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes_have_the_outputs_of_scikit_learn(classes: int) -> None:
    labels = np.array(["ant", "bee", "cat"])[Y % classes]
    there, here = (model.fit(X, labels) for model in both())
    assert_same(here, there)
    np.testing.assert_array_equal(here.classes_, there.classes_)
    np.testing.assert_array_equal(here.predict(X_TEST), there.predict(X_TEST))
    np.testing.assert_allclose(here.predict_proba(X_TEST), there.predict_proba(X_TEST), rtol=1e-9)
    np.testing.assert_allclose(here.predict_log_proba(X_TEST), there.predict_log_proba(X_TEST), rtol=1e-9)
    assert here.score(X, labels) == there.score(X, labels)


def several_labels() -> Array:
    return np.stack([Y > 4, Y % 2 == 0, Y == 3], axis=1).astype(int)


def test_several_labels_of_a_sample_are_those_of_scikit_learn() -> None:
    there, here = (model.fit(X, several_labels()) for model in both())
    assert_same(here, there)
    np.testing.assert_array_equal(here.predict(X_TEST), there.predict(X_TEST))
    np.testing.assert_allclose(here.predict_proba(X_TEST), there.predict_proba(X_TEST), rtol=1e-9)
    assert here.score(X, several_labels()) == there.score(X, several_labels())


# --- stopping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"tol": 0.1}, {"tol": 0.05, "n_iter_no_change": 1}, {"n_iter_no_change": np.inf}])
def test_training_stops_where_scikit_learn_stops(given: dict[str, Any]) -> None:
    there, here = (model.fit(X, Y) for model in both(**given, max_iter=40, learning_rate_init=0.01))
    assert_same(here, there)
    assert (here.n_iter_ < 40) == (given.get("n_iter_no_change") != np.inf)


EARLY: dict[str, Array] = {"ten classes": Y, "two classes": Y % 2, "several labels": several_labels()}


@pytest.mark.parametrize("engine", ["plain", "panels"])
@pytest.mark.parametrize("labels", EARLY)
def test_early_stopping_splits_and_scores_as_scikit_learn(labels: str, engine: str) -> None:
    given = {"early_stopping": True, "max_iter": 60, "tol": 0.01, "n_iter_no_change": 2, "learning_rate_init": 0.03}
    there, here = (model.fit(X, EARLY[labels]) for model in both(**given, engine=engine))
    assert_same(here, there)
    assert 4 < here.n_iter_ < 60
    assert len(set(here.validation_scores_)) > 3


@pytest.mark.parametrize("engine", ["plain", "panels"])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_as_many_random_numbers_are_drawn(early_stopping: bool, engine: str) -> None:
    """Also where training ends early: whoever shares the generator goes on as with scikit-learn."""
    left = []
    for k in range(2):
        rng = np.random.RandomState(5)
        model = both(random_state=rng, early_stopping=early_stopping, tol=0.1, max_iter=30, engine=engine)[k].fit(X, Y)
        assert model.n_iter_ < 30
        left.append(rng.randint(0, 2**31, 5).tolist())
    assert left[0] == left[1]


# --- weights of samples, several calls --------------------------------------------------------------------------

WEIGHTS = np.random.default_rng(0).integers(0, 3, len(Y)).astype(float)


@pytest.mark.parametrize(
    ("given", "engine"),
    [
        ({}, "panels"),
        ({"solver": "sgd"}, "plain"),
        ({"early_stopping": True}, "panels"),
        ({"solver": "lbfgs", "max_iter": 5}, "auto"),
    ],
)
def test_weights_of_samples_count_as_in_scikit_learn(given: dict[str, Any], engine: str) -> None:
    for labels in (Y, Y % 2, several_labels()):
        there, here = (model.fit(X, labels, sample_weight=WEIGHTS) for model in both(**given, alpha=0.5, engine=engine))
        assert_same(here, there)
    assert not np.allclose(here.coefs_[0], both(**given, alpha=0.5)[1].fit(X, several_labels()).coefs_[0])


@pytest.mark.parametrize("given", [SOLVERS["adam"], SOLVERS["sgd, invscaling"], SOLVERS["sgd, nesterov"]])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_partial_fit_goes_on_as_scikit_learn_does(given: dict[str, Any], weights: Array | None) -> None:
    there, here = both(**given, batch_size=50, engine="panels")
    for k in range(6):
        rows = slice(100 * (k % 3), 100 * (k % 3) + 100 + 10 * k)
        chosen = None if weights is None else weights[rows]
        for model in (there, here):
            model.partial_fit(X[rows], Y[rows], chosen, **({} if k else {"classes": np.arange(10)}))
    assert len(here.loss_curve_) == 6
    assert_same(here, there)


def test_partial_fit_after_fit_keeps_the_optimizer() -> None:
    there, here = (model.fit(X, Y) for model in both())
    for model in (there, here):
        model.partial_fit(X[:300], Y[:300])
    assert_same(here, there)


@pytest.mark.parametrize("given", [{}, {"solver": "sgd", "learning_rate": "invscaling"}, {"solver": "lbfgs"}])
def test_a_warm_start_goes_on_as_scikit_learn_does(given: dict[str, Any]) -> None:
    there, here = both(**given, warm_start=True, max_iter=4)
    for _ in range(3):
        for model in (there, here):
            model.fit(X, Y)
    assert_same(here, there, bound=1e-9)


# --- L-BFGS -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", EARLY)
def test_lbfgs_takes_the_path_of_scikit_learn(labels: str) -> None:
    there, here = (model.fit(X, EARLY[labels]) for model in both(solver="lbfgs", max_iter=15))
    assert_same(here, there, bound=1e-9)
    assert not hasattr(here, "loss_curve_")
    np.testing.assert_array_equal(here.predict(X_TEST), there.predict(X_TEST))


def test_lbfgs_ends_by_its_own_rule_and_by_max_fun() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        there, here = (model.fit(X, Y) for model in both(solver="lbfgs", alpha=10.0, tol=0.1, max_iter=200))
    assert here.n_iter_ == there.n_iter_ < 200
    there, here = both(solver="lbfgs", max_fun=4, max_iter=200)
    for model in (there, here):
        with pytest.warns(ConvergenceWarning):
            model.fit(X, Y)
    assert here.n_iter_ == there.n_iter_ <= 4


def test_lbfgs_on_float32_samples_leaves_float64_weights() -> None:
    there, here = (model.fit(X.astype(np.float32), Y) for model in both(solver="lbfgs", max_iter=5))
    assert {x.dtype.name for x in here.coefs_} == {x.dtype.name for x in there.coefs_} == {"float64"}
    assert_same(here, there, bound=1e-6)


# --- numbers ----------------------------------------------------------------------------------------------------

X_NUMBERS, Y_NUMBERS = make_regression(300, 12, n_targets=3, noise=1.0, random_state=0)
Y_NUMBERS /= np.abs(Y_NUMBERS).max()
TARGETS = {"one": Y_NUMBERS[:, 0], "three": Y_NUMBERS}
REGRESSORS: dict[str, dict[str, Any]] = {
    **{name: SOLVERS[name] for name in ("sgd, nesterov", "sgd, adaptive", "adam")},
    "lbfgs": {"solver": "lbfgs", "max_iter": 10},
    "early stopping": {"early_stopping": True, "tol": 1e-2, "n_iter_no_change": 2, "max_iter": 60},
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("solver", REGRESSORS)
def test_a_regressor_takes_the_path_of_scikit_learn(solver: str, targets: str) -> None:
    there, here = (model.fit(X_NUMBERS, TARGETS[targets]) for model in both("MLPRegressor", **REGRESSORS[solver]))
    assert_same(here, there, bound=1e-9)
    np.testing.assert_allclose(here.predict(X_NUMBERS), there.predict(X_NUMBERS), rtol=1e-7, atol=1e-12)
    assert here.score(X_NUMBERS, TARGETS[targets]) == pytest.approx(there.score(X_NUMBERS, TARGETS[targets]))


@pytest.mark.parametrize("engine", ["plain", "panels"])
@pytest.mark.parametrize("weights", [None, WEIGHTS[:300]])
def test_counts_are_predicted_as_scikit_learn_does(weights: Array | None, engine: str) -> None:
    counts = np.random.default_rng(0).poisson(np.exp(3 * TARGETS["three"]))
    given = {"loss": "poisson", "engine": engine, "learning_rate_init": 0.01}
    there, here = (model.fit(X_NUMBERS, counts, weights) for model in both("MLPRegressor", **given))
    assert_same(here, there)
    assert (here.predict(X_NUMBERS) > 0).all()


def test_a_regressor_weighs_samples_and_goes_on_as_scikit_learn() -> None:
    there, here = both("MLPRegressor", batch_size=40)
    for model in (there, here):
        model.fit(X_NUMBERS, TARGETS["three"], WEIGHTS[:300])
        model.partial_fit(X_NUMBERS[:90], TARGETS["three"][:90])
    assert_same(here, there)
