"""The network's gradients: against automatic differentiation (golden values), differences, and by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catopt_xp.nn.network import DeepNetwork

GOLDEN = json.loads((Path(__file__).parents[1] / "helpers" / "golden" / "gradients.json").read_text(encoding="ascii"))
OUTPUTS = {"sigmoid": ("sigmoid", 1), "multi-label": ("sigmoid", 3), "softmax": ("softmax", 4)}
NUMBERS = {"identity": ("identity", 2), "exp": ("exp", 2)}  # outputs that predict numbers
ACTIVATIONS = ("relu", "sigmoid", "tanh", "identity")

Array = np.ndarray[Any, Any]


def worst_relative(ours: Mapping[str, Array], golden: Mapping[str, Any]) -> tuple[float, str]:
    """The largest difference, relative to the largest value of its array, and the array's name."""
    gaps = {}
    for name, values in golden.items():
        expected = np.array(values)
        assert ours[name].shape == expected.shape, name
        gaps[name] = float(np.abs(ours[name] - expected).max() / np.abs(expected).max())
    assert set(ours) == set(golden)
    name = max(gaps, key=lambda key: (np.isnan(gaps[key]), gaps[key]))
    return gaps[name], name


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_loss_and_gradients_of_pytorch(case: dict[str, Any]) -> None:
    model = DeepNetwork(case["neuron_cnt"], case["activation_func"], dtype="float64")
    model.load({name: np.array(values) for name, values in case["parameters"].items()})
    X, Y = np.array(case["X"]), np.array(case["Y"])
    Y_hat = model.forward(X)
    training_loss = float(model.backward(Y))
    gap, name = worst_relative(dict(model.get_grad_dict()), case["gradients"])
    assert gap <= 1e-12, f"{case['name']}: {name} differs by {gap:.1e}, relative to its largest value"
    assert training_loss == pytest.approx(case["loss"], rel=1e-13)
    assert model.loss(Y, Y_hat) == pytest.approx(case["loss"], rel=1e-12)
    if case["activation_func"][-1] not in NUMBERS:
        assert model.evaluate(X, Y, return_loss=True)[1] == pytest.approx(case["loss"], rel=1e-13)  # type: ignore[index]


def test_the_golden_networks_cover_every_kind() -> None:
    names = {case["name"] for case in GOLDEN["cases"]}
    curved = [a for a in ACTIVATIONS if a != "identity"]
    deep = {f"{a} {output} depth {depth}" for a in curved for output in OUTPUTS for depth in range(2, 6)}
    straight = {f"identity {output} depth {depth}" for output in OUTPUTS for depth in (2, 3)}
    numbers = {f"tanh {output} depth {depth}" for output in NUMBERS for depth in (1, 2, 3)}
    assert names == deep | straight | numbers | {f"relu {output} depth 1" for output in OUTPUTS}
    assert {case["activation_func"][0] for case in GOLDEN["cases"] if case["name"].endswith("depth 5")} == set(curved)
    for case in GOLDEN["cases"]:
        for name, values in case["gradients"].items():
            assert np.abs(values).max() > 1e-6, f"{case['name']}: the gradient of {name} says nothing"


def network_and_batch(
    activation: str, output: str, depth: int, n_x: int = 5, m: int = 6, dropout: float = 0.0
) -> tuple[DeepNetwork, Array, Array]:
    """A float64 network with biases off zero, and a random batch with labels."""
    function, n_out = (OUTPUTS | NUMBERS)[output]
    rng = np.random.Generator(np.random.PCG64([depth, n_x, ACTIVATIONS.index(activation), n_out]))
    units, names = [n_x, *[4] * (depth - 1), n_out], [activation] * (depth - 1) + [function]
    model = DeepNetwork(units, names, seed=depth, dtype="float64", dropout=dropout)
    for name, array in model.save().items():
        if name.startswith("b"):
            array[...] = rng.standard_normal(array.shape) * 0.3
    X = rng.standard_normal((n_x, m))
    Y = rng.integers(0, n_out, (1, m)) if output == "softmax" else rng.integers(0, 2, (n_out, m))
    return model, X, Y


def training_loss(model: DeepNetwork, X: Array, Y: Array, weights: Array | None = None) -> float:
    """As a step of training has it, with the masks of the first one."""
    model.position = (0, 0)
    model.forward(X)
    return float(model.backward(Y, weights))


def directional_gap(model: DeepNetwork, loss: Callable[[], float], gradients: Mapping[str, Array]) -> float:
    """The slope along a random direction against central differences: the gap over the gradient's norm."""
    h = 1e-5
    rng = np.random.Generator(np.random.PCG64(8))
    params = model.save()
    gradients = {name: gradient.copy() for name, gradient in gradients.items()}
    directions = {name: rng.standard_normal(array.shape) for name, array in params.items()}
    norm = np.sqrt(sum((d * d).sum() for d in directions.values()))
    saved = {name: array.copy() for name, array in params.items()}
    losses = []
    for side in (+1, -1):
        for name, array in params.items():
            array[...] = saved[name] + side * h * directions[name] / norm
        losses.append(loss())
    model.load(saved)
    numeric = (losses[0] - losses[1]) / (2 * h)
    analytic = sum((gradients[name] * directions[name]).sum() for name in directions) / norm
    return float(abs(numeric - analytic) / np.sqrt(sum((g * g).sum() for g in gradients.values())))


