"""Optimizers beyond their oracles: any arrays, accumulation, copies and states, options, and kernel = rule.

A new optimizer enters `OPTIMIZERS` in `rules.py`, and with it every test here.
"""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from catopt_xp.backend.xp import Backend, NumpyBackend
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.nn.parameters import Parameters
from catopt_xp.optim import base as base_optimizer
from catopt_xp.optim.base import SLICE, BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS, Adam, GradientDescent, Momentum, RMSProp, make_optimizer
from catopt_xp.optim.schedules import const_lr, describe, get_hyperbola_func

Array = np.ndarray[Any, Any]

ALL = [cls for cls, _ in OPTIMIZERS.values()]
DECAYS: list[dict[str, Any]] = [{}, {"weight_decay": 0.1}, {"l2": 0.1}, {"weight_decay": 0.1, "l2": 0.1}]
VARIANTS: list[tuple[type[BaseOptimizer], dict[str, Any]]] = [
    (GradientDescent, {}),
    *((Momentum, options) for options in ({}, {"nesterov": True}, {"correct_param": True}, {"rate_inside": True})),
    (Momentum, {"nesterov": True, "rate_inside": True}),
    *((cls, {"eps_mode": mode}) for cls in (RMSProp, Adam) for mode in ("inside", "outside", "hat")),
    *((cls, {"correct_param": False}) for cls in (RMSProp, Adam)),
]

each_optimizer = pytest.mark.parametrize("cls", ALL)
each_variant = pytest.mark.parametrize(("cls", "variant"), VARIANTS, ids=lambda x: getattr(x, "__name__", str(x)))


def safe(cls: type[BaseOptimizer], dtype: str) -> dict[str, Any]:
    """Options that a dtype needs: the usual eps is 0 in float16."""
    return {"eps": 1e-3} if dtype == "float16" and cls in (RMSProp, Adam) else {}


def draws(shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int) -> dict[str, Array]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def flat(arrays: Mapping[str, Array], dtype: str) -> Parameters:
    joined = np.concatenate([x.ravel() for x in arrays.values()]).astype(dtype)
    return Parameters(joined, {name: x.shape for name, x in arrays.items()})


def take_steps(optimizer: BaseOptimizer, gradients: list[Any]) -> None:
    for gradient in gradients:
        optimizer.zero_grad()
        optimizer.add_grad(gradient)
        optimizer.step()


def state_of(optimizer: BaseOptimizer) -> list[Array]:
    moments = [x for x in optimizer.save().values() if isinstance(x, np.ndarray)]
    return [*optimizer.param_dict.values(), *moments]


