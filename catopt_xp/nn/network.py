"""The model base and the fully connected network: forward, loss, backward.

Arrays are `(features, samples)` as in the chapter; in memory a set is sample-major, so `X.T` is the
C-contiguous `(m, n_x)` array from which rows are gathered (`first_layer.py`).
"""

from __future__ import annotations

import abc
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from catopt_xp.backend.xp import Array, Backend, as_array, asnumpy, backend_of, dtype_name, get_backend
from catopt_xp.nn.evaluation import EVALUATION_ROWS, Judge
from catopt_xp.nn.first_layer import Batch
from catopt_xp.nn.functional import HIDDEN_ACTIVATIONS, OUTPUT_ACTIVATIONS, clipped_binary_loss, pixel_scale
from catopt_xp.nn.labels import as_rows, check_labels, labels_for, weight_row
from catopt_xp.nn.parameters import Parameters, common_dtype, is_bias, layer_shapes


def checked_layout(neuron_cnt: Sequence[int], activation_func: Sequence[str]) -> tuple[list[int], list[str]]:
    """Units of every layer and the activation of every one after the input, as plain numbers and names.

    Raises ValueError for a network that cannot be built.

    >>> checked_layout((4, 3, 1), ("relu", "sigmoid"))
    ([4, 3, 1], ['relu', 'sigmoid'])
    """
    try:
        units, names = [operator.index(n) for n in neuron_cnt], [str(name) for name in activation_func]
    except TypeError as error:
        raise ValueError(
            f"DeepNetwork: neuron_cnt is {neuron_cnt!r}; give whole numbers, one for each layer"
        ) from error
    if len(units) != len(names) + 1 or not names:
        raise ValueError(
            f"DeepNetwork: {len(units)} layer sizes and {len(names)} activations; "
            "give one activation for every layer after the input"
        )
    if min(units) < 1:
        raise ValueError(f"DeepNetwork: layer sizes are {units}; every layer needs at least one unit")
    for name in names[:-1]:
        if name not in HIDDEN_ACTIVATIONS:
            raise ValueError(f"DeepNetwork: unknown activation {name!r}; choose {', '.join(HIDDEN_ACTIVATIONS)}")
    if names[-1] not in OUTPUT_ACTIVATIONS:
        raise ValueError(f"DeepNetwork: the last activation is {names[-1]!r}; choose {', '.join(OUTPUT_ACTIVATIONS)}")
    if names[-1] == "softmax" and units[-1] < 2:
        raise ValueError("DeepNetwork: a softmax output needs at least two units; use sigmoid for one")
    return units, names


DROPOUT_STREAM = 2  # keeps masks apart from other random numbers of the same seed


