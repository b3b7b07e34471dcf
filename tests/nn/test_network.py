"""The network beyond its gradients: layouts, weights, pixels, blocks, dtypes, devices, dropout, copies, waits."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from catopt_xp.backend import xp as backend_module
from catopt_xp.backend.xp import Backend, NumpyBackend, backend_of
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.nn.evaluation import EVALUATION_ROWS
from catopt_xp.nn.first_layer import MIN_WIDTH, Batch
from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork, dropout_masks
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS, make_optimizer

Array = np.ndarray[Any, Any]

HIDDEN = ("relu", "sigmoid", "tanh")
OUTPUTS = {"one label": ("sigmoid", 1), "three labels": ("sigmoid", 3), "four classes": ("softmax", 4)}


def make(n_x: int = 6, output: str = "one label", **options: Any) -> DeepNetwork:
    function, n_out = OUTPUTS[output]
    defaults: dict[str, Any] = {"seed": 3, "dtype": "float64"}
    model = DeepNetwork([n_x, 5, 4, n_out], ["relu", "tanh", function], **(defaults | options))
    for name, bias in model.save().items():
        if name.startswith("b"):
            bias += 0.1
    return model


def samples_and_labels(model: DeepNetwork, m: int, pixels: bool = False) -> tuple[Array, Array]:
    """X (n_x, m), sample-major in memory, and labels as the network takes them."""
    rng = np.random.Generator(np.random.PCG64(7))
    n_x, n_out = model.neuron_cnt[0], model.neuron_cnt[-1]
    X = rng.integers(0, 256, (m, n_x), dtype=np.uint8).T if pixels else rng.standard_normal((m, n_x)).T
    softmax = model.activation_func[-1] == "softmax"
    return X, rng.integers(0, n_out, (1, m)) if softmax else rng.integers(0, 2, (n_out, m))


def gradient_of(model: DeepNetwork, X: Any, Y: Any) -> tuple[float, Array]:
    model.forward(X)
    loss = float(model.backward(Y))
    return loss, model.backend.to_host(model.get_grad_dict().flat).copy()


def train(model: DeepNetwork, optimizer: BaseOptimizer, X: Any, Y: Any, steps: int = 3) -> None:
    for _ in range(steps):
        model.forward(X)
        model.backward(Y)
        optimizer.update(model.get_grad_dict())


# Layouts and initial weights.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([3, 1], ["relu", "sigmoid"]), "2 layer sizes and 2 activations"),
        (([3], []), "1 layer sizes and 0 activations"),
        (([3, 0, 1], ["relu", "sigmoid"]), "every layer needs at least one unit"),
        (([3, 2, 1], ["swish", "sigmoid"]), "unknown activation 'swish'; choose relu, sigmoid, tanh"),
        (([3, 2, 1], ["softmax", "sigmoid"]), "unknown activation 'softmax'"),
        (([3, 1], ["relu"]), "the last activation is 'relu'; choose sigmoid, softmax"),
        (([3, 1], ["softmax"]), "a softmax output needs at least two units"),
        (([3, 1], ["sigmoid"], 0, "float16"), "dtype is float16; choose float32 or float64"),
    ],
)
def test_a_layout_that_cannot_be_built_is_refused_in_one_line(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        DeepNetwork(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_out_of_range_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout is .*; it must be at least 0 and below 1"):
        DeepNetwork([3, 1], ["sigmoid"], dropout=dropout)


def test_weights_start_normal_and_biases_at_zero() -> None:
    model = DeepNetwork([4000, 300, 1], ["relu", "sigmoid"], seed=5)
    W0 = model.save()["W0"]
    assert W0.dtype == np.float32
    n, sigma = W0.size, np.sqrt(2 / 4000)
    assert abs(W0.mean()) < 4 * sigma / np.sqrt(n)
    assert abs(W0.std() / sigma - 1) < 4 / np.sqrt(2 * n)
    assert abs((np.abs(W0) < sigma).mean() - 0.6827) < 4 * np.sqrt(0.6827 * 0.3173 / n)  # a normal distribution's share
    assert abs(model.save()["W1"].std() / np.sqrt(2 / 300) - 1) < 4 / np.sqrt(2 * 300)
    assert all((model.save()[name] == 0).all() for name in ("b0", "b1"))


def test_the_seed_alone_fixes_the_initial_weights_on_every_device(backend: Backend) -> None:
    here = make(seed=1, dtype="float32")
    there = make(seed=1, dtype="float32", device=backend)
    np.testing.assert_array_equal(backend.to_host(there.save().flat), here.save().flat)
    assert not np.array_equal(make(seed=2).save().flat, make(seed=1).save().flat)


def test_the_architecture_builds_the_network_again() -> None:
    model = make(output="four classes", dropout=0.25, seed=9)
    twin = DeepNetwork(**model.architecture)
    assert twin.architecture == model.architecture
    np.testing.assert_array_equal(twin.save()["W0"], model.save()["W0"])


# Pixels, blocks of features, products.


def test_uint8_means_shares_of_255_in_every_pass(backend: Backend) -> None:
    model = make(device=backend)
    pixels, Y = samples_and_labels(model, 9, pixels=True)
    np.testing.assert_allclose(model.forward(pixels), model.forward(pixels / 255), rtol=1e-12)
    gradient, expected = (gradient_of(model, X, Y)[1] for X in (pixels, pixels / 255))
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-15)
    evaluated = model.evaluate(pixels, Y, return_loss=True)
    assert evaluated == pytest.approx(model.evaluate(pixels / 255, Y, return_loss=True), rel=1e-12)


def test_numbers_of_other_dtypes_are_taken_as_they_are() -> None:
    model = make()
    numbers = np.array([[0, 1, 1, 0, 1, 1]]).T
    expected = model.forward(numbers.astype(float))
    for dtype in ("bool", "int8", "uint16", "int64", "float16", "float32", ">f4"):
        np.testing.assert_array_equal(model.forward(numbers.astype(dtype)), expected)


def test_the_bias_gradient_never_sees_the_scale_of_pixels() -> None:
    # With X = 0 the scale can reach b0's gradient alone by mistake: zeros as pixels and as floats must agree exactly.
    model = make()
    _, Y = samples_and_labels(model, 8)
    zeros = np.zeros((6, 8))
    (_, floats), (_, pixels) = (gradient_of(model, zeros.astype(dtype), Y) for dtype in ("float64", "uint8"))
    assert np.array_equal(floats, pixels)
    assert np.abs(model.get_grad_dict()["b0"]).min() > 1e-6


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("cache_bytes", [1, 4 * 8 * 640, 1 << 20])
def test_block_widths_do_not_change_results_beyond_rounding(cache_bytes: int, pixels: bool) -> None:
    results = []
    for size, tasks in ((cache_bytes, 3), (1 << 30, 1)):
        model = make(n_x=2 * MIN_WIDTH + 277)
        model.backend.cache_bytes, model.backend.tasks = size, tasks
        X, Y = samples_and_labels(model, 8, pixels)
        loss, gradient = gradient_of(model, X, Y)
        results.append(np.concatenate([gradient, [loss], model.forward(X).ravel()]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("n_x", [1, MIN_WIDTH - 1, MIN_WIDTH, 5000, 100_003])
@pytest.mark.parametrize(
    ("count", "cache_bytes"), [(1, 1 << 20), (64, 1 << 20), (2000, 1 << 20), (64, 1), (8, 1 << 30)]
)
def test_blocks_cover_every_feature_once_and_fit_the_cache(n_x: int, count: int, cache_bytes: int) -> None:
    backend = NumpyBackend()
    backend.cache_bytes = cache_bytes
    samples = np.broadcast_to(np.float32(0), (count, n_x))
    columns = Batch(backend, np.float32, samples, slice(0, count), count).columns
    assert [c.start for c in columns] == [0, *(c.stop for c in columns[:-1])]
    assert columns[-1].stop == n_x
    for c in columns[:-1]:
        assert MIN_WIDTH <= c.stop - c.start <= max(MIN_WIDTH, cache_bytes // (4 * count))


def test_the_gradient_handed_to_the_first_layers_product_is_left_alone(backend: Backend) -> None:
    pixels = backend.asarray(np.full((4, 6), 255, dtype=np.uint8))
    dZ, out = backend.asarray(np.ones((2, 4))), backend.zeros((2, 6), "float64")
    Batch(backend, dZ.dtype, pixels, slice(0, 4), 4).weight_gradient(dZ, out)
    assert backend.to_host(dZ).tolist() == [[1.0] * 4] * 2
    np.testing.assert_allclose(backend.to_host(out), np.full((2, 6), 4.0), rtol=1e-15)


class MatmulSpy:
    """NumPy, whose `matmul` also writes down the shape of each product."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        product: Array = np.matmul(a, b, out=out)
        self.shapes.append(product.shape)
        return product