def same_bits(one: BaseOptimizer, other: BaseOptimizer) -> bool:
    pairs = zip(state_of(one), state_of(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs) and one.steps == other.steps


# Any arrays.


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@each_optimizer
def test_arrays_of_any_stride_are_updated_like_contiguous_ones(cls: type[BaseOptimizer], dtype: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "W0": (4, 6),
        "W1": (5,),
        "W2": (),
        "W3": (1, 0, 2),
        "gamma": (3, 2),
        "b0": (7,),
    }
    start, gradients = draws(shapes, dtype, 1), [draws(shapes, dtype, seed) for seed in (2, 3)]
    base = np.zeros((8, 12), dtype=dtype)
    odd = {
        "W0": base[::2, ::-2],
        "W1": np.zeros(15, dtype=dtype)[::3],
        "W2": np.zeros((), dtype=dtype),
        "W3": np.zeros((1, 0, 2), dtype=dtype),
        "gamma": np.zeros((3, 2), dtype=dtype, order="F"),
        "b0": np.zeros(7, dtype=dtype)[::-1],
    }
    for name, array in odd.items():
        array[...] = start[name]
    held = dict(odd)
    options = {"weight_decay": 0.1, "l2": 0.1, **safe(cls, dtype)}
    ours, plain = cls(odd, 0.01, **options), cls(start, 0.01, **options)
    for optimizer in (ours, plain):
        take_steps(optimizer, gradients)
    assert same_bits(ours, plain)
    assert all(odd[name] is held[name] for name in odd)
    assert {x.dtype.name for x in state_of(ours)} == {dtype}
    assert (base[1::2] == 0).all()
    assert (base[:, ::2] == 0).all()
    assert (base[::2, 1::2] != 0).all()


@pytest.mark.parametrize("size", [1, 3, 255, 257, SLICE - 1, SLICE, SLICE + 1, 40_000])
@each_variant
def test_the_sliced_update_of_a_flat_buffer_is_the_update_of_whole_arrays(
    cls: type[BaseOptimizer], variant: dict[str, Any], size: int
) -> None:
    shapes = {"W0": (1, size), "W1": (2, 3), "b0": (257, 1), "b1": (size, 1)}
    start, gradients = draws(shapes, "float32", 1), [draws(shapes, "float32", seed) for seed in (2, 3, 4)]
    options = variant | {"weight_decay": 0.1, "l2": 0.1}
    sliced, whole = cls(flat(start, "float32"), 0.01, **options), cls(start, 0.01, **options)
    for gradient in gradients:
        sliced.update(flat(gradient, "float32"))
        whole.update(gradient)
    assert same_bits(sliced, whole)
    assert all(np.isfinite(x).all() for x in state_of(whole))


@pytest.mark.parametrize(("slices", "tasks"), [(15, 0), (16, 16), (40, 16)])
@each_variant
def test_an_update_over_several_threads_has_the_same_bits(
    cls: type[BaseOptimizer], variant: dict[str, Any], slices: int, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_optimizer, "SLICE", 16)
    dealt: list[int] = []
    run = NumpyBackend.run
    monkeypatch.setattr(NumpyBackend, "run", lambda self, given: dealt.append(len(given)) or run(self, given))
    shapes = {"W0": (1, 16 * (slices - 1)), "b0": (16, 1)}
    start, gradient = draws(shapes, "float32", 1), draws(shapes, "float32", 2)
    options = variant | {"weight_decay": 0.1, "l2": 0.1}
    sliced, whole = cls(flat(start, "float32"), 0.01, **options), cls(start, 0.01, **options)
    sliced.update(flat(gradient, "float32"))
    assert dealt == ([tasks] if tasks else [])
    whole.update(gradient)
    assert same_bits(sliced, whole)


@each_optimizer
def test_biases_are_spared_by_both_kinds_of_weight_decay(cls: type[BaseOptimizer]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"W0": (2, 3), "b0": (2, 1)}
    for make in (dict, lambda arrays: flat(arrays, "float64")):
        results = {}
        kinds: dict[str, dict[str, Any]] = {"none": {}, "decay": {"weight_decay": 0.5}, "l2": {"l2": 0.5}}
        for key, options in kinds.items():
            optimizer = cls(make(draws(shapes, "float64", 1)), 0.1, **options)
            take_steps(optimizer, [make(draws(shapes, "float64", seed)) for seed in (2, 3)])
            results[key] = {name: x.copy() for name, x in optimizer.param_dict.items()}
        for key in ("decay", "l2"):
            assert np.array_equal(results[key]["b0"], results["none"]["b0"])
            assert np.abs(results[key]["W0"] - results["none"]["W0"]).min() > 1e-6


def test_clipping_scales_the_gradient_of_all_arrays_together(backend: Backend) -> None:
    for clip_norm, expected in ((1.0, 1 / (5 + 1e-6)), (10.0, 1.0)):
        p = {"W0": backend.zeros((1, 1), "float64"), "b0": backend.zeros((1, 1), "float64")}
        optimizer = GradientDescent(p, 1.0, clip_norm=clip_norm)
        take_steps(optimizer, [{name: backend.asarray([[x]], "float64") for name, x in (("W0", 3.0), ("b0", 4.0))}])
        moved = [-float(x[0, 0]) for x in p.values()]
        assert moved == pytest.approx([3 * expected, 4 * expected], rel=1e-15)


@each_variant
def test_all_but_the_first_parameter_are_updated_as_in_a_whole_update(
    cls: type[BaseOptimizer], variant: dict[str, Any]
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"W0": (4, 5), "W1": (7, 4), "b0": (4, 1), "b1": (7, 1)}
    start, options = draws(shapes, "float64", 1), variant | {"weight_decay": 0.1, "l2": 0.1}
    whole, parts = (cls(flat(start, "float64"), 0.01, **options) for _ in range(2))
    for seed in (2, 3):
        gradient = flat(draws(shapes, "float64", seed), "float64")
        whole.update(gradient)
        parts.update_after("W0", gradient, parts.advance())
    assert parts.steps == whole.steps == 2
    rest = slice(4 * 5, None)
    for ours, theirs in zip(parts.flat_state(), whole.flat_state(), strict=True):
        assert np.array_equal(ours[rest], theirs[rest])
        assert not np.array_equal(ours[: rest.start], theirs[: rest.start])
    assert np.array_equal(parts.param_dict["W0"], start["W0"])
    assert not any(parts.save()[f"{name}/W0"].any() for name in cls.moment_names)


@each_optimizer
def test_the_flat_state_is_the_live_parameters_and_moments(cls: type[BaseOptimizer]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"W0": (2, 3), "b0": (2, 1)}
    optimizer = cls(flat(draws(shapes, "float64", 1), "float64"), 0.01)
    optimizer.update(flat(draws(shapes, "float64", 2), "float64"))
    live = [optimizer.param_dict, *optimizer._moments.values()]
    for array, arrays in zip(optimizer.flat_state(), live, strict=True):
        assert np.array_equal(array, np.concatenate([arrays[name].ravel() for name in shapes]))
        array[...] = 5.0
        assert all((arrays[name] == 5.0).all() for name in shapes)


# Gradients.


@each_optimizer
def test_weighted_gradients_add_up_in_copies(cls: type[BaseOptimizer], backend: Backend) -> None:
    def place(values: list[float]) -> Parameters:
        return Parameters(backend.asarray(values, "float64"), {"W0": (1, 2), "b0": (1, 1)})

    params, expected = place([1.0, 2.0, 3.0]), place([1.0, 2.0, 3.0])
    optimizer, reference = cls(params, 0.1), cls(expected, 0.1)
    gradient = place([4.0, 8.0, -4.0])
    optimizer.add_grad(gradient, weight=0.25)
    gradient.flat[...] = 2.0
    optimizer.add_grad(dict(gradient), weight=0.5)
    optimizer.add_grad(gradient, weight=0.0)
    gradient.flat[...] = 1.0
    optimizer.add_grad(gradient, weight=2.0)
    gradient.flat[...] = 2.0
    optimizer.step()
    take_steps(reference, [place([4.0, 5.0, 2.0])])
    assert backend.to_host(params.flat).tolist() == backend.to_host(expected.flat).tolist()
    optimizer.zero_grad()
    assert float(backend.to_host(optimizer._gradient.flat).sum()) == 0.0  # type: ignore[union-attr]
    assert backend.to_host(gradient.flat).tolist() == [2.0] * 3


@each_optimizer
def test_update_has_the_bits_of_zero_add_step_and_keeps_the_gradient(cls: type[BaseOptimizer]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"W0": (30, 700), "b0": (30, 1)}
    gradients = [draws(shapes, "float32", seed) for seed in (2, 3, 4)]
    options: dict[str, Any] = {"weight_decay": 0.1, "l2": 0.1, "clip_norm": 1.0}
    for make in (dict, lambda arrays: flat(arrays, "float32")):
        one, other = (cls(make(draws(shapes, "float32", 1)), 0.01, **options) for _ in range(2))
        for gradient in gradients:
            given = make(gradient)
            one.update(given)
            assert all(np.array_equal(given[name], gradient[name]) for name in shapes)
        take_steps(other, [make(gradient) for gradient in gradients])
        assert same_bits(one, other)


@each_optimizer
def test_a_dict_of_gradients_moves_a_flat_buffer_as_a_buffer_does(cls: type[BaseOptimizer]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"W0": (3, 5), "b0": (3, 1)}
    start, gradient = draws(shapes, "float32", 1), draws(shapes, "float32", 2)
    one, other, third = (cls(flat(start, "float32"), 0.01) for _ in range(3))
    one.update(gradient)
    other.update(flat(gradient, "float32"))
    take_steps(third, [gradient])
    assert same_bits(one, other)
    assert same_bits(one, third)


@each_optimizer
def test_missing_and_mismatched_gradients_are_refused(cls: type[BaseOptimizer]) -> None:
    optimizer = cls({"W0": np.ones((2, 1))}, 0.1)
    with pytest.raises(RuntimeError, match="step: there is no gradient; call add_grad first"):
        optimizer.step()
    for gradient, words in (
        ({}, "W0 is missing"),
        ({"W0": np.ones((1, 2))}, r"W0 has shape \(1, 2\), expected \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=f"{cls.__name__}.add_grad: {words}"):
            optimizer.add_grad(gradient)
    with pytest.raises(ValueError, match="W1 is not a parameter here"):
        optimizer.add_grad({"W0": np.ones((2, 1)), "W1": np.ones(1)})
    assert optimizer.steps == 0


# States and copies.


def trained(cls: type[BaseOptimizer], seed: int = 0) -> tuple[DeepNetwork, BaseOptimizer]:
    """A model and an optimizer after two steps, with an epoch gone by."""
    model = DeepNetwork([4, 3, 1], ["relu", "sigmoid"], seed=seed)
    optimizer = cls(model.save(), 0.01, lr_scheduler=get_hyperbola_func(0.5), weight_decay=0.01)
    learn(model, optimizer)
    optimizer.increase_epoch()
    return model, optimizer


def learn(model: DeepNetwork, optimizer: BaseOptimizer, steps: int = 2) -> None:
    rng = np.random.Generator(np.random.PCG64(optimizer.steps))
    for _ in range(steps):
        model.forward(rng.standard_normal((4, 9)).astype(np.float32))
        model.backward(rng.integers(0, 2, (1, 9)))
        take_steps(optimizer, [model.get_grad_dict()])


def by_load(model: DeepNetwork, optimizer: BaseOptimizer) -> tuple[DeepNetwork, BaseOptimizer]:
    other, twin = trained(type(optimizer), seed=5)
    weights, moments = other.save()["W0"], {k: x for k, x in twin.save().items() if "/" in k}
    other.load(model.save())
    twin.load(optimizer.save() | {"name": json.loads(json.dumps(type(optimizer).__name__))})  # as out of a file
    assert other.save()["W0"] is weights, "the live array was replaced"
    assert all(twin.save()[key] is x for key, x in moments.items()), "the live moments were replaced"
    return other, twin


def by_pickle(*pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def by_deepcopy(*pair: Any) -> Any:
    return copy.deepcopy(pair)


def by_on(model: DeepNetwork, optimizer: BaseOptimizer) -> tuple[DeepNetwork, BaseOptimizer]:
    twin = model.to("cpu")
    return twin, optimizer.on(twin.save())


@pytest.mark.parametrize("twins_of", [by_load, by_deepcopy, by_pickle, by_on])
@each_optimizer
def test_a_loaded_or_copied_optimizer_goes_on_moving_its_own_model(
    cls: type[BaseOptimizer], twins_of: Callable[..., Any]
) -> None:
    model, optimizer = trained(cls)
    twin_model, twin = twins_of(model, optimizer)
    assert (twin.steps, twin.epoch, twin.learning_rate) == (2, 1, 0.01 / 1.5)
    assert same_bits(twin, optimizer)
    before = model.save().flat.copy()
    learn(twin_model, twin)
    assert np.array_equal(model.save().flat, before), "the copy moved the original"
    assert not np.array_equal(twin_model.save().flat, before), "the copy moved nothing"
    assert np.array_equal(twin.param_dict["W0"], twin_model.save()["W0"])
    learn(model, optimizer)
    assert same_bits(twin, optimizer)


@pytest.mark.parametrize(("saved", "loading"), list(itertools.permutations(ALL, 2)), ids=lambda cls: cls.__name__)
def test_the_state_of_another_optimizer_starts_at_zero_with_a_warning(
    saved: type[BaseOptimizer], loading: type[BaseOptimizer]
) -> None:
    _, other = trained(saved)
    model, optimizer = trained(loading, seed=1)
    optimizer.increase_epoch()
    weights = model.save().flat.copy()
    with pytest.warns(UserWarning, match=f"the state is that of {saved.__name__}, this is {loading.__name__}") as told:
        optimizer.load(other.save())
    assert told[0].filename == __file__, "the warning names another line than the one that loads"
    assert (optimizer.steps, optimizer.epoch) == (0, 1)
    assert all((x == 0).all() for key, x in optimizer.save().items() if "/" in key)
    assert np.array_equal(model.save().flat, weights)
    learn(model, optimizer)
    assert not np.array_equal(model.save().flat, weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"m/W0": None}, "m/W0 is missing"),
        ({"v/b1": np.zeros((2, 1))}, r"v/b1 has shape \(2, 1\), expected \(1, 1\)"),
        ({"u/W0": np.zeros((3, 4))}, "u/W0 is not a parameter here"),
        ({"steps": None}, "steps is missing"),
        ({"epoch": None}, "epoch is missing"),
        ({"steps": -1}, "steps is -1; it must be a number of at least 0"),
        ({"steps": 2**53}, "steps is 9007199254740992; it must be"),
        ({"steps": "3"}, "steps is '3'; it must be"),
        ({"epoch": float("inf")}, "epoch is inf; it must be"),
        ({"epoch": float("nan")}, "epoch is nan; it must be"),
    ],
)
def test_a_state_that_does_not_match_is_refused_by_key_and_changes_nothing(change: dict[str, Any], words: str) -> None:
    _, optimizer = trained(Adam)
    state = {key: x + 3 if key != "name" else x for key, x in optimizer.save().items()} | change
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=f"Adam.load: {words}"):
        optimizer.load({key: x for key, x in state.items() if x is not None})
    assert same_bits(optimizer, before)
    assert optimizer.epoch == before.epoch


