"""The innermost functions of the panel engine: rules value by value, extreme numbers, other processors' vectors."""

from __future__ import annotations

import itertools
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import some
from numba import njit
from numba.core.codegen import get_host_cpu_features
from panel_runs import OPTIONS, Array, Case, python, run, state

from catopt_xp.engines import panels
from catopt_xp.engines.choose import LEAST_EPS
from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.engines.cpu.lanes import flush_subnormals, restore
from catopt_xp.engines.cpu.rules import NUMBERS, update
from catopt_xp.engines.cpu.vectors import X86 as FLUSHES
from catopt_xp.engines.plain import PlainEngine
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS

# --- the rules, value by value ------------------------------------------------------------------------------


def _update(p: Any, moments: Any, g: Any, numbers: Any, decay: Any) -> None:
    before = flush_subnormals()  # as the engine runs it
    update(p, moments, 0, g, 0, p.size, numbers, decay)
    restore(before)


compiled_update = njit(_update, error_model="numpy")

ORDINARY = [0.0, 1e-25, 1e-17, 1e-8, 1e-3, 1.0, 7.5, 1e4, 1e18]
Decay = tuple[float, float] | tuple[()]
DECAYS: list[Decay] = [(), (0.01, 1 - 1e-4)]


def both_rules(
    name: str, dtype: str, decay: Decay, arrays: list[Array], **more: Any
) -> tuple[list[Array], list[Array]]:
    """(p, *moments) after one update by `update` and by the class's `rule`; `arrays` are (g, p, *moments)."""
    optimizer, options = OPTIONS[name]
    kind = OPTIMIZERS[optimizer][0]
    made: BaseOptimizer = kind({"W0": np.zeros((1, 1), dtype)}, 1e-3, **options | more)
    made.steps = 3
    scalars, count = made.scalars(), arrays[0].size
    whole = panels.padded(count, panels.STRIP)  # numbers in whole strips
    ours, theirs = ([np.resize(x, whole).astype(dtype) for x in arrays] for _ in range(2))
    g, p, *moments = ours
    compiled_update(p, tuple(moments), g, NUMBERS[kind](**scalars), decay)
    g, p, *moments = theirs
    with np.errstate(all="ignore"):
        if decay:
            g += decay[0] * p
            p *= decay[1]
        kind.rule(np, p, g, *moments, **scalars)
    return [x[:count] for x in ours[1:]], [x[:count] for x in theirs[1:]]


def value_table(name: str, dtype: str, values: list[float]) -> list[Array]:
    """(g, p, *moments): all combinations of values for g and the moments, and as many random ones; second moments >= 0.

    In each combination all have one sign: a rule's own sum may not cancel, which would leave its rounding alone.
    """
    moment_names = OPTIMIZERS[OPTIONS[name][0]][0].moment_names
    rng = np.random.default_rng(0)
    combined = np.array(list(itertools.product(values, repeat=1 + len(moment_names)))).T
    drawn = 10.0 ** rng.uniform(-12, 12, combined.shape)
    g, *moments = np.hstack([combined, drawn])
    sign = rng.choice([-1.0, 1.0], g.size)
    p = sign * 10.0 ** rng.uniform(-6, 3, g.size)
    second = OPTIONS[name][0] in ("rmsprop", "adam")
    if second:  # squares of what is in the table, as far as they are normal numbers
        moments[-1] = np.where(moments[-1] < 1e-17, 0.0, np.minimum(moments[-1], 1e17) ** 2)
    signed = [sign * x for x in moments[: len(moments) - second]]
    return [x.astype(dtype) for x in (sign * g, p, *signed, *moments[len(signed) :])]


def assert_same_values(name: str, dtype: str, values: list[float], **more: Any) -> None:
    """To a few units in the last place of the larger of old and new value."""
    arrays = value_table(name, dtype, values)
    few, smallest = 8 * float(np.finfo(dtype).eps), float(np.finfo(dtype).smallest_normal)
    for decay in DECAYS:
        ours, theirs = both_rules(name, dtype, decay, arrays, **more)
        for here, there, before in zip(ours, theirs, arrays[1:], strict=True):
            assert np.isfinite(there).all()
            scale = np.maximum(np.abs(there), np.abs(before)).astype(np.float64)
            off = np.abs(here.astype(np.float64) - there) - few * scale
            worst = int(np.argmax(off))
            assert off[worst] <= smallest, ([float(x[worst]) for x in arrays], here[worst], there[worst])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_kernel_computes_its_rule_value_by_value(name: str, dtype: str) -> None:
    assert_same_values(name, dtype, ORDINARY)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name, (optimizer, _) in OPTIONS.items() if optimizer in ("rmsprop", "adam")])
