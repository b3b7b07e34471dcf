"""Activations, their derivatives, and losses from logits: pure array formulas, the same on every device.

Every function takes the array module `xp` last and uses operations of the array API standard alone, so
NumPy, CuPy and any other namespace of that standard run the same line. Derivatives are written in terms of the
*output* `A`, so the input `Z` need not be kept. Arrays are `(units, samples)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from catopt_xp.backend.xp import Array

PIXEL_SCALE = 1.0 / 255.0


def pixel_scale(dtype: Any) -> float:
    """Factor that turns stored values into what the network sees: 1/255 for uint8 pixels, 1 for anything else.

    >>> import numpy as np
    >>> pixel_scale(np.dtype("uint8")) == 1 / 255, pixel_scale(np.dtype("float32"))
    (True, 1.0)
    """
    return PIXEL_SCALE if str(dtype).endswith("uint8") else 1.0


def in_rows(Z: Array, xp: Any) -> Array:
    """`Z` with its rows one behind the other in memory, a copy where they are not: sums have the same bits then.

    >>> import numpy as np
    >>> in_rows(np.ones((2, 3), order="F"), np).flags.c_contiguous
    True
    """
    return xp.reshape(xp.reshape(Z, (-1,)), Z.shape)


def relu(Z: Array, xp: Any) -> Array:
    """`max(Z, 0)`; a NaN stays a NaN.

    >>> import numpy as np
    >>> relu(np.array([[-1.0, 2.0]]), np)
    array([[0., 2.]])
    """
    return xp.maximum(Z, 0.0)


def relu_backward(dA: Array, A: Array, xp: Any) -> Array:
    """Gradient through relu: `dA` where the unit was active, 0 elsewhere."""
    return xp.where(A > 0, dA, 0.0)


def sigmoid(Z: Array, xp: Any) -> Array:
    """`1 / (1 + exp(-Z))` without overflow: with `e = exp(-|Z|)` it is `1/(1+e)` or `e/(1+e)`.

    >>> import numpy as np
    >>> sigmoid(np.array([[-1e4, 0.0, 1e4]]), np)
    array([[0. , 0.5, 1. ]])
    """
    e = xp.exp(-xp.abs(Z))
    return xp.where(Z >= 0, 1.0, e) / (1.0 + e)


def sigmoid_backward(dA: Array, A: Array, xp: Any) -> Array:
    """Gradient through the logistic function: `dA * A * (1 - A)`."""
    return dA * A * (1.0 - A)


def identity(Z: Array, xp: Any) -> Array:
    """`Z` itself: a layer without an activation, or the output that predicts numbers."""
    return Z


def identity_backward(dA: Array, A: Array, xp: Any) -> Array:
    """Gradient through nothing: `dA`."""
    return dA


def exponential(Z: Array, xp: Any) -> Array:
    """`exp(Z)`: the output that predicts counts."""
    return xp.exp(Z)


def tanh(Z: Array, xp: Any) -> Array:
    """Hyperbolic tangent."""
    return xp.tanh(Z)


def tanh_backward(dA: Array, A: Array, xp: Any) -> Array:
    """Gradient through tanh: `dA * (1 - A**2)`."""
    return dA * (1.0 - A * A)


def softmax(Z: Array, xp: Any) -> Array:
    """`exp(Z) / sum(exp(Z))` down each column (one sample), shifted by the column's maximum.

    >>> import numpy as np
    >>> softmax(np.array([[1e4], [1e4]]), np)
    array([[0.5],
           [0.5]])
    """
    Z = in_rows(Z, xp)
    e = xp.exp(Z - xp.max(Z, axis=0, keepdims=True))
    return e / xp.sum(e, axis=0, keepdims=True)


@dataclass(frozen=True)
class Activation:
    """A hidden layer's function and the gradient through it, given the function's output."""

    forward: Callable[[Array, Any], Array]
    backward: Callable[[Array, Array, Any], Array]


HIDDEN_ACTIVATIONS = {
    "relu": Activation(relu, relu_backward),
    "sigmoid": Activation(sigmoid, sigmoid_backward),
    "tanh": Activation(tanh, tanh_backward),
    "identity": Activation(identity, identity_backward),
}


def weighted_mean(each: Array, weights: Array | None, xp: Any) -> Array:
    """The mean of `each` (·, m) over samples, summed over outputs: `sum(w * each) / sum(w)`, 0-d.

    `weights`: (1, m), one a sample; None: all are 1.

    >>> import numpy as np
    >>> float(weighted_mean(np.array([[1.0, 3.0]]), np.array([[3.0, 1.0]]), np))
    1.5
    """
    if weights is None:
        return xp.sum(in_rows(each, xp)) / each.shape[1]
    return xp.sum(in_rows(each * weights, xp)) / xp.sum(weights)


def binary_loss(Z: Array, Y: Array, xp: Any, weights: Array | None = None) -> Array:
    """Binary cross-entropy from logits, summed over outputs, mean over samples.

    `Z`, `Y`: (n_out, m), Y of 0 and 1; `weights`: see `weighted_mean`. Equation:
    `max(z, 0) - y*z + log(1 + exp(-|z|))`, which is `-[y log a + (1-y) log(1-a)]` with `a = sigmoid(z)`, finite for
    every finite z. Returns a 0-d array.

    >>> import numpy as np
    >>> round(float(binary_loss(np.array([[0.0, -1e4]]), np.array([[1.0, 0.0]]), np)), 6)  # log(2) / 2
    0.346574
    """
    # The difference comes first: it is exact, and a logit far on the right side leaves the small logarithm whole.
    each = xp.maximum(Z, 0.0) - Y * Z + xp.log1p(xp.exp(-xp.abs(Z)))  # (n_out, m)
    return weighted_mean(each, weights, xp)


def categorical_loss(Z: Array, Y: Array, xp: Any, weights: Array | None = None) -> Array:
    """Cross-entropy of a softmax from logits, mean over samples.

    `Z`: (k, m); `Y`: (k, m) one-hot; `weights`: see `weighted_mean`. Equation: `log(sum(exp(z))) - z[y]`, shifted by
    the maximum. Returns a 0-d array.

    >>> import numpy as np
    >>> round(float(categorical_loss(np.array([[0.0], [0.0]]), np.array([[1.0], [0.0]]), np)), 6)  # log(2)
    0.693147
    """
    shifted = in_rows(Z - xp.max(Z, axis=0, keepdims=True), xp)
    sums = [xp.sum(x, axis=0, keepdims=True) for x in (xp.exp(shifted), Y * shifted)]
    return weighted_mean(xp.log(sums[0]) - sums[1], weights, xp)  # of (1, m)


def squared_loss(Z: Array, Y: Array, xp: Any, weights: Array | None = None) -> Array:
    """Half the squared error, summed over outputs, mean over samples: `(z - y)**2 / 2`.

    `Z`, `Y`: (n_out, m) numbers; `weights`: see `weighted_mean`. Returns a 0-d array.

    >>> import numpy as np
    >>> float(squared_loss(np.array([[3.0, 1.0]]), np.array([[1.0, 1.0]]), np))
    1.0
    """
    return weighted_mean(0.5 * xp.square(Z - Y), weights, xp)


def poisson_loss(Z: Array, Y: Array, xp: Any, weights: Array | None = None) -> Array:
    """Half the Poisson deviance of the means `exp(Z)`, summed over outputs, mean over samples.

    `Z`, `Y`: (n_out, m), Y at least 0; `weights`: see `weighted_mean`. Equation: `y log(y/a) - y + a` with
    `a = exp(z)`, where `0 log 0` is 0. Returns a 0-d array.

    >>> import numpy as np
    >>> float(poisson_loss(np.log([[2.0, 1.0]]), np.array([[2.0, 0.0]]), np))
    0.5
    """
    logs = xp.log(xp.where(Y > 0, Y, xp.ones_like(Y)))
    return weighted_mean(Y * (logs - Z) - Y + xp.exp(Z), weights, xp)


def squared_error(Y: Array, Y_hat: Array, xp: Any, weights: Array | None = None) -> Array:
    """`squared_loss` of predicted numbers (n_out, m)."""
    return squared_loss(Y_hat, Y, xp, weights)


def poisson_deviance(Y: Array, Y_hat: Array, xp: Any, weights: Array | None = None) -> Array:
    """`poisson_loss` of predicted means (n_out, m)."""
    return poisson_loss(xp.log(Y_hat), Y, xp, weights)


def clipped_binary_loss(Y: Array, Y_hat: Array, xp: Any, weights: Array | None = None) -> Array:
    """Binary cross-entropy of probabilities (n_out, m), clipped at the dtype's eps so that 0 and 1 stay finite."""
    P = _clipped(Y_hat, xp)
    return -weighted_mean(Y * xp.log(P) + (1.0 - Y) * xp.log(1.0 - P), weights, xp)


