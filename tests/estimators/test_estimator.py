"""MLPClassifier and MLPRegressor as scikit-learn's tools use them, and their own additions."""

from __future__ import annotations

import copy
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import neural_network as theirs
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.estimator_checks import parametrize_with_checks

import catopt_xp
from catopt_xp.backend.devices import DeviceError, DeviceFallbackWarning
from catopt_xp.backend.xp import NumpyBackend, get_backend
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.estimators import arrays
from catopt_xp.estimators.epochs import initial_network, shuffled
from catopt_xp.estimators.mlp import MLPClassifier, MLPRegressor
from catopt_xp.optim.rules import Adam, Momentum, RMSProp
from catopt_xp.optim.schedules import get_hyperbola_func

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_iris(return_X_y=True)
X = (X - X.mean(axis=0)) / X.std(axis=0)
KINDS: list[type[Any]] = [MLPClassifier, MLPRegressor]


def small(kind: type[Any] = MLPClassifier, **given: Any) -> Any:
    return kind(**{"hidden_layer_sizes": (8, 5), "max_iter": 6, "random_state": 0, "batch_size": 40} | given)


def weights_of(model: Any) -> Array:
    return np.concatenate([x.ravel() for x in (*model.coefs_, *model.intercepts_)])


# --- scikit-learn's tools -----------------------------------------------------------------------------------------


LBFGS = MLPRegressor(solver="lbfgs", max_iter=40)


@pytest.mark.filterwarnings("ignore:Can't check dok sparse matrix for nan or inf")
@parametrize_with_checks([MLPClassifier(max_iter=100), MLPRegressor(max_iter=100), LBFGS])
def test_the_estimators_pass_the_checks_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


def test_parameters_and_their_defaults_are_those_of_scikit_learn() -> None:
    own = {"class_weight": None, "device": "auto", "engine": "auto", "lr_scheduler": None, "pixels": False}
    for kind in KINDS:
        there = getattr(theirs, kind.__name__)().get_params()
        here = kind().get_params()
        assert {name: here.get(name) for name in there} == there
        added = {name: value for name, value in here.items() if name not in there}
        assert added == {name: value for name, value in own.items() if kind is MLPClassifier or name != "class_weight"}
    assert catopt_xp.MLPClassifier is MLPClassifier


