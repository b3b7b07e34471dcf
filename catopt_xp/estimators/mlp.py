"""scikit-learn's MLPClassifier and MLPRegressor on the engines of this library, on a CPU or a GPU.

Names, defaults, attributes and results are scikit-learn's: the same random draws, rules, penalties and stopping. What
is different is said in the classes. scikit-learn is imported here alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import closing
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

try:
    import sklearn  # noqa: F401
except ModuleNotFoundError as error:
    message = 'MLPClassifier and MLPRegressor need scikit-learn: pip install "catopt-xp[sklearn]"'
    raise ModuleNotFoundError(message, name="sklearn") from error

from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target, unique_labels
from sklearn.utils.validation import check_is_fitted, validate_data

from catopt_xp.backend.xp import Array, Backend, dtype_name, get_backend
from catopt_xp.estimators.arrays import (
    Labels,
    as_host,
    backend_for,
    checked_samples,
    home_of,
    in_kind_of,
)
from catopt_xp.estimators.epochs import Cost, Training, answers, initial_network, minimise
from catopt_xp.estimators.parameters import HIDDEN, LearningRate, check_parameters, layer_sizes, make_solver, penalty_of
from catopt_xp.io.console import warn
from catopt_xp.nn.labels import sample_weights
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.schedules import Scheduler

HostArray = NDArray[Any]
FEW_BATCHES = 4  # in a call of `partial_fit`, up to which packing for the panel engine costs more than it gains
MOST_SAMPLES = 200  # of a mini-batch, where batch_size is "auto"


class FittedNetwork:
    """A network, the optimizer that trains it, and scikit-learn's record of that: attributes that end in `_`.

    The parameters (`alpha`, `solver`, …) are those of the estimator that this is a part of.
    """

    coefs_: list[HostArray]
    intercepts_: list[HostArray]
    loss_curve_: list[float]
    validation_scores_: list[float] | None
    best_loss_: Any  # a number where the loss is judged, else None; so is the next one where the score is
    best_validation_score_: Any
    _network: DeepNetwork
    _optimizer: BaseOptimizer | None
    _solver: str
    _published: list[HostArray]

    # --- what an estimator says -------------------------------------------------------------------------------------

    def _given(self) -> dict[str, Any]:
        """The parameters by name."""
        raise NotImplementedError

    def _split(self, y: HostArray, rng: np.random.RandomState) -> tuple[HostArray, HostArray]:
        """Row numbers to train on, and to judge by."""
        raise NotImplementedError

    def _score_of(self, answer: HostArray, y: HostArray, weights: HostArray | None) -> float:
        """The score of the network's answer (outputs, m) to samples with these targets."""
        raise NotImplementedError

    # --- beginning and going on -------------------------------------------------------------------------------------

    def _begin(self, units: list[int], output: str, dtype: str, rng: np.random.RandomState, backend: Backend) -> None:
        """A new network, and nothing learned yet."""
        given = self._given()
        self._network = initial_network(units, HIDDEN[given["activation"]], output, dtype, rng, backend)
        self._optimizer = None
        self.n_iter_, self.t_ = 0, 0
        self.n_layers_, self.n_outputs_ = len(units), units[-1]
        self.out_activation_ = "logistic" if output == "sigmoid" else output
        if given["solver"] != "lbfgs":
            self.loss_curve_ = []
            self._begin_stopping(given["early_stopping"])

    def _go_on(self, units: list[int], backend: Backend) -> None:
        """The network that there is, on this device, with the weights that `coefs_` and `intercepts_` hold."""
        given, network = self._given(), self._current_network()
        hidden = [HIDDEN[given["activation"]]] * (len(units) - 2)
        if (network.neuron_cnt, network.activation_func[:-1]) != (units, hidden):
            has = f"layers of {network.neuron_cnt} units, {', '.join(network.activation_func)}"
            raise ValueError(f"the network has {has}; for another one fit anew, with warm_start=False")
        self._move(backend)
        if given["solver"] == "lbfgs":
            return
        self.loss_curve_ = getattr(self, "loss_curve_", [])  # L-BFGS leaves none
        judged_by_score = getattr(self, "validation_scores_", None) is not None
        if not hasattr(self, "best_loss_") or judged_by_score != given["early_stopping"]:
            self._begin_stopping(given["early_stopping"])

    def _begin_stopping(self, by_score: bool) -> None:
        self._no_improvement = 0
        self.validation_scores_ = [] if by_score else None
        self.best_validation_score_ = -math.inf if by_score else None
        self.best_loss_ = None if by_score else math.inf

    # --- the network and its arrays ---------------------------------------------------------------------------------

    def _current_network(self) -> DeepNetwork:
        """The network, with the arrays of `coefs_` and `intercepts_` in it that someone put there since training."""
        arrays = [*self.coefs_, *self.intercepts_]
        if len(arrays) != len(self._published) or any(a is not b for a, b in zip(arrays, self._published, strict=True)):
            weights = {f"W{k}": np.asarray(x).T for k, x in enumerate(self.coefs_)}
            biases = {f"b{k}": np.asarray(x).reshape(-1, 1) for k, x in enumerate(self.intercepts_)}
            self._network.load(weights | biases)
            self._publish()
        return self._network

    def _publish(self) -> None:
        """`coefs_` (n_in, n_out) and `intercepts_` (n_out,): views of the network's arrays, or a GPU's copied."""
        network = self._network
        host = {name: network.backend.to_host(x) for name, x in network.save().items()}  # sync
        self.coefs_ = [host[f"W{k}"].T for k in range(len(network.activation_func))]
        self.intercepts_ = [host[f"b{k}"].reshape(-1) for k in range(len(network.activation_func))]
        self._published = [*self.coefs_, *self.intercepts_]

    def _move(self, backend: Backend) -> None:
        if self._network.backend.device != backend.device:
            self._network = self._network.to(backend)
            if self._optimizer is not None:
                self._optimizer = self._optimizer.on(self._network.save())
            self._publish()

    def _portable_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a copy or a pickle: everything on the host, and every weight once."""
        if "_network" not in state:
            return dict(state)
        network, optimizer = self._current_network(), self._optimizer
        if network.backend.name != "numpy":
            network = network.to("cpu")
            optimizer = None if optimizer is None else optimizer.on(network.save())
        views = ("coefs_", "intercepts_", "_published")
        return {k: v for k, v in state.items() if k not in views} | {"_network": network, "_optimizer": optimizer}

    # --- training ---------------------------------------------------------------------------------------------------

    def _train(
        self,
        samples: Array,
        y: HostArray,
        targets: HostArray,
        weights: HostArray | None,
        rng: np.random.RandomState,
        incremental: bool,
    ) -> str | None:
        """Trains the network in place; what is to be warned of, or None.

        `samples`: (m, n_x) on the network's device; `y`: targets as they came, for the validation score; `targets`:
        (·, m) as the network takes them; `weights`: (m,); `incremental`: one epoch.
        """
        with self._network.backend.activate():
            if self._given()["solver"] == "lbfgs":
                return self._minimise(samples, targets, weights)
            if not self._given()["early_stopping"]:
                return self._train_epochs(samples, targets, weights, None, rng, incremental)
            train, held = self._split(y, rng)
            if len(held) < 2:
                raise ValueError("the validation set has one sample; raise validation_fraction, or give more samples")
            backend = self._network.backend
            train_samples, held_samples = (
                backend.xp.take(samples, backend.asarray(rows), axis=0) for rows in (train, held)
            )
            w_train, w_held = (None if weights is None else weights[rows] for rows in (train, held))
            judged = held_samples, y[held], w_held
            return self._train_epochs(train_samples, targets[:, train], w_train, judged, rng, incremental)

    def _train_epochs(
        self,
        samples: Array,
        targets: HostArray,
        weights: HostArray | None,
        judged: tuple[Array, HostArray, HostArray | None] | None,
        rng: np.random.RandomState,
        incremental: bool,
    ) -> str | None:
        """Epochs until neither the loss nor, where a set is to be judged by, the score on it gets better."""
        given, flat = self._given(), self._network.save().flat
        training = self._training(given, samples, targets, weights, incremental)
        rate, stopped, self.n_iter_ = LearningRate(given, training.optimizer), False, 0
        best = None if judged is None else self._network.backend.asarray(flat + 0.0)
        try:
            epochs = training.epochs(1 if incremental else given["max_iter"], rng, given["shuffle"])
            # What overflows ends in weights that are not finite, which is said in the end.
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"), closing(epochs):
                for loss in epochs:
                    self._record(loss, samples.shape[0], given["verbose"])
                    if judged is None:
                        self._judge_loss(given["tol"])
                    else:
                        training.engine.settle()
                        if self._judge_score(*judged, given["tol"], given["verbose"]):
                            best = flat + 0.0
                    rate.after_epoch(self.t_)
                    if self._no_improvement > given["n_iter_no_change"]:
                        stopped = not rate.lowered()
                        if stopped:
                            break
                        self._no_improvement = 0
        except KeyboardInterrupt:
            warn("training was interrupted; what was learned so far is kept")
            stopped = True
        if best is not None:
            flat[...] = best
        if stopped or incremental:
            return None
        return f"max_iter={given['max_iter']} epochs are over before the stopping rule held; raise max_iter"

    def _training(
        self,
        given: Mapping[str, Any],
        samples: Array,
        targets: HostArray,
        weights: HostArray | None,
        incremental: bool,
    ) -> Training:
        """The engine for these samples, with a new optimizer unless `partial_fit` goes on with one."""
        m = samples.shape[0]
        batch_size = min(MOST_SAMPLES, m) if given["batch_size"] == "auto" else int(given["batch_size"])
        if batch_size > m:
            warn(f"batch_size is {batch_size} and there are {m} samples: {m} is taken")
            batch_size = m
        penalty = penalty_of(given)
        if self._optimizer is None or not incremental or self._solver != given["solver"]:
            self._optimizer = make_solver(given, self._network.save())
            self._solver = given["solver"]
        engine = given["engine"]
        if engine == "auto" and incremental and m <= FEW_BATCHES * batch_size:
            engine = "plain"
        numbers: dict[str, Any] = {"batch_size": batch_size, "penalty": penalty, "loss_scale": self._loss_scale()}
        training = Training(self._network, self._optimizer, samples, targets, weights, engine=engine, **numbers)
        self.engine_, self.engine_reason_ = training.engine.name, training.engine_reason
        return training

    def _loss_scale(self) -> float:
        """What losses are multiplied by: of predicted numbers scikit-learn's is a mean over outputs too."""
        return 1.0 / self.n_outputs_ if self.out_activation_ == "identity" else 1.0

    def _record(self, loss: float, samples: int, verbose: Any) -> None:
        self.n_iter_ += 1
        self.t_ += samples
        self.loss_ = loss
        self.loss_curve_.append(loss)
        if verbose:
            print(f"epoch {self.n_iter_}: loss {loss:.8f}")

    def _judge_loss(self, tol: float) -> None:
        self._no_improvement = self._no_improvement + 1 if self.loss_ > self.best_loss_ - tol else 0
        self.best_loss_ = min(self.best_loss_, self.loss_)

    def _judge_score(self, samples: Array, y: HostArray, weights: HostArray | None, tol: float, verbose: Any) -> bool:
        """Whether the score on the validation set is the best so far; a NaN never is."""
        answer = self._network.backend.to_host(answers(self._network, samples))  # sync
        score = self._score_of(answer, y, weights) if np.isfinite(answer).all() else math.nan
        assert self.validation_scores_ is not None
        self.validation_scores_.append(score)
        if verbose:
            print(f"epoch {self.n_iter_}: validation score {score:.6f}")
        self._no_improvement = self._no_improvement + 1 if score < self.best_validation_score_ + tol else 0
        better: bool = score > self.best_validation_score_
        if better:
            self.best_validation_score_ = score
        return better

    def _minimise(self, samples: Array, targets: HostArray, weights: HostArray | None) -> str | None:
        """L-BFGS over the whole set, in float64 whatever the samples are."""
        given, network = self._given(), self._network
        if network.dtype != "float64":
            same = network.architecture | {"dtype": "float64"}
            self._network = DeepNetwork(**same, device=network.backend)
            self._network.load(network.save())
        result = minimise(
            Cost(self._network, samples, targets, weights, penalty_of(given), self._loss_scale()),
            given["tol"],
            given["max_iter"],
            given["max_fun"],
        )
        self._optimizer = None
        self.n_iter_, self.loss_ = min(int(result.nit), int(given["max_iter"])), float(result.fun)
        return None if result.status == 0 else f"lbfgs ended after {self.n_iter_} iterations: {result.message}"


