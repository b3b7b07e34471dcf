"""Arrays of other libraries and of a GPU: taken where they lie, answered in their kind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from marks import some
from sklearn.base import clone

from catopt_xp.backend.devices import DeviceError
from catopt_xp.backend.xp import Backend, get_backend
from catopt_xp.estimators.arrays import checked_samples, in_kind_of, is_foreign
from catopt_xp.estimators.mlp import MLPClassifier, MLPRegressor

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

rng = np.random.default_rng(0)
X, Y = rng.standard_normal((60, 6)), rng.integers(0, 3, 60)
WEIGHTS = rng.random(60)
KINDS: list[type[Any]] = [MLPClassifier, MLPRegressor]


def small(kind: type[Any] = MLPClassifier, **given: Any) -> Any:
    return kind(**{"hidden_layer_sizes": (7,), "max_iter": 8, "random_state": 0, "batch_size": 20} | given)


def asks(model: Any) -> list[str]:
    return ["predict", "predict_proba", "predict_log_proba"] if isinstance(model, MLPClassifier) else ["predict"]


# --- arrays of the host, by DLPack ----------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_another_library_are_answered_in_their_kind(kind: type[Any], library: str) -> None:
    xp: Any = pytest.importorskip(library, reason=f"{library} is not installed")
    samples, labels, weights = (xp.asarray(np.asarray(x, dtype=np.float32)) for x in (X, Y, WEIGHTS))
    assert is_foreign(samples)
    here = small(kind).fit(samples, labels, sample_weight=weights)
    there = small(kind).fit(
        *(np.asarray(x, dtype=np.float32) for x in (X, Y)), sample_weight=WEIGHTS.astype(np.float32)
    )
    for ask in asks(here):
        answer, expected = getattr(here, ask)(samples), getattr(there, ask)(X.astype(np.float32))
        assert type(answer) is type(samples)
        np.testing.assert_array_equal(np.asarray(answer), expected)
    assert here.score(samples, labels, weights) == pytest.approx(
        there.score(X.astype(np.float32), Y, WEIGHTS), rel=1e-6
    )
    assert type(here.predict(X)) is np.ndarray
    assert {type(x) for x in here.coefs_} == {np.ndarray}


def test_names_of_classes_come_back_as_numpy_s() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = small().fit(torch.asarray(X), np.array(["a", "b", "c"])[Y])
    assert isinstance(model.predict(torch.asarray(X)), np.ndarray)
    assert isinstance(model.predict_proba(torch.asarray(X)), torch.Tensor)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"requires_grad": True}, r"a Tensor of torch\.float32 .*detach"), ({"dtype": "bfloat16"}, "bfloat16")],
)
def test_a_tensor_that_numpy_cannot_read_is_named(given: dict[str, Any], words: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    options = given | ({"dtype": getattr(torch, given["dtype"])} if "dtype" in given else {})
    with pytest.raises(TypeError, match=f"{words}.*; convert it$"):
        small().fit(torch.ones((60, 6), **options), Y)


@pytest.mark.parametrize("copied", [clone, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_backend_as_the_device_is_copied_with_the_estimator(copied: Any) -> None:
    twin = copied(small(device=get_backend("cpu")))
    assert twin.device.device == "cpu"
    np.testing.assert_array_equal(twin.fit(X, Y).coefs_[0], small().fit(X, Y).coefs_[0])


# --- a device of its own: the portable backend stands in for a GPU --------------------------------------------------


GIVEN: list[dict[str, Any]] = [{}, {"early_stopping": True}, {"solver": "lbfgs"}, {"solver": "sgd", "alpha": 0.0}]
EACH = [(kind, given) for given in GIVEN for kind in KINDS]


@pytest.mark.parametrize(("kind", "given"), some(EACH, [EACH[0], EACH[3], EACH[4], EACH[7]], pytest.mark.hardening))
def test_training_elsewhere_gives_the_numbers_of_numpy(kind: type[Any], given: Any, strict_backend: Backend) -> None:
    here = small(kind, **given, device=strict_backend).fit(X, Y, sample_weight=WEIGHTS)
    there = small(kind, **given).fit(X, Y, sample_weight=WEIGHTS)
    for ours, theirs in zip(here.coefs_, there.coefs_, strict=True):
        assert type(ours) is np.ndarray
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert here.loss_ == pytest.approx(there.loss_, rel=1e-9)
    np.testing.assert_allclose(here.predict(X), there.predict(X), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_a_device_stay_there(kind: type[Any], strict_backend: Backend) -> None:
    samples = strict_backend.asarray(X)
    model = small(kind, device=strict_backend).fit(samples, strict_backend.asarray(Y))
    model.partial_fit(samples, strict_backend.asarray(Y))
    expected = small(kind).fit(X, Y).partial_fit(X, Y)
    for ask in asks(model):
        answer = getattr(model, ask)(samples)
        assert str(answer.device) == strict_backend.device
        np.testing.assert_allclose(strict_backend.to_host(answer), getattr(expected, ask)(X), rtol=1e-9)
    assert model.score(samples, strict_backend.asarray(Y)) == pytest.approx(expected.score(X, Y))
    assert type(model.predict(X)) is np.ndarray


def test_a_model_moves_between_devices_with_its_moments(strict_backend: Backend) -> None:
    moved, stays = (small(engine="plain").fit(X, Y) for _ in range(2))
    for device in (strict_backend, "cpu"):
        moved.set_params(device=device).partial_fit(X, Y)
        stays.partial_fit(X, Y)
        for ours, theirs in zip(moved.coefs_, stays.coefs_, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_a_model_of_a_device_is_pickled_as_host_data(strict_backend: Backend) -> None:
    model = small(engine="plain", device=strict_backend).fit(X, Y)
    model.set_params(device="auto")  # the portable backend itself is not pickled
    twin = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(twin.predict_proba(X), small(engine="plain").fit(X, Y).predict_proba(X))
    twin.partial_fit(X, Y)
    model.partial_fit(X, Y)
    np.testing.assert_allclose(twin.coefs_[0], model.coefs_[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("samples", "pixels", "words"),
    [
        (np.zeros(3), False, r"X has shape \(3,\); give \(samples, features\)"),
        (np.zeros((0, 3)), False, r"X has shape \(0, 3\); give"),
        (np.zeros((2, 3), complex), False, "X holds complex128; give real numbers"),
        (np.array([[1.0, np.inf]]), False, "X contains NaN or infinity; replace them first"),
        (np.zeros((2, 3)), True, "X holds float64; with pixels=True give uint8"),
    ],
)
def test_arrays_of_a_device_are_checked(samples: Array, pixels: bool, words: str, strict_backend: Backend) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        checked_samples(strict_backend.asarray(samples), strict_backend, pixels)


def test_checked_arrays_become_floats_or_stay_pixels(strict_backend: Backend) -> None:
    for given, pixels, kind in (("int32", False, "float64"), ("uint8", False, "float64"), ("uint8", True, "uint8")):
        samples = strict_backend.asarray(np.ones((2, 3), given))
        assert str(checked_samples(samples, strict_backend, pixels).dtype).endswith(kind)
    single = strict_backend.asarray(np.ones((2, 3), np.float32))
    assert checked_samples(single, strict_backend, False) is single


def test_samples_and_labels_of_a_device_that_do_not_fit_are_refused(strict_backend: Backend) -> None:
    samples = strict_backend.asarray(X)
    with pytest.raises(ValueError, match=r"^X has 60 samples, and y has 59$"):
        small(device=strict_backend).fit(samples, Y[:-1])
    model = small(device=strict_backend).fit(samples, Y)
    with pytest.raises(ValueError, match="X has 5 features, but MLPClassifier is expecting 6"):
        model.predict(samples[:, :5])


def test_what_is_no_array_of_another_library() -> None:
    for given in ([1.0], (1.0,), np.zeros(1), np.float64(1), 1.0, None):
        assert not is_foreign(given)
    assert type(in_kind_of(np.zeros(2), [[1.0]], "auto")) is np.ndarray


# --- a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["plain", "auto"])
@pytest.mark.parametrize("library", ["cupy", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_a_gpu_are_trained_on_and_answered_there(kind: type[Any], library: str, engine: str) -> None:
    xp: Any = pytest.importorskip(library, reason=f"{library} is not installed")
    try:
        get_backend("cuda", strict_device=True)
    except DeviceError as error:
        pytest.skip(str(error))
    on_gpu = (lambda x: xp.asarray(x, device="cuda")) if library == "torch" else xp.asarray
    model = small(kind, engine=engine).fit(on_gpu(X), on_gpu(Y), sample_weight=on_gpu(WEIGHTS))
    expected = small(kind, engine="plain", device="cpu").fit(X, Y, sample_weight=WEIGHTS)
    for ours, theirs in zip(model.coefs_, expected.coefs_, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    twin = pickle.loads(pickle.dumps(model))
    for ask in asks(model):
        answer = getattr(model, ask)(on_gpu(X))
        assert type(answer) is type(on_gpu(X))
        host = answer.cpu().numpy() if library == "torch" else answer.get()
        np.testing.assert_allclose(host, getattr(expected, ask)(X), rtol=1e-9)
        np.testing.assert_allclose(getattr(twin, ask)(X), host, rtol=1e-9)
    assert twin._network.backend.name == "numpy"
