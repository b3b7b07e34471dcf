"""The flat buffer of parameters: live views, strict copies, copies that stay joined."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.backend.xp import Backend, NumpyBackend
from catopt_xp.nn.parameters import Parameters, is_bias, layer_shapes

SHAPES: dict[str, tuple[int, ...]] = layer_shapes([3, 2, 1])  # W0 (2, 3), W1 (1, 2), b0 (2, 1), b1 (1, 1)
SIZE = 11


def counted(backend: Backend, dtype: str = "float64") -> Parameters:
    return Parameters(backend.asarray(np.arange(SIZE), dtype=dtype), SHAPES)


def host(parameters: Parameters) -> list[float]:
    values: list[float] = parameters.backend.to_host(parameters.flat).tolist()
    return values


def test_views_lie_in_order_and_are_live(backend: Backend) -> None:
    p = counted(backend)
    assert list(p) == ["W0", "W1", "b0", "b1"]
    assert {name: tuple(p[name].shape) for name in p} == SHAPES == p.shapes
    assert backend.to_host(p["b0"]).tolist() == [[8], [9]]
    p.flat[...] = 0.0
    assert float(backend.to_host(p["W0"]).sum()) == 0.0
    view = p["W1"]
    p["W1"] = [[5.0, 6.0]]
    view += 1.0
    assert host(p)[6:8] == [6.0, 7.0]
    assert p["W1"] is view


@given(st.lists(st.integers(1, 7), min_size=2, max_size=6))
def test_weights_come_first_and_are_counted(neuron_cnt: list[int]) -> None:
    shapes = layer_shapes(neuron_cnt)
    p = Parameters.zeros(shapes, "float32", NumpyBackend())
    names, layers = list(p), len(neuron_cnt) - 1
    assert names == [f"W{k}" for k in range(layers)] + [f"b{k}" for k in range(layers)]
    assert p.n_weights == sum(a * b for a, b in itertools.pairwise(neuron_cnt))
    assert p.flat.size == p.n_weights + sum(neuron_cnt[1:])
    assert all(np.shares_memory(p[name], p.flat) for name in names)


def test_which_names_are_biases() -> None:
    assert [name for name in ("b0", "b12", "b", "bias", "b0x", "xb0", "W0", "beta") if is_bias(name)] == ["b0", "b12"]


@pytest.mark.parametrize(
    ("size", "shapes", "words"),
    [
        (3, {"W0": (2,)}, "hold 2 values, the flat array has 3"),
        (3, {"W0": (4,)}, "."),
        (2, {"b0": (1,), "W0": (1,)}, "W0 follows a bias"),
    ],
)
def test_shapes_that_do_not_fill_the_buffer_are_refused(size: int, shapes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Parameters(np.zeros(size), shapes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"W1": None}, "here: W1 is missing"),
        ({"W1": np.zeros((2, 1))}, r"here: W1 has shape \(2, 1\), expected \(1, 2\)"),
        ({"b0": np.zeros(2)}, r"here: b0 has shape \(2,\), expected \(2, 1\)"),
        ({"W2": np.zeros((1, 1))}, "here: W2 is not a parameter here"),
    ],
)
def test_copy_from_names_the_bad_key_and_copies_nothing(change: dict[str, Any], words: str, backend: Backend) -> None:
    source = {name: np.full(shape, 7.0) for name, shape in SHAPES.items()} | change
    p = counted(backend)
    with pytest.raises(ValueError, match=words):
        p.copy_from({name: x for name, x in source.items() if x is not None}, "here")
    assert host(p) == list(range(SIZE))


def test_copy_from_takes_dicts_and_buffers_of_any_device_and_dtype(backend: Backend) -> None:
    p = counted(backend, "float32")
    flat, view = p.flat, p["b1"]
    for source in (counted(NumpyBackend()), dict(counted(backend)), dict(counted(NumpyBackend(), "float16"))):
        p.flat[...] = -1.0
        p.copy_from(source)
        assert host(p) == list(range(SIZE))
        assert p.flat is flat
        assert p["b1"] is view
    assert backend.to_host(p.flat).dtype == np.float32


def test_to_is_a_copy_on_the_other_device_and_back(backend: Backend) -> None:
    p = counted(NumpyBackend(), "float32")
    there = p.to(backend)
    assert (there.backend.device, there.backend.xp) == (backend.device, backend.xp)
    there.flat[...] = there.flat + 1.0
    back = there.to(NumpyBackend())
    assert host(p) == list(range(SIZE))
    assert host(back) == list(range(1, SIZE + 1))
    assert back.flat.dtype == np.float32
    assert (list(there), there.n_weights) == (list(p), p.n_weights)


def test_zeros_like_shares_nothing(backend: Backend) -> None:
    p = counted(backend, "float32")
    zeros = p.zeros_like()
    assert host(zeros) == [0.0] * SIZE
    assert zeros.flat.dtype == p.flat.dtype
    assert zeros.shapes == p.shapes
    zeros.flat[...] = 3.0
    assert host(p) == list(range(SIZE))


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_views_and_shared_buffers_joined(twin_of: Any) -> None:
    p = counted(NumpyBackend())
    same_memory = Parameters(p.flat, SHAPES)
    one, again, other = twin_of((p, p, same_memory))
    assert one is again
    assert one.flat is other.flat
    one["W0"] = np.full((2, 3), 9.0)
    assert host(other)[:6] == [9.0] * 6
    assert host(p) == list(range(SIZE))
    assert (one.n_weights, one.shapes) == (p.n_weights, p.shapes)


def test_unknown_names_are_key_errors_and_repr_says_what_is_inside() -> None:
    p = counted(NumpyBackend())
    with pytest.raises(KeyError):
        p["W9"] = 1.0
    with pytest.raises(ValueError, match="broadcast"):
        p["W0"] = np.zeros((3, 2))
    assert repr(p) == "Parameters(W0 (2, 3), W1 (1, 2), b0 (2, 1), b1 (1, 1); float64 on cpu)"