class BaseRegressionModel(abc.ABC):
    """What `train` asks of a model: forward, backward, gradients by name, live parameters, loss, accuracy.

    A subclass implements `forward`, `backward`, `get_grad_dict`, `save` and `load`; `X` is (n_x, m), uint8 pixels
    (which stand for `X/255`) or floats, `Y` is (1, m).
    """

    position = (0, 0)
    """(epoch, step) of the next batch, set by the engine: what a dropout mask is drawn from, besides the seed."""

    @property
    def architecture(self) -> dict[str, Any]:
        """What a checkpoint says of the model, JSON-able; empty where a model cannot be built again from it."""
        return {}

    @abc.abstractmethod
    def forward(self, X: Array, train_mode: bool = True) -> Array:
        """Probabilities (n_out, m) for X (n_x, m); in `train_mode` keeps what `backward` needs."""

    @abc.abstractmethod
    def backward(self, Y: Array, weights: Array | None = None) -> Array | None:
        """Computes the gradients of the mean loss over the last batch; may return that loss, left on the device.

        `weights`: (m,), one for each sample; None: all are 1. A model may leave this argument out, if it is trained
        without weights.
        """

    @abc.abstractmethod
    def get_grad_dict(self) -> Mapping[str, Array]:
        """Gradients by parameter name, valid until the next `backward`."""

    @abc.abstractmethod
    def save(self) -> Mapping[str, Array]:
        """The parameters by name, as live arrays."""

    @abc.abstractmethod
    def load(self, state_dict: Mapping[str, Any]) -> None:
        """Copies parameters of the same names and shapes into the live arrays."""

    def loss(self, Y: Any, Y_hat: Any, weights: Any = None) -> float:
        """Mean cross-entropy of probabilities `Y_hat` (n_out, m) against `Y`, finite at 0 and 1.

        `weights`: (m,), one for each sample; None: all are 1.
        Equation: `-mean(y log p + (1-y) log(1-p))` with p clipped to [eps, 1-eps] of its dtype. Raises ValueError or
        TypeError, naming the argument, for shapes and values that do not fit.
        """
        backend, Y, Y_hat = labels_for(Y, Y_hat)
        row = weight_row(weights, Y_hat.shape[1], backend, Y_hat.dtype)
        return float(clipped_binary_loss(backend.asarray(Y, dtype=Y_hat.dtype), Y_hat, backend.xp, row))  # sync

    def forward_rows(self, samples: Array, rows: Array | slice, train_mode: bool = True) -> Array:
        """`forward` of the chosen rows of a sample-major set (m, n_x)."""
        backend = backend_of(samples)
        dtype = common_dtype(self.save())
        x = backend.gather(samples, rows, 0, samples.shape[1], dtype) * pixel_scale(samples.dtype)
        return self.forward(x.T, train_mode)

    def evaluate(
        self, X: Array, Y: Array, return_loss: bool = False, weights: Array | None = None
    ) -> float | tuple[float, float]:
        """Accuracy in [0, 1] over X (n_x, m), Y (1, m); with `return_loss` also the mean loss. In chunks.

        `weights`: (m,), one for each sample; None: all are 1.
        """
        right, total, size, m = 0.0, 0.0, 0.0, X.shape[1]
        for start in range(0, m, EVALUATION_ROWS):
            part = slice(start, min(m, start + EVALUATION_ROWS))
            Y_hat, labels = self.forward_rows(X.T, part, train_mode=False), Y[:, part]
            hits = (Y_hat > 0.5) == (labels > 0.5)
            given: dict[str, Array] = {}
            count = float(labels.shape[1])
            if weights is not None:
                given = {"weights": weights[part]}
                hits, count = hits * weights[part], float(weights[part].sum())
            right += float(hits.sum())  # sync
            total += self.loss(labels, Y_hat, **given) * count
            size += count
        return (right / size, total / size) if return_loss else right / size

    def evaluate_rows(self, samples: Array, Y: Array, weights: Array | None = None) -> tuple[float, float]:
        """Accuracy and mean loss over a sample-major set (m, n_x) with labels (·, m) and weights (m,) of samples."""
        given = {} if weights is None else {"weights": weights}  # a model of one's own may know none
        return cast(tuple[float, float], self.evaluate(samples.T, Y, return_loss=True, **given))


