"""What MLPClassifier and MLPRegressor refuse, each in one line that says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from sklearn.datasets import load_iris

from catopt_xp.estimators.mlp import MLPClassifier, MLPRegressor

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_iris(return_X_y=True)
X = (X - X.mean(axis=0)) / X.std(axis=0)


def small(kind: type[Any] = MLPClassifier, **given: Any) -> Any:
    return kind(**{"hidden_layer_sizes": (8, 5), "max_iter": 6, "random_state": 0, "batch_size": 40} | given)


def weights_of(model: Any) -> Array:
    return np.concatenate([x.ravel() for x in (*model.coefs_, *model.intercepts_)])


SEVERAL = np.stack([Y > 0, Y > 1], axis=1).astype(int)


def with_nan() -> Array:
    samples = X.copy()
    samples[3, 2] = np.nan
    return samples


def fitted(**given: Any) -> Any:
    return small(**given).fit(X, Y)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "MLPClassifier: alpha is -1; it must be a number of at least 0": (lambda: fitted(alpha=-1), ValueError),
    "Sparse data was passed": (lambda: small().fit(sparse.csr_array(X), Y), TypeError),
    "Sparse data was passed ": (lambda: fitted().predict(sparse.csr_matrix(X)), TypeError),
    "Input X contains NaN": (lambda: small().fit(with_nan(), Y), ValueError),
    "Input X contains NaN.": (lambda: fitted().predict_proba(with_nan()), ValueError),
    "X has 3 features, but MLPClassifier is expecting 4 features": (lambda: fitted().predict(X[:, :3]), ValueError),
    "Unknown label type": (lambda: small().fit(X, X[:, 0]), ValueError),
    "several labels of a sample are columns of 0 and 1": (lambda: small().fit(X, np.stack([Y, Y], axis=1)), ValueError),
    "sample_weight has shape (3,); give (150,), a number for each sample": (
        lambda: small().fit(X, Y, sample_weight=[1, 2, 3]),
        ValueError,
    ),
    "sample_weight contains NaN or infinity": (
        lambda: small().fit(X, Y, sample_weight=np.full(150, np.nan)),
        ValueError,
    ),
    "the sample weights of a mini-batch are all zero": (
        lambda: small(batch_size=5, shuffle=False).fit(X, Y, sample_weight=Y),
        ValueError,
    ),
    "partial_fit is one epoch, which early_stopping=True cannot end": (
        lambda: fitted(early_stopping=True).partial_fit(X, Y),
        ValueError,
    ),
    "classes must be passed on the first call to partial_fit": (lambda: small().partial_fit(X, Y), ValueError),
    "classes is [0 1], and was [0 1 2] in earlier calls": (
        lambda: fitted().partial_fit(X, Y, classes=[0, 1]),
        ValueError,
    ),
    "y has the classes [0 1 2 3], and this estimator knows [0 1 2]": (
        lambda: fitted().partial_fit(X[:4], [0, 1, 2, 3]),
        ValueError,
    ),
    "y has the classes [0 1], and this estimator knows [0 1 2]": (
        lambda: fitted(warm_start=True).fit(X[:100], Y[:100]),
        ValueError,
    ),
    "y has the classes [0 1], and this estimator knows [0 1 2];": (
        lambda: fitted(warm_start=True).fit(X, SEVERAL),
        ValueError,
    ),
    "the network has layers of [4, 8, 5, 3] units, relu, relu, softmax; for another one fit anew": (
        lambda: fitted(warm_start=True).set_params(hidden_layer_sizes=(9,)).fit(X, Y),
        ValueError,
    ),
    "for another one fit anew, with warm_start=False": (
        lambda: fitted().set_params(activation="tanh").partial_fit(X, Y),
        ValueError,
    ),
    'class_weight="balanced" needs all labels at once': (
        lambda: small(class_weight="balanced").partial_fit(X, Y, classes=[0, 1, 2]),
        ValueError,
    ),
    "the validation set has one sample; raise validation_fraction": (
        lambda: small(early_stopping=True, validation_fraction=0.1).fit(X[::18], Y[::18]),
        ValueError,
    ),
    "X holds float64; with pixels=True give uint8": (lambda: fitted(pixels=True), ValueError),
    'engine "panels" cannot run this: eps is below 1e-30': (
        lambda: fitted(engine="panels", epsilon=1e-31),
        ValueError,
    ),
    "Momentum: beta is 1": (lambda: fitted(solver="momentum", momentum=1), ValueError),
    "the weights are no longer finite numbers: scale X, or lower learning_rate_init": (
        lambda: fitted(solver="sgd", learning_rate_init=1e200),
        ValueError,
    ),
    "y has the value -1.0; the poisson loss takes counts": (
        lambda: small(MLPRegressor, loss="poisson").fit(X, Y - 1.0),
        ValueError,
    ),
    "y has 2 columns, and the network 1 outputs; fit it anew": (
        lambda: small(MLPRegressor).fit(X, Y).partial_fit(X, SEVERAL),
        ValueError,
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(words: str) -> None:
    act, kind = REFUSED[words]
    with pytest.raises(kind, match=re.escape(words.strip(" ;.") if words[-1] in " ;." else words)) as caught:
        act()
    if not words.startswith(("Sparse", "Input X")):  # those are scikit-learn's own words
        assert "\n" not in str(caught.value)


def test_lbfgs_has_no_partial_fit() -> None:
    assert not hasattr(small(solver="lbfgs"), "partial_fit")
    assert all(hasattr(small(solver=solver), "partial_fit") for solver in ("sgd", "adam", "adamw"))


def test_a_refused_call_leaves_a_fitted_model_as_it_was() -> None:
    model = fitted(warm_start=True)
    before = weights_of(model)
    for act in (
        lambda: model.fit(with_nan(), Y),
        lambda: model.fit(X, SEVERAL),
        lambda: model.partial_fit(X[:, :2], Y),
    ):
        with pytest.raises(ValueError, match=r"NaN|classes|features"):
            act()
    assert np.array_equal(weights_of(model), before)
    assert model.classes_.tolist() == [0, 1, 2]
