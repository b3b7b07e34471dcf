"""Gradients and parameters of any type and layout: the bits of their plain copies, or one line that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import awkward_arrays as forms
import numpy as np
import pytest
from awkward_arrays import FORMS, Answer, Array, same
from hypothesis import example, given
from hypothesis import strategies as st
from properties import Tally, prove, refusal, times

from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS, Adam

Record = Callable[..., None]
seeds = st.integers(0, 2**16)


def stepped(cls: type[BaseOptimizer], p: Array, gradients: list[Any], added: bool, options: dict[str, Any]) -> Answer:
    """Parameters, moments and their sum of gradients after steps on a plain dict."""
    optimizer = cls({"W0": p, "b0": p[..., :1] if p.ndim else p.copy()}, 0.01, **options)
    for g in gradients:
        gradient = {"W0": g, "b0": g[..., :1] if np.ndim(g) else g}
        if added:
            optimizer.zero_grad()
            optimizer.add_grad(gradient, weight=0.5)
            optimizer.add_grad(gradient)
            optimizer.step()
        else:
            optimizer.update(gradient)
    return {k: forms.plain(x) for k, x in optimizer.save().items() if "/" in k} | {"p": forms.plain(p)}


@times(150, 15000)
def test_an_optimizer_steps_as_with_plain_copies(examples: int, record: Record) -> None:
    tally = Tally()

    @given(
        st.sampled_from(sorted(OPTIMIZERS)),
        st.lists(st.integers(1, 6), max_size=3).map(tuple),
        st.sampled_from(["float32", "float64", "longdouble"]),
        forms.dtypes,
        st.sampled_from(sorted(forms.WRITABLE)),
        st.sampled_from(sorted(set(FORMS) - {"holder"})),
        st.booleans(),
        st.sampled_from([{}, {"clip_norm": 0.5}, {"l2": 0.1, "weight_decay": 0.1}]),
        seeds,
    )
    @example("rmsprop", (3,), "float32", "uint8", "plain", "plain", False, {}, 0)  # squares overflowed in uint8
    @example("adam", (3, 2), "float32", "float16", "plain", "plain", False, {}, 0)
    @example("adam", (2, 3), "float64", "float64", "matrix", "matrix", True, {}, 0)  # products of matrices
    @example("momentum", (5, 6), "float32", "float32", "fortran", "fortran", True, {"clip_norm": 0.5}, 2)
    def holds(
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        of_g: str,
        form: str,
        form_of_g: str,
        added: bool,
        options: dict[str, Any],
        seed: int,
    ) -> None:
        cls, p = OPTIMIZERS[name][0], forms.numbers(dtype, shape, seed)
        gradients = [FORMS[form_of_g](forms.numbers(of_g, shape, seed + k)) for k in range(2)]
        before = [forms.plain(g) for g in gradients]
        here = stepped(cls, forms.WRITABLE[form](p), gradients, added, options)
        assert same(here, stepped(cls, p.copy(), before, added, options))
        assert all(np.array_equal(g, was) for g, was in zip(gradients, before, strict=True))
        tally(name)

    prove(holds, examples, record, tally)


def parameters_that_cannot_be_updated() -> dict[str, tuple[Any, str]]:
    floats = np.ones(3)
    return {
        "a list": ([1.0], "is a list; give an array of floats"),
        "a number": (1.0, "is a float; give an array of floats"),
        "a NumPy number": (np.float64(1.0), "is a float64; give an array of floats"),
        "whole numbers": (np.ones(3, int), "is an array of int64; give an array of floats"),
        "complex numbers": (np.ones(3, complex), "is an array of complex128"),
        "objects": (np.ones(3, object), "is an array of object"),
        "read-only": (forms.read_only(floats), "is read-only, and parameters are updated in place"),
        "a stride of 0": (np.lib.stride_tricks.as_strided(floats, (3,), (0,)), "has elements that share memory"),
        "masked": (np.ma.masked_array(floats, [True, False, False]), "masked values are no numbers"),
    }


@pytest.mark.parametrize("kind", parameters_that_cannot_be_updated())
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_cannot_be_updated_in_place_is_refused_before_any_step(name: str, kind: str) -> None:
    value, words = parameters_that_cannot_be_updated()[kind]
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        OPTIMIZERS[name][0]({"W1": value}, 0.1)
    refusal(caught.value, "W1")


def test_memory_that_two_elements_share_is_refused() -> None:
    two = np.lib.stride_tricks.as_strided(np.ones(3), (2,), (0,))
    with pytest.raises(ValueError, match="has elements that share memory"):
        Adam({"W1": two}, 0.1)
    one = np.lib.stride_tricks.as_strided(np.ones(3), (1, 3), (0, 8))
    optimizer = Adam({"W1": one}, 0.1)
    optimizer.update({"W1": np.ones((1, 3))})
    assert (one < 1.0).all()


@pytest.mark.parametrize("value", ["a", [1.0]])
def test_a_rate_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"learning_rate is .*; it must be a number"):
        Adam({"W1": np.ones(2)}, value)


def test_an_optimizer_comes_back_after_any_number_of_steps() -> None:
    optimizer = Adam({"W1": np.ones(2)}, 0.1)
    optimizer.steps = (1 << 53) - 1
    twin = Adam({"W1": np.ones(2)}, 0.1)
    twin.load(optimizer.save())
    assert twin.steps == optimizer.steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_refused_leaves_the_sum_as_it_is(name: str) -> None:
    p = {"W0": np.ones(2, np.float32), "W1": np.ones(2, np.float32)}
    optimizer = OPTIMIZERS[name][0](p, 0.1)
    good = {"W0": np.ones(2), "W1": np.ones(2)}
    optimizer.add_grad(good)
    masked = np.ma.masked_array(np.ones(2), [True, False])
    for bad in (*(forms.no_numbers(kind, (2,)) for kind in forms.NO_NUMBERS), masked, [1.0, 1.0], 1.0, None):
        for act in (optimizer.add_grad, optimizer.update):
            with pytest.raises((TypeError, ValueError)) as caught:
                act({"W0": np.ones(2), "W1": bad})
            refusal(caught.value, "W1")
    assert optimizer._gradient is not None
    assert optimizer.steps == 0
    assert all(np.array_equal(optimizer._gradient[k], good[k]) for k in good)


def test_a_state_that_is_refused_changes_nothing() -> None:
    p = {"W0": np.ones(2), "W1": np.ones(2)}
    optimizer = Adam(p, 0.1)
    optimizer.update(p)
    for kind in forms.NO_NUMBERS:
        bad = optimizer.save() | {"m/W0": np.full(2, 5.0), "v/W1": forms.no_numbers(kind, (2,))}
        with pytest.raises(TypeError, match=r"v/W1 holds .*; give real numbers"):
            optimizer.load(bad)
        assert optimizer.save()["m/W0"].max() < 1.0