class DeepNetwork(BaseRegressionModel):
    """A fully connected classifier with He initialisation.

    `neuron_cnt`: units of every layer, the input first, e.g. `[n_x, 30, 20, 20, 1]`.
    `activation_func`: one name per layer after the input: relu, sigmoid, tanh or identity, and sigmoid or softmax at
    the end (or identity or exp, which predict numbers: `MLPRegressor`).
    A sigmoid output takes labels of 0 and 1, (n_out, m); a softmax output takes class numbers, (1, m); the others take
    numbers, (n_out, m).
    `seed`: of the initial weights, drawn on the host by PCG64 as `W ~ N(0, 2/n_in)` (He et al. 2015), b = 0; None
    leaves them 0, for a network that is loaded. `dtype`: float32 or float64. `dropout`: probability that a hidden unit
    is left out of a training pass (inverted: the others are divided by `1 - dropout`). `device`: as for `get_backend`.
    `clipped_loss`: `backward` takes its loss from probabilities clipped at the dtype's eps, as scikit-learn does, not
    from logits.

    Raises ValueError for a layout that cannot be built.

    >>> model = DeepNetwork([4, 3, 1], ["relu", "sigmoid"], seed=1)
    >>> model.forward(np.zeros((4, 2), dtype=np.float32)).tolist()
    [[0.5, 0.5]]
    >>> list(model.save())
    ['W0', 'W1', 'b0', 'b1']
    """

    def __init__(
        self,
        neuron_cnt: Sequence[int],
        activation_func: Sequence[str],
        seed: int | None = 0,
        dtype: Any = "float32",
        *,
        dropout: float = 0.0,
        device: str | Backend = "cpu",
        clipped_loss: bool = False,
    ) -> None:
        self.neuron_cnt, self.activation_func = checked_layout(neuron_cnt, activation_func)
        self.dtype = np.dtype(dtype).name
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"DeepNetwork: dtype is {self.dtype}; choose float32 or float64")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"DeepNetwork: dropout is {dropout}; it must be at least 0 and below 1")
        if seed is None and dropout:
            raise ValueError("DeepNetwork: dropout draws its masks from the seed, which is None; give a number")
        self.seed, self.dropout = None if seed is None else int(seed), float(dropout)
        self.position, self.clipped_loss = (0, 0), bool(clipped_loss)
        parameters = Parameters.zeros(layer_shapes(self.neuron_cnt), self.dtype, get_backend(device))
        if self.seed is not None:
            _initialise(parameters, self.seed)
        self.__setstate__({"parameters": parameters})

    @property
    def architecture(self) -> dict[str, Any]:
        """Everything that `DeepNetwork(**architecture)` needs to build this network again, JSON-able."""
        described = {
            "neuron_cnt": self.neuron_cnt,
            "activation_func": self.activation_func,
            "seed": self.seed,
            "dtype": self.dtype,
            "dropout": self.dropout,
        }
        return described | ({"clipped_loss": True} if self.clipped_loss else {})

    @property
    def kernel_obstacle(self) -> str | None:
        """The first feature of this network that the fused kernels lack, or None."""
        if {"identity", "exp"} & set(self.activation_func):
            return "its kernels know no identity and no exp"
        return "its kernels know no clipped losses" if self.clipped_loss else None

    def to(self, device: str | Backend) -> DeepNetwork:
        """A copy of this network on a device; this one stays where it is."""
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__() | {"parameters": self.parameters.to(get_backend(device))})
        return twin

    # What a pass left behind need not be copied or pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_") and k != "backend"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.parameters: Parameters = state["parameters"]
        self.backend, self._float = self.parameters.backend, self.parameters.flat.dtype
        self._judge = Judge(self.activation_func[-1], self.neuron_cnt[-1], self._float, self.backend)
        self._gradients: Parameters | None = None
        self._trace: _Trace | None = None
        self._batch: Batch | None = None

    def save(self) -> Parameters:
        """The parameters `W0, W1, …, b0, b1, …` as live views: what training changes, changes here."""
        return self.parameters

    def load(self, state_dict: Mapping[str, Any]) -> None:
        """Copies values into the live arrays; raises ValueError naming a missing, foreign or misshapen key."""
        self.parameters.copy_from(state_dict, "DeepNetwork.load")

    def get_grad_dict(self) -> Parameters:
        """Gradients by name, from the last `backward`; they are overwritten by the next one."""
        if self._gradients is None:
            raise RuntimeError("get_grad_dict: there is no gradient yet; call forward and backward first")
        return self._gradients

    def forward(self, X: Array, train_mode: bool = True) -> Array:
        """Probabilities for a batch.

        `X`: (n_x, m), uint8 pixels (seen as X/255) or floats, of any device; `train_mode`: keep what `backward` needs
        and apply dropout. Returns (n_out, m) in the namespace of X.

        Equation: `A0 = X; Z_k = W_k A_k + b_k; A_{k+1} = f_k(Z_k)`. Raises ValueError when X has other features.
        """
        source, samples = _samples(X, self.neuron_cnt[0], self.backend)
        with self.backend.activate():
            A = self.forward_rows(samples, slice(0, samples.shape[0]), train_mode)
        if train_mode:  # the next batch has another dropout mask
            self.position = (self.position[0], self.position[1] + 1)
        return A if source.device == self.backend.device else source.asarray(asnumpy(A))

    def forward_rows(self, samples: Array, rows: Array | slice, train_mode: bool = True) -> Array:
        """`forward` of the chosen rows of a sample-major set (m, n_x) that lies on this network's device."""
        count = rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]
        masks = dropout_masks(self, count) if train_mode else None
        batch = Batch(self.backend, self._float, samples, rows, count)
        trace = self._propagate(batch.times_weights(self.parameters["W0"]), masks)
        if train_mode:
            self._trace, self._batch = trace, batch
        return trace.probabilities

    def forward_from(self, Z: Array) -> Array:
        """`forward` from the first layer's product on, for an engine that makes that product itself.

        `Z`: `W0 X`, (units, m) in the network's dtype on its device, which is used up. Returns (n_out, m); keeps what
        `backward_to` needs, and applies dropout.
        """
        self._trace = self._propagate(Z, dropout_masks(self, Z.shape[1]))
        return self._trace.probabilities

    def _propagate(self, Z: Array, masks: list[Array] | None = None) -> _Trace:
        """What follows on the first layer's product `Z` (units, m), which is used up."""
        xp, last = self.backend.xp, len(self.activation_func) - 1
        outputs: list[Array] = []  # f_k(Z_k), what the derivative needs
        inputs: list[Array] = []  # the same after dropout, what the next layer sees
        for k in range(last):
            Z += self.parameters[f"b{k}"]
            A = HIDDEN_ACTIVATIONS[self.activation_func[k]].forward(Z, xp)
            outputs.append(A)
            inputs.append(A if masks is None else A * masks[k])
            Z = xp.matmul(self.parameters[f"W{k + 1}"], inputs[-1])
        Z += self.parameters[f"b{last}"]
        return _Trace(outputs, inputs, masks, Z, self._judge.output.forward(Z, xp))

    def backward(self, Y: Array, weights: Array | None = None) -> Array:
        """Gradients of the mean loss over the batch of the last `forward`; returns that loss, 0-d, on the device.

        `Y`: (n_out, m) of 0 and 1 for a sigmoid output, (1, m) class numbers for a softmax one, (n_out, m) numbers for
        the others. `weights`: (m,), one for each sample; None: all are 1.
        Equation: `dZ_last = (A - Y)/m`, with weights w `(A - Y) w/sum(w)`; `dW_k = dZ_k A_k^T; db_k = sum(dZ_k);
        dZ_{k-1} = f'(W_k^T dZ_k)`. The gradient of the input is never formed. Raises RuntimeError without a forward
        pass in train mode, ValueError when Y or weights are of another shape than that batch.
        """
        batch = self._batch
        if batch is None:
            raise RuntimeError("backward: call forward(X, train_mode=True) first")
        loss, dZ = self.backward_to(Y, weights)
        batch.weight_gradient(dZ, self.get_grad_dict()["W0"])
        self._batch = None  # it holds the whole set
        return loss

    def backward_to(self, Y: Array, weights: Array | None = None) -> tuple[Array, Array]:
        """`backward` as far as the first layer: the loss, and dZ (units, m) of that layer; W0's gradient is not made.

        Arguments and exceptions are those of `backward`.
        """
        trace, xp = self._trace, self.backend.xp
        if trace is None:
            raise RuntimeError("backward_to: call forward_from(Z) first")
        if self._gradients is None:
            self._gradients = self.parameters.zeros_like()
        gradients = self._gradients
        targets = self._judge.targets(Y, trace.logits)
        row = weight_row(weights, targets.shape[1], self.backend, self._float)
        dZ = trace.probabilities - targets  # (n_out, m)
        if row is None:
            dZ /= dZ.shape[1]
        else:
            dZ *= row / xp.sum(row)
        for k in range(len(self.activation_func) - 1, 0, -1):
            self.backend.matmul(dZ, trace.inputs[k - 1].T, gradients[f"W{k}"])
            gradients[f"b{k}"][...] = xp.sum(dZ, axis=1, keepdims=True)
            dA = xp.matmul(self.parameters[f"W{k}"].T, dZ)  # (units of layer k-1, m)
            if trace.masks is not None:
                dA *= trace.masks[k - 1]
            dZ = HIDDEN_ACTIVATIONS[self.activation_func[k - 1]].backward(dA, trace.outputs[k - 1], xp)
        gradients["b0"][...] = xp.sum(dZ, axis=1, keepdims=True)
        self._trace = None
        output = self._judge.output
        if self.clipped_loss:
            return output.loss_of_output(targets, trace.probabilities, xp, row), dZ
        return output.loss(trace.logits, targets, xp, row), dZ

    def loss(self, Y: Any, Y_hat: Any, weights: Any = None) -> float:
        """Mean cross-entropy of probabilities, clipped at the dtype's eps so that 0 and 1 are finite.

        `Y`: (n_out, m) of 0 and 1, or (1, m) class numbers with a softmax output; `Y_hat`: (n_out, m) probabilities;
        `weights`: (m,), one for each sample; None: all are 1.
        Of predicted numbers it is the loss that belongs to the output.

        >>> model = DeepNetwork([2, 1], ["sigmoid"])
        >>> model.loss(np.array([[1, 0]]), np.array([[1.0, 0.0]])) < 1e-12
        True
        """
        output = self.activation_func[-1]
        backend, Y, Y_hat = labels_for(Y, Y_hat, 1 if output == "softmax" else None)
        judge = Judge(output, Y_hat.shape[0], Y_hat.dtype, backend)
        row = weight_row(weights, Y_hat.shape[1], backend, Y_hat.dtype)
        return float(judge.output.loss_of_output(judge.targets(Y, Y_hat), Y_hat, backend.xp, row))  # sync

    def evaluate(
        self, X: Array, Y: Array, return_loss: bool = False, weights: Array | None = None
    ) -> float | tuple[float, float]:
        """Accuracy in [0, 1] over a set; with `return_loss` also its mean loss from the logits.

        `X`: (n_x, m) of any device; `Y`, `weights`: as for `backward`. Runs in chunks, so memory stays bounded. A
        multi-label sample is right when all its labels are. Raises ValueError for shapes or labels that do not fit.
        """
        _, samples = _samples(X, self.neuron_cnt[0], self.backend)
        labels = as_rows(Y)
        self._judge.check_shape(labels, samples.shape[0])
        targets = check_labels(labels, self.activation_func[-1], self.neuron_cnt[-1], self.dtype)
        with self.backend.activate():
            accuracy, loss = self.evaluate_rows(samples, self.backend.asarray(targets), weights)
        return (accuracy, loss) if return_loss else accuracy

    def evaluate_rows(self, samples: Array, Y: Array, weights: Array | None = None) -> tuple[float, float]:
        """Accuracy and mean loss over a sample-major set (m, n_x) with labels (·, m), both on this device.

        `samples`: an array, or what gives one for `samples[a:b, :]`, asked for from the first row to the last;
        `weights`: (m,), one for each sample; None: all are 1.
        """

        def product(rows: slice) -> Array:
            count = rows.stop - rows.start
            batch = Batch(self.backend, self._float, samples[rows, :], slice(0, count), count)
            return batch.times_weights(self.parameters["W0"])

        return self.evaluate_from(product, Y, weights)

    def evaluate_from(
        self, product: Callable[[slice], Array], Y: Array, weights: Array | None = None
    ) -> tuple[float, float]:
        """`evaluate_rows` for whoever makes the first layer's product: `W0 X` (units, n) of some rows, used up."""
        return self._judge.means(lambda rows: self._propagate(product(rows)).logits, Y, weights)


