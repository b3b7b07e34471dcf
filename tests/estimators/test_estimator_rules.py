"""The parameters' ranges, the order of the random draws, and labels, apart from any training."""

from __future__ import annotations

import math
import re
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from sklearn.utils import shuffle as shuffle_of_scikit_learn

from catopt_xp.backend.xp import get_backend
from catopt_xp.engines.plain import PlainEngine
from catopt_xp.estimators.arrays import Labels
from catopt_xp.estimators.epochs import Training, initial_network, shuffled
from catopt_xp.estimators.mlp import MLPClassifier, MLPRegressor
from catopt_xp.estimators.parameters import RULES, LearningRate, check_parameters, layer_sizes, make_solver
from catopt_xp.optim.rules import Adam, GradientDescent, Momentum, RMSProp

BAD: dict[str, list[Any]] = {
    "loss": ["log_loss"],
    "hidden_layer_sizes": [0, (3, 0), -1, 2.5, (2.5,), "ab", None, (True,)],
    "activation": ["sigmoid", None, 1],
    "solver": ["gd", "SGD", None],
    "alpha": [-1e-9, math.nan, math.inf, "0", None, True],
    "batch_size": [0, -3, 2.5, "all", None, True],
    "learning_rate": ["hyperbolic", 0.1],
    "learning_rate_init": [0, -0.1, math.inf, math.nan, None],
    "power_t": [-0.5],
    "max_iter": [0, 2.5, None, True],
    "shuffle": [1, None, "yes"],
    "tol": [-1e-4, math.nan],
    "verbose": ["yes", None],
    "warm_start": [0],
    "momentum": [-0.1, 1.1, math.nan],
    "nesterovs_momentum": ["yes"],
    "early_stopping": [1],
    "validation_fraction": [-0.1, 1.0],
    "beta_1": [1.0, -0.1],
    "beta_2": [1.0, math.nan],
    "epsilon": [0.0, -1e-8],
    "n_iter_no_change": [0, 2.5, -math.inf],
    "max_fun": [0, 1.5],
    "device": [0, None],
    "engine": ["fast", None],
    "lr_scheduler": [0.1, "hyperbola"],
    "pixels": [None, 1],
}
GOOD: dict[str, list[Any]] = {
    "hidden_layer_sizes": [5, (), [3, 2], np.array([3, 2]), np.int64(4), range(1, 3)],
    "alpha": [0, 0.0, np.float32(1), np.int64(1), 5],
    "batch_size": ["auto", np.int32(1)],
    "momentum": [0, 1],
    "shuffle": [np.bool_(True)],
    "verbose": [0, 3, True],
    "n_iter_no_change": [math.inf, np.inf, 1],
    "beta_1": [0],
}


def test_every_parameter_has_a_rule() -> None:
    parameters = MLPClassifier().get_params() | MLPRegressor().get_params()
    assert set(RULES) == set(BAD)
    assert set(parameters) - set(RULES) == {"random_state", "class_weight"}  # scikit-learn checks these two


@pytest.mark.parametrize("name", BAD)
def test_a_parameter_out_of_range_is_named_with_what_it_takes(name: str) -> None:
    for value in BAD[name]:
        words = f"MLPClassifier: {name} is {value!r}; it must be {RULES[name][1]}"
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            check_parameters("MLPClassifier", {name: value})


@pytest.mark.parametrize("name", GOOD)
def test_a_parameter_may_be_any_number_of_its_range(name: str) -> None:
    for value in GOOD[name]:
        check_parameters("MLPClassifier", {name: value})


@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
def test_the_defaults_are_within_their_ranges(kind: type[Any]) -> None:
    check_parameters("any", kind().get_params())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"solver": "sgd", "learning_rate": "adaptive", "lr_scheduler": max}, "both set the rate; keep one"),
        ({"solver": "lbfgs", "lr_scheduler": max}, "lbfgs has no learning rate; leave lr_scheduler out"),
        ({"solver": "lbfgs", "engine": "panels"}, 'lbfgs makes no mini-batch steps; leave engine at "auto"'),
    ],
)
def test_parameters_without_a_meaning_beside_others_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^MLPClassifier: .*{words}$"):
        check_parameters("MLPClassifier", MLPClassifier(**given).get_params())


def test_layers_are_plain_numbers_however_given() -> None:
    for given in (5, np.int64(5), [5], (5,), np.array([5])):
        sizes = layer_sizes(given)
        assert sizes == [5]
        assert type(sizes[0]) is int
    assert layer_sizes(()) == []


def test_each_solver_has_its_optimizer() -> None:
    def made(**given: Any) -> Any:
        return make_solver(MLPClassifier(**given).get_params(), {"W0": np.zeros(1)})

    sgd = made(solver="sgd", momentum=0.7, alpha=0.25)
    assert (type(sgd), sgd.beta, sgd.nesterov, sgd.rate_inside) == (Momentum, 0.7, True, True)
    assert (sgd.l2, sgd.l2_per_batch) == (0.25, True)
    assert type(made(solver="sgd", momentum=0)) is GradientDescent
    adam = made(beta_1=0.5, beta_2=0.6, epsilon=1e-3, learning_rate_init=0.1)
    told = (adam.beta1, adam.beta2, adam.eps, adam.eps_mode, adam.learning_rate, adam.weight_decay)
    assert (type(adam), told) == (Adam, (0.5, 0.6, 1e-3, "hat", 0.1, 0.0))
    adamw = made(solver="adamw", alpha=0.1)
    assert (type(adamw), adamw.eps_mode, adamw.weight_decay, adamw.l2) == (Adam, "outside", 0.1, 0.0)
    momentum = made(solver="momentum")
    assert (type(momentum), momentum.nesterov, momentum.rate_inside) == (Momentum, False, False)
    rmsprop = made(solver="rmsprop", momentum=0.8)
    assert (type(rmsprop), rmsprop.beta, rmsprop.eps_mode) == (RMSProp, 0.8, "inside")