def test_the_least_eps_that_the_engine_takes_is_as_good_as_any(name: str, dtype: str) -> None:
    assert_same_values(name, dtype, ORDINARY[:-1], eps=LEAST_EPS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("values", [[0.0, 1.0, 1e4, np.nan], [0.0, 1.0, 1e25, 1e200, np.inf]], ids=["nan", "overflow"])
def test_a_kernel_has_its_rule_s_numbers_that_are_not_finite(values: list[float], name: str, dtype: str) -> None:
    with np.errstate(over="ignore"):  # float32 has no 1e200: infinity is meant there
        arrays = value_table(name, dtype, values)
    for decay in DECAYS:
        ours, theirs = both_rules(name, dtype, decay, arrays)
        for here, there in zip(ours, theirs, strict=True):
            for kind in (np.isnan, np.isposinf, np.isneginf):
                differ = np.flatnonzero(kind(here) != kind(there))
                assert not differ.size, [[float(x[i]) for x in arrays] + [here[i], there[i]] for i in differ[:3]]
            finite = np.isfinite(there)
            assert np.allclose(here[finite], there[finite], rtol=1e-5, atol=0)


def test_every_optimizer_has_a_kernel_here() -> None:
    assert set(NUMBERS) == {kind for kind, _ in OPTIMIZERS.values()}
    assert {optimizer for optimizer, _ in OPTIONS.values()} == set(OPTIMIZERS)
    for kind, numbers in NUMBERS.items():
        optimizer = kind({"W0": np.zeros((1, 1))}, 1e-3)
        assert list(optimizer.advance()) == list(numbers._fields)


# --- whole runs with extreme numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "moment", "dtype"), [("adam", "v", "float32"), ("rmsprop", "s", "float32")])
def test_where_a_second_moment_is_infinite_the_weights_stay(optimizer: str, moment: str, dtype: str) -> None:
    for kind in (PlainEngine, PanelEngine):
        case = Case(dtype=dtype, optimizer=optimizer)
        engine = case.engine(kind)
        before = state(engine)["W0"]
        engine.optimizer.save()[f"{moment}/W0"][:, :1500] = np.inf
        after = run(engine, case)
        assert np.array_equal(after["W0"][:, :1500], before[:, :1500])
        assert not np.array_equal(after["W0"][:, 1500:], before[:, 1500:])
        assert np.isinf(after[f"{moment}/W0"][:, :1500]).all()


@pytest.mark.skipif(not FLUSHES, reason="only x86 processors are told to take subnormal numbers for 0")
@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    some(
        [(optimizer, dtype) for optimizer in ("momentum", "rmsprop", "adam") for dtype in ("float32", "float64")],
        [("adam", "float32")],
        pytest.mark.hardening,
    ),
)
def test_moments_of_dead_units_never_stay_subnormal(optimizer: str, dtype: str) -> None:
    case = Case(dtype=dtype, optimizer=optimizer, activation="relu", epochs=20, n_x=300)
    engine = case.engine(PanelEngine)
    engine.model.save()["b0"][...] = -1e6  # no unit of the first layer is ever alive
    smallest = float(np.finfo(dtype).smallest_normal)
    names = [f"{name}/W0" for name in engine.optimizer.moment_names]
    for name in names:
        # One step from the smallest normal number; 60 steps from it; nowhere near it.
        engine.optimizer.save()[name][:, ::3] = smallest * 1.0001
        engine.optimizer.save()[name][:, 1::3] = smallest * 0.9**-30
        engine.optimizer.save()[name][:, 2::3] = 1.0
    arrays = run(engine, case)
    for name in names:
        sizes = np.abs(arrays[name])
        assert not np.count_nonzero((sizes > 0) & (sizes < smallest)), name
        assert not sizes[:, ::3].any()
        assert (sizes[:, 2::3] > 1e-3).all()


def test_the_processor_is_left_as_it_was_found() -> None:
    case, tiny = Case(dtype="float32"), np.full(64, 1e-40, dtype=np.float32)
    run(case.engine(PanelEngine), case)
    assert (tiny * np.float32(0.5) > 0).all()


# --- other processors ---------------------------------------------------------------------------------------

X86 = platform.machine().lower() in ("x86_64", "amd64")

# Checks the engine with the vectors of another processor, and says how long they are.
CHECK = """
import numpy as np
from catopt_xp.engines.cpu import vectors
from catopt_xp.engines.choose import self_check
from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import Adam, Momentum
print(vectors.VECTOR_BYTES)
for kind, samples, dtype, options in (
    (Adam, "uint8", "float32", {}),
    (Momentum, "float32", "float32", {"nesterov": True}),
    (Adam, "uint8", "float64", {"l2": 0.1, "eps_mode": "inside"}),
):
    model = DeepNetwork([4, 3, 1], ["relu", "sigmoid"], dtype=dtype)
    print(self_check(PanelEngine, kind(model.save(), 1e-3, **options), np.zeros((1, 1), samples), model))
"""


@pytest.mark.hardening
@pytest.mark.skipif(not X86, reason="the vectors of other x86 processors can be tried on one of them only")
@pytest.mark.parametrize(
    ("name", "features", "vector_bytes"),
    [("haswell", "+sse2,+avx,+avx2,+fma", 32), ("x86-64", "+sse,+sse2", 16)],
)
def test_the_vectors_of_other_processors_compute_the_same(
    tmp_path: Path, name: str, features: str, vector_bytes: int
) -> None:
    if "avx2" in features and "+avx2" not in str(get_host_cpu_features()):
        pytest.skip("this processor has no AVX2")
    printed = python(CHECK, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed.split() == [str(vector_bytes), *["None"] * 3]