@each_optimizer
def test_reset_zeroes_moments_and_steps_but_not_the_epoch(cls: type[BaseOptimizer]) -> None:
    _, optimizer = trained(cls)
    optimizer.reset()
    assert (optimizer.steps, optimizer.epoch) == (0, 1)
    assert all((x == 0).all() for key, x in optimizer.save().items() if "/" in key)


# Numbers and options.


@each_optimizer
def test_the_learning_rate_follows_the_schedule_and_sets_the_step(cls: type[BaseOptimizer]) -> None:
    def first_step(learning_rate: float, epochs: int, **options: Any) -> tuple[float, float]:
        p = {"W0": np.zeros((1, 1))}
        optimizer = cls(p, learning_rate, **options)
        for _ in range(epochs):
            optimizer.increase_epoch()
        take_steps(optimizer, [{"W0": np.ones((1, 1))}])
        return optimizer.learning_rate, p["W0"].item()

    for epochs in (0, 1, 4):
        rate = 0.1 / (1 + 0.5 * epochs)
        scheduled = first_step(0.1, epochs, lr_scheduler=get_hyperbola_func(0.5))
        assert scheduled == pytest.approx(first_step(rate, 0), rel=1e-14)
        assert scheduled[0] == pytest.approx(rate)


def test_an_epoch_counted_in_steps_goes_on_to_the_next_whole_one() -> None:
    optimizer = GradientDescent({"W0": np.zeros(1)}, 0.1, lr_scheduler=lambda rate, epoch: rate * (1 - epoch / 10))
    optimizer.epoch = 2.75
    assert optimizer.learning_rate == pytest.approx(0.0725)
    optimizer.increase_epoch()
    assert optimizer.epoch == 3


