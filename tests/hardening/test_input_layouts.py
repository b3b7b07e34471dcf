"""Input of any type, shape and memory layout: the bits of its plain copy, or one line that names the argument."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import awkward_arrays as forms
import numpy as np
import pytest
from awkward_arrays import FORMS, Answer, assert_as_plain, same
from hypothesis import example, given
from hypothesis import strategies as st
from properties import Tally, outcome, prove, refusal, times
from short_runs import fit

from catopt_xp.backend.xp import NumpyBackend, asnumpy
from catopt_xp.estimators.mlp import MLPClassifier, MLPRegressor
from catopt_xp.nn import functional
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.nn.parameters import Parameters

Record = Callable[..., None]
seeds = st.integers(0, 2**16)
# Features: one, few, more than a block of products, more than a panel; samples: one, few, more than are turned around.
features = st.sampled_from([1, 2, 3, 7, 17, 40, 769, 1030, 2310])
samples = st.sampled_from([1, 2, 3, 5, 8, 30, 257, 300])


def rows_of(m: int) -> list[tuple[int, ...]]:
    """The shapes of labels of m samples: a row, or a list; of one sample a number too."""
    return [(1, m), (m,)] + [()] * (m == 1)


# --- the network ------------------------------------------------------------------------------------------------------


def ask_network(model: DeepNetwork) -> Callable[[Any, Any], Answer]:
    """Everything that a network answers to samples and labels."""

    def ask(X: Any, Y: Any) -> Answer:
        model.position = (0, 0)
        Y_hat = model.forward(X)
        loss = model.backward(Y)
        accuracy, cost = model.evaluate(X, Y, return_loss=True)  # type: ignore[misc]
        gradient = model.get_grad_dict().flat.copy()
        said = model.loss(Y, Y_hat)
        return {"Y_hat": Y_hat, "loss": loss, "gradient": gradient, "said": said, "judged": [accuracy, cost]}

    return ask


@times(150, 12000)
def test_a_network_answers_as_to_the_plain_copy(examples: int, record: Record) -> None:
    tally = Tally()

    @given(features, samples, forms.dtypes, forms.dtypes, forms.forms, forms.forms, st.booleans(), seeds)
    @example(13, 1, "float32", "int64", "backwards", "plain", False, 0)  # strides of one sample decided on the product
    @example(1, 9, "float32", "int64", "backwards", "plain", False, 0)
    @example(7, 5, "float32", "float64", "plain", "big-endian", False, 0)
    def holds(n_x: int, m: int, dtype: str, of_Y: str, form: str, form_of_Y: str, softmax: bool, seed: int) -> None:
        double = "float64" if seed % 3 == 0 else "float32"
        units, output = (9, "softmax") if softmax else (2, "sigmoid")
        model = DeepNetwork([n_x, 4, units], ["tanh", output], seed=1, dtype=double, dropout=0.25 * (seed % 2))
        X = forms.numbers(dtype, (n_x, m), seed)
        labels = np.random.default_rng(seed).integers(0, units, (1, m)) if softmax else X[:2] > 0
        labels = np.resize(labels, (1 if softmax else units, m))
        of_Y = "int16" if softmax and of_Y == "bool" else of_Y
        assert_as_plain(ask_network(model), FORMS[form](X), FORMS[form_of_Y](labels.astype(of_Y)))
        tally("answered")

    prove(holds, examples, record, tally)


@times(60, 3000)
def test_numbers_that_repeat_by_a_stride_of_zero_are_as_their_copies(examples: int, record: Record) -> None:
    tally = Tally()

    @given(features, samples, st.sampled_from(["uint8", "float32", "float64", "int16"]), st.integers(0, 1), seeds)
    def holds(n_x: int, m: int, dtype: str, axis: int, seed: int) -> None:
        row = forms.numbers(dtype, (m,) if axis == 0 else (n_x,), seed)
        X = forms.repeated(row, n_x if axis == 0 else m, axis)
        assert 0 in X.strides
        model = DeepNetwork([n_x, 4, 1], ["relu", "sigmoid"])
        assert_as_plain(ask_network(model), X, np.broadcast_to(np.int8(1), (1, m)))
        tally("answered")

    prove(holds, examples, record, tally)


@times(60, 2000)
def test_values_that_are_not_finite_pass_through_a_network_alike(examples: int, record: Record) -> None:
    tally = Tally()
    bad = st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0])

    @given(features, samples, st.sampled_from(forms.FLOATS), forms.forms, bad, seeds)
    def holds(n_x: int, m: int, dtype: str, form: str, value: float, seed: int) -> None:
        X = forms.numbers(dtype, (n_x, m), seed)
        with np.errstate(over="ignore"):
            X[seed % n_x, seed % m] = value
        model = DeepNetwork([n_x, 4, 1], ["relu", "sigmoid"])

        def ask(X: Any) -> Answer:
            return {"Y_hat": model.forward(X, train_mode=False)}

        assert_as_plain(ask, FORMS[form](X))
        tally("answered")

    prove(holds, examples, record, tally)


@times(60, 2000)
def test_arrays_of_any_shape_fit_a_network_or_are_refused_by_name(examples: int, record: Record) -> None:
    tally = Tally()

    @given(forms.shapes, forms.shapes, forms.dtypes, forms.forms)
    @example((), (), "float32", "plain")
    @example((3, 0), (1, 0), "float32", "plain")
    @example((3, 4), (4, 1), "float32", "plain")  # which would broadcast
    @example((3, 1), (), "bool", "backwards")
    @example((1, 1), (1,), "longdouble", "plain")
    def holds(shape: tuple[int, ...], of_Y: tuple[int, ...], dtype: str, form: str) -> None:
        model = DeepNetwork([3, 2, 1], ["relu", "sigmoid"])
        X, Y = FORMS[form](np.ones(shape, dtype)), FORMS[form](np.ones(of_Y, dtype))
        fits = len(shape) == 2 and shape[0] == 3 and shape[1] > 0
        row = fits and of_Y in rows_of(shape[1])
        as_labels = len(shape) == 2 and 0 not in shape and (of_Y == shape or (1, *of_Y) == shape)
        asks: list[tuple[Callable[[], Any], bool]] = [
            (lambda: model.forward(X), fits),
            (lambda: model.evaluate(X, Y), row),
            (lambda: model.loss(Y, X), as_labels),
        ]
        for ask, wanted in asks:
            said = outcome(ask, "X", "Y")
            assert (said == "answered") == wanted, said
            tally("answered" if wanted else "refused")

    prove(holds, examples, record, tally)


# --- training ---------------------------------------------------------------------------------------------------------


def ask_train(engine: str, by_data: bool, **options: Any) -> Callable[..., Answer]:
    """What a run with these sets leaves."""

    def ask(X: Any, Y: Any, dev_X: Any, dev_Y: Any) -> Answer:
        sets = {"X": X, "Y": Y, "dev_X": dev_X, "dev_Y": dev_Y}
        given = {"data": (X, Y, dev_X, dev_Y)} | dict.fromkeys(sets) if by_data else sets
        result = fit(**given, engine=engine, total_epoch=2, batch_size=7, hidden=(3,), **options)
        assert result.engine == engine
        history = result.history
        moments = {k: x for k, x in result.optimizer.save().items() if "/" in k}
        return {
            "weights": result.model.save().flat,  # type: ignore[attr-defined]
            "losses": history.mini_batch_loss,
            "costs": history.full_train_loss + history.dev_loss,
            "accuracies": history.train_accuracy + history.dev_accuracy,
            **moments,
        }

    return ask


@times(40, 2500)
def test_training_gives_the_bits_of_the_plain_copy(examples: int, record: Record) -> None:
    tally = Tally()
    form = st.sampled_from(sorted(set(FORMS) - {"holder"}))

    @given(
        st.sampled_from([1, 3, 17, 1030]),
        st.sampled_from([1, 2, 8, 23]),
        forms.dtypes,
        st.tuples(form, form, form, form),
        st.sampled_from(["plain", "panels"]),
        st.booleans(),
        st.sampled_from(["float32", "float64"]),
        seeds,
    )
    @example(17, 8, "float32", ("misaligned fortran", *["plain"] * 3), "panels", False, "float32", 1)
    @example(17, 8, "float32", ("big-endian", *["plain"] * 3), "panels", False, "float32", 1)
    @example(3, 1, "float64", ("backwards", *["plain"] * 3), "panels", True, "float64", 1)
    def holds(
        n_x: int, m: int, dtype: str, made: tuple[str, ...], engine: str, by_data: bool, network: str, seed: int
    ) -> None:
        X, dev_X = forms.numbers(dtype, (n_x, m), seed), forms.numbers(dtype, (n_x, 5), seed + 1)
        Y, dev_Y = (np.arange(k).reshape(1, -1) % 2 for k in (m, 5))
        of_Y = [*forms.WHOLE, *forms.FLOATS][seed % 13]
        arrays = (X, Y.astype(of_Y), dev_X, dev_Y.astype(of_Y))
        given = [FORMS[form](x) for form, x in zip(made, arrays, strict=True)]
        assert_as_plain(ask_train(engine, by_data, dtype=network), *given)
        tally(engine)

    prove(holds, examples, record, tally)


@pytest.mark.filterwarnings("ignore:all .* samples have the label")
@times(50, 2000)
def test_sets_of_any_shape_are_trained_on_or_refused_by_name(examples: int, record: Record) -> None:
    tally = Tally()

    @given(forms.shapes, forms.shapes, st.sampled_from(["X", "dev_X"]), st.booleans(), forms.forms)
    @example((), (), "X", False, "plain")
    @example((), (), "X", True, "plain")
    @example((0, 3), (3,), "X", False, "plain")
    def holds(shape: tuple[int, ...], of_Y: tuple[int, ...], name: str, by_data: bool, form: str) -> None:
        good = np.ones((shape[0] if shape else 1, 2), np.float32), np.array([[0, 1]])
        made = FORMS[form](np.ones(shape, np.float32)), FORMS[form](np.ones(of_Y, np.float32))
        X, Y, dev_X, dev_Y = (*made, *good) if name == "X" else (*good, *made)
        fits = len(shape) == 2 and 0 not in shape and of_Y in rows_of(shape[1])
        said = outcome(lambda: ask_train("plain", by_data)(X, Y, dev_X, dev_Y), "X", "Y")
        assert (said == "answered") == fits, said
        tally("trained" if fits else "refused")

    prove(holds, examples, record, tally)


# --- parameters, the backend, the formulas ----------------------------------------------------------------------------


@times(60, 3000)
def test_parameters_and_the_backend_take_any_form_as_its_copy(examples: int, record: Record) -> None:
    tally = Tally()
    backend = NumpyBackend()

    @given(forms.shapes, forms.dtypes, forms.forms, st.sampled_from([None, "float32", "float64"]), seeds)
    def holds(shape: tuple[int, ...], dtype: str, form: str, wanted: str | None, seed: int) -> None:
        x = forms.numbers(dtype, shape, seed)
        made = FORMS[form](x)
        taken = backend.asarray(made, wanted)
        assert type(taken) is np.ndarray
        assert type(asnumpy(made)) is np.ndarray
        assert np.array_equal(taken, x if wanted is None else x.astype(wanted))
        assert np.array_equal(asnumpy(made), x)
        flat = Parameters(np.zeros(x.size, np.float32), {"W0": shape})
        flat["W0"] = made
        assert np.array_equal(flat.flat, x.astype(np.float32).ravel())
        if form != "holder":
            twin = flat.zeros_like()
            twin.copy_from({"W0": made})
            assert np.array_equal(twin.flat, flat.flat)
        tally("taken")

    prove(holds, examples, record, tally)


FORMULAS: dict[str, Callable[..., Any]] = {
    **{name: lambda Z, Y, w, f=f: f.forward(Z, np) for name, f in functional.HIDDEN_ACTIVATIONS.items()},
    **{
        f"gradient of {name}": lambda Z, Y, w, f=f: f.backward(Y, Z, np)
        for name, f in functional.HIDDEN_ACTIVATIONS.items()
    },
    **{f"output {name}": lambda Z, Y, w, f=f: f.forward(Z, np) for name, f in functional.OUTPUT_ACTIVATIONS.items()},
    **{f"loss {name}": lambda Z, Y, w, f=f: f.loss(Z, Y, np, w) for name, f in functional.OUTPUT_ACTIVATIONS.items()},
    **{
        f"loss of what {name} says": lambda Z, Y, w, f=f: f.loss_of_output(Y, f.forward(Z, np), np, w)
        for name, f in functional.OUTPUT_ACTIVATIONS.items()
    },
}


@times(150, 10000)
def test_the_formulas_have_the_bits_of_plain_copies(examples: int, record: Record) -> None:
    tally = Tally()
    form = st.sampled_from(sorted(set(FORMS) - {"holder", "matrix", "nothing masked"}))  # which sum in their own way

    @given(
        st.sampled_from(sorted(FORMULAS)),
        st.sampled_from([1, 2, 9, 40]),
        st.sampled_from([1, 2, 9, 200]),
        st.sampled_from(["float16", "float32", "float64"]),
        form,
        form,
        st.booleans(),
        seeds,
    )
    @example("loss sigmoid", 9, 40, "float32", "fortran", "fortran", False, 0)  # sums in another order
    @example("output softmax", 40, 9, "float32", "fortran", "plain", False, 0)
    def holds(
        name: str, rows: int, columns: int, dtype: str, form: str, form_of_Y: str, weighted: bool, seed: int
    ) -> None:
        Z, shape = forms.numbers(dtype, (rows, columns), seed, 3.0), (rows, columns)
        Y = (np.random.default_rng(seed).random(shape) > 0.5).astype(dtype)
        weights = np.random.default_rng(seed).random((1, columns)).astype(dtype) if weighted else None

        def ask(Z: Any, Y: Any) -> Answer:
            return {"value": np.asarray(FORMULAS[name](Z, Y, weights))}

        assert_as_plain(ask, FORMS[form](Z), FORMS[form_of_Y](Y))
        tally("answered")

    prove(holds, examples, record, tally)


# --- the estimators ---------------------------------------------------------------------------------------------------


def ask_estimator(kind: type[Any], solver: str, weighted: bool, pixels: bool) -> Callable[..., Answer]:
    def ask(X: Any, y: Any, weights: Any) -> Answer:
        options = {"solver": solver, "random_state": 0, "max_iter": 2, "batch_size": 5, "pixels": pixels}
        options["learning_rate_init"] = 1e-6  # with larger ones regression on whole numbers diverges
        model = kind(hidden_layer_sizes=(3,), **options)
        model.fit(X, y, sample_weight=weights if weighted else None)
        fitted = {f"coefs {k}": x.copy() for k, x in enumerate(model.coefs_)}
        if solver != "lbfgs":
            model.partial_fit(X, y)
        asked = {"predict": model.predict(X), "score": model.score(X, y), "loss": model.loss_}
        if kind is MLPClassifier:
            asked |= {"probabilities": model.predict_proba(X), "logs": model.predict_log_proba(X)}
        return fitted | asked | {f"after {k}": x for k, x in enumerate([*model.coefs_, *model.intercepts_])}

    return ask


@times(40, 1500)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_an_estimator_learns_as_from_plain_copies(examples: int, record: Record) -> None:
    tally = Tally()
    # Matrices scikit-learn refuses; what is no array and hands one out it takes as float64.
    form = st.sampled_from(sorted(set(FORMS) - {"matrix", "holder"}))

    @given(
        st.sampled_from([MLPClassifier, MLPRegressor]),
        st.sampled_from(["adam", "sgd", "rmsprop", "lbfgs"]),
        st.sampled_from([1, 3, 1030]),
        forms.dtypes,
        st.tuples(form, form, form),
        st.booleans(),
        seeds,
    )
    @example(MLPClassifier, "adam", 3, "float32", ("big-endian", "plain", "plain"), False, 0)  # was taken as float64
    @example(MLPRegressor, "adam", 3, "float64", ("misaligned", "big-endian", "big-endian"), True, 0)
    def holds(
        kind: type[Any], solver: str, n_x: int, dtype: str, made: tuple[str, ...], weighted: bool, seed: int
    ) -> None:
        X = forms.numbers(dtype, (12, n_x), seed)
        y = np.arange(12) % (2 + seed % 2)
        labels = y.astype([*forms.WHOLE, *forms.FLOATS[:3]][1 + seed % 11])
        weights = np.random.default_rng(seed).random(12)
        given = [FORMS[form](x) for form, x in zip(made, (X, labels, weights), strict=True)]
        pixels = dtype == "uint8" and seed % 2 == 0
        assert_as_plain(ask_estimator(kind, solver, weighted and solver != "lbfgs", pixels), *given)
        tally(kind.__name__)

    prove(holds, examples, record, tally)


@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
@pytest.mark.parametrize("name", ["X", "y", "sample_weight", "predict"])
def test_masked_values_are_not_learned_from(kind: type[Any], name: str) -> None:
    arrays: dict[str, Any] = {"X": np.random.default_rng(0).random((12, 3)), "y": np.arange(12) % 2}
    arrays["sample_weight"] = np.ones(12)
    model = kind(hidden_layer_sizes=(3,), max_iter=1, solver="sgd")
    masked = {k: np.ma.masked_array(x, np.arange(x.size).reshape(x.shape) == 1) for k, x in arrays.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(**arrays)
        coefs = model.coefs_[0].copy()
        with pytest.raises(ValueError, match="has masked values, which are no numbers") as caught:
            model.predict(masked["X"]) if name == "predict" else model.fit(**arrays | {name: masked[name]})
    refusal(caught.value, "X" if name == "predict" else name)
    assert np.array_equal(model.coefs_[0], coefs)


# --- what is no number ------------------------------------------------------------------------------------------------


def takers() -> dict[str, tuple[Callable[[Any, Any], Any], str]]:
    """Each place where arrays enter: what calls it with (features, samples) or with labels, and the argument's name."""
    model = DeepNetwork([3, 2, 1], ["relu", "sigmoid"])
    good = np.ones((3, 4), np.float32), np.array([[0, 1, 0, 1]])

    def after_forward(Y: Any) -> Any:
        model.forward(good[0])
        return model.backward(Y)

    return {
        "forward": (lambda X, Y: model.forward(X), "X"),
        "evaluate X": (lambda X, Y: model.evaluate(X, good[1]), "X"),
        "evaluate Y": (lambda X, Y: model.evaluate(good[0], Y), "Y"),
        "backward": (lambda X, Y: after_forward(Y), "Y"),
        "loss Y": (lambda X, Y: model.loss(Y, good[1]), "Y"),
        "loss Y_hat": (lambda X, Y: model.loss(good[1], Y), "Y_hat"),
        "load": (lambda X, Y: model.load({**model.save(), "W1": X[:1, :2]}), "W1"),
        "train X": (lambda X, Y: fit(X=X, Y=good[1]), "X"),
        "train Y": (lambda X, Y: fit(X=good[0], Y=Y), "Y"),
        "train dev_X": (lambda X, Y: fit(X=good[0], Y=good[1], dev_X=X, dev_Y=good[1]), "dev_X"),
        "train dev_Y": (lambda X, Y: fit(X=good[0], Y=good[1], dev_X=good[0], dev_Y=Y), "dev_Y"),
        "data X": (lambda X, Y: fit(X=None, Y=None, data=(X, good[1])), "X"),
        "data Y": (lambda X, Y: fit(X=None, Y=None, data=(good[0], Y)), "Y"),
    }