@pytest.mark.parametrize("depth", range(1, 6))
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slope_along_a_random_direction(activation: str, output: str, depth: int) -> None:
    model, X, Y = network_and_batch(activation, output, depth)
    model.forward(X)
    model.backward(Y)
    gradients = model.get_grad_dict()
    gap = directional_gap(model, lambda: model.evaluate(X, Y, return_loss=True)[1], gradients)  # type: ignore[index]
    assert gap <= 1e-8, f"{activation}, {output}, depth {depth}: slopes differ by {gap:.1e} of the norm"


@pytest.mark.parametrize("output", OUTPUTS)
def test_slope_with_dropout_and_a_first_layer_in_blocks(output: str) -> None:
    # The mask is a function of seed and position, so every pass of this test drops the same units.
    model, X, Y = network_and_batch("tanh", output, depth=3, n_x=4301, dropout=0.3)
    training_loss(model, X, Y)
    gap = directional_gap(model, lambda: training_loss(model, X, Y), model.get_grad_dict())
    assert gap <= 1e-8, f"{output}: slopes differ by {gap:.1e} of the norm"


@pytest.mark.parametrize("clipped_loss", [False, True])
@pytest.mark.parametrize("output", OUTPUTS | NUMBERS)
def test_slope_with_weights_of_samples(output: str, clipped_loss: bool) -> None:
    made, X, Y = network_and_batch("tanh", output, depth=3)
    model = DeepNetwork(**made.architecture, clipped_loss=clipped_loss)
    model.load(made.save())
    weights = np.random.Generator(np.random.PCG64(6)).random(Y.shape[1])
    weights[2] = 0
    training_loss(model, X, Y, weights)
    gap = directional_gap(model, lambda: training_loss(model, X, Y, weights), model.get_grad_dict())
    assert gap <= 1e-8, f"{output}: slopes differ by {gap:.1e} of the norm"


@pytest.mark.parametrize("output", OUTPUTS)
def test_pixels_are_shares_of_255_and_the_bias_gradient_is_not_scaled(output: str) -> None:
    model, _, Y = network_and_batch("relu", output, depth=3, n_x=700)
    pixels = np.random.Generator(np.random.PCG64(5)).integers(0, 256, (700, Y.shape[1]), dtype=np.uint8)
    gradients = []
    for X in (pixels, pixels / 255):
        model.forward(X)
        model.backward(Y)
        gradients.append({name: gradient.copy() for name, gradient in model.get_grad_dict().items()})
    gap, name = worst_relative(*gradients)
    assert gap <= 1e-12, f"{name} differs by {gap:.1e}"


def test_two_samples_worked_out_by_hand() -> None:
    # Layers 2-2-1, relu and sigmoid. Samples x = (2, 1) with y = 1 and x = (-1, 1) with y = 0.
    # Z0 = W0 x + b0: (2 - 1, 1 + 0.5 - 1) = (1, 0.5), active; (-1 - 1, -0.5 + 0.5 - 1) = (-2, -1), cut to 0.
    # Z1 = (1, -2) A0 = 1 - 1 = 0 for both samples (the second sees zeros): a = 0.5, loss = log 2.
    # dZ1 = (a - y)/2 = (-0.25, 0.25); dW1 = -0.25 * (1, 0.5) + 0.25 * (0, 0); db1 = 0.
    # dA0 = (1, -2)^T dZ1 = (-0.25, 0.5) for the first sample, the second is cut; dW0 = dA0 (2, 1).
    model = DeepNetwork([2, 2, 1], ["relu", "sigmoid"], dtype="float64")
    model.load(
        {
            "W0": np.array([[1.0, -1.0], [0.5, 0.5]]),
            "b0": np.array([[0.0], [-1.0]]),
            "W1": np.array([[1.0, -2.0]]),
            "b1": np.array([[0.0]]),
        }
    )
    Y_hat = model.forward(np.array([[2.0, -1.0], [1.0, 1.0]]))
    loss = float(model.backward(np.array([[1, 0]])))
    assert Y_hat.tolist() == [[0.5, 0.5]]
    assert loss == pytest.approx(np.log(2), rel=1e-15)
    gradients = {name: gradient.tolist() for name, gradient in model.get_grad_dict().items()}
    assert gradients == {
        "W0": [[-0.5, -0.25], [1.0, 0.5]],
        "W1": [[-0.25, -0.125]],
        "b0": [[-0.25], [0.5]],
        "b1": [[0.0]],
    }
