"""The epochs of an estimator: steps in scikit-learn's random order, and L-BFGS by SciPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, minimize

from catopt_xp.backend.xp import Array, Backend
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.training.loop import run_epochs

Rows = NDArray[np.int64]
HostArray = NDArray[Any]

PREDICTED_ROWS = 1024  # looked at together in prediction: what layers say of them stays in the cache


def initial_network(
    units: Sequence[int], hidden: str, output: str, dtype: str, rng: np.random.RandomState, backend: Backend
) -> DeepNetwork:
    """A network with weights by Glorot & Bengio (2010), drawn as scikit-learn draws them.

    `units`: of every layer; `hidden`, `output`: activations. Equation: weights and biases are uniform in `[-b, b]`,
    `b = sqrt(6/(n_in + n_out))`, with 2 instead of 6 for sigmoid layers; layer by layer, weights (n_in, n_out) first.
    """
    names = [*[hidden] * (len(units) - 2), output]
    network = DeepNetwork(units, names, seed=None, dtype=dtype, device=backend, clipped_loss=True)
    for k, (n_in, n_out) in enumerate(itertools.pairwise(units)):
        bound = math.sqrt((2.0 if hidden == "sigmoid" else 6.0) / (n_in + n_out))
        network.save()[f"W{k}"] = rng.uniform(-bound, bound, (n_in, n_out)).astype(dtype).T
        network.save()[f"b{k}"] = rng.uniform(-bound, bound, n_out).astype(dtype).reshape(-1, 1)
    return network


def shuffled(order: Rows, rng: np.random.RandomState) -> Rows:
    """The rows in another order, drawn as scikit-learn draws it: places are permuted, each order builds on the last."""
    places = np.arange(len(order))
    rng.shuffle(places)
    return order[places]


class DrawnOrders:
    """The orders of m rows, epoch after epoch, as scikit-learn draws them.

    `rng` draws them, one epoch ahead; with `shuffle` false every order is 0, 1, … m-1.
    """

    def __init__(self, m: int, rng: np.random.RandomState, shuffle: bool) -> None:
        self.order, self.rng, self.shuffle = np.arange(m), rng, shuffle
        self._ahead = 0  # orders that were drawn for epochs that have not begun
        self._before = rng.get_state()  # the last draw

    def __call__(self, epoch: int) -> Rows:
        """The order of the next epoch, whatever its number."""
        self._before = self.rng.get_state()
        self._ahead += 1
        if self.shuffle:
            self.order = shuffled(self.order, self.rng)
        return self.order

    def begun_by(self, engine: PlainEngine) -> Callable[..., Iterator[int]]:
        """The engine's `steps`, which tell that an epoch has begun."""

        def steps(*asked: Any) -> Iterator[int]:
            self._ahead -= 1
            yield from engine.steps(*asked)

        return steps

    def take_back(self) -> None:
        """Takes back the draw for an epoch that has not begun."""
        if self._ahead:
            self.rng.set_state(self._before)


def placed_targets(network: DeepNetwork, targets: HostArray) -> Array:
    """Targets (·, m) on the network's device, in the dtype that its loss takes."""
    classes = network.activation_func[-1] == "softmax"
    return network.backend.asarray(targets, dtype="int64" if classes else network.dtype)


