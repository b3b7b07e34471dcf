"""Numbers at the ends of their range: logits of ten thousand, gradients near 0, schedules far out."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from awkward_arrays import Array
from hypothesis import assume, example, given
from hypothesis import strategies as st
from panel_runs import OPTIONS
from properties import Tally, prove, times

from catopt_xp.backend.xp import NumpyBackend
from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.nn.functional import OUTPUT_ACTIVATIONS
from catopt_xp.nn.labels import check_labels
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim import schedules
from catopt_xp.optim.rules import OPTIMIZERS, GradientDescent, make_optimizer
from catopt_xp.optim.schedules import Scheduler, describe, restore

Record = Callable[..., None]
seeds = st.integers(0, 2**16)
FARTHEST = 1e4  # logits
M, BATCH = 11, 4


# --- schedules --------------------------------------------------------------------------------------------------------

above_zero = st.floats(sys.float_info.min * sys.float_info.epsilon, sys.float_info.max, exclude_min=False)
not_negative = st.floats(0.0, sys.float_info.max)
share = st.floats(0.0, 1.0)
factor = st.floats(5e-324, 1.0)
simple: st.SearchStrategy[Scheduler] = st.one_of(
    st.just(schedules.const_lr),
    st.builds(schedules.get_hyperbola_func, not_negative),
    st.builds(schedules.get_exponential_func, factor),
    st.builds(schedules.get_sqrt_func, st.floats(5e-324, 1e150)),
    st.builds(schedules.get_staircase_func, factor, above_zero),
    st.builds(schedules.get_table_func, st.dictionaries(not_negative, not_negative, min_size=1, max_size=5)),
    st.builds(schedules.get_cosine_func, above_zero, share),
)
any_schedule = st.recursive(
    simple, lambda inner: st.builds(schedules.with_warmup, inner, above_zero, share), max_leaves=4
)
epochs = st.one_of(st.floats(0.0, 1e6), st.integers(0, 10**6), st.just(10**6))
rates = st.floats(5e-324, 1e150)


@times(300, 30000)
def test_every_schedule_is_finite_far_out_and_read_from_its_text(examples: int, record: Record) -> None:
    tally = Tally()

    @given(any_schedule, rates, epochs)
    @example(schedules.get_staircase_func(0.5, 1e-310), 1.0, 10**6)  # more stairs than there are numbers
    @example(schedules.get_staircase_func(1.0, 5e-324), 1.0, 1e6)
    @example(schedules.get_hyperbola_func(sys.float_info.max), 1.0, 1e6)
    def holds(schedule: Scheduler, rate: float, epoch: float) -> None:
        now = schedule(rate, epoch)
        assert type(now) is float
        assert 0.0 <= now < math.inf
        optimizer = GradientDescent({"W0": np.zeros(1)}, rate, lr_scheduler=schedule)
        optimizer.epoch = epoch
        assert optimizer.learning_rate == now
        back = restore(describe(schedule))
        assert back == schedule
        assert back(rate, epoch) == now
        assert pickle.loads(pickle.dumps(schedule))(rate, epoch) == now
        tally("finite")

    prove(holds, examples, record, tally)


def test_a_rate_beyond_all_numbers_is_named() -> None:
    optimizer = GradientDescent({"W0": np.zeros(1)}, 1e200, lr_scheduler=schedules.get_sqrt_func(1e200))
    with pytest.raises(ValueError, match=r"InverseSquareRoot\(k=1e\+200\) gives inf at epoch 0"):
        _ = optimizer.learning_rate


# --- logits -----------------------------------------------------------------------------------------------------------


def network_with(logits: Array, output: str, dtype: str) -> DeepNetwork:
    """A network that says these logits (outputs, m) of sample k, which is 1 in feature k alone."""
    outputs, m = logits.shape
    model = DeepNetwork([m, m, outputs], ["relu", output], dtype=dtype)
    model.load({"W0": np.eye(m), "W1": logits, "b0": np.zeros((m, 1)), "b1": np.zeros((outputs, 1))})
    return model


def made(name: str, model: DeepNetwork, rate: float = 1e-3) -> Any:
    kind, options = OPTIONS[name]
    return make_optimizer(kind, model.save(), rate, **options)


def assert_finite(engine: PlainEngine) -> None:
    arrays = {**engine.model.save(), **{k: x for k, x in engine.optimizer.save().items() if "/" in k}}
    for name, x in (arrays | {"losses": engine.fetch_losses()}).items():
        assert np.isfinite(x).all(), name


def train(kind: type[PlainEngine], model: DeepNetwork, optimizer: Any, X: Array, Y: Array, epochs: int = 2) -> Any:
    """Steps over samples (m, n_x), in which nothing overflows and nothing is no number."""
    engine = kind(model, optimizer, X, Y, NumpyBackend(), Settings(BATCH))
    order = np.arange(len(X))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for epoch in range(epochs):
            for _ in engine.steps(epoch, order, following=order):
                pass
    accuracy, cost = engine.evaluate(X, Y)
    engine.settle()
    assert 0.0 <= accuracy <= 1.0
    assert math.isfinite(cost)
    return engine


# Compiled for each of the rules and dtypes, which takes seconds: the short form has a rule and dtype of each kind.
FEW = ["gd", "nesterov", "rmsprop inside", "adam outside"]


@pytest.mark.parametrize("kind", [PlainEngine, PanelEngine], ids=["plain", "panels"])
@times(40, 4000)
def test_logits_of_ten_thousand_train_with_finite_numbers(
    examples: int, kind: type[PlainEngine], record: Record
) -> None:
    tally = Tally()
    far = st.sampled_from([-FARTHEST, FARTHEST, 0.0, -1.0, 104.0, -104.0, 709.8, -745.2])
    logits = st.lists(st.one_of(far, st.floats(-FARTHEST, FARTHEST)), min_size=3 * M, max_size=3 * M)
    names = st.sampled_from(FEW if examples < 300 else sorted(OPTIONS))

    @given(
        logits,
        st.sampled_from(["sigmoid", "softmax"]),
        st.sampled_from(["float32"] if examples < 300 else ["float32", "float64"]),
        names,
        seeds,
    )
    @example([FARTHEST] * 3 * M, "sigmoid", "float32", "adam outside", 0)
    @example([-FARTHEST, FARTHEST, 0.0] * M, "softmax", "float32", "rmsprop inside", 0)
    def holds(numbers: list[float], output: str, dtype: str, name: str, seed: int) -> None:
        Z = np.array(numbers, dtype=dtype).reshape(3, M)
        model = network_with(Z, output, dtype)
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, 3, (1, M)) if output == "softmax" else rng.integers(0, 2, (3, M))
        X, Y = np.eye(M, dtype=dtype), check_labels(drawn, output, 3, dtype)
        Y_hat = model.forward(X.T)
        loss = float(model.backward(Y))
        # What the loss is, worked out in float64: it is as exact as the logits are.
        targets = np.eye(3)[:, drawn[0]] if output == "softmax" else drawn
        expected = float(OUTPUT_ACTIVATIONS[output].loss(Z.astype(np.float64), targets, np, None))
        assert np.isfinite(Y_hat).all()
        assert Y_hat.min() >= 0.0
        assert Y_hat.max() <= 1.0
        assert loss == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 1e-12, abs=1e-6)
        assert np.isfinite(model.get_grad_dict().flat).all()
        assert math.isfinite(model.loss(Y, Y_hat))
        assert_finite(train(kind, model, made(name, model), X, Y))
        tally(output)

    prove(holds, examples, record, tally)


# --- gradients near 0 -------------------------------------------------------------------------------------------------


def magnitudes(dtype: str) -> st.SearchStrategy[float]:
    """Numbers of which the squares do not overflow: those near 0 most."""
    info = np.finfo(dtype)
    tiny, small, large = float(info.smallest_subnormal), float(info.smallest_normal), float(info.max) ** 0.5 / 32
    ends = st.sampled_from([0.0, tiny, small, -tiny, -small, small - tiny, small**0.5, tiny**0.5, large, -large])
    return st.one_of(ends, st.floats(-small, small), st.floats(-large, large))


@times(200, 20000)
def test_each_rule_is_finite_from_subnormal_to_large_gradients(examples: int, record: Record) -> None:
    tally = Tally()

    @given(st.sampled_from(sorted(OPTIONS)), st.sampled_from(["float16", "float32", "float64"]), st.data())
    def holds(name: str, dtype: str, data: st.DataObject) -> None:
        kind, options = OPTIONS[name]
        if dtype == "float16" and kind in ("rmsprop", "adam"):
            options = options | {"eps": 1e-3}  # the usual ones are 0 there
        steps = data.draw(st.lists(st.lists(magnitudes(dtype), min_size=4, max_size=4), min_size=1, max_size=40))
        clip = data.draw(st.sampled_from([None, 1.0]))
        p = {"W0": np.array([0.5, -0.5, 0.0, 1e-3], dtype=dtype)}
        optimizer = OPTIMIZERS[kind][0](p, 1e-3, clip_norm=clip, **options)
        with np.errstate(invalid="raise", divide="raise"):
            for gradient in steps:
                with np.errstate(over="ignore" if clip else "raise"):
                    optimizer.update({"W0": np.array(gradient, dtype=dtype)})
        for key, x in optimizer.save().items():
            assert "/" not in key or np.isfinite(x).all(), key
        assert np.isfinite(p["W0"]).all()
        tally(kind)

    prove(holds, examples, record, tally)


@pytest.mark.parametrize("kind", [PlainEngine, PanelEngine], ids=["plain", "panels"])
@times(30, 3000)
def test_a_network_trains_on_subnormal_gradients(examples: int, kind: type[PlainEngine], record: Record) -> None:
    tally = Tally()
    names = st.sampled_from(FEW if examples < 300 else sorted(OPTIONS))
    dtypes = st.sampled_from(["float32"] if examples < 300 else ["float32", "float64"])

    @given(dtypes, names, st.integers(-8, 2), seeds)
    def holds(dtype: str, name: str, exponent: int, seed: int) -> None:
        info = np.finfo(dtype)
        size = float(info.smallest_normal) * 10.0**exponent
        assume(size > 0.0)
        rng = np.random.default_rng(seed)
        X = (size * rng.standard_normal((M, 5))).astype(dtype)
        Y = check_labels(rng.integers(0, 2, (1, M)), "sigmoid", 1, dtype)
        model = DeepNetwork([5, 4, 1], ["tanh", "sigmoid"], seed=seed, dtype=dtype)
        model.forward(X.T)
        model.backward(Y)
        nearest = np.abs(model.get_grad_dict()["W0"]).max()
        assert nearest < 100 * info.smallest_normal
        assert_finite(train(kind, model, made(name, model), X, Y, epochs=12))
        tally("subnormal" if nearest < info.smallest_normal else "normal")

    prove(holds, examples, record, tally)