def test_without_scikit_learn_one_line_says_how_to_get_it() -> None:
    program = """
import sys
sys.modules["sklearn"] = None
import catopt_xp
try:
    catopt_xp.MLPClassifier
except ModuleNotFoundError as error:
    print(error.name, error, sep=": ")
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told == 'sklearn: MLPClassifier and MLPRegressor need scikit-learn: pip install "catopt-xp[sklearn]"\n'


def test_pipelines_and_searches_give_the_results_of_scikit_learn() -> None:
    grid = {"mlpclassifier__alpha": [1e-4, 1.0], "mlpclassifier__hidden_layer_sizes": [(4,), (8, 5)]}
    searches = []
    for kind in (theirs.MLPClassifier, MLPClassifier):
        model = kind(max_iter=8, random_state=0, learning_rate_init=0.05)
        search = GridSearchCV(make_pipeline(StandardScaler(), model), grid, cv=3).fit(X, Y)
        scores = cross_val_score(make_pipeline(StandardScaler(), model), X, Y, cv=3)
        searches.append((search.best_params_, search.cv_results_["mean_test_score"].tolist(), scores.tolist()))
    assert searches[0] == searches[1]
    assert len(set(searches[0][1])) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_clone_is_unfitted_and_learns_the_same(kind: type[Any]) -> None:
    model = small(kind).fit(X, Y)
    twin = clone(model)
    with pytest.raises(NotFittedError):
        twin.predict(X)
    assert np.array_equal(weights_of(twin.fit(X, Y)), weights_of(model))
    assert twin.set_params(alpha=0.5).get_params()["alpha"] == 0.5


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [by_pickle, copy.deepcopy])
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_predicts_the_same_and_goes_on_by_itself(kind: type[Any], solver: str, copied: Any) -> None:
    model = small(kind, solver=solver, warm_start=True).fit(X, Y)
    before, twin = weights_of(model), copied(model)
    assert np.array_equal(twin.predict(X), model.predict(X))
    for trained in (twin, model):
        trained.fit(X, Y) if solver == "lbfgs" else trained.partial_fit(X, Y)
        if trained is twin:
            assert np.array_equal(weights_of(model), before), "the copy moved the original"
    assert not np.array_equal(weights_of(twin), before)
    assert np.array_equal(weights_of(twin), weights_of(model))


def test_a_pickle_holds_every_number_once() -> None:
    model = MLPClassifier((64,), max_iter=1, solver="adam", engine="plain")
    model.fit(np.random.default_rng(0).random((40, 2000)), Y[:40] % 2)
    numbers = 3 * 8 * weights_of(model).size  # weights and two moments
    assert numbers < len(pickle.dumps(model)) < 1.02 * numbers


def test_an_unfitted_estimator_is_pickled() -> None:
    assert by_pickle(MLPClassifier(alpha=0.5)).get_params() == MLPClassifier(alpha=0.5).get_params()


# --- samples and labels ---------------------------------------------------------------------------------------------


def test_data_frames_leave_their_names_and_numpy_comes_out() -> None:
    names = ["sepal length", "sepal width", "petal length", "petal width"]
    frame, labels = pd.DataFrame(X, columns=names), pd.Series(np.array(["a", "b", "c"])[Y])
    model = small().fit(frame, labels)
    assert model.feature_names_in_.tolist() == names
    assert model.n_features_in_ == 4
    for answer in (model.predict(frame), model.predict_proba(frame)):
        assert type(answer) is np.ndarray
    assert np.array_equal(weights_of(model), weights_of(small().fit(X, labels.to_numpy())))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[names[::-1]])
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        model.predict(X)


def test_samples_in_another_layout_or_type_give_the_same_model() -> None:
    expected = weights_of(small().fit(X, Y))
    for samples in (np.asfortranarray(X), X.tolist(), np.repeat(X, 2, axis=1)[:, ::2], X.astype(object)):
        assert np.array_equal(weights_of(small().fit(samples, Y)), expected)
    whole = np.round(X * 10).astype(np.int16)
    assert np.array_equal(weights_of(small().fit(whole, Y)), weights_of(small().fit(whole.astype(float), Y)))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_stand_for_shares_of_255_when_asked(kind: type[Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 30), dtype=np.uint8)
    labels = pixels[:, 0] // 128
    as_pixels = small(kind, pixels=True).fit(pixels, labels)
    as_shares = small(kind).fit((pixels / 255).astype(np.float32), labels)
    assert as_pixels.coefs_[0].dtype == np.float32
    np.testing.assert_allclose(weights_of(as_pixels), weights_of(as_shares), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        as_pixels.predict(pixels), as_shares.predict((pixels / 255).astype(np.float32)), rtol=1e-3
    )
    as_numbers = small(kind).fit(pixels, labels)
    assert as_numbers.coefs_[0].dtype == np.float64
    assert np.abs(as_numbers.loss_curve_[0] - as_pixels.loss_curve_[0]) > 0.1


@pytest.mark.parametrize("labels", [np.array(["no", "yes"])[Y // 2], Y > 1, (Y > 1) * 2.0, list("ab" * 75)])
def test_labels_of_any_kind_come_back_as_they_were(labels: Any) -> None:
    answer = small(max_iter=1).fit(X, labels).predict(X)
    assert answer.dtype == np.asarray(labels).dtype
    assert set(answer) <= set(np.unique(labels))


def test_weights_of_classes_are_weights_of_their_samples() -> None:
    names, several = np.array(["a", "b", "c"])[Y], np.stack([Y > 0, Y > 1], axis=1).astype(int)
    cases: list[tuple[Any, Any]] = [("balanced", names[:120]), ({"a": 3.0, "c": 0.5}, names), ("balanced", several)]
    for class_weight, labels in cases:
        samples, given = X[: len(labels)], np.linspace(1, 2, len(labels))
        by_class = small(class_weight=class_weight).fit(samples, labels, sample_weight=given)
        by_sample = small().fit(samples, labels, sample_weight=given * compute_sample_weight(class_weight, labels))
        assert np.array_equal(weights_of(by_class), weights_of(by_sample))
        assert not np.allclose(weights_of(by_class), weights_of(small().fit(samples, labels, sample_weight=given)))


# --- solvers, rates and engines of our own --------------------------------------------------------------------------

OWN = {
    "momentum": lambda p, **options: Momentum(p, 0.01, 0.8, **options),
    "rmsprop": lambda p, **options: RMSProp(p, 0.01, 0.8, 1e-5, **options),
    "adamw": lambda p, **options: Adam(p, 0.01, eps=1e-5, **options),
}


@pytest.mark.parametrize("solver", OWN)
def test_our_solvers_follow_the_rules_of_the_chapter(solver: str) -> None:
    schedule, alpha, epochs, batch = get_hyperbola_func(0.3), 0.2, 4, 50  # batches of equal length
    rng = np.random.RandomState(0)
    network = initial_network([4, 8, 5, 3], "relu", "softmax", "float64", rng, get_backend("cpu"))
    decay = {"weight_decay": alpha} if solver == "adamw" else {"l2": alpha / batch}
    optimizer = OWN[solver](network.save(), lr_scheduler=schedule, **decay)
    engine = PlainEngine(network, optimizer, X, Y.reshape(1, -1), network.backend, Settings(batch))
    order, losses = np.arange(len(X)), []
    for epoch in range(epochs):
        order = shuffled(order, rng)
        for _ in engine.steps(epoch, order):
            pass
        optimizer.increase_epoch()
        losses.append(engine.fetch_losses().mean())
    given = {"momentum": 0.8, "epsilon": 1e-5, "learning_rate_init": 0.01, "lr_scheduler": schedule}
    model = small(solver=solver, alpha=alpha, batch_size=batch, max_iter=epochs, **given).fit(X, Y)
    np.testing.assert_allclose(model.coefs_[0], network.save()["W0"].T, rtol=1e-12)
    np.testing.assert_allclose(model.coefs_[2], network.save()["W2"].T, rtol=1e-12)
    if solver == "adamw":  # a decay of its own is no part of the loss
        np.testing.assert_allclose(model.loss_curve_, losses, rtol=1e-12)
    else:
        assert (np.array(model.loss_curve_) > losses).all()


def test_a_schedule_counts_the_epochs_of_fit_and_of_partial_fit() -> None:
    seen: list[float] = []

    def schedule(rate: float, epoch: float) -> float:
        seen.append(epoch)
        return rate / (1 + epoch)

    model = small(lr_scheduler=schedule, max_iter=3).fit(X, Y)
    assert sorted(set(seen)) == [0, 1, 2]
    seen.clear()
    model.partial_fit(X, Y).partial_fit(X, Y)
    assert sorted(set(seen)) == [3, 4]


def test_the_engine_that_ran_is_named_with_its_reason() -> None:
    wide = np.random.default_rng(0).random((60, 1500))
    for engine, samples, told in (
        ("plain", X, "as asked"),
        ("panels", X, "as asked"),
        ("auto", X[:60], "the faster one for fewer than 1024 features with a loss like this"),
        ("auto", wide, "the fastest that can run this"),
    ):
        model = small(engine=engine, max_iter=1).fit(samples, Y[: len(samples)])
        assert (model.engine_, model.engine_reason_) == (
            "panels" if engine == "panels" or samples is wide else "plain",
            told,
        )
    assert model.partial_fit(wide[:50], Y[:50]).engine_ == "plain"  # one step is not worth packing


def test_without_a_gpu_the_cpu_trains_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CATOPT_XP_STRICT_DEVICE", raising=False)
    try:
        get_backend("cuda", strict_device=True)
    except DeviceError:
        with pytest.warns(DeviceFallbackWarning, match="device='cuda' cannot be used"):
            model = small(device="cuda").fit(X, Y)
        assert np.array_equal(weights_of(model), weights_of(small().fit(X, Y)))
    else:
        pytest.skip("there is a GPU")


def test_the_device_that_is_taken_when_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU where there is one, or what the environment wishes, for steps that gain by it; it is looked for once."""
    asked: list[str] = []

    def backend(device: str) -> Any:
        asked.append(device)
        return SimpleNamespace(device="cuda:0") if device == "auto" else get_backend("cpu")

    monkeypatch.setattr(arrays, "get_backend", backend)
    monkeypatch.setenv("CATOPT_XP_DEVICE", "a wish of this test")
    wide = np.random.default_rng(0).random((300, 3000))
    for samples, batch_size in ((X, 40), (wide, 8), (wide, 200), (wide, 200)):
        small(max_iter=1, batch_size=batch_size).fit(samples, np.arange(len(samples)) % 3)
    assert asked == ["cpu", "cpu", "auto", "cuda:0", "cuda:0"]