class _Estimator(FittedNetwork, BaseEstimator):  # type: ignore[misc]
    """What both estimators share: the checks of what they are given, and where they train and predict."""

    def _targets(self, y: HostArray, first: bool, incremental: bool) -> HostArray:
        """Checked targets as a network takes them, (·, m)."""
        raise NotImplementedError

    def _output(self) -> tuple[str, int]:
        """The network's last activation, and how many outputs it has."""
        raise NotImplementedError

    def _weights(self, y: HostArray, sample_weight: Any, incremental: bool) -> HostArray | None:
        """The samples' weights (m,), or None where all are 1."""
        return sample_weights(as_host(sample_weight, "sample_weight"), None, None, y.shape[0])

    def _given(self) -> dict[str, Any]:
        given: dict[str, Any] = self.get_params(deep=False)
        return given

    def _store(self, given: dict[str, Any]) -> None:
        """Keeps the parameters as they were given, which is all that a constructor may do."""
        for name in self._get_param_names():
            setattr(self, name, given[name])

    # --- fitting ----------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Trains on `X` (m, n_x) and `y`; begins anew unless `warm_start`.

        `sample_weight`: (m,), None for all 1. Returns the estimator. Raises ValueError or TypeError for what cannot be
        used, and ValueError where weights are no longer finite. Warns (ConvergenceWarning) when `max_iter` ends
        training. Ctrl-C ends it with a warning, and what was learned is kept.
        """
        return self._fit(X, y, sample_weight, incremental=False)

    def _steps(self) -> bool:
        """Whether the solver makes mini-batch steps, which `partial_fit` needs."""
        if self.solver == "lbfgs":
            raise AttributeError("partial_fit makes mini-batch steps; solver lbfgs makes none")
        return True

    def _fit(self, X: Any, y: Any, sample_weight: Any, incremental: bool) -> Self:
        check_parameters(type(self).__name__, self._given())
        if incremental and self.early_stopping:
            raise ValueError(
                "partial_fit is one epoch, which early_stopping=True cannot end; set it to False, or use fit"
            )
        first = not hasattr(self, "coefs_") or not (self.warm_start or incremental)
        X, y = self._checked(X, y, first)
        weights = self._weights(y, sample_weight, incremental)
        targets = self._targets(y, first, incremental)
        rng = check_random_state(self.random_state)
        output, outputs = self._output()
        units = [X.shape[1], *layer_sizes(self.hidden_layer_sizes), outputs]
        backend = self._backend(X, units, first)
        # L-BFGS works in float64 and converts block by block; a network that goes on keeps its type.
        dtype = "float32" if self.pixels else dtype_name(X)
        kept = self.pixels or self.solver == "lbfgs"
        # Before there is a new network: where the device has no room for the samples, the fit before stays whole.
        samples = backend.asarray(X, dtype=None if kept else dtype if first else self._network.dtype)
        if first:
            self._begin(units, output, dtype, rng, backend)
        else:
            self._go_on(units, backend)
        try:
            warning = self._train(samples, y, targets, weights, rng, incremental)
        finally:
            self._publish()
        if not all(np.isfinite(x).all() for x in (*self.coefs_, *self.intercepts_)):
            raise ValueError("the weights are no longer finite numbers: scale X, or lower learning_rate_init")
        if warning is not None:
            warn(warning, ConvergenceWarning)
        return self

    def _checked(self, X: Any, y: Any, first: bool) -> tuple[Any, HostArray]:
        """X as `_checked_samples` has it, and y on the host, (m,) or (m, k)."""
        home, options = home_of(X, self.device), {"multi_output": True, "y_numeric": isinstance(self, RegressorMixin)}
        if home is None:
            kinds = {"dtype": self._kinds(X), "order": "C"}
            X, y = validate_data(self, as_host(X), as_host(y, "y"), reset=first, **options, **kinds)
        else:
            X, y = checked_samples(X, home, self.pixels), validate_data(self, y=as_host(y, "y"), **options)
            validate_data(self, X, reset=first, skip_check_array=True)
            if len(y) != X.shape[0]:
                raise ValueError(f"X has {X.shape[0]} samples, and y has {len(y)}")
        return X, column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y

    def _checked_samples(self, X: Any) -> tuple[Any, Backend | None]:
        """X to predict, (m, n_x): float32 or float64, or uint8 pixels; on a GPU if it came from there. And where."""
        check_is_fitted(self)
        home = home_of(X, self.device)
        if home is None:
            return validate_data(self, as_host(X), dtype=self._kinds(X), order="C", reset=False), None
        X = checked_samples(X, home, self.pixels)
        validate_data(self, X, reset=False, skip_check_array=True)
        return X, home

    def _kinds(self, X: Any) -> Any:
        """The types of numbers that samples on the host may have; the first is what others become."""
        if not self.pixels:
            return (np.float64, np.float32)
        kind = np.asarray(as_host(X)).dtype
        if kind != np.uint8:
            raise ValueError(f"X holds {kind}; with pixels=True give uint8")
        return np.uint8

    def _backend(self, X: Any, units: list[int], first: bool) -> Backend:
        """Where to train; "auto": where X lies, where the network is already, or where a step is fast."""
        if self.device != "auto":
            return get_backend(self.device)
        home = home_of(X, self.device)
        if home is not None or not first:
            return home or self._network.backend
        batch = MOST_SAMPLES if self.batch_size == "auto" else self.batch_size
        return backend_for(6 * min(batch, X.shape[0]) * sum(a * b for a, b in itertools.pairwise(units)))

    def _split(self, y: HostArray, rng: np.random.RandomState) -> tuple[HostArray, HostArray]:
        stratify = y if isinstance(self, ClassifierMixin) and self.n_outputs_ == 1 else None
        options = {"test_size": self.validation_fraction, "random_state": rng, "stratify": stratify}
        train, held = train_test_split(np.arange(len(y)), **options)
        return train, held

    # --- predicting -------------------------------------------------------------------------------------------------

    def _answer(self, X: Any) -> tuple[Array, Backend]:
        """The network's answer to X, (outputs, m), and the backend where it is."""
        X, home = self._checked_samples(X)
        if home is not None:
            self._move(home)
        network = self._current_network()
        return answers(network, network.backend.asarray(X)), network.backend

    @property
    def network_(self) -> DeepNetwork:
        """The trained network, for exports and the like; on a CPU `coefs_` are views of its arrays."""
        check_is_fitted(self)
        return self._current_network()

    # --- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return self._portable_state(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if hasattr(self, "_network"):
            self._publish()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        return tags


class MLPClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A fully connected classifier with scikit-learn's interface and results, trained on the engines of this library.

    scikit-learn's parameters, in its order and with its defaults:

    `hidden_layer_sizes`: units of each hidden layer. `activation`: identity, logistic, tanh or relu, of hidden layers.
    `solver`: adam, sgd or lbfgs, as scikit-learn has them; or the library's own: momentum (`momentum` is beta),
    rmsprop (`momentum` is beta, `epsilon` stands inside the root) and adamw (`alpha` is the decoupled decay).
    `alpha`: L2 penalty, divided by the batch's samples. `batch_size`: "auto" is min(200, samples). `learning_rate`:
    constant, invscaling or adaptive, for sgd alone, with `power_t`. `learning_rate_init`: per step. `max_iter`: epochs
    at most (iterations of lbfgs, with at most `max_fun` evaluations). `shuffle`: a new order in every epoch.
    `random_state`: of weights, orders and the validation split. `tol`, `n_iter_no_change`: training ends when the loss,
    or the validation score, has not become better by tol for more than so many epochs. `verbose`: print each epoch.
    `warm_start`: fit goes on with the weights that there are. `momentum`, `nesterovs_momentum`: of sgd, the learning
    rate inside the velocity. `early_stopping`: judge by the score on `validation_fraction` of the samples, and put back
    the best weights. `beta_1`, `beta_2`, `epsilon`: of adam.

    Ours: `class_weight`: None, "balanced" or {class: weight}. `device`: as for `catopt_xp.get_backend`; "auto" is the
    GPU where X lies on one, or where there is one and steps are large. `engine`: auto, plain or panels, as for
    `catopt_xp.train`. `lr_scheduler`: `(learning_rate, epoch) -> rate`, epochs from 0. `pixels`: X holds uint8 pixels
    (m, n_x), which stay such and stand for X/255.

    Attributes, scikit-learn's: `classes_, coefs_, intercepts_, loss_, loss_curve_, best_loss_, validation_scores_,
    best_validation_score_, n_iter_, t_, n_features_in_, feature_names_in_, n_layers_, n_outputs_, out_activation_`; and
    `engine_`, `engine_reason_`: what ran, and why; `network_`: the trained DeepNetwork.

    float64 samples are trained on in float64, float32 ones in float32, others become float64. Sparse samples are
    refused. Arrays of other libraries (CuPy, PyTorch, …) are taken, and answered in their kind. Differences:
    with `warm_start` and `early_stopping`, the weights put back are the best of all calls; numbers of loss_curve_ are
    float64; parameters without a meaning beside others are refused.

    >>> X = np.random.default_rng(0).random((60, 4))
    >>> y = np.where(X[:, 0] > 0.5, "right", "left")
    >>> model = MLPClassifier((8,), solver="lbfgs", random_state=0).fit(X, y)
    >>> model.predict(X[:2]), model.score(X, y)
    (array(['right', 'right'], dtype='<U5'), 1.0)
    """

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        class_weight: Any = None,
        device: str | Backend = "auto",
        engine: str = "auto",
        lr_scheduler: Scheduler | None = None,
        pixels: bool = False,
    ) -> None:
        self._store(locals())

    @available_if(_Estimator._steps)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Self:
        """One epoch over X (m, n_x) and y, with the optimizer of the calls before.

        `sample_weight`: as for `fit`; `classes`: all that there will ever be, at the first call. Returns the estimator.
        Raises ValueError as `fit` does, with `early_stopping`, and for classes that are not known.
        """
        known = getattr(self, "classes_", None)
        if classes is not None:
            classes = unique_labels(classes)
            if known is not None and not np.array_equal(known, classes):
                raise ValueError(
                    f"classes is {classes}, and was {known} in earlier calls; give the same, or leave it out"
                )
        elif known is None:
            raise ValueError("classes must be passed on the first call to partial_fit: all that there will ever be")
        self.classes_ = classes if known is None else known
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> Any:
        """The most probable class of each of X (m, n_x): (m,); of each label whether it holds, (m, k), multi-label."""
        return in_kind_of(self._predicted(X), X, self.device)

    def predict_proba(self, X: Any) -> Any:
        """The probability of each class, in the order of `classes_`, for X (m, n_x): (m, classes)."""
        answer, backend = self._answer(X)
        with backend.activate():
            return in_kind_of(self._labels.probabilities(answer, backend.xp), X, self.device)

    def predict_log_proba(self, X: Any) -> Any:
        """The logarithm of `predict_proba`, -inf where that is 0."""
        answer, backend = self._answer(X)
        with backend.activate(), np.errstate(divide="ignore"):
            return in_kind_of(backend.xp.log(self._labels.probabilities(answer, backend.xp)), X, self.device)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of samples X (m, n_x) whose class (all of whose labels) is y, weighed by `sample_weight` (m,)."""
        return float(
            accuracy_score(as_host(y, "y"), self._predicted(X), sample_weight=as_host(sample_weight, "sample_weight"))
        )

    def _predicted(self, X: Any) -> HostArray:
        answer, backend = self._answer(X)
        labels: HostArray = self._labels.decode(backend.to_host(answer))  # sync
        return labels

    def _targets(self, y: HostArray, first: bool, incremental: bool) -> HostArray:
        kind = type_of_target(y)
        if kind == "multiclass-multioutput":
            raise ValueError(
                f"y has shape {y.shape} and more than two values; several labels of a sample are columns of 0 and 1"
            )
        check_classification_targets(y)
        classes, multilabel = unique_labels(y), kind == "multilabel-indicator"
        if first:
            self.classes_ = self.classes_ if incremental else classes
            self._labels = Labels(self.classes_, multilabel)
        known = set(classes) <= set(self.classes_) if incremental else set(classes) == set(self.classes_)
        if not known or multilabel != self._labels.multilabel:
            raise ValueError(
                f"y has the classes {classes}, and this estimator knows {self.classes_}; fit it anew for others"
            )
        return self._labels.encode(y.toarray() if hasattr(y, "toarray") else y)

    def _output(self) -> tuple[str, int]:
        return self._labels.output, self._labels.units

    def _weights(self, y: HostArray, sample_weight: Any, incremental: bool) -> HostArray | None:
        if incremental and self.class_weight == "balanced":
            raise ValueError(
                'class_weight="balanced" needs all labels at once, which partial_fit never sees; give a dict'
            )
        labels = y.toarray() if hasattr(y, "toarray") else y
        return sample_weights(as_host(sample_weight, "sample_weight"), self.class_weight, labels.T, y.shape[0])

    def _score_of(self, answer: HostArray, y: HostArray, weights: HostArray | None) -> float:
        return float(accuracy_score(y, self._labels.decode(answer), sample_weight=weights))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class MLPRegressor(MultiOutputMixin, RegressorMixin, _Estimator):  # type: ignore[misc]
    """A fully connected regressor with scikit-learn's interface and results, trained on the engines of this library.

    `loss`: squared_error, or poisson, whose outputs are means of counts, `exp(z)`, for targets of at least 0. The other
    parameters, attributes and differences are those of `MLPClassifier`, but for classes and their weights; the
    validation score is R².

    >>> X = np.random.default_rng(0).random((60, 2))
    >>> model = MLPRegressor(hidden_layer_sizes=(8,), solver="lbfgs", random_state=0).fit(X, X[:, 0] - X[:, 1])
    >>> round(model.score(X, X[:, 0] - X[:, 1]), 2)
    1.0
    """

    def __init__(
        self,
        loss: str = "squared_error",
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        device: str | Backend = "auto",
        engine: str = "auto",
        lr_scheduler: Scheduler | None = None,
        pixels: bool = False,
    ) -> None:
        self._store(locals())

    @available_if(_Estimator._steps)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """One epoch over X (m, n_x) and y, with the optimizer of the calls before; the rest as for `fit`."""
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> Any:
        """The predicted numbers for X (m, n_x): (m,), or (m, outputs) where there are several."""
        answer, backend = self._answer(X)
        with backend.activate():
            return in_kind_of(answer[0, :] if self.n_outputs_ == 1 else answer.T, X, self.device)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R² of the predictions for X (m, n_x), y (m,) or (m, outputs), weighed by `sample_weight` (m,)."""
        return float(
            r2_score(as_host(y, "y"), as_host(self.predict(X)), sample_weight=as_host(sample_weight, "sample_weight"))
        )

    def _targets(self, y: HostArray, first: bool, incremental: bool) -> HostArray:
        if self.loss == "poisson" and (y < 0).any():
            raise ValueError(f"y has the value {y.min()}; the poisson loss takes counts, at least 0")
        targets = y.reshape(len(y), -1).T
        if not first and len(targets) != self.n_outputs_:
            raise ValueError(f"y has {len(targets)} columns, and the network {self.n_outputs_} outputs; fit it anew")
        self._columns = len(targets)
        return targets

    def _output(self) -> tuple[str, int]:
        return "exp" if self.loss == "poisson" else "identity", self._columns

    def _score_of(self, answer: HostArray, y: HostArray, weights: HostArray | None) -> float:
        return float(r2_score(y, answer.T.reshape(y.shape), sample_weight=weights))
