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


def made(engine: str, n_x: int = N_X, weights: Array | None = None, **given: Any) -> PlainEngine:
    """An engine over a small set, which keeps squares unless told otherwise."""
    rng = np.random.default_rng(0)
    model = DeepNetwork([n_x, 7, 4, 3], ["relu", "tanh", "softmax"], dtype="float64", clipped_loss=True)
    optimizer = Adam(model.save(), 1e-3, l2=0.1, l2_per_batch=True)
    X, Y = rng.standard_normal((M, n_x)), rng.integers(0, 3, (1, M))
    settings = Settings(**{"batch_size": 5, "squares": True} | given)
    return choose_engine(engine, model, optimizer, X, Y, NumpyBackend(), settings, weights=weights)[0]


def sum_of_squares(engine: PlainEngine) -> float:
    return float(sum((x * x).sum() for name, x in engine.model.save().items() if name.startswith("W")))


@pytest.mark.parametrize("engine", ["plain", "panels"])
def test_an_engine_keeps_the_squares_of_its_weights_before_each_batch(engine: str) -> None:
    watched, plain = made(engine), made("plain")
    order = np.arange(M)[::-1].copy()
    for epoch in range(2):
        expected = [sum_of_squares(plain)]
        for _ in zip(watched.steps(epoch, order, 0, order), plain.steps(epoch, order), strict=True):
            expected.append(sum_of_squares(plain))
        found = watched.fetch_squares()
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected[:-1], rtol=1e-12)
        assert len(set(expected)) == len(expected)
    assert watched.name == engine


@pytest.mark.parametrize("engine", ["plain", "panels"])
def test_keeping_squares_changes_no_weight(engine: str) -> None:
    silent, asked = made(engine, squares=False), made(engine)
    order = np.arange(M)
    for one in (silent, asked):
        for _ in one.steps(0, order, 0, order):
            pass
        one.settle()
    assert np.array_equal(silent.model.save()["W0"], asked.model.save()["W0"])


def test_squares_of_many_weights_are_summed_by_tasks(strict_backend: Backend) -> None:
    for backend in (NumpyBackend(), strict_backend):
        model = DeepNetwork([17 * SQUARED + 5, 1], ["sigmoid"], dtype="float64", device=backend)
        X, Y = backend.zeros((1, 17 * SQUARED + 5), "uint8"), backend.zeros((1, 1), "float64")
        engine = PlainEngine(model, Adam(model.save(), 1e-3), X, Y, backend, Settings(1, squares=True))
        expected = np.square(backend.to_host(model.save()["W0"])).sum()
        for _ in engine.steps(0, np.arange(1)):
            pass
        assert engine.fetch_squares()[0] == pytest.approx(expected, rel=1e-12)


def test_models_of_ones_own_have_squares_too() -> None:
    engine = made("plain")
    engine.model = type("Own", (), {"save": lambda self: {"W0": np.full((2, 3), 2.0), "b0": np.ones((2, 1))}})()
    assert float(engine._sum_of_squares()) == 24.0


@pytest.mark.parametrize("engine", ["plain", "panels"])
def test_whole_weights_are_repeated_samples(engine: str) -> None:
    weights = np.random.default_rng(1).integers(0, 3, M).astype(float)
    order = np.arange(M)
    weighted = made(engine, weights=weights)
    repeated = made("plain")
    repeated.slices, start = [], 0
    for part in weighted.slices:
        count = int(weights[part].sum())
        repeated.slices.append(slice(start, start + count))
        start += count
    repeated.lengths = repeated.sizes = [part.stop - part.start for part in repeated.slices]
    for one, rows in ((weighted, order), (repeated, np.repeat(order, weights.astype(int)))):
        for _ in one.steps(0, rows):
            pass
        one.settle()
    assert weighted.name == engine
    assert list(weighted.sizes) == list(repeated.sizes)
    np.testing.assert_allclose(weighted.fetch_losses(), repeated.fetch_losses(), rtol=1e-12)
    np.testing.assert_allclose(weighted.model.save()["W0"], repeated.model.save()["W0"], rtol=1e-9)