# --- weights that someone else sets ---------------------------------------------------------------------------------


def test_weights_are_live_and_may_be_replaced() -> None:
    model, other = small(max_iter=1).fit(X, Y), small(random_state=1).fit(X, Y)
    for array, values in zip(model.coefs_, other.coefs_, strict=True):
        array[...] = values
    model.intercepts_ = [x.copy() for x in other.intercepts_]
    assert np.array_equal(model.predict_proba(X), other.predict_proba(X))
    model.coefs_[0] = np.zeros_like(other.coefs_[0])
    for trained in (model, by_pickle(model)):
        assert np.ptp(trained.predict_proba(X), axis=0).max() == 0
        assert np.array_equal(trained.network_.forward(X.T).T, trained.predict_proba(X))
    model.coefs_[0] = np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"W0 has shape \(2, 2\), expected \(8, 4\)"):
        model.predict(X)


# --- several calls --------------------------------------------------------------------------------------------------


def test_a_warm_start_may_change_what_it_is_judged_by() -> None:
    model = small(warm_start=True).fit(X, Y)
    assert (model.validation_scores_, model.best_validation_score_) == (None, None)
    model.set_params(early_stopping=True).fit(X, Y)
    assert len(model.validation_scores_) == 6
    assert model.best_validation_score_ == max(model.validation_scores_)
    assert model.best_loss_ is None
    assert len(model.loss_curve_) == 12
    model.fit(X, Y)
    assert len(model.validation_scores_) == 12
    model.set_params(early_stopping=False).fit(X, Y)
    assert (model.validation_scores_, model.best_validation_score_) == (None, None)
    assert model.best_loss_ == min(model.loss_curve_[-6:])
    model.set_params(solver="lbfgs").fit(X, Y)
    model.set_params(solver="sgd").fit(X, Y).partial_fit(X, Y)
    assert len(model.loss_curve_) == 31


