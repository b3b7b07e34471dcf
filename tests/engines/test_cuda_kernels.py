"""The GPU engine's kernels executed on the CPU, against the plain engine, which is the definition: equal numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import run_sanitized
from cuda_runs import (
    PRODUCTS,
    RULES,
    CpuDevice,
    cases,
    cuda_engine,
    error_ratio,
    planted,
    source_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import some
from panel_runs import Case, assert_same_bits, assert_same_numbers, differences, run

from catopt_xp.engines.cuda.launches import SUBTREE
from catopt_xp.engines.panels import tree_sum
from catopt_xp.engines.plain import PlainEngine
from catopt_xp.optim import schedules

OBSTACLE = cuda_on_cpu.obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

CASES = cases()
DOUBLE = [name for name in CASES if name.startswith("float64")]
SINGLE = [name for name in CASES if not name.startswith("float64")]
# In every run each kind of products with its own rule and every rule with one of them; the cross product is `kernels`.
ALWAYS = {f"float64, pixels: {rule}" for rule in ("gd", "nesterov", "rmsprop hat", "adam, both")}
ALWAYS |= {"float64, floats: adam outside", "tensor cores: adam outside", "tensor cores: rmsprop, both"}
ALWAYS |= {f"{products}: momentum" for products in ("tensor cores", "cores, pixels", "cores, floats")}
ALWAYS |= {"float64, pixels: 3 layers, relu", "tensor cores: 129 of 260", "tensor cores: 2049 features"}

# --- every variant ------------------------------------------------------------------------------------------------


@cache
def difference(name: str) -> float:
    """The largest one from the plain engine, over the size of its array."""
    kind, case = CASES[name]
    ours, theirs = (run(case.engine(engine), case) for engine in (cuda_engine(kind=kind), PlainEngine))
    assert {array.dtype.name for array in ours.values() if array.ndim} == {"float64"}
    return max(differences(ours, theirs).values())


@cache
def ratio(name: str) -> float:
    """The largest one of errors, ours over the plain engine's."""
    kind, case = CASES[name]
    return error_ratio(cuda_engine(kind=kind), case)


@pytest.mark.parametrize("name", some(DOUBLE, ALWAYS & {*DOUBLE}, pytest.mark.kernels))
def test_in_float64_a_variant_has_the_numbers_of_the_plain_engine(name: str) -> None:
    assert difference(name) < 1e-12


@pytest.mark.parametrize("name", some(SINGLE, ALWAYS & {*SINGLE}, pytest.mark.kernels))
def test_in_float32_a_variant_s_error_is_at_most_twice_the_plain_engine_s(name: str) -> None:
    assert ratio(name) <= 2


def test_the_variants_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    sources = {source_of(kind, case) for kind, case in CASES.values()}
    with capsys.disabled():
        print(f"\n{len(CASES)} runs of {len(sources)} variants of the source")
    assert len(sources) >= 85
    assert {name.partition(":")[0] for name in CASES} == set(PRODUCTS)


# --- any run ------------------------------------------------------------------------------------------------------

SCHEDULES: list[schedules.Scheduler] = [
    schedules.const_lr,
    schedules.get_hyperbola_func(0.5),
    schedules.get_table_func({0: 1e-4, 1: 5e-5, 1.5: 0.0}),
    schedules.with_warmup(schedules.get_cosine_func(2, 0.1), 1, 0.1),
]


@st.composite
def any_case(draw: Callable[..., Any]) -> Case:
    """What the source does not depend on is free; of what it does there are few, so that few are compiled."""
    rule = RULES[draw(st.sampled_from(sorted(RULES)))]
    m = draw(st.integers(1, 40))
    return Case(
        n_x=draw(st.integers(1, 700)),
        m=m,
        batch_size=draw(st.integers(1, m)),
        drop_last=draw(st.booleans()),
        shuffle=draw(st.sampled_from(["epoch", "once", "none"])),
        samples=draw(st.sampled_from(["uint8", "float64"])),
        scheduler=draw(st.sampled_from(SCHEDULES)),
        by_step=draw(st.booleans()),
        epochs=draw(st.integers(1, 4)),
        settled=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
        **rule,
    )


@pytest.mark.kernels
@settings(max_examples=120)
@given(any_case())
def test_in_float64_any_run_has_the_numbers_of_the_plain_engine(case: Case) -> None:
    assert_same_numbers(run(case.engine(cuda_engine()), case), run(case.engine(PlainEngine), case))


# --- orders, and what memory held before --------------------------------------------------------------------------

# Several groups of units, several chunks of samples, tiles and subtrees of tiles, a ragged one, and blocks of `middle`
# with more than one sample.
LARGE = {
    "float64, pixels": Case(n_x=128 * SUBTREE + 300, units=(40, 3), m=150, batch_size=140, epochs=2),
    "tensor cores": Case(n_x=256 + 117, units=(40, 3), dtype="float32", m=150, batch_size=140, epochs=2),
    "tensor cores, aligned": Case(n_x=256 + 120, units=(20, 3), dtype="float32", m=80, batch_size=70, epochs=2),
}


@pytest.mark.parametrize("name", some(LARGE, ["tensor cores, aligned"], pytest.mark.kernels))
def test_the_order_of_blocks_and_threads_changes_no_bit(name: str) -> None:
    case = LARGE[name]
    straight = run(case.engine(cuda_engine(CpuDevice())), case)
    for orders in (("backward", "forward"), ("shuffled", "shuffled"), ("forward", "backward")):
        assert_same_bits(run(case.engine(cuda_engine(CpuDevice(str, *orders))), case), straight)


