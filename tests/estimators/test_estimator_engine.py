"""What engines and networks do for the estimators: weights of samples, sums of squares, numbers instead of classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from catopt_xp.backend.xp import Backend, NumpyBackend
from catopt_xp.data.resident import SampleLayout, make_resident
from catopt_xp.engines.choose import choose_engine, gpu_obstacle
from catopt_xp.engines.plain import SQUARED, PlainEngine, Settings
from catopt_xp.nn.first_layer import Batch
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import Adam

Array = np.ndarray[Any, Any]
M, N_X = 23, 2500


def made(engine: str, n_x: int = N_X, **given: Any) -> PlainEngine:
    """An engine over a small set, for a caller that asks for squares."""
    rng = np.random.default_rng(0)
    model = DeepNetwork([n_x, 7, 4, 3], ["relu", "tanh", "softmax"], dtype="float64")
    model.clips = True
    optimizer = Adam(model.save(), 1e-3, l2=0.1)
    X, Y = rng.standard_normal((M, n_x)), rng.integers(0, 3, (1, M))
    settings = Settings(5, **({"penalised": True} | given))
    return choose_engine(engine, model, optimizer, X, Y, NumpyBackend(), settings)[0]


def sum_of_squares(engine: PlainEngine) -> float:
    return float(sum((x * x).sum() for name, x in engine.model.save().items() if name.startswith("W")))


@pytest.mark.parametrize("engine", ["plain", "panels"])
def test_between_two_steps_an_engine_knows_the_squares_of_its_weights(engine: str) -> None:
    watched, plain = made(engine), made("plain")
    order, asked, expected = np.arange(M)[::-1].copy(), [watched.weight_squares()], [sum_of_squares(plain)]
    for _ in zip(watched.steps(0, order, 0, order), plain.steps(0, order), strict=True):
        asked.append(watched.weight_squares())
        expected.append(sum_of_squares(plain))
    assert watched.name == engine
    found = watched.fetch_squares(asked)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(set(expected)) == len(expected)
    watched.settle()
    assert float(watched.weight_squares()) == pytest.approx(expected[-1], rel=1e-12)


@pytest.mark.parametrize("engine", ["plain", "panels"])
def test_asking_for_squares_changes_no_weight(engine: str) -> None:
    silent, asked = made(engine), made(engine)
    order = np.arange(M)
    for _ in silent.steps(0, order, 0, order):
        pass
    for _ in asked.steps(0, order, 0, order):
        asked.weight_squares()
    for one in (silent, asked):
        one.settle()
    assert np.array_equal(silent.model.save()["W0"], asked.model.save()["W0"])


def test_squares_of_many_weights_are_summed_by_tasks(strict_backend: Backend) -> None:
    for backend in (NumpyBackend(), strict_backend):
        model = DeepNetwork([17 * SQUARED + 5, 1], ["sigmoid"], dtype="float64", device=backend)
        X, Y = backend.zeros((1, 17 * SQUARED + 5), "uint8"), backend.zeros((1, 1), "float64")
        engine = PlainEngine(model, Adam(model.save(), 1e-3), X, Y, backend, Settings(1))
        expected = np.square(backend.to_host(model.save()["W0"])).sum()
        assert engine.fetch_squares([engine.weight_squares()])[0] == pytest.approx(expected, rel=1e-12)


def test_models_of_ones_own_have_squares_too() -> None:
    engine = made("plain")
    engine.model = type("Own", (), {"save": lambda self: {"W0": np.full((2, 3), 2.0), "b0": np.ones((2, 1))}})()
    assert float(engine.weight_squares()) == 24.0


@pytest.mark.parametrize(
    ("n_x", "units", "batch", "blocks", "several"),
    [
        (64, 100, 64, 1, False),  # too small for threads
        (784, 100, 200, 1, True),  # one product, of BLAS's threads
        (1535, 30, 2000, 1, True),  # two blocks would be too narrow
        (3072, 100, 200, 4, False),  # blocks that fit the cache, dealt to threads
        (20_000, 30, 8, 16, False),
    ],
)
def test_products_have_threads_of_their_own_or_those_of_tasks(
    n_x: int, units: int, batch: int, blocks: int, several: bool
) -> None:
    model, samples = DeepNetwork([n_x, units, 1], ["relu", "sigmoid"], seed=None), np.zeros((batch, n_x), np.uint8)
    targets = np.zeros((1, batch), np.float32)
    engine = PlainEngine(model, Adam(model.save(), 1e-3), samples, targets, NumpyBackend(), Settings(batch))
    assert len(Batch(model.backend, np.dtype("float32"), samples, slice(0, batch), batch).columns) == blocks
    assert engine._narrow is not several


# --- what kernels do not know ---------------------------------------------------------------------------------------

UNKNOWN: dict[str, dict[str, Any]] = {
    "its kernels know no identity and no exp": {"names": ["identity", "softmax"]},
    "its kernels know no identity and no exp ": {"names": ["relu", "exp"]},
    "its kernels know no weights of samples": {"weighted": True},
    "its kernels know no clipped losses": {"clips": True},
    "its kernels do not add up the squares of the weights": {"penalised": True},
}


@pytest.mark.parametrize("obstacle", UNKNOWN)
def test_what_the_kernels_of_a_gpu_do_not_know_goes_to_the_plain_engine(obstacle: str) -> None:
    given = UNKNOWN[obstacle]
    model = DeepNetwork([N_X, 7, 3], given.get("names", ["relu", "softmax"]))
    model.weighted, model.clips = given.get("weighted", False), given.get("clips", False)
    settings, samples = Settings(5, penalised=given.get("penalised", False)), np.zeros((M, N_X), np.uint8)
    optimizer, backend = Adam(model.save(), 1e-3), NumpyBackend()
    assert gpu_obstacle(model, optimizer, samples, backend, settings) == obstacle.strip()


def test_a_network_that_kernels_know_meets_no_such_obstacle() -> None:
    assert DeepNetwork([4, 3, 1], ["tanh", "sigmoid"]).kernel_obstacle is None


# --- networks -------------------------------------------------------------------------------------------------------


def test_a_network_without_a_seed_starts_at_zero() -> None:
    model = DeepNetwork([4, 3, 1], ["relu", "sigmoid"], seed=None)
    assert not model.save().flat.any()
    assert DeepNetwork(**model.architecture).seed is None
    with pytest.raises(ValueError, match="dropout draws its masks from the seed, which is None; give a number"):
        DeepNetwork([4, 3, 1], ["relu", "sigmoid"], seed=None, dropout=0.5)


@pytest.mark.parametrize("output", ["identity", "exp"])
def test_numbers_have_a_loss_and_no_accuracy(output: str) -> None:
    model = DeepNetwork([2, 2], [output], dtype="float64")
    X, Y = np.ones((2, 3)), np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 4.0]])
    Y_hat = model.forward(X)
    assert model.loss(Y, Y_hat) == pytest.approx(float(model.backward(Y)), rel=1e-14)
    with pytest.raises(ValueError, match=f"^evaluate: the {output} output predicts numbers, and has no accuracy$"):
        model.evaluate_rows(X.T, Y)
    with pytest.raises(ValueError, match=f"^an {output} output predicts numbers; MLPRegressor trains such a network$"):
        make_resident(X, Y, NumpyBackend(), SampleLayout(2, output, 2, "float64"))


def test_a_weighted_network_needs_a_row_of_weights() -> None:
    model = DeepNetwork([2, 3], ["softmax"], dtype="float64")
    model.weighted = True
    X, labels = np.ones((2, 4)), np.array([[0, 1, 2, 1]])
    model.forward(X)
    with pytest.raises(ValueError, match=r"Y has shape \(0, 4\), expected \(1, 4\)"):
        model.backward(labels)
    model.forward(X)
    assert float(model.backward(np.concatenate([labels, [[1, 0, 0, 2]]]))) > 0


def test_a_copy_of_a_network_is_weighted_as_well() -> None:
    model = DeepNetwork([2, 3], ["softmax"])
    model.weighted, model.clips = True, True
    assert (model.to("cpu").weighted, model.to("cpu").clips) == (True, True)