def clipped_categorical_loss(Y: Array, Y_hat: Array, xp: Any, weights: Array | None = None) -> Array:
    """Cross-entropy of class probabilities (k, m) against one-hot Y, clipped at the dtype's eps."""
    P = _clipped(xp.sum(Y * Y_hat, axis=0, keepdims=True), xp)  # of the true class: (1, m)
    return -weighted_mean(xp.log(P), weights, xp)


def _clipped(P: Array, xp: Any) -> Array:
    eps = xp.finfo(P.dtype).eps  # of its own type: 1 less that of a long double is no float64
    return xp.clip(P, eps, 1 - eps)


@dataclass(frozen=True)
class Output:
    """An output layer: its activation and the loss that belongs to it.

    `loss(Z, Y, xp, weights)`: from logits; `loss_of_output(Y, Y_hat, xp, weights)`: from what the layer says, where
    probabilities are clipped; `classifies`: whether those are probabilities, not numbers. In each pair the gradient at
    the logits is `(A - Y) / m`, so it needs no field of its own.
    """

    forward: Callable[[Array, Any], Array]
    loss: Callable[[Array, Array, Any, Array | None], Array]
    loss_of_output: Callable[[Array, Array, Any, Array | None], Array]
    classifies: bool = True


OUTPUT_ACTIVATIONS = {
    "sigmoid": Output(sigmoid, binary_loss, clipped_binary_loss),
    "softmax": Output(softmax, categorical_loss, clipped_categorical_loss),
    "identity": Output(identity, squared_loss, squared_error, classifies=False),
    "exp": Output(exponential, poisson_loss, poisson_deviance, classifies=False),
}


def one_hot(labels: Array, classes: Array, Z: Array, xp: Any) -> Array:
    """Labels (1, m) as columns of 0 and 1, in the shape, dtype and device of the logits `Z` (k, m).

    `classes`: (k, 1), the numbers 0 … k-1 in the labels' dtype.

    >>> import numpy as np
    >>> one_hot(np.array([[2, 0]]), np.array([[0], [1], [2]]), np.zeros((3, 2)), np)
    array([[0., 1.],
           [0., 0.],
           [1., 0.]])
    """
    return xp.where(labels == classes, xp.ones_like(Z), 0.0)