@pytest.mark.parametrize("name", some(LARGE, ["tensor cores, aligned"], pytest.mark.kernels))
def test_what_the_memory_held_before_does_not_matter(name: str) -> None:
    case = LARGE[name]
    engine: Any = case.engine(cuda_engine())
    for array in [*engine._buffers.values(), engine._table, engine.losses]:
        array[...] = np.nan
    for array in (engine._rows, engine._places, engine._base):
        array[...] = np.iinfo(np.int32).max
    assert_same_bits(run(engine, case), run(case.engine(cuda_engine()), case))


def test_a_set_that_begins_at_an_odd_address_has_the_same_bits() -> None:
    """Its pixels are loaded one by one, not by fours."""
    case, results = Case(n_x=264, dtype="float32"), []
    for offset in (0, 1):
        engine = case.engine(PlainEngine)
        held = np.empty(engine.samples.size + 16, np.uint8)
        start = -held.ctypes.data % 8 + offset
        samples = held[start : start + engine.samples.size].reshape(engine.samples.shape)
        samples[...] = engine.samples
        ours = cuda_engine()(engine.model, engine.optimizer, samples, engine.targets, engine.backend, engine.settings)
        assert ours.aligned == (offset == 0)
        results.append(run(ours, case))
    assert_same_bits(*results)


# --- sums ---------------------------------------------------------------------------------------------------------


def sum_error(tiles: int, change: Callable[[str], str] = str) -> float:
    """How far d is from what it is where the products of tiles are added by the tree of `panels.py`.

    The numbers are large and cancel, a bias brings their sum near 0: a sum in another order is far off.
    """
    case = Case(n_x=256 * tiles, units=(5,), activation="relu", dtype="float32", m=1, batch_size=1, seed=tiles)
    engine: Any = case.engine(cuda_engine(CpuDevice(change)))
    rng, parameters, part = np.random.default_rng(tiles), engine.model.save(), engine._buffers["part"]
    part[...] = (rng.standard_normal(part.shape) * 10.0 ** rng.integers(1, 8, part.shape)).astype(np.float32)
    scaled = tree_sum(part.reshape(tiles, 5).copy()) * np.float32(1 / 255)
    parameters["b0"][:, 0] = np.float32(0.3) - scaled
    engine._places[0] = (0, 1, 0, 1)
    engine._middle(0)
    Z = (scaled + parameters["b0"][:, 0]).astype(np.float64)
    probability = 1 / (1 + np.exp(-parameters["W1"] @ Z))
    expected = (probability - engine.targets[0, 0]) * parameters["W1"][0] / 255
    return float(np.abs(d_of_terms(engine._buffers["d"])[0, :5] / expected - 1).max())


def d_of_terms(terms: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """d (samples, units) of what tensor cores are given: sums of three terms, bf16, in the lanes that `mma` wants."""
    halves = np.ascontiguousarray(terms).view(np.uint16).astype(np.uint32) << 16
    steps, tiles = terms.shape[:2]
    sums = halves.view(np.float32).reshape(steps, tiles, 3, 8, 4, 2, 2, 2).astype(np.float64).sum(axis=2)
    # A lane is a unit of eight and a pair of samples of eight, a register an eight of samples and one of units.
    return sums.transpose(0, 4, 3, 6, 1, 5, 2).reshape(16 * steps, 16 * tiles)


@pytest.mark.parametrize("tiles", [1, 2, 3, SUBTREE - 1, SUBTREE, SUBTREE + 1, 2 * SUBTREE, 3 * SUBTREE + 5])
def test_the_products_of_tiles_are_added_by_the_binary_tree(tiles: int) -> None:
    assert sum_error(tiles) < 1e-5


# Each still adds all products: its tiles from both ends, its subtrees one by one.
OTHER_ORDERS: dict[str, list[tuple[str, str]]] = {
    "within a subtree": [("x[t] += x[t + step];", "x[t] += x[SUBTREE - t - step];")],
    "over subtrees": [
        ("for (int step = 1; step < subtrees; step *= 2) {", "for (int step = 1; step < subtrees; step++) {"),
        ("const int pairs = (subtrees - step + 2 * step - 1) / (2 * step);", "const int pairs = 1;"),
    ],
}


@pytest.mark.parametrize("where", OTHER_ORDERS)
def test_another_order_of_sums_would_be_seen(where: str) -> None:
    assert sum_error(3 * SUBTREE + 5, planted(*OTHER_ORDERS[where])) > 1e-3


# --- bounds -------------------------------------------------------------------------------------------------------

# Runs cases with the kernels of a sanitized library; the first index out of bounds ends the process.
WITHIN_BOUNDS = """
import sys
import numpy as np
from cuda_runs import PRODUCTS, CpuDevice, cases, cuda_engine
from panel_runs import run
for name in sys.argv[1:]:
    kind, case = cases()[name]
    engine = case.engine(cuda_engine(CpuDevice(sanitize=True), kind))
    run(engine, case)
    times = 20 if name == "tensor cores: 33 units" else 1  # more samples than a batch has
    engine.evaluate(np.tile(engine.samples, (times, 1)), np.tile(engine.targets, times))
    print(name)
"""


@pytest.mark.kernels
def test_no_index_is_out_of_bounds() -> None:
    names = [f"float64, pixels: {name}" for name in ("1 features", "129 features", "9 of 25")]
    names += [f"tensor cores: {name}" for name in ("3 features", "1000 features", "33 units", "600 of 600")]
    names += ["cores, floats: 33 units"]
    done = run_sanitized(WITHIN_BOUNDS, *names)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == names
