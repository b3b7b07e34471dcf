"""A training set on its device: what is refused and how it is said, what is copied and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catopt_xp.backend.xp import Backend, NumpyBackend
from catopt_xp.data.resident import CHECK_ROWS, ResidentSet, SampleLayout, make_resident
from catopt_xp.nn.labels import check_labels

Array = np.ndarray[Any, Any]

M, N_X = 7, 5


def resident(X: Any, Y: Any = None, backend: Backend | None = None, **changes: Any) -> ResidentSet:
    """`make_resident` for a float32 network with one sigmoid output."""
    Y = np.arange(M).reshape(1, M) % 2 if Y is None else Y
    options: dict[str, Any] = {"n_x": N_X, "output": "sigmoid", "units": 1, "dtype": "float32"} | changes
    name = options.pop("name", "X")
    return make_resident(X, Y, backend or NumpyBackend(), SampleLayout(**options), name)


def sample_major(dtype: Any = "uint8") -> Array:
    """X (n_x, m) whose transpose is C-contiguous."""
    return (np.arange(M * N_X).reshape(M, N_X) % 2).astype(dtype).T


# Refused.


@pytest.mark.parametrize(
    ("X", "words"),
    [
        (np.zeros(M), r"X has shape \(7,\); give \(n_x, m\), a sample in each column"),
        (np.zeros((M, 2, 2)), r"X has shape \(7, 2, 2\)"),
        (np.zeros((M, N_X)), "X has 5 samples and Y has 7; samples go in columns: pass X.T"),
        (np.zeros((N_X, M + 1)), "X has 8 samples and Y has 7$"),
        (np.zeros((N_X + 1, M)), "X has 6 features, the network takes 5"),
        (np.zeros((0, M)), r"X has shape \(0, 7\): there is nothing to train on"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(X: Array, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resident(X)


def test_an_empty_set_and_missing_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="there is nothing to train on"):
        resident(np.zeros((N_X, 0)), np.zeros((1, 0)))
    with pytest.raises(ValueError, match="dev_X is given without dev_Y; pass both"):
        make_resident(sample_major(), None, NumpyBackend(), SampleLayout(5, "sigmoid", 1, "float32"), "dev_X")


@pytest.mark.parametrize("dtype", ["object", "complex64", ">c16", "U3", ">U3", "S3", "datetime64[s]", ">M8[s]", "V4"])
def test_what_is_no_number_is_refused_by_its_type(dtype: str) -> None:
    X = np.zeros((N_X, M), dtype=dtype)
    with pytest.raises(TypeError, match=r"dev_X holds .*; give uint8 pixels or real numbers"):
        resident(X, name="dev_X")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("feature", "sample"), [(0, 0), (3, CHECK_ROWS - 1), (4, CHECK_ROWS), (2, 2 * CHECK_ROWS + 10)]
)
def test_the_first_value_that_is_not_finite_is_named(feature: int, sample: int, bad: float, backend: Backend) -> None:
    X = np.zeros((2 * CHECK_ROWS + 11, N_X), dtype=np.float32).T
    X[feature, sample] = X[4, -1] = bad
    Y = np.zeros((1, X.shape[1]))
    with pytest.raises(ValueError, match=f"X is not finite at feature {feature}, sample {sample}; replace NaN"):
        resident(backend.asarray(X), Y, backend)


@pytest.mark.parametrize(
    ("labels", "output", "units", "error", "words"),
    [
        ([[0, 1, 2]], "sigmoid", 1, ValueError, r"Y has the label 2 \(sample 2\); a sigmoid output takes 0 and 1"),
        ([[0, 0.5]], "sigmoid", 1, ValueError, r"Y has the label 0.5 \(sample 1\)"),
        ([[np.nan, 1]], "sigmoid", 1, ValueError, r"Y has the label nan \(sample 0\)"),
        ([[0, 1], [1, 7]], "sigmoid", 2, ValueError, r"Y has the label 7 \(sample 1\)"),
        ([[0, 3, 1]], "softmax", 3, ValueError, r"Y has the label 3 \(sample 1\).*whole numbers from 0 to 2"),
        ([[0, -1]], "softmax", 3, ValueError, r"Y has the label -1 \(sample 1\)"),
        ([[0, 1.5]], "softmax", 3, ValueError, r"Y has the label 1.5 \(sample 1\)"),
        ([[0], [1]], "sigmoid", 1, ValueError, r"Y has shape \(2, 1\); this network's sigmoid output takes \(1, m\)"),
        ([[0, 1]], "sigmoid", 3, ValueError, r"Y has shape \(1, 2\); .*sigmoid output takes \(3, m\)"),
        ([[0, 1], [1, 0]], "softmax", 2, ValueError, r"Y has shape \(2, 2\); .*softmax output takes \(1, m\)"),
        ([0, 1], "sigmoid", 1, ValueError, r"Y has shape \(2,\)"),
        ([["cat", "dog"]], "sigmoid", 1, TypeError, "Y holds <U3; labels are numbers"),
        ([[None, 1]], "sigmoid", 1, TypeError, "Y holds object; labels are numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    labels: Any, output: str, units: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        check_labels(np.array(labels), output, units, "float32")
    assert "\n" not in str(raised.value)


# Labels.


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float32", "float64"])
def test_labels_of_any_number_type_become_those_of_the_network(dtype: str, backend: Backend) -> None:
    labels = (np.arange(M).reshape(1, M) % 2).astype(dtype)
    for given in (labels, labels[0], labels.tolist(), labels[0].tolist()):
        targets = backend.to_host(resident(sample_major(), given, backend).targets)
        assert (targets.dtype, targets.tolist()) == (np.float32, [[0, 1, 0, 1, 0, 1, 0]])
    targets = backend.to_host(resident(sample_major(), labels, backend, output="softmax", units=2).targets)
    assert (targets.dtype, targets.tolist()) == (np.int64, [[0, 1, 0, 1, 0, 1, 0]])


# Kept, copied, converted.


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_sample_major_set_of_the_right_type_is_never_copied(dtype: str) -> None:
    X = sample_major(dtype)
    result = resident(X)
    assert np.shares_memory(result.samples, X)
    assert (result.samples.shape, result.samples.dtype, result.notices) == ((M, N_X), dtype, [])


def test_read_only_memory_and_memory_maps_are_taken_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", sample_major().T)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    read_only = sample_major()
    read_only.flags.writeable = False
    for X in (mapped.T, read_only):
        result = resident(X)
        assert np.shares_memory(result.samples, X)
        assert result.notices == []
        np.testing.assert_array_equal(result.samples, sample_major().T)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_set_in_another_layout_is_copied_once_and_said(dtype: str) -> None:
    feature_major = np.ascontiguousarray(sample_major(dtype))
    every_other = np.repeat(sample_major(dtype), 2, axis=1)[:, ::2]
    for X in (feature_major, every_other):
        result = resident(X)
        assert not np.shares_memory(result.samples, X)
        assert result.samples.flags.c_contiguous
        np.testing.assert_array_equal(result.samples, X.T)
        assert result.notices == [
            "X was copied once into sample-major memory (0 MB); a C-contiguous X.T is not",
        ]


@pytest.mark.parametrize("layout", ["sample-major", "feature-major"])
@pytest.mark.parametrize("dtype", ["bool", "int8", "int16", "uint16", "int64", "float16", "float64", ">f4", ">i2"])
def test_other_number_types_are_converted_once_and_said(dtype: str, layout: str) -> None:
    X = sample_major(dtype)
    if layout == "feature-major":
        X = np.ascontiguousarray(X)
    result = resident(X, name="dev_X")
    assert result.samples.dtype == np.float32
    assert result.samples.dtype.isnative
    assert result.samples.flags.c_contiguous
    np.testing.assert_array_equal(result.samples, sample_major().T)
    assert result.notices == [f"dev_X was converted from {np.dtype(dtype)} to float32, once"]
    assert resident(sample_major("float64"), dtype="float64").notices == []


def test_a_list_is_taken_and_the_callers_array_is_left_alone() -> None:
    X = sample_major("float64")
    before = X.copy()
    assert resident(X.tolist()).samples.dtype == np.float32
    samples = resident(X).samples
    samples += 1
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int16", "float32", "float64"])
def test_a_set_goes_from_any_device_to_any_other(dtype: str, backend: Backend) -> None:
    X = sample_major(dtype)
    wanted = "uint8" if dtype == "uint8" else "float32"
    for there in (resident(X, backend=backend), resident(backend.asarray(X), backend=backend)):
        assert (there.samples.shape, there.targets.shape) == ((M, N_X), (1, M))
        host = backend.to_host(there.samples)
        assert host.dtype == wanted
        np.testing.assert_array_equal(host, sample_major().T)
    back = resident(backend.asarray(X), backend.asarray(np.zeros((1, M))))
    assert type(back.samples) is np.ndarray
    np.testing.assert_array_equal(back.samples, sample_major().T)