@pytest.mark.parametrize("kind", [*forms.NO_NUMBERS, "masked", "lists of unequal lengths"])
@pytest.mark.parametrize("taker", takers())
def test_what_is_no_number_is_refused_by_name_wherever_it_enters(taker: str, kind: str) -> None:
    act, name = takers()[taker]
    X: Any
    Y: Any
    if kind == "masked":
        X, Y = (np.ma.masked_array(np.ones(shape), np.eye(*shape)) for shape in ((3, 4), (1, 4)))
    elif kind == "lists of unequal lengths":
        if taker == "load":
            pytest.skip("lists are no arrays to load, of whatever lengths")
        X, Y = [[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.0]]
    else:
        X, Y = forms.no_numbers(kind, (3, 4)), forms.no_numbers(kind, (1, 4))
    with pytest.raises((TypeError, ValueError)) as caught:
        act(X, Y)
    refusal(caught.value, name)


def test_lists_tuples_and_frames_are_taken_as_arrays() -> None:
    X, Y = np.arange(24.0).reshape(3, 8) / 24, np.arange(8).reshape(1, 8) % 2
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    expected = ask_train("plain", False)(X, Y, X, Y)
    as_tuples = tuple(map(tuple, X.tolist())), tuple(map(tuple, Y.tolist()))
    for made in ((X.tolist(), Y.tolist()), as_tuples, (pandas.DataFrame(X), pandas.DataFrame(Y))):
        for by_data in (False, True):
            assert same(ask_train("plain", by_data)(*made, *made), expected)
