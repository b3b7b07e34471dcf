"""The quasi-Newton method L-BFGS, SciPy's, on the network's loss and gradient over a whole set. Floor F4."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, minimize

from catopt_xp.backend.xp import Array
from catopt_xp.nn.network import DeepNetwork

HostArray = NDArray[Any]


class Cost:
    """The mean loss of a set with an L2 penalty, and its gradient, as a function of all parameters.

    `network`: of float64, which is what SciPy works in; `samples`: (m, n_x) on its device; `targets`: (·, m) there;
    `size`: samples, or the sum of their weights; the rest as for `Training`.
    """

    def __init__(
        self, network: DeepNetwork, samples: Array, targets: Array, size: float, penalty: float, loss_scale: float
    ) -> None:
        self.network, self.samples, self.targets = network, samples, targets
        self.size, self.penalty, self.loss_scale = size, penalty, loss_scale

    def __call__(self, x: HostArray) -> tuple[float, HostArray]:
        """The cost at x, (parameters,), and its gradient."""
        network, backend = self.network, self.network.backend
        parameters = network.save()
        with backend.activate(), np.errstate(over="ignore", invalid="ignore"):
            parameters.flat[...] = backend.asarray(x)
            network.forward_rows(self.samples, slice(0, self.samples.shape[0]))
            loss = float(network.backward(self.targets)) * self.loss_scale  # sync
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
