"""Activations and losses: against 50 digits, at extreme inputs, and on every backend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.backend.xp import Backend
from catopt_xp.nn import functional
from catopt_xp.nn.functional import HIDDEN_ACTIVATIONS, OUTPUT_ACTIVATIONS

Array = np.ndarray[Any, Any]

LOGITS = [-1e4, -745.0, -89.0, -37.5, -1.0, -1e-9, 0.0, 1e-30, 0.3, 1.0, 17.0, 36.9, 88.0, 710.0, 1e4]
LABELS = [0.0, 1.0] * 7 + [0.0]
DTYPES = ("float32", "float64")


def exact(formula: Callable[[Any, Any], Any]) -> Array:
    """`formula(mpmath, z)` of every logit with 50 digits, rounded to float64."""
    mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed")
    with mpmath.workdps(50):
        return np.array([float(formula(mpmath, mpmath.mpf(z))) for z in LOGITS])


def softmax_of_pair(mp: Any, z: Any) -> Any:
    """The first of two classes, whose logits are z and 0.5."""
    return mp.exp(z) / (mp.exp(z) + mp.exp(mp.mpf("0.5")))


EXACT: dict[str, Callable[[Any, Any], Any]] = {
    "relu": lambda mp, z: max(z, 0),
    "sigmoid": lambda mp, z: 1 / (1 + mp.exp(-z)),
    "tanh": lambda mp, z: mp.tanh(z),
    "identity": lambda mp, z: z,
    "softmax": softmax_of_pair,
}


@pytest.mark.parametrize("name", EXACT)
def test_activation_has_the_value_of_50_digits(name: str, backend: Backend) -> None:
    Z = np.array([LOGITS, np.full(len(LOGITS), 0.5)] if name == "softmax" else [LOGITS])
    ours = backend.to_host(getattr(functional, name)(backend.asarray(Z), backend.xp))[0]
    # Values below the smallest normal number may have lost digits: the library's exp decides.
    np.testing.assert_allclose(ours, exact(EXACT[name]), rtol=1e-14, atol=1e-307)


@pytest.mark.parametrize("name", HIDDEN_ACTIVATIONS)
def test_gradient_through_an_activation_is_its_exact_derivative(name: str, backend: Backend) -> None:
    inside = [z for z in LOGITS if 1e-9 < abs(z) < 20]  # off the kink of relu, where 1 - A*A keeps its digits
    mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed")
    with mpmath.workdps(50):
        slopes = [float(mpmath.diff(lambda z: EXACT[name](mpmath, z), z)) for z in inside]
    Z, dA = backend.asarray(np.array([inside])), backend.asarray(np.full((1, len(inside)), 2.0))
    activation = HIDDEN_ACTIVATIONS[name]
    ours = activation.backward(dA, activation.forward(Z, backend.xp), backend.xp)
    np.testing.assert_allclose(backend.to_host(ours)[0], 2 * np.array(slopes), rtol=1e-13, atol=1e-15)


def test_gradient_through_relu_is_zero_at_zero_and_below(backend: Backend) -> None:
    A = backend.asarray(np.array([[0.0, -0.0, 1.0, -1.0]]))
    assert backend.to_host(functional.relu_backward(A + 5.0, A, backend.xp)).tolist() == [[0.0, 0.0, 6.0, 0.0]]


@pytest.mark.parametrize("z", range(len(LOGITS)), ids=lambda k: f"z={LOGITS[k]}")
def test_loss_has_the_value_of_50_digits(z: int, backend: Backend) -> None:
    y = LABELS[z]
    binary = exact(lambda mp, z: mp.log1p(mp.exp(-z if y else z)))[z]
    Z, Y = (backend.asarray(np.array([[x]])) for x in (LOGITS[z], y))
    assert float(functional.binary_loss(Z, Y, backend.xp)) == pytest.approx(binary, rel=1e-14, abs=1e-307)
    pair = exact(lambda mp, z: -mp.log(softmax_of_pair(mp, z)))[z]
    Z, Y = (backend.asarray(np.array(x)) for x in ([[LOGITS[z]], [0.5]], [[1.0], [0.0]]))
    # log(sum(exp)) rounds near 1, so its error is one of 1, not of a loss of 1e-300.
    assert float(functional.categorical_loss(Z, Y, backend.xp)) == pytest.approx(pair, rel=1e-14, abs=3e-16)


def test_loss_is_a_sum_over_outputs_and_a_mean_over_samples(backend: Backend) -> None:
    rng = np.random.default_rng(3)
    Z, Y = rng.standard_normal((3, 5)), rng.integers(0, 2, (3, 5)).astype(float)
    A = 1 / (1 + np.exp(-Z))
    by_hand = -(Y * np.log(A) + (1 - Y) * np.log(1 - A)).sum() / 5
    Z_, Y_, A_ = (backend.asarray(x) for x in (Z, Y, A))
    loss = functional.binary_loss(Z_, Y_, backend.xp)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(by_hand, rel=1e-14)
    assert float(functional.clipped_binary_loss(Y_, A_, backend.xp)) == pytest.approx(by_hand, rel=1e-14)


def test_losses_of_numbers_by_hand(backend: Backend) -> None:
    # Two outputs, three samples. Squared: half of (1 + 0 + 4) and (0 + 1 + 1) over 3 samples.
    Z, Y = (
        backend.asarray(np.array(x)) for x in ([[1.0, 2.0, 0.0], [0.0, 1.0, 2.0]], [[0.0, 2.0, 2.0], [0.0, 0.0, 1.0]])
    )
    assert float(functional.squared_loss(Z, Y, backend.xp)) == pytest.approx(3.5 / 3, rel=1e-15)
    # Poisson, mean e**z: y log y - y z - y + e**z, where a count of 0 leaves e**z.
    terms = [math.e, 2 * math.log(2) - 4 - 2 + math.e**2, 2 * math.log(2) - 2 + 1, 1, math.e, -2 - 1 + math.e**2]
    assert float(functional.poisson_loss(Z, Y, backend.xp)) == pytest.approx(sum(terms) / 3, rel=1e-15)


def test_a_count_below_one_has_a_logarithm_too(backend: Backend) -> None:
    # Mean 2, "count" 0.5: y log(y / 2) - y + 2.
    Z, Y = (backend.asarray(np.array([[x]])) for x in (math.log(2), 0.5))
    assert float(functional.poisson_loss(Z, Y, backend.xp)) == pytest.approx(0.5 * math.log(0.25) + 1.5, rel=1e-14)


def test_the_order_in_memory_changes_no_bit_of_a_sum() -> None:
    rng = np.random.default_rng(6)
    Z, Y = (3 * rng.standard_normal((40, 7))).astype("f4"), np.eye(40, dtype="f4")[rng.integers(0, 40, 7)].T
    other = np.asfortranarray(Z)
    e = np.exp(other - other.max(axis=0))
    assert not np.array_equal(e / e.sum(axis=0), functional.softmax(Z, np)), "these sums do not tell orders apart"
    assert np.array_equal(functional.softmax(other, np), functional.softmax(Z, np))
    for output in OUTPUT_ACTIVATIONS.values():
        for weights in (None, rng.random((1, 7)).astype("f4")):
            losses = [output.loss(z, np.asfortranarray(y), np, weights) for z, y in ((Z, Y), (other, Y.copy()))]
            assert losses[0] == losses[1]


@pytest.mark.parametrize("name", OUTPUT_ACTIVATIONS)
def test_the_loss_of_what_an_output_says_is_that_of_its_logits(name: str, backend: Backend) -> None:
    rng, output = np.random.default_rng(4), OUTPUT_ACTIVATIONS[name]
    Z, Y = rng.standard_normal((3, 5)), np.eye(3)[rng.integers(0, 3, 5)].T
    Z, Y, weights = (backend.asarray(x) for x in (Z, Y, rng.random((1, 5))))
    said = output.forward(Z + 0.0, backend.xp)
    for w in (None, weights):
        of_output = output.loss_of_output(Y, said, backend.xp, w)
        assert float(of_output) == pytest.approx(float(output.loss(Z, Y, backend.xp, w)), rel=1e-13)


@pytest.mark.parametrize("name", OUTPUT_ACTIVATIONS)
def test_a_weight_counts_a_sample_so_many_times(name: str, backend: Backend) -> None:
    rng, output, times = np.random.default_rng(5), OUTPUT_ACTIVATIONS[name], np.array([2, 0, 1, 3, 1])
    Z, Y = rng.standard_normal((3, 5)), np.eye(3)[rng.integers(0, 3, 5)].T
    weights = backend.asarray(times.reshape(1, -1).astype(float))
    weighted = output.loss(backend.asarray(Z), backend.asarray(Y), backend.xp, weights)
    repeated = (backend.asarray(x.repeat(times, axis=1)) for x in (Z, Y))
    assert float(weighted) == pytest.approx(float(output.loss(*repeated, backend.xp)), rel=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", [functional.clipped_binary_loss, functional.clipped_categorical_loss])
def test_loss_of_probabilities_is_finite_at_0_and_1(
    loss: Callable[[Any, Any, Any], Any], dtype: str, backend: Backend
) -> None:
    Y, Y_hat = (backend.asarray(np.array(x, dtype=dtype)) for x in ([[0, 1], [1, 0]], [[0, 0], [1, 1]]))
    value = float(loss(Y, Y_hat, backend.xp))
    assert 0 < value <= 2 * -math.log(np.finfo(dtype).eps) + 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_logits_give_finite_values_of_their_dtype(strict_backend: Backend, dtype: str, data: st.DataObject) -> None:
    width = 32 if dtype == "float32" else 64
    logit = st.floats(-1e4, 1e4, width=width)  # type: ignore[arg-type]
    rows = st.lists(st.lists(logit, min_size=2, max_size=2), min_size=2, max_size=4)
    host = np.array(data.draw(rows), dtype=dtype)
    Y = np.zeros_like(host)
    Y[0] = 1
    for backend in (Backend(np, "numpy", "cpu"), strict_backend):
        xp, Z = backend.xp, backend.asarray(host)
        targets = backend.asarray(Y)
        results = [activation.forward(Z, xp) for activation in HIDDEN_ACTIVATIONS.values()]
        results += [
            HIDDEN_ACTIVATIONS[a].backward(Z, HIDDEN_ACTIVATIONS[a].forward(Z, xp), xp) for a in HIDDEN_ACTIVATIONS
        ]
        for output in (output for output in OUTPUT_ACTIVATIONS.values() if output.classifies):
            results += [output.forward(Z, xp), output.loss(Z, targets, xp)]
        results += [functional.clipped_binary_loss(targets, functional.sigmoid(Z, xp), xp)]
        results += [functional.clipped_categorical_loss(targets, functional.softmax(Z, xp), xp)]
        for k, result in enumerate(results):
            assert backend.to_host(result).dtype == dtype, k
            assert np.isfinite(backend.to_host(result)).all(), k
        assert np.allclose(backend.to_host(functional.softmax(Z, xp)).sum(axis=0), 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "softmax", "binary_loss", "categorical_loss"])
def test_a_nan_stays_a_nan(name: str, backend: Backend) -> None:
    Z = backend.asarray(np.array([[np.nan], [1.0]]))
    arguments = [backend.zeros((2, 1), "float64")] if name.endswith("loss") else []
    result = backend.to_host(getattr(functional, name)(Z, *arguments, backend.xp))
    assert np.isnan(result.ravel()[0])


def test_one_hot_takes_labels_of_any_whole_dtype(backend: Backend) -> None:
    Z = backend.zeros((3, 4), "float32")
    for dtype in ("uint8", "int32", "int64"):
        labels, classes = (backend.asarray(np.array(x, dtype=dtype)) for x in ([[2, 0, 1, 2]], [[0], [1], [2]]))
        columns = backend.to_host(functional.one_hot(labels, classes, Z, backend.xp))
        assert columns.dtype == np.float32
        assert columns.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]


def test_tables_of_outputs_are_right_and_read_only() -> None:
    assert {name for name, output in OUTPUT_ACTIVATIONS.items() if output.classifies} == {"sigmoid", "softmax"}
    for part, field in ((OUTPUT_ACTIVATIONS["exp"], "loss"), (HIDDEN_ACTIVATIONS["tanh"], "backward")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, None)


def test_only_uint8_is_scaled() -> None:
    xp = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")
    scales = {np.dtype(n): functional.pixel_scale(np.dtype(n)) for n in ("uint8", "int8", "uint16", "float32", ">f4")}
    assert scales.pop(np.dtype("uint8")) == functional.pixel_scale(xp.uint8) == 1 / 255
    assert set(scales.values()) == {1.0} == {functional.pixel_scale(xp.float32)}