def test_accumulated_batches_count_by_their_weights() -> None:
    weights = np.random.default_rng(1).random(M)
    apart, whole = (made("plain", weights=weights, accumulate=k, batch_size=n) for k, n in ((5, 5), (1, M)))
    for one in (apart, whole):
        for _ in one.steps(0, np.arange(M)):
            pass
    np.testing.assert_allclose(apart.model.save()["W0"], whole.model.save()["W0"], rtol=1e-9)


def test_a_batch_without_any_weight_is_refused() -> None:
    engine = made("plain", weights=np.repeat([1.0, 0.0], [M - 5, 5]))
    with pytest.raises(ValueError, match=r"^the sample weights of a mini-batch are all zero; leave such samples out"):
        next(engine.steps(0, np.arange(M)))


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
    "its kernels know no clipped losses": {"clipped_loss": True},
    "its kernels do not add up the squares of the weights": {"squares": True},
}


@pytest.mark.parametrize("obstacle", UNKNOWN)
def test_what_the_kernels_of_a_gpu_do_not_know_goes_to_the_plain_engine(obstacle: str) -> None:
    given = UNKNOWN[obstacle]
    clipped_loss = given.get("clipped_loss", False)
    model = DeepNetwork([N_X, 7, 3], given.get("names", ["relu", "softmax"]), clipped_loss=clipped_loss)
    settings, samples = Settings(5, squares=given.get("squares", False)), np.zeros((M, N_X), np.uint8)
    optimizer, backend = Adam(model.save(), 1e-3), NumpyBackend()
    weighted = given.get("weighted", False)
    assert gpu_obstacle(model, optimizer, samples, backend, settings, weighted) == obstacle.strip()


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


@pytest.mark.parametrize("form", [lambda w: w, np.ndarray.tolist, lambda w: w.astype("float32")])
def test_weights_are_one_number_for_each_sample(form: Any) -> None:
    model = DeepNetwork([2, 3], ["softmax"], dtype="float64")
    X, labels, weights = np.ones((2, 4)), np.array([[0, 1, 2, 1]]), np.array([1.0, 0, 0, 2])
    for wrong in (weights[:3], weights.reshape(1, -1), 1.0):
        for ask in (model.backward, lambda Y, w: model.loss(Y, model.forward(X), w)):
            model.forward(X)
            with pytest.raises(ValueError, match=r"^weights has shape .*, expected \(4,\): a number for each sample$"):
                ask(labels, wrong)
    Y_hat = model.forward(X)
    assert model.loss(labels, Y_hat, form(weights)) == pytest.approx(float(model.backward(labels, form(weights))))


@pytest.mark.parametrize(("output", "units"), [("sigmoid", 1), ("sigmoid", 2), ("softmax", 3)])
@pytest.mark.parametrize("m", [5, 700])
def test_an_evaluation_with_whole_weights_is_one_of_repeated_samples(output: str, units: int, m: int) -> None:
    model = DeepNetwork([4, units], [output], dtype="float64")
    rng = np.random.default_rng(2)
    X, weights = rng.standard_normal((4, m)), rng.integers(0, 3, m)
    weights[:512] *= m < 512  # a chunk that weighs nothing
    Y = rng.integers(0, units, (1, m)) if output == "softmax" else rng.integers(0, 2, (units, m))
    expected = model.evaluate(np.repeat(X, weights, axis=1), np.repeat(Y, weights, axis=1), return_loss=True)
    assert model.evaluate(X, Y, return_loss=True, weights=weights) == pytest.approx(expected, rel=1e-12)
    assert model.evaluate(X, Y, weights=weights) == pytest.approx(expected[0], rel=1e-12)


def test_a_network_is_made_again_with_its_clipped_loss() -> None:
    model = DeepNetwork([2, 3], ["softmax"], clipped_loss=True)
    assert model.to("cpu").clipped_loss
    assert DeepNetwork(**model.architecture).clipped_loss
    assert "clipped_loss" not in DeepNetwork([2, 3], ["softmax"]).architecture