def rates(**given: Any) -> tuple[LearningRate, Any]:
    parameters = MLPClassifier(**{"solver": "sgd", "learning_rate_init": 0.5} | given).get_params()
    optimizer = make_solver(parameters, {"W0": np.zeros(1)})
    return LearningRate(parameters, optimizer), optimizer


def test_the_rate_falls_with_the_samples_seen() -> None:
    rate, optimizer = rates(learning_rate="invscaling", power_t=0.5)
    assert optimizer.learning_rate == 0.5
    for seen, expected in ((3, 0.25), (99, 0.05)):
        rate.after_epoch(seen)
        assert optimizer.learning_rate == pytest.approx(expected, rel=1e-15)
    assert not rate.lowered()
    constant, optimizer = rates(solver="adam", learning_rate="invscaling")
    constant.after_epoch(99)
    assert optimizer.learning_rate == 0.5


def test_the_rate_is_lowered_by_5_until_it_is_small() -> None:
    rate, optimizer = rates(learning_rate="adaptive", learning_rate_init=1e-4)
    times = 0
    while rate.lowered():
        times += 1
        assert optimizer.learning_rate == pytest.approx(1e-4 / 5**times, rel=1e-12)
    assert times == 3  # 8e-7 is the first rate that is not above 1e-6


def test_initial_weights_are_bounded_by_the_units_on_both_sides() -> None:
    for hidden, factor in (("relu", 6.0), ("sigmoid", 2.0)):
        network = initial_network(
            [40, 60, 3], hidden, "softmax", "float32", np.random.RandomState(0), get_backend("cpu")
        )
        for k, units in ((0, 40 + 60), (1, 60 + 3)):
            bound = math.sqrt(factor / units)
            for name in (f"W{k}", f"b{k}"):
                array = network.save()[name]
                assert array.dtype == np.float32
                assert 0.5 * bound < np.abs(array).max() <= bound * (1 + 1e-6), name


def test_orders_build_on_one_another_as_in_scikit_learn() -> None:
    here, there = np.random.RandomState(3), np.random.RandomState(3)
    ours, theirs = np.arange(20), np.arange(20)
    for _ in range(3):
        ours, theirs = shuffled(ours, here), shuffle_of_scikit_learn(theirs, random_state=there)
        assert np.array_equal(ours, theirs)


def test_an_engine_is_told_the_order_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[tuple[list[int], list[int] | None]] = []

    def steps(self: Any, epoch: int, order: Any, first: int = 0, following: Any = None) -> Any:
        orders.append((order.tolist(), None if following is None else following.tolist()))
        yield 1

    monkeypatch.setattr(PlainEngine, "steps", steps)
    rng = np.random.RandomState(0)
    network = initial_network([3, 1], "relu", "sigmoid", "float64", rng, get_backend("cpu"))
    optimizer = GradientDescent(network.save(), 0.1)
    given: dict[str, Any] = {"batch_size": 9, "penalty": 0.0, "loss_scale": 1.0, "engine": "plain"}
    training = Training(network, optimizer, np.zeros((9, 3)), np.zeros((1, 9)), None, **given)
    assert len(list(training.epochs(3, rng, shuffle=True))) == 3
    assert [following for _, following in orders[:-1]] == [order for order, _ in orders[1:]]
    assert orders[-1][1] is None


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_epochs_left_early_have_made_their_own_draws_alone(epochs: int) -> None:
    here, there = np.random.RandomState(0), np.random.RandomState(0)
    network = initial_network([3, 1], "relu", "sigmoid", "float64", np.random.RandomState(1), get_backend("cpu"))
    given: dict[str, Any] = {"batch_size": 9, "penalty": 0.0, "loss_scale": 1.0, "engine": "plain"}
    optimizer = GradientDescent(network.save(), 0.1)
    training = Training(network, optimizer, np.zeros((9, 3)), np.zeros((1, 9)), None, **given)
    with closing(training.epochs(3, here, shuffle=True)) as losses:
        for _ in range(epochs):
            next(losses)
    for _ in range(epochs):
        shuffled(np.arange(9), there)
    assert here.randint(1 << 30) == there.randint(1 << 30)


@pytest.mark.parametrize(
    ("classes", "multilabel", "output", "units"),
    [(1, False, "sigmoid", 1), (2, False, "sigmoid", 1), (3, False, "softmax", 3), (2, True, "sigmoid", 2)],
)
def test_labels_have_an_output_that_tells_them_apart(classes: int, multilabel: bool, output: str, units: int) -> None:
    labels = Labels(np.arange(classes) * 10, multilabel)
    assert (labels.output, labels.units) == (output, units)
    y = np.array([[0, 1], [1, 1], [0, 0]]) if multilabel else np.array([0, 10, 20, 10])[: classes + 1] % (10 * classes)
    targets = labels.encode(y)
    answer = np.eye(classes)[targets[0]].T if output == "softmax" else targets * 0.8 + 0.1
    assert np.array_equal(labels.decode(answer), y)
    probabilities = labels.probabilities(answer, np)
    assert probabilities.shape == (len(y), max(2, units))