def _initialise(parameters: Parameters, seed: int) -> None:
    """Draws the weights, `W ~ N(0, 2/n_in)`, on the host."""
    rng = np.random.Generator(np.random.PCG64(seed))
    for name, (n_out, n_in) in parameters.shapes.items():
        if not is_bias(name):
            draw = rng.standard_normal((n_out, n_in), dtype=np.dtype(dtype_name(parameters.flat)).type)
            draw *= np.sqrt(2.0 / n_in).astype(draw.dtype)
            parameters[name] = draw


def _samples(X: Array, n_x: int, backend: Backend) -> tuple[Backend, Array]:
    """Returns the backend where X (n_x, m) lies, and its samples as (m, n_x) on this one."""
    source = backend_of(X)
    X = as_array(X, "X", source, "give uint8 pixels or real numbers")
    if X.ndim != 2 or X.shape[0] != n_x or not X.shape[1]:
        raise ValueError(
            f"X has shape {tuple(X.shape)}, this network takes (n_x, m) with n_x = {n_x} and m >= 1"
            " (samples in columns; pass X.T if yours are in rows)"
        )
    return source, backend.asarray(X.T)


def dropout_masks(network: DeepNetwork, count: int) -> list[Array] | None:
    """Draws a mask (units, count) for each hidden layer: 0, or 1/(1 - dropout). None without dropout.

    Seed and position alone decide what is drawn.
    """
    if not network.dropout:
        return None
    rng = np.random.Generator(np.random.PCG64([network.seed or 0, DROPOUT_STREAM, *network.position]))
    keep, dtype = 1.0 - network.dropout, np.dtype(network.dtype).type
    draws = (rng.random((units, count), dtype=dtype) for units in network.neuron_cnt[1:-1])
    return [network.backend.asarray((draw < keep).astype(dtype) / dtype(keep)) for draw in draws]


@dataclass
class _Trace:
    """What a forward pass leaves for the backward pass."""

    outputs: list[Array]
    inputs: list[Array]
    masks: list[Array] | None
    logits: Array
    probabilities: Array