def test_early_stopping_puts_the_best_weights_of_all_calls_back() -> None:
    model = small(early_stopping=True, warm_start=True, learning_rate_init=0.05, max_iter=30).fit(X, Y)
    best, score, epochs = weights_of(model), model.best_validation_score_, model.n_iter_
    model.set_params(learning_rate_init=1e3, max_iter=3).fit(X, Y)  # which makes it worse
    assert max(model.validation_scores_[epochs:]) < score
    assert np.array_equal(weights_of(model), best)


@pytest.mark.parametrize("engine", ["plain", "panels"])
def test_a_network_that_goes_on_keeps_its_float_type(engine: str) -> None:
    single = X.astype(np.float32)
    model = small(engine=engine).fit(single, Y).partial_fit(single.astype(np.float64), Y)
    assert model.coefs_[0].dtype == np.float32
    assert np.array_equal(weights_of(model), weights_of(small(engine=engine).fit(single, Y).partial_fit(single, Y)))


def test_partial_fit_with_another_solver_begins_its_moments_anew() -> None:
    model = small(solver="adam").fit(X, Y)
    twin = small(solver="sgd", warm_start=True).fit(X, Y)
    twin.coefs_, twin.intercepts_ = copy.deepcopy(model.coefs_), copy.deepcopy(model.intercepts_)
    model.set_params(solver="sgd").partial_fit(X, Y)
    twin.set_params(max_iter=1).fit(X, Y)
    assert np.array_equal(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("engine", ["plain", "panels"])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_ctrl_c_keeps_what_was_learned(early_stopping: bool, engine: str) -> None:
    pressed: list[float] = []

    def schedule(rate: float, epoch: float) -> float:
        if epoch == 3 and not pressed:
            pressed.append(epoch)
            signal.raise_signal(signal.SIGINT)
        return rate

    whole = small(max_iter=3, early_stopping=early_stopping, engine=engine).fit(X, Y)
    with pytest.warns(UserWarning, match="^training was interrupted; what was learned so far is kept$"):
        model = small(lr_scheduler=schedule, max_iter=50, early_stopping=early_stopping, engine=engine).fit(X, Y)
    assert (model.n_iter_, model.loss_curve_) == (3, whole.loss_curve_)
    assert np.array_equal(weights_of(model), weights_of(whole))
    model.set_params(early_stopping=False).partial_fit(X, Y)
    assert len(model.loss_curve_) == 4


def test_progress_is_printed_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    small(verbose=False).fit(X, Y)
    assert capsys.readouterr().out == ""
    small(verbose=True, max_iter=2, early_stopping=True).fit(X, Y)
    line = r"epoch {k}: loss \d\.\d{{8}}\nepoch {k}: validation score \d\.\d{{6}}\n"
    assert re.fullmatch(line.format(k=1) + line.format(k=2), capsys.readouterr().out)


def test_the_last_epoch_is_said_to_be_the_last() -> None:
    with pytest.warns(
        ConvergenceWarning, match="^max_iter=6 epochs are over before the stopping rule held; raise max_iter$"
    ):
        small().fit(X, Y)
    with pytest.warns(ConvergenceWarning, match=r"^lbfgs ended after 2 iterations: \S.*"):
        small(solver="lbfgs", max_iter=2).fit(X, Y)
    with pytest.warns(UserWarning, match="^batch_size is 400 and there are 150 samples: 150 is taken$"):
        small(batch_size=400).fit(X, Y)


def test_where_samples_find_no_room_the_fit_before_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = load_iris(return_X_y=True)
    model = MLPClassifier((8,), max_iter=3, random_state=0, device="cpu").fit(X, y)
    before = model.predict_proba(X[:9])

    def no_room(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(NumpyBackend, "asarray", no_room)
        with pytest.raises(MemoryError, match="no room"):
            model.fit(X, y)
    assert np.array_equal(model.predict_proba(X[:9]), before)


def test_the_network_of_a_weighted_fit_takes_labels_without_weights() -> None:
    X, y = load_iris(return_X_y=True)
    model = MLPClassifier((8,), max_iter=3, random_state=0).fit(X, y, np.arange(1.0, 151.0))
    accuracy = model.network_.evaluate(X.T, y.reshape(1, -1))
    assert accuracy == model.score(X, y)