class Training:
    """Epochs of mini-batch steps over one set.

    `network`, `optimizer`: what trains, in place; `samples`: (m, n_x), on the network's device; `targets`: (·, m) on
    the host, as the network takes them; `weights`: of samples, (m,) on the host, or None; `penalty`: scikit-learn's
    alpha; `loss_scale`: what losses are multiplied by; `engine`: as for `choose_engine`.
    """

    def __init__(
        self,
        network: DeepNetwork,
        optimizer: BaseOptimizer,
        samples: Array,
        targets: HostArray,
        weights: HostArray | None,
        *,
        batch_size: int,
        penalty: float,
        loss_scale: float,
        engine: str,
    ) -> None:
        self.network, self.optimizer = network, optimizer
        self.penalty, self.loss_scale, optimizer.l2 = penalty, loss_scale, penalty
        on_device, settings = placed_targets(network, targets), Settings(batch_size, squares=penalty > 0)
        self.engine, self.engine_reason = choose_engine(
            engine, network, optimizer, samples, on_device, network.backend, settings, weights=weights
        )

    def epochs(self, count: int, rng: np.random.RandomState, shuffle: bool) -> Generator[float]:
        """Trains epoch after epoch, at most `count`; yields the loss of each, when it has ended.

        After the last one, and wherever the caller leaves off, the weights are up to date and `rng` has made the draws
        of the epochs that were begun, no others.
        """
        orders, start = DrawnOrders(self.engine.samples.shape[0], rng, shuffle), int(self.optimizer.epoch)
        try:
            for epoch in run_epochs(self.engine, orders, start, start + count, steps=orders.begun_by(self.engine)):
                yield self._loss(epoch.losses)
        finally:
            orders.take_back()
            self.engine.settle()

    def _loss(self, losses: NDArray[Any]) -> float:
        """The loss of an epoch, the L2 penalty included: the mean over its batches, weighed by their samples."""
        engine, lengths = self.engine, np.array(self.engine.lengths)
        losses = losses.astype(np.float64) * self.loss_scale
        if self.penalty:
            losses += 0.5 * self.penalty * engine.fetch_squares() / np.array(engine.sizes, dtype=np.float64)
        return float((losses * lengths).sum() / lengths.sum())


def answers(network: DeepNetwork, samples: Array) -> Array:
    """What the network says of samples (m, n_x) on its device: (outputs, m), there."""
    backend, m = network.backend, samples.shape[0]
    with backend.activate(), np.errstate(over="ignore", invalid="ignore"):
        answer = backend.empty((network.neuron_cnt[-1], m), network.dtype)
        for start in range(0, m, PREDICTED_ROWS):
            part = slice(start, min(m, start + PREDICTED_ROWS))
            answer[:, part] = network.forward_rows(samples, part, train_mode=False)
        return answer


class Cost:
    """The mean loss of a set with an L2 penalty, and its gradient, as a function of all parameters.

    `network`: of float64, which is what SciPy works in; the rest as for `Training`.
    """

    def __init__(
        self,
        network: DeepNetwork,
        samples: Array,
        targets: HostArray,
        weights: HostArray | None,
        penalty: float,
        loss_scale: float,
    ) -> None:
        self.network, self.samples, self.targets = network, samples, placed_targets(network, targets)
        self.weights = None if weights is None else network.backend.asarray(weights, dtype=network.dtype)
        self.size = samples.shape[0] if weights is None else float(weights.sum())
        self.penalty, self.loss_scale = penalty, loss_scale

    def __call__(self, x: HostArray) -> tuple[float, HostArray]:
        """The cost at x, (parameters,), and its gradient."""
        network, backend = self.network, self.network.backend
        parameters = network.save()
        with backend.activate(), np.errstate(over="ignore", invalid="ignore"):
            parameters.flat[...] = backend.asarray(x)
            network.forward_rows(self.samples, slice(0, self.samples.shape[0]))
            loss = float(network.backward(self.targets, self.weights)) * self.loss_scale  # sync
            gradient = np.array(backend.to_host(network.get_grad_dict().flat))  # sync
        weights = x[: parameters.n_weights]
        gradient[: parameters.n_weights] += self.penalty / self.size * weights
        return loss + 0.5 * self.penalty / self.size * float(weights @ weights), gradient


def minimise(cost: Cost, tol: float, max_iter: int, max_fun: int) -> OptimizeResult:
    """Minimises the cost from the network's weights on, which in the end are the best found; SciPy's result."""
    start = np.array(cost.network.backend.to_host(cost.network.save().flat))  # sync
    options = {"maxfun": int(max_fun), "maxiter": int(max_iter), "gtol": float(tol)}
    result = minimize(cost, start, method="L-BFGS-B", jac=True, options=options)
    cost.network.save().flat[...] = cost.network.backend.asarray(result.x)
    return result