def test_the_gradient_of_the_input_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, model = MatmulSpy(), make(n_x=97)
    X, Y = samples_and_labels(model, 11)
    model.backend.xp = spy
    monkeypatch.setattr(model.backend, "matmul", spy.matmul)
    train(model, make_optimizer("adam", model.save()), X, Y, steps=1)
    forward, backward = [(5, 11), (4, 11), (1, 11)], [(1, 4), (4, 11), (4, 5), (5, 11), (5, 97)]
    assert spy.shapes == forward + backward  # none is (97, 11)


# Types and memory.


@pytest.fixture
def dtypes_of_a_run(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the dtypes of all NumPy arrays that operations make, from the arrays that a backend hands out."""
    seen: Counter[str] = Counter()

    class Spy(np.ndarray[Any, Any]):
        def __array_finalize__(self, source: Any) -> None:
            seen[self.dtype.name] += 1

    def watched(method: Callable[..., Array]) -> Callable[..., Array]:
        return lambda *args, **kwargs: method(*args, **kwargs).view(Spy)

    for name in ("asarray", "zeros", "empty", "gather"):
        monkeypatch.setattr(NumpyBackend, name, watched(getattr(NumpyBackend, name)))
    monkeypatch.setattr(NumpyBackend, "to_host", lambda self, x: x.view(np.ndarray))
    return seen


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_run_has_arrays_of_its_own_float_type_alone(
    output: str, name: str, dtype: str, dtypes_of_a_run: Counter[str]
) -> None:
    model = make(output=output, dtype=dtype, dropout=0.3)
    X, Y = samples_and_labels(model, 40, pixels=True)
    options = {"weight_decay": 0.1, "l2": 0.1, "clip_norm": 1.0, "lr_scheduler": lambda rate, epoch: np.float64(rate)}
    optimizer = make_optimizer(name, model.save(), 0.1, **options)
    samples, targets = NumpyBackend().asarray(X.T), NumpyBackend().asarray(Y, None if "class" in output else dtype)
    engine = PlainEngine(model, optimizer, samples, targets, NumpyBackend(), Settings(16))
    dtypes_of_a_run.clear()
    assert list(engine.steps(0, np.arange(40))) == [1, 2, 3]
    optimizer.add_grad(model.get_grad_dict(), weight=0.5)
    optimizer.step()
    engine.fetch_losses()
    model.evaluate_rows(samples, targets)
    assert dtypes_of_a_run[dtype] > 100
    foreign = {"float16", "float32", "float64", "longdouble", "complex128"} - {dtype}
    assert not foreign & set(dtypes_of_a_run), dtypes_of_a_run
    for holder in (model, model.get_grad_dict(), optimizer, *optimizer._moments.values(), engine):
        arrays = {key: x for key, x in vars(holder).items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
        assert {x.dtype.name for x in arrays.values()} <= {dtype}, arrays


def test_evaluation_of_a_large_set_of_pixels_needs_little_memory() -> None:
    model = DeepNetwork([3000, 8, 1], ["relu", "sigmoid"])
    X, Y = samples_and_labels(model, 4 * EVALUATION_ROWS + 5, pixels=True)
    model.evaluate(X[:, :8], Y[:, :8])
    tracemalloc.start()
    try:
        model.evaluate(X, Y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * model.backend.cache_bytes < X.size / 1.4, f"{peak} bytes for {X.size} pixels"


# Labels and evaluation.


@pytest.mark.parametrize("m", [1, EVALUATION_ROWS, EVALUATION_ROWS + 1, 2 * EVALUATION_ROWS + 300])
@pytest.mark.parametrize("output", OUTPUTS)
def test_accuracy_and_loss_by_hand_also_in_chunks(output: str, m: int, backend: Backend) -> None:
    model = make(output=output, device=backend)
    X, Y = samples_and_labels(model, m)
    A = model.forward(X, train_mode=False)
    if output == "four classes":
        right = A.argmax(axis=0) == Y[0]
        each = -np.log(A[Y[0], np.arange(m)])
    else:
        right = ((A > 0.5) == (Y == 1)).all(axis=0)
        each = -(Y * np.log(A) + (1 - Y) * np.log(1 - A)).sum(axis=0)
    accuracy, loss = model.evaluate(X, Y, return_loss=True)  # type: ignore[misc]
    assert type(accuracy) is type(loss) is float
    assert accuracy == right.mean() == model.evaluate(X, Y)
    assert loss == pytest.approx(each.mean(), rel=1e-12)
    assert model.loss(Y, A) == pytest.approx(each.mean(), rel=1e-12)


def test_evaluation_leaves_the_pass_of_training_alone() -> None:
    model = make()
    X, Y = samples_and_labels(model, 8)
    loss, gradient = gradient_of(model, X, Y)
    model.forward(X)
    model.evaluate(X[:, :3], Y[:, :3])
    model.forward(X[:, :2], train_mode=False)
    assert float(model.backward(Y)) == loss
    assert np.array_equal(model.get_grad_dict().flat, gradient)


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_public_loss_is_finite_for_probabilities_0_and_1(output: str) -> None:
    model = make(output=output)
    _, Y = samples_and_labels(model, 5)
    for edge in (0.0, 1.0):
        for dtype in ("float32", "float64"):
            assert np.isfinite(model.loss(Y, np.full((model.neuron_cnt[-1], 5), edge, dtype=dtype)))


def test_labels_may_be_of_any_number_type() -> None:
    for output in OUTPUTS:
        model = make(output=output)
        X, Y = samples_and_labels(model, 7)
        expected = gradient_of(model, X, Y)[1]
        for labels in (Y.astype("uint8"), Y.astype("float32"), Y.tolist()):
            assert np.array_equal(gradient_of(model, X, labels)[1], expected)


def test_passes_out_of_order_and_misshapen_input_are_refused() -> None:
    model = make()
    X, Y = samples_and_labels(model, 3)
    with pytest.raises(RuntimeError, match="there is no gradient yet"):
        model.get_grad_dict()
    model.forward(X, train_mode=False)
    with pytest.raises(RuntimeError, match=r"backward: call forward\(X, train_mode=True\) first"):
        model.backward(Y)
    with pytest.raises(ValueError, match=r"X has shape \(3, 6\), this network takes .* n_x = 6 .* pass X.T"):
        model.forward(X.T)
    with pytest.raises(ValueError, match=r"DeepNetwork\.load: W1 is missing"):
        model.load({"W0": model.save()["W0"]})


# Dropout.


def test_masks_are_a_function_of_seed_and_position() -> None:
    def masked(seed: int, position: tuple[int, int]) -> Array:
        model = make(dropout=0.5, seed=seed)
        model.load(make(seed=1).save())
        model.position = position
        return gradient_of(model, *samples_and_labels(model, 30))[1]

    first = masked(1, (2, 3))
    assert np.array_equal(first, masked(1, (2, 3)))
    for seed, position in ((2, (2, 3)), (1, (2, 4)), (1, (3, 2)), (1, (0, 0))):
        assert not np.array_equal(first, masked(seed, position)), (seed, position)


def test_dropout_masks_are_equal_on_every_device(backend: Backend) -> None:
    model = DeepNetwork([4, 50, 40, 2], ["relu", "tanh", "sigmoid"], dropout=0.2, device=backend)
    drawn, own_drawn = dropout_masks(model, 200), dropout_masks(model.to("cpu"), 200)
    assert drawn is not None
    assert own_drawn is not None
    masks = [backend.to_host(mask) for mask in drawn]
    for mask, units, own in zip(masks, (50, 40), own_drawn, strict=True):
        assert mask.shape == (units, 200)
        assert mask.dtype == np.float32
        assert set(np.unique(mask)) == {np.float32(0), np.float32(1) / np.float32(0.8)}
        assert abs((mask == 0).mean() - 0.2) < 4 * np.sqrt(0.16 / mask.size)
        assert np.array_equal(mask, own)


def test_dropout_acts_in_training_passes_alone() -> None:
    model, plain = make(dropout=0.5), make()
    X, Y = samples_and_labels(model, 20)
    assert np.array_equal(model.forward(X, train_mode=False), plain.forward(X))
    assert model.evaluate(X, Y, return_loss=True) == plain.evaluate(X, Y, return_loss=True)
    assert not np.array_equal(model.forward(X), plain.forward(X))


# Copies.


def twins_by_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("twins_of", [copy.deepcopy, twins_by_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copied_model_and_optimizer_are_joined_and_learn_the_same(name: str, twins_of: Any) -> None:
    model = make(dropout=0.2)
    optimizer = make_optimizer(name, model.save(), 0.01)
    X, Y = samples_and_labels(model, 20)
    train(model, optimizer, X, Y)
    twin, twin_optimizer = twins_of((model, optimizer))
    assert twin_optimizer.param_dict is twin.save()
    before = twin.save().flat.copy()
    train(twin, twin_optimizer, X, Y)
    assert np.abs(twin.save().flat - before).max() > 0
    assert np.array_equal(model.save().flat, before)
    train(model, optimizer, X, Y)
    assert np.array_equal(model.save().flat, twin.save().flat)


def test_a_copy_of_the_model_alone_carries_no_pass() -> None:
    model = make()
    gradient_of(model, *samples_and_labels(model, 4))
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="call forward"):
        twin.backward(np.zeros((1, 4)))
    assert not np.shares_memory(twin.save().flat, model.save().flat)


# Devices.


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_elsewhere_takes_the_path_of_numpy(name: str, output: str, backend: Backend) -> None:
    here = make(output=output, dropout=0.2)
    there = here.to(backend)
    X, Y = samples_and_labels(here, 20, pixels=True)
    options = {"weight_decay": 0.1, "l2": 0.01, "clip_norm": 0.5}
    optimizer = make_optimizer(name, here.save(), 0.01, **options)
    moved = optimizer.on(there.save())
    train(here, optimizer, X, Y, steps=5)
    train(there, moved, backend.asarray(X), backend.asarray(Y), steps=5)
    np.testing.assert_allclose(backend.to_host(there.save().flat), here.save().flat, rtol=1e-10, atol=1e-13)
    assert there.evaluate(X, Y, return_loss=True) == pytest.approx(here.evaluate(X, Y, return_loss=True), rel=1e-10)


def test_to_is_a_copy_that_stays_where_it_is_put(backend: Backend) -> None:
    model = make()
    there = model.to(backend)
    assert (there.backend.device, there.architecture) == (backend.device, model.architecture)
    there.save()["W0"] = np.zeros((5, 6))
    assert np.abs(model.save()["W0"]).max() > 0
    assert there.to("cpu").save().backend.name == "numpy"


def test_forward_answers_in_the_namespace_of_its_input(backend: Backend) -> None:
    here, there = make(), make().to(backend)
    X, _ = samples_and_labels(here, 6)
    for model in (here, there):
        assert type(model.forward(X)) is np.ndarray
        answer = model.forward(backend.asarray(X))
        assert (backend_of(answer).xp, backend_of(answer).device) == (backend.xp, backend.device)
        np.testing.assert_allclose(backend.to_host(answer), here.forward(X), rtol=1e-13)


SYNCS = [f"__{name}__" for name in ("array", "bool", "buffer", "complex", "dlpack", "float", "index", "int", "iter")]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_epoch_fetches_its_losses_once_and_waits_for_nothing_else(
    name: str, accumulate: int, strict_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[str] = []
    array_type: Any = type(strict_backend.zeros(1, "float32"))

    def counted(key: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            syncs.append(key)
            return method(*args, **kwargs)

        return call

    model = make(dtype="float32", dropout=0.1, device=strict_backend)
    X, Y = samples_and_labels(model, 50, pixels=True)
    optimizer = make_optimizer(name, model.save(), weight_decay=0.1, clip_norm=1.0)
    samples, targets = strict_backend.asarray(X.T), strict_backend.asarray(Y, "float32")
    engine = PlainEngine(model, optimizer, samples, targets, strict_backend, Settings(8, accumulate=accumulate))
    with monkeypatch.context() as patch:
        for key in SYNCS:
            if hasattr(array_type, key):
                patch.setattr(array_type, key, counted(key, getattr(array_type, key)))
        patch.setattr(Backend, "to_host", counted("to_host", Backend.to_host))
        patch.setattr(backend_module, "asnumpy", counting_device_arrays(syncs, backend_module.asnumpy))
        float(strict_backend.zeros((), "float32"))
        assert syncs == ["__float__"], "the count itself does not work"
        syncs.clear()
        for _ in engine.steps(0, np.arange(50)):
            assert syncs == []
        losses = engine.fetch_losses()
    # One transfer; inside it the library turns the array into NumPy's in one way or another.
    assert Counter(syncs)["to_host"] == 1
    assert len(syncs) <= 3, syncs
    assert losses.shape == (7,)
    assert (losses > 0).all()


def counting_device_arrays(syncs: list[str], asnumpy: Callable[[Any], Array]) -> Callable[[Any], Array]:
    """`asnumpy`, which counts where it is given an array of a device (one of the host is on its way there)."""

    def call(x: Any) -> Array:
        if hasattr(x, "__array_namespace__") and not isinstance(x, np.ndarray):
            syncs.append("asnumpy")
        return asnumpy(x)

    return call


# The base class, for models of one's own.


class Constant(BaseRegressionModel):
    """Answers 0.75 for a sum of features above 0, else 0.25."""

    def forward(self, X: Any, train_mode: bool = True) -> Any:
        return np.where(X.sum(axis=0, keepdims=True) > 0, 0.75, 0.25)

    def backward(self, Y: Any) -> None:
        return None

    def get_grad_dict(self) -> dict[str, Any]:
        return {}

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state_dict: Any) -> None:
        return None


def test_a_model_of_ones_own_is_evaluated_by_the_base_class() -> None:
    X = np.array([[1.0, -1.0, 1.0, -1.0]])
    Y = np.array([[1, 0, 0, 0]])
    model = Constant()
    assert model.evaluate(X, Y) == 0.75
    accuracy, loss = model.evaluate(X, Y, return_loss=True)  # type: ignore[misc]
    assert (accuracy, loss) == (0.75, pytest.approx((-3 * np.log(0.75) - np.log(0.25)) / 4))
    np.testing.assert_array_equal(
        model.forward_rows(np.array([[0], [255]], np.uint8), np.array([1, 0])), [[0.75, 0.25]]
    )


@pytest.mark.parametrize(
    ("shape_x", "shape_y", "told"),
    [
        ((4, 3), (1, 1), r"^Y has shape \(1, 1\), expected \(1, 3\): a column for each of 3 samples$"),
        ((4, 3), (3, 1), r"^Y has shape \(3, 1\)"),
        ((3, 4), (1, 4), r"^X has shape \(3, 4\), this network takes \(n_x, m\) with n_x = 4 and m >= 1"),
        ((4, 0), (1, 0), r"^X has shape \(4, 0\)"),
        ((4,), (1, 1), r"^X has shape \(4,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_one_line(
    shape_x: tuple[int, ...], shape_y: tuple[int, ...], told: str
) -> None:
    model, X, Y = DeepNetwork([4, 1], ["sigmoid"]), np.ones(shape_x, np.float32), np.ones(shape_y, np.float32)

    def forward_and_backward() -> None:
        model.forward(X)
        model.backward(Y)

    for use in (forward_and_backward, lambda: model.evaluate(X, Y)):
        with pytest.raises(ValueError, match=told):
            use()


def test_lists_are_taken_as_arrays() -> None:
    model = DeepNetwork([2, 1], ["sigmoid"])
    assert model.forward([[0.0], [0.0]]).tolist() == [[0.5]]
    assert model.evaluate([[0.0], [0.0]], [0]) == 1.0


def test_the_position_decides_which_units_are_dropped() -> None:
    model, X = DeepNetwork([3, 50, 1], ["relu", "sigmoid"], dropout=0.5), np.ones((3, 1), np.float32)
    first, second = model.forward(X), model.forward(X)
    assert first.tolist() != second.tolist()
    model.position = (0, 0)
    assert model.forward(X).tolist() == first.tolist()


def test_the_set_is_not_kept_alive_after_the_backward_pass() -> None:
    model, X = DeepNetwork([3, 2, 1], ["relu", "sigmoid"]), np.ones((3, 4), np.float32)
    model.forward(X)
    model.backward(np.ones((1, 4)))
    assert model._trace is None
    with pytest.raises(RuntimeError, match="call forward"):
        model.backward(np.ones((1, 4)))


def test_labels_that_the_output_cannot_have_are_refused_by_evaluate() -> None:
    model, X = DeepNetwork([3, 1], ["sigmoid"]), np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"^Y has the label 255 \(sample 1\); a sigmoid output takes 0 and 1$"):
        model.evaluate(X, np.array([[0, 255]]))


@pytest.mark.parametrize("Y_hat", [np.array([[1, 0]]), [[1, 0]], np.array([[1.0, 0.0]])])
def test_the_loss_of_sure_answers_is_finite_whatever_they_come_as(Y_hat: Any) -> None:
    assert 0.0 <= DeepNetwork([3, 1], ["sigmoid"]).loss([[1, 0]], Y_hat) < 1e-6
