"""Every optimizer follows the paths that PyTorch, optax and scikit-learn took, in float64.

The paths are in ``golden/optimizers.json``, written by ``golden/make_golden.py``. Two are worked out by hand.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catopt_xp.backend.xp import Backend
from catopt_xp.nn.parameters import Parameters
from catopt_xp.optim import rules
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import Adam, GradientDescent, Momentum, RMSProp
from catopt_xp.optim.schedules import parse

GOLDEN = json.loads((Path(__file__).parents[1] / "helpers" / "golden" / "optimizers.json").read_text(encoding="ascii"))
SHAPES: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in GOLDEN["shapes"].items()}
TOLERANCE = 1e-12  # after 200 steps of about 1e-2; what is seen is near 1e-15

# A new optimizer enters this list, or it does not enter.
ALL_OPTIMIZERS: list[type[BaseOptimizer]] = [GradientDescent, Momentum, RMSProp, Adam]

Arrays = dict[str, np.ndarray[Any, Any]]


def split(values: list[float], dtype: str = "float64") -> Arrays:
    """The flat numbers of the golden file as named arrays."""
    arrays, begin = {}, 0
    for name, shape in SHAPES.items():
        end = begin + math.prod(shape)
        arrays[name] = np.array(values[begin:end], dtype=dtype).reshape(shape)
        begin = end
    return arrays


def flat(arrays: Arrays) -> np.ndarray[Any, Any]:
    return np.concatenate([arrays[name].ravel() for name in SHAPES])


def build(case: dict[str, Any], params: Mapping[str, Any]) -> BaseOptimizer:
    arguments = dict(case["arguments"])
    if "lr_scheduler" in arguments:
        arguments["lr_scheduler"] = parse(arguments["lr_scheduler"])
    cls: Any = getattr(rules, case["optimizer"])
    if "preset" in case:
        made: BaseOptimizer = cls.preset(case["preset"], params, **arguments)
        return made
    made = cls(params, **arguments)
    return made


def step(optimizer: BaseOptimizer, gradient: Mapping[str, Any]) -> None:
    optimizer.zero_grad()
    optimizer.add_grad(gradient)
    optimizer.step()


def largest_difference(case: dict[str, Any]) -> tuple[float, int]:
    """Follow the golden gradients; return the largest difference (a NaN is one) and its step."""
    params = split(GOLDEN["start"])
    optimizer = build(case, params)
    kept = dict(zip(GOLDEN["kept_steps"], case["parameters"], strict=True))
    differences = {}
    for t, gradient in enumerate(GOLDEN["gradients"], start=1):
        step(optimizer, split(gradient))
        if t % GOLDEN["steps_per_epoch"] == 0:
            optimizer.increase_epoch()
        if t in kept:
            differences[t] = float(np.abs(flat(params) - kept[t]).max())
    worst = int(np.argmax(list(differences.values())))
    return list(differences.values())[worst], list(differences)[worst]


def identity(case: dict[str, Any]) -> str:
    return f"{case['optimizer']}, {'preset ' if 'preset' in case else ''}{case['name']}"


def test_the_list_of_optimizers_is_complete() -> None:
    found = [
        cls
        for _, cls in inspect.getmembers(rules, inspect.isclass)
        if issubclass(cls, BaseOptimizer) and cls is not BaseOptimizer
    ]
    assert set(found) == set(ALL_OPTIMIZERS)
    assert {case["optimizer"] for case in GOLDEN["cases"]} == {cls.__name__ for cls in ALL_OPTIMIZERS}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=identity)
def test_the_path_of_the_library(case: dict[str, Any]) -> None:
    difference, at_step = largest_difference(case)
    assert difference <= TOLERANCE, f"{identity(case)}: largest difference {difference:.2e}, at step {at_step}"


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=identity)
def test_flat_parameters_take_that_path_on_every_backend(case: dict[str, Any], backend: Backend) -> None:
    def place(values: list[float]) -> Parameters:
        return Parameters(backend.asarray(np.array(values), dtype=backend.xp.float64), SHAPES)

    params = place(GOLDEN["start"])
    optimizer = build(case, params)
    for t, gradient in enumerate(GOLDEN["gradients"][:50], start=1):
        step(optimizer, place(gradient))
        if t % GOLDEN["steps_per_epoch"] == 0:
            optimizer.increase_epoch()
    expected = case["parameters"][GOLDEN["kept_steps"].index(50)]
    difference = float(np.abs(backend.to_host(params.flat) - expected).max())
    assert difference <= TOLERANCE, f"{identity(case)}, {backend.name}: difference {difference:.2e} at step 50"


def changed(name: str, optimizer: str, **arguments: Any) -> dict[str, Any]:
    case = next(c for c in GOLDEN["cases"] if (c["name"], c["optimizer"]) == (name, optimizer) and "preset" not in c)
    return {**case, "arguments": {**case["arguments"], **arguments}}


@pytest.mark.parametrize(
    "case",
    [
        changed("torch Adam", "Adam", eps_mode="hat"),
        changed("torch Adam", "Adam", correct_param=False),
        changed("torch RMSprop", "RMSProp", eps_mode="inside"),
        changed("optax rms, eps inside", "RMSProp", correct_param=False),
        changed("torch SGD momentum", "Momentum", nesterov=True),
        changed("torch SGD weight_decay", "GradientDescent", l2=0.0),
        changed("torch AdamW", "Adam", weight_decay=0.0, l2=0.1),
        changed("torch SGD clip_grad_norm_", "GradientDescent", clip_norm=None),
    ],
    ids=lambda case: f"{case['name']} {case['arguments']}",
)
def test_the_golden_paths_tell_the_variants_apart(case: dict[str, Any]) -> None:
    difference, _ = largest_difference(case)
    assert difference > 1e3 * TOLERANCE, f"another rule came within {difference:.1e} of this path"


def test_adam_by_hand_two_steps() -> None:
    # g = 0.5, then -1; lr = 0.1, beta1 = 0.9, beta2 = 0.999, eps = 1e-8.
    # t=1: m = 0.05, v = 0.00025; m/(1-0.9) = 0.5, v/(1-0.999) = 0.25: p = 1 - 0.1*0.5/(0.5 + 1e-8)
    # t=2: m = 0.045 - 0.1 = -0.055, v = 0.00024975 + 0.001 = 0.00124975; 1-0.81 = 0.19, 1-0.998001 = 0.001999
    params = {"W0": np.array([[1.0]])}
    optimizer = Adam(params, 0.1)
    step(optimizer, {"W0": np.array([[0.5]])})
    first = 1 - 0.1 * 0.5 / (0.5 + 1e-8)
    assert params["W0"][0, 0] == pytest.approx(first, rel=1e-14)
    step(optimizer, {"W0": np.array([[-1.0]])})
    second = first - 0.1 * (-0.055 / 0.19) / (math.sqrt(0.00124975 / 0.001999) + 1e-8)
    assert params["W0"][0, 0] == pytest.approx(second, rel=1e-13)


def test_rmsprop_by_hand_has_eps_inside_the_root_and_is_corrected() -> None:
    # g = 0.001; s = 1e-7, s/(1-0.9) = 1e-6; eps = 1e-6: p = 0 - 0.1*0.001/sqrt(2e-6)
    params = {"W0": np.array([[0.0]])}
    step(RMSProp(params, 0.1), {"W0": np.array([[0.001]])})
    assert params["W0"][0, 0] == pytest.approx(-1e-4 / math.sqrt(2e-6), rel=1e-13)


@pytest.mark.parametrize("cls", ALL_OPTIMIZERS)
def test_the_preset_of_the_chapter_is_the_plain_constructor(cls: type[BaseOptimizer]) -> None:
    plain, preset = split(GOLDEN["start"]), split(GOLDEN["start"])
    for optimizer in (cls(plain, 0.01), cls.preset("chapter", preset, 0.01)):
        for gradient in GOLDEN["gradients"][:5]:
            step(optimizer, split(gradient))
    assert np.array_equal(flat(plain), flat(preset))


@pytest.mark.parametrize("cls", ALL_OPTIMIZERS)
def test_every_optimizer_descends_a_parabola(cls: type[BaseOptimizer]) -> None:
    # 300 steps down p*p/2 from 1 and -1. Steps of RMSProp and Adam are about lr long wherever they are.
    params = {"W0": np.array([[1.0, -1.0]])}
    optimizer = cls(params, 0.05 if cls in (GradientDescent, Momentum) else 0.01)
    for _ in range(300):
        step(optimizer, {"W0": params["W0"].copy()})
    assert np.abs(params["W0"]).max() < 0.02, params["W0"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cls", ALL_OPTIMIZERS)
def test_the_callers_arrays_are_updated_in_place_in_their_type(cls: type[BaseOptimizer], dtype: str) -> None:
    params = split(GOLDEN["start"], dtype)
    arrays = dict(params)
    before = flat(params).copy()
    optimizer = cls(params, 0.01, weight_decay=0.1, l2=0.1, clip_norm=1.0)
    step(optimizer, split(GOLDEN["gradients"][0], dtype))
    for name, array in arrays.items():
        assert params[name] is array
        assert array.dtype == dtype
    assert np.abs(flat(params) - before).min() > 0
    moments = [x for x in optimizer.save().values() if isinstance(x, np.ndarray)]
    assert {x.dtype.name for x in moments} <= {dtype}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=identity)
def test_float32_follows_float64(case: dict[str, Any]) -> None:
    # 50 steps of 1e-2 on parameters near 1: a few roundings of 6e-8 a step.
    paths = []
    for dtype in ("float32", "float64"):
        params = split(GOLDEN["start"], dtype)
        optimizer = build(case, params)
        for gradient in GOLDEN["gradients"][:50]:
            step(optimizer, split(gradient, dtype))
        paths.append(flat(params))
    difference = float(np.abs(paths[0] - paths[1]).max())
    assert difference <= 2e-5, f"{identity(case)}: {difference:.1e}"


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=identity)
def test_saved_and_loaded_in_the_middle_it_goes_on_with_the_same_bits(case: dict[str, Any]) -> None:
    def run(optimizer: BaseOptimizer, first: int, end: int) -> None:
        for t in range(first, end):
            step(optimizer, split(GOLDEN["gradients"][t]))
            if (t + 1) % GOLDEN["steps_per_epoch"] == 0:
                optimizer.increase_epoch()

    whole = split(GOLDEN["start"])
    run(build(case, whole), 0, 60)
    params = split(GOLDEN["start"])
    stopped = build(case, params)
    run(stopped, 0, 30)
    resumed_params = {name: array.copy() for name, array in params.items()}
    resumed = build(case, resumed_params)
    resumed.load(stopped.save())
    assert (resumed.epoch, resumed.learning_rate) == (stopped.epoch, stopped.learning_rate)
    run(resumed, 30, 60)
    assert np.array_equal(flat(resumed_params), flat(whole))


@pytest.mark.parametrize("cls", ALL_OPTIMIZERS)
def test_every_optimizer_takes_a_schedule(cls: type[BaseOptimizer]) -> None:
    optimizer = cls(split(GOLDEN["start"]), 0.01, lr_scheduler=parse("hyperbola(0.5)"))
    rates = []
    for _ in range(3):
        rates.append(optimizer.learning_rate)
        optimizer.increase_epoch()
    assert rates == pytest.approx([0.01, 0.01 / 1.5, 0.005], rel=1e-15)


@pytest.mark.parametrize("cls", ALL_OPTIMIZERS)
def test_gradients_add_up_until_they_are_zeroed(cls: type[BaseOptimizer]) -> None:
    one, two = split(GOLDEN["gradients"][0]), split(GOLDEN["gradients"][1])
    params, summed = split(GOLDEN["start"]), split(GOLDEN["start"])
    optimizer, reference = cls(params, 0.01), cls(summed, 0.01)
    optimizer.add_grad(two)
    optimizer.zero_grad()
    optimizer.add_grad(one)
    optimizer.add_grad(two)
    optimizer.step()
    step(reference, {name: one[name] + two[name] for name in one})
    assert np.array_equal(flat(params), flat(summed))