@pytest.mark.parametrize("cls", [RMSProp, Adam])
def test_an_eps_that_is_nothing_in_the_arrays_dtype_is_refused(cls: Any) -> None:
    p = {"W0": np.zeros((1, 1), dtype=np.float32), "W1": np.zeros((1, 1), dtype=np.float16)}
    with pytest.raises(ValueError, match=f"{cls.__name__}: eps is 1e-08, which is not above 0 in W1's float16"):
        cls(p, 0.1, eps=1e-8)
    for eps in (0.0, -1e-8, float("nan")):
        with pytest.raises(ValueError, match="eps is"):
            cls({"W0": np.zeros(1)}, 0.1, eps=eps)
    W = np.zeros(1, dtype=np.float16)
    take_steps(cls({"W0": W}, 0.1, eps=1e-3), [{"W0": np.zeros(1, dtype=np.float16)}])
    assert W.tolist() == [0.0]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "l2", "clip_norm"])
@each_optimizer
def test_numbers_out_of_range_are_refused_by_name(cls: type[BaseOptimizer], name: str, value: float) -> None:
    options: dict[str, Any] = {"learning_rate": 0.1, name: value}
    with pytest.raises(ValueError, match=f"{cls.__name__}: {name} is {value}; it must be"):
        cls({"W0": np.zeros(1)}, **options)


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (GradientDescent, {"learning_rate": 0.0}, "learning_rate is 0.0; it must be positive"),
        (GradientDescent, {"clip_norm": 0.0}, "clip_norm is 0.0; it must be positive"),
        (Momentum, {"beta": 1.0}, "Momentum: beta is 1.0"),
        (Momentum, {"beta": 1.5, "rate_inside": True}, "Momentum: beta is 1.5"),
        (Momentum, {"nesterov": True, "correct_param": True}, "nesterov has no bias-corrected form"),
        (Momentum, {"rate_inside": True, "correct_param": True}, "rate_inside has no bias-corrected form"),
        (RMSProp, {"beta": -0.1}, "RMSProp: beta is -0.1"),
        (RMSProp, {"eps_mode": "in"}, "unknown eps_mode 'in'; choose inside, outside, hat"),
        (Adam, {"beta1": float("nan")}, "Adam: beta1 is nan"),
        (Adam, {"beta2": 2}, "Adam: beta2 is 2"),
    ],
)
def test_options_of_one_method_are_checked(cls: type[BaseOptimizer], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls({"W0": np.zeros(1)}, **({"learning_rate": 0.1} | options))


@pytest.mark.parametrize("scheduler", [3, None, "const", 1e-3])
@each_optimizer
def test_a_schedule_that_is_no_function_is_refused_at_once(cls: type[BaseOptimizer], scheduler: Any) -> None:
    with pytest.raises(TypeError, match=f"^{cls.__name__}: lr_scheduler is .*; give a function") as caught:
        cls({"W0": np.zeros(1)}, 0.1, lr_scheduler=scheduler)
    assert repr(scheduler) in str(caught.value)


@pytest.mark.parametrize(("cls", "names"), [(Momentum, ["beta"]), (RMSProp, ["beta"]), (Adam, ["beta1", "beta2"])])
def test_an_average_may_forget_at_once(cls: Any, names: list[str]) -> None:
    p = {"W0": np.zeros(1)}
    optimizer = cls(p, 0.5, **dict.fromkeys(names, 0.0))
    for gradient in (7.0, 2.0):
        optimizer.update({"W0": np.array([gradient])})
    last = [4.0 if name in ("s", "v") and cls is not Momentum else 2.0 for name in cls.moment_names]
    assert [x.item() for x in optimizer.save().values() if isinstance(x, np.ndarray)] == last


def test_a_velocity_that_holds_the_rate_may_be_kept_whole() -> None:
    p = {"W0": np.zeros(1)}
    optimizer = Momentum(p, 0.5, 1.0, rate_inside=True)
    for _ in range(3):
        optimizer.update({"W0": np.ones(1)})
    assert p["W0"].tolist() == [-0.5 - 1.0 - 1.5]


@each_optimizer
def test_l2_of_a_batch_is_divided_by_its_samples(cls: type[BaseOptimizer]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"W0": (2, 3), "b0": (2, 1)}
    divided = cls(draws(shapes, "float64", 1), 0.1, l2=0.5, l2_per_batch=True)
    by_hand = cls(draws(shapes, "float64", 1), 0.1)
    for samples, seed in ((4, 2), (1.6, 3), (1, 4)):
        divided.samples, by_hand.l2 = samples, 0.5 / samples
        for optimizer in (divided, by_hand):
            optimizer.update(draws(shapes, "float64", seed))
    assert same_bits(divided, by_hand)
    assert divided.options["l2_per_batch"]
    assert "l2_per_batch" not in by_hand.options


@pytest.mark.parametrize("cls", [Momentum, RMSProp, Adam])
def test_from_scratch_is_accepted_and_needless(cls: Any) -> None:
    results = []
    for options in ({}, {"from_scratch": True}, {"from_scratch": False}):
        p = {"W0": np.ones((2, 2))}
        take_steps(cls(p, 0.1, **options), [{"W0": np.full((2, 2), 0.5)}] * 2)
        results.append(p["W0"])
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_options_may_be_given_by_position_in_the_chapters_order() -> None:
    p = {"W0": np.zeros(1)}
    half = get_hyperbola_func(1.0)
    adam = Adam(p, 0.1, 0.8, 0.99, 1e-7, True, False, half)
    assert (adam.beta1, adam.beta2, adam.eps, adam.correct_param, adam.lr_scheduler) == (0.8, 0.99, 1e-7, False, half)
    rmsprop = RMSProp(p, 0.1, 0.8, 1e-5, True, False)
    assert (rmsprop.beta, rmsprop.eps, rmsprop.correct_param) == (0.8, 1e-5, False)
    assert Momentum(p, 0.1, 0.8, True).beta == 0.8
    assert (rmsprop.learning_rate, adam.learning_rate) == (0.1, 0.1)


@each_variant
def test_options_build_the_optimizer_again(cls: type[BaseOptimizer], variant: dict[str, Any]) -> None:
    first = cls({"W0": np.zeros(1)}, 0.25, weight_decay=0.1, l2=0.2, clip_norm=3.0, **variant)
    options = first.options
    assert options["lr_scheduler"] == describe(const_lr)
    again = cls({"W0": np.zeros(1)}, **(options | {"lr_scheduler": const_lr}))
    assert again.options == first.options
    assert again.advance() == first.advance()


@each_optimizer
def test_presets_are_by_convention_and_take_options(cls: Any) -> None:
    p = {"W0": np.zeros(1)}
    assert cls.preset("chapter", p, 0.1).options == cls(p, 0.1).options
    for convention in ("chapter", "torch", "keras"):
        made = cls.preset(convention, p, 0.1, weight_decay=0.5)
        assert (made.weight_decay, type(made)) == (0.5, cls)
    with pytest.raises(ValueError, match="unknown convention 'jax'; choose chapter, torch, keras"):
        cls.preset("jax", p, 0.1)


def test_presets_of_other_libraries() -> None:
    p = {"W0": np.zeros(1)}
    assert Momentum.preset("torch", p, 0.1).learning_rate == pytest.approx(1.0)
    assert Momentum.preset("keras", p, 0.1, beta=0.5).learning_rate == pytest.approx(0.2)
    torch, keras = RMSProp.preset("torch", p, 0.1), RMSProp.preset("keras", p, 0.1)
    assert (torch.beta, torch.eps, torch.eps_mode, torch.correct_param) == (0.99, 1e-8, "outside", False)
    assert (keras.beta, keras.eps, keras.eps_mode, keras.correct_param) == (0.9, 1e-7, "inside", False)
    assert (Adam.preset("keras", p, 0.1).eps, Adam.preset("keras", p, 0.1).eps_mode) == (1e-7, "hat")
    assert RMSProp.preset("torch", p, 0.1, eps=1e-4).eps == 1e-4


@pytest.mark.parametrize(("name", "rate"), [("gd", 1e-3), ("momentum", 1e-3), ("rmsprop", 1e-5), ("adam", 1e-5)])
def test_an_optimizer_by_name_has_the_chapters_learning_rate(name: str, rate: float) -> None:
    p = {"W0": np.zeros(1)}
    cls = OPTIMIZERS[name][0]
    for known in (name, name.upper(), cls.__name__, cls.__name__.lower()):
        assert type(make_optimizer(known, p)) is cls
    assert make_optimizer(name, p).learning_rate == rate
    assert make_optimizer(name, p, 0.5, l2=0.1).options["l2"] == 0.1
    assert make_optimizer(name, p, 0.5).learning_rate == 0.5


def test_an_unknown_name_or_option_is_refused_in_one_line() -> None:
    p = {"W0": np.zeros(1)}
    with pytest.raises(ValueError, match=r"^unknown optimizer 'sgd'; choose gd, momentum, rmsprop, adam$"):
        make_optimizer("sgd", p)
    takes = "lr_scheduler, weight_decay, l2, clip_norm, l2_per_batch"
    with pytest.raises(ValueError, match=rf"^gd has no option 'beta'; it takes {takes}$"):
        make_optimizer("gd", p, beta=0.9)
    with pytest.raises(ValueError, match="learning_rate is 0"):
        make_optimizer("gd", p, 0.0)


# The rule and the kernel.


def python_of(body: str) -> str:
    """A kernel's CUDA C++ as Python: the declaration, the `if` block and the conditional expression are rewritten."""
    text = re.sub(r"\bT (\w+) =", r"\1 =", body)
    text = re.sub(r"if \((.*?)\) \{ (.*?);? \}", r"\nif \1: \2\n", text)
    text = re.sub(r"\((\w+) \? (.*?) : (.*?)\)", r"((\2) if \1 else (\3))", text)
    return "\n".join(line.strip("; ") for line in text.splitlines())


class FusingBackend(NumpyBackend):
    """Stands in for a GPU: runs a kernel's text element by element, every number in the arrays' dtype."""

    fuses = True

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def elementwise(self, name: str, inputs: str, outputs: str, body: str) -> Any:
        code = compile(python_of(body), name, "exec")
        declared = [part.split() for part in f"{inputs}, {outputs}".split(", ")]
        written = [part.split()[-1] for part in outputs.split(", ")]

        def launch(*arguments: Any) -> None:
            self.launched.append(name)
            T = arguments[-1].dtype.type
            given = {words[-1]: (words, x) for words, x in zip(declared, arguments, strict=True)}
            for i in range(arguments[-1].size):
                scope: dict[str, Any] = {"i": i, "sqrt": np.sqrt}
                for key, (words, x) in given.items():
                    if words[0] == "raw":
                        scope[key] = x.reshape(-1)
                    else:
                        scope[key] = x if words[0] == "int64" else T(x.flat[i] if isinstance(x, np.ndarray) else x)
                exec(code, scope)
                for key in written:
                    assert type(scope[key]) is T, f"{key} became {type(scope[key])}"
                    given[key][1].flat[i] = scope[key]

        return launch


def test_the_translation_of_a_kernel() -> None:
    body = "T g = gradient; if (i < decayed) { g += l2 * p; p *= shrink; } p -= (n ? b * v + a : v);"
    assert python_of(body).splitlines() == [
        "g = gradient",
        "if i < decayed: g += l2 * p; p *= shrink",
        "p -= ((b * v + a) if n else (v))",
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("decay", DECAYS, ids=str)
@each_variant
def test_the_kernel_is_the_rule_value_by_value_in_one_launch(
    cls: type[BaseOptimizer],
    variant: dict[str, Any],
    decay: dict[str, float],
    clip_norm: float | None,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"W0": (4, 5), "W1": (2, 4), "b0": (4, 1), "b1": (2, 1)}
    start, gradients = draws(shapes, dtype, 1), [draws(shapes, dtype, seed) for seed in (2, 3, 4)]
    options: dict[str, Any] = variant | decay | {"clip_norm": clip_norm, "lr_scheduler": get_hyperbola_func(0.5)}
    by_rule, by_kernel = (cls(flat(start, dtype), 0.1, **options) for _ in range(2))
    fusing = FusingBackend()
    for gradient in gradients:
        by_rule.update(flat(gradient, dtype))
        with monkeypatch.context() as patch:
            patch.setattr(base_optimizer, "backend_of", lambda *arrays: fusing)
            by_kernel.update(flat(gradient, dtype))
        for optimizer in (by_rule, by_kernel):
            optimizer.increase_epoch()
    assert fusing.launched == [f"catopt_xp_{cls.__name__.lower()}"] * 3
    assert same_bits(by_kernel, by_rule)
    assert not np.array_equal(by_rule.param_dict["W0"], start["W0"])


def test_the_list_of_variants_has_every_optimizer() -> None:
    assert {cls for cls, _ in VARIANTS} == set(ALL)
    assert all(cls.kernel.endswith(";") for cls in ALL)


def test_numbers_of_numpy_leave_dtypes_alone() -> None:
    p = {"W0": np.ones((2, 2), np.float32)}
    optimizer = Adam(p, np.float64(1e-3), clip_norm=np.float64(0.1), l2=np.float64(1e-3), weight_decay=np.float64(0.1))
    optimizer.update({"W0": np.ones((2, 2), np.float32)})
    assert {type(x) for x in optimizer.scalars().values()} == {float}
    assert type(optimizer.clip_norm) is float
    assert {x.dtype for name, x in optimizer.save().items() if "/" in name} == {np.dtype(np.float32)}


class OwnRule(Adam):
    """Another rule, without a CUDA text of its own: Adam's kernel must not run in its place."""

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, m: Any, v: Any, **scalars: float) -> None:
        p -= 1.0


def test_a_rule_without_its_kernel_runs_as_array_operations() -> None:
    for kind, has in ((Adam, True), (OwnRule, False)):
        assert kind({"W0": np.zeros(1)}, 0.1)._has_kernel is has


def test_a_schedule_may_stand_still() -> None:
    optimizer = GradientDescent({"W0": np.ones(1)}, 0.1, lr_scheduler=lambda rate, epoch: 0.0)
    optimizer.update({"W0": np.ones(1)})
    assert (optimizer.learning_rate, optimizer.param_dict["W0"].item()) == (0.0, 1.0)


@pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf")])
def test_a_schedule_that_gives_no_learning_rate_is_named(rate: float) -> None:
    optimizer = GradientDescent({"W0": np.zeros(1)}, 0.1, lr_scheduler=lambda lr, epoch: rate)
    with pytest.raises(ValueError, match=r"gives (-0.001|nan|inf) at epoch 0; a learning rate is finite"):
        _ = optimizer.learning_rate


def test_a_gradient_that_is_missing_is_named_and_counts_no_step() -> None:
    optimizer = GradientDescent({"W0": np.zeros(1), "b0": np.zeros(1)}, 0.1)
    with pytest.raises(ValueError, match=r"^gradient: b0 is missing"):
        optimizer.update({"W0": np.zeros(1)})
    assert optimizer.steps == 0


@pytest.mark.parametrize("kind", [Momentum, RMSProp, Adam])
def test_moments_of_a_gradient_that_has_died_become_zero_and_not_subnormal(kind: Any) -> None:
    p = {"W0": np.ones((2, 3), np.float32)}
    optimizer = kind(p, 1e-3, **({"beta2": 0.5} if kind is Adam else {}))
    optimizer.update({"W0": np.full((2, 3), 1e-3, np.float32)})
    for _ in range(1500):
        optimizer.update({"W0": np.zeros((2, 3), np.float32)})
    assert not any(np.any(x) for name, x in optimizer.save().items() if "/" in name)


def test_subnormal_moments_become_zero_every_32_steps() -> None:
    tiny = float(np.finfo(np.float32).smallest_normal)
    optimizer = Momentum({"W0": np.ones(2, np.float32)}, 1e-3, beta=0.5)
    zero_after = []
    for step in range(1, 70):
        optimizer.save()["v/W0"][1] = tiny
        optimizer.update({"W0": np.array([1e-40, tiny], np.float32)})
        moment = optimizer.save()["v/W0"]
        zero_after += [step] if moment[0] == 0 else []
        assert moment[1] == np.float32(tiny)
    assert zero_after == [32, 64]


def test_a_nan_in_a_moment_is_not_flushed_away() -> None:
    optimizer = Momentum({"W0": np.ones(2)}, 1e-3)
    for _ in range(64):
        optimizer.update({"W0": np.array([np.nan, 1.0])})
    assert np.isnan(optimizer.save()["v/W0"]).tolist() == [True, False]
