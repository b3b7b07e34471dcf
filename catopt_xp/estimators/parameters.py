"""What scikit-learn's parameters mean here: their ranges, a solver's optimizer, the learning rate by epoch.

No line of scikit-learn is imported: these are its conventions, expressed by the optimizers of `optim/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from catopt_xp.backend.xp import Array, Backend
from catopt_xp.engines.choose import ENGINES
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import Adam, GradientDescent, Momentum, RMSProp
from catopt_xp.optim.schedules import const_lr

SOLVERS = ("adam", "sgd", "lbfgs", "momentum", "rmsprop", "adamw")
HIDDEN = {"identity": "identity", "logistic": "sigmoid", "tanh": "tanh", "relu": "relu"}
"""scikit-learn's names of hidden activations -> those of `functional.py`."""
SMALLEST_RATE = 1e-6  # where the adaptive learning rate ends

_Rule = tuple[Callable[[Any], bool], str]


def _one_of(*choices: str) -> _Rule:
    return lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"


def _number(low: float, high: float, wanted: str, above: bool = False, below: bool = False) -> _Rule:
    """A real number from `low` to `high`, the ends included unless `above` or `below` leaves one out."""

    def fits(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        x = float(value)
        return (low < x if above else low <= x) and (x < high if below else x <= high) and math.isfinite(x)

    return fits, wanted


def _whole(besides: Callable[[Any], bool] = lambda value: False, also: str = "") -> _Rule:
    def fits(value: Any) -> bool:
        return besides(value) or (isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1)

    return fits, f"a whole number of at least 1{also}"


def _are_sizes(value: Any) -> bool:
    sizes = [value] if isinstance(value, Integral) else value
    try:
        return all(isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 1 for size in sizes)
    except TypeError:
        return False


_FLAG: _Rule = (lambda value: isinstance(value, bool) or type(value).__name__ == "bool", "True or False")
_FRACTION = _number(0, 1, "at least 0 and below 1", below=True)
_NOT_NEGATIVE = _number(0, math.inf, "a number of at least 0")
_POSITIVE = _number(0, math.inf, "a number above 0", above=True)

RULES: Mapping[str, _Rule] = {
    "loss": _one_of("squared_error", "poisson"),
    "hidden_layer_sizes": (_are_sizes, "whole numbers of at least 1, one for each hidden layer"),
    "activation": _one_of(*HIDDEN),
    "solver": _one_of(*SOLVERS),
    "alpha": _NOT_NEGATIVE,
    "batch_size": _whole(lambda value: isinstance(value, str) and value == "auto", ' or "auto"'),
    "learning_rate": _one_of("constant", "invscaling", "adaptive"),
    "learning_rate_init": _POSITIVE,
    "power_t": _NOT_NEGATIVE,
    "max_iter": _whole(),
    "shuffle": _FLAG,
    "tol": _NOT_NEGATIVE,
    "verbose": (lambda value: isinstance(value, Integral) or type(value).__name__ == "bool", "True, False or a number"),
    "warm_start": _FLAG,
    "momentum": _number(0, 1, "a number from 0 to 1"),
    "nesterovs_momentum": _FLAG,
    "early_stopping": _FLAG,
    "validation_fraction": _FRACTION,
    "beta_1": _FRACTION,
    "beta_2": _FRACTION,
    "epsilon": _POSITIVE,
    "n_iter_no_change": _whole(lambda value: value == math.inf, ", or infinity"),
    "max_fun": _whole(),
    "device": (lambda value: isinstance(value, str | Backend), '"auto", "cpu", "cuda", "cuda:N" or a Backend'),
    "engine": _one_of(*ENGINES),
    "lr_scheduler": (lambda value: value is None or callable(value), "None, or a function (rate, epoch) -> rate"),
    "pixels": _FLAG,
}


def check_parameters(owner: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line, for the first parameter out of its range, or without a meaning beside others.

    >>> check_parameters("MLPClassifier", {"alpha": -1})
    Traceback (most recent call last):
    ValueError: MLPClassifier: alpha is -1; it must be a number of at least 0
    """
    for name, (fits, wanted) in RULES.items():
        if name in given and not fits(given[name]):
            raise ValueError(f"{owner}: {name} is {given[name]!r}; it must be {wanted}")
    solver, scheduler = given.get("solver"), given.get("lr_scheduler")
    if scheduler is not None and solver == "sgd" and given["learning_rate"] != "constant":
        raise ValueError(
            f"{owner}: lr_scheduler and learning_rate={given['learning_rate']!r} both set the rate; keep one"
        )
    if scheduler is not None and solver == "lbfgs":
        raise ValueError(f"{owner}: lbfgs has no learning rate; leave lr_scheduler out")
    if solver == "lbfgs" and given.get("engine") == "panels":
        raise ValueError(f'{owner}: lbfgs makes no mini-batch steps; leave engine at "auto"')


def layer_sizes(hidden_layer_sizes: Any) -> list[int]:
    """Units of the hidden layers, however they were given.

    >>> layer_sizes(100), layer_sizes((30, 20))
    ([100], [30, 20])
    """
    given = [hidden_layer_sizes] if isinstance(hidden_layer_sizes, Integral) else hidden_layer_sizes
    return [int(size) for size in given]


def penalty_of(given: Mapping[str, Any]) -> float:
    """The L2 penalty that enters loss and gradient: `alpha`, which is the decoupled decay with adamw instead."""
    return 0.0 if given["solver"] == "adamw" else float(given["alpha"])


def make_solver(given: Mapping[str, Any], param_dict: Mapping[str, Array]) -> BaseOptimizer:
    """Makes the optimizer that follows a solver's rule with these parameters."""
    rate, momentum, eps = given["learning_rate_init"], given["momentum"], given["epsilon"]
    betas = given["beta_1"], given["beta_2"]
    options: dict[str, Any] = {"lr_scheduler": given["lr_scheduler"] or const_lr}
    options |= {"l2": penalty_of(given), "l2_per_batch": True}
    match given["solver"]:
        case "sgd" if momentum == 0:
            return GradientDescent(param_dict, rate, **options)
        case "sgd":
            nesterov = bool(given["nesterovs_momentum"])
            return Momentum(param_dict, rate, momentum, nesterov=nesterov, rate_inside=True, **options)
        case "adam":
            return Adam(param_dict, rate, *betas, eps, eps_mode="hat", **options)
        case "adamw":
            return Adam(param_dict, rate, *betas, eps, weight_decay=given["alpha"], **options)
        case "momentum":
            return Momentum(param_dict, rate, momentum, **options)
        case solver:
            assert solver == "rmsprop"
            return RMSProp(param_dict, rate, momentum, eps, **options)


class LearningRate:
    """How the learning rate of "sgd" goes on from epoch to epoch: constant, by the samples seen, or by what is gained.

    `kind`: constant, invscaling or adaptive; the other solvers leave it constant.
    """

    def __init__(self, given: Mapping[str, Any], optimizer: BaseOptimizer) -> None:
        self.kind = given["learning_rate"] if given["solver"] == "sgd" else "constant"
        self.initial, self.power, self.optimizer = given["learning_rate_init"], given["power_t"], optimizer

    def after_epoch(self, samples_seen: int) -> None:
        """invscaling: `lr0 / (samples_seen + 1)**power_t`."""
        if self.kind == "invscaling":
            self.optimizer.learning_rate_zero = float(self.initial) / (samples_seen + 1) ** self.power

    def lowered(self) -> bool:
        """adaptive: divides the rate by 5, unless it is at its end; False where training ends instead."""
        if self.kind != "adaptive" or self.optimizer.learning_rate_zero <= SMALLEST_RATE:
            return False
        self.optimizer.learning_rate_zero /= 5.0
        return True
