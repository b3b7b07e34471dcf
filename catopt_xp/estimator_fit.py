"""What a fitted estimator consists of, and how it is trained: epochs with scikit-learn's stopping, or L-BFGS. Floor F5.

No line of scikit-learn is imported here; `estimator.py` joins this class to scikit-learn's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.xp import Array, Backend
from catopt_xp.estimator_lbfgs import Cost, minimise
from catopt_xp.estimator_rules import HIDDEN, LearningRate, make_solver, penalty_of
from catopt_xp.estimator_training import Training, answers, initial_network, with_weights
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer

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
        self.coefs_ = [host[f"W{k}"].T for k in range(network.layers)]
        self.intercepts_ = [host[f"b{k}"].reshape(-1) for k in range(network.layers)]
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
            with closing(training.epochs(1 if incremental else given["max_iter"], rng, given["shuffle"])) as epochs:
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
            warnings.warn("training was interrupted; what was learned so far is kept", stacklevel=5)
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
            warnings.warn(f"batch_size is {batch_size} and there are {m} samples: {m} is taken", stacklevel=6)
            batch_size = m
        penalty = penalty_of(given)
        if self._optimizer is None or not incremental or self._solver != given["solver"]:
            self._optimizer = make_solver(given, self._network.save(), penalty / batch_size)
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
            double = DeepNetwork(network.neuron_cnt, network.activation_func, None, "float64", device=network.backend)
            double.load(network.save())
            double.clips, self._network = network.clips, double
        size = samples.shape[0] if weights is None else float(weights.sum())
        on_device = with_weights(self._network, targets, weights)
        result = minimise(
            Cost(self._network, samples, on_device, size, penalty_of(given), self._loss_scale()),
            given["tol"],
            given["max_iter"],
            given["max_fun"],
        )
        self._optimizer = None
        self.n_iter_, self.loss_ = min(int(result.nit), int(given["max_iter"])), float(result.fun)
        return None if result.status == 0 else f"lbfgs ended after {self.n_iter_} iterations: {result.message}"
