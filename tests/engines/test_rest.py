"""The compiled rest of a network: the plain engine's numbers, and no other network than those it knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from marks import some
from numba import njit
from panel_runs import OPTIONS, Case, assert_same_bits, assert_same_numbers, is_alive, run

from catopt_xp.engines.cpu import upper_layers
from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.engines.cpu.lanes import combine, convert, dot
from catopt_xp.engines.cpu.upper_layers import Rest
from catopt_xp.engines.panels import STRIP, aligned_zeros
from catopt_xp.engines.plain import PlainEngine
from catopt_xp.nn.network import DeepNetwork

Array = np.ndarray[Any, Any]


def chapter_case(**more: Any) -> Case:
    """A run of a network like the chapter's, on few features."""
    return Case(**({"activation": "relu", "n_x": 200} | more))


@pytest.mark.parametrize("name", some(OPTIONS, ["adam hat"], pytest.mark.hardening))
def test_with_every_rule_the_numbers_are_those_of_the_plain_engine(name: str) -> None:
    optimizer, options = OPTIONS[name]
    for decays in ({}, {"weight_decay": 0.1, "l2": 0.05}):
        case = chapter_case(units=(9, 6, 5), optimizer=optimizer, options=options | decays, outputs=2)
        engine = case.engine(PanelEngine)
        assert engine._rest is not None
        assert_same_numbers(run(engine, case), run(case.engine(PlainEngine), case))


@given(
    units=st.lists(st.integers(1, 40), max_size=4).map(tuple),
    outputs=st.integers(1, 4),
    m=st.integers(1, 40),
    data=st.data(),
)
def test_networks_of_any_size_have_the_same_numbers(
    units: tuple[int, ...], outputs: int, m: int, data: st.DataObject
) -> None:
    batch_size = data.draw(st.integers(1, m))
    case = chapter_case(units=units, outputs=outputs, m=m, batch_size=batch_size, settled=data.draw(st.booleans()))
    engine = case.engine(PanelEngine)
    assert engine._rest is not None
    assume(is_alive(case.engine(PlainEngine)))
    assert_same_numbers(run(engine, case), run(case.engine(PlainEngine), case))


def test_what_is_not_known_goes_by_the_formulas_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = chapter_case()
    compiled = run(case.engine(PanelEngine), case)
    monkeypatch.setattr(upper_layers, "MOST_WEIGHTS", 0)
    engine = case.engine(PanelEngine)
    assert engine._rest is None
    assert_same_numbers(run(engine, case), compiled)


@pytest.mark.parametrize(
    ("layers", "names", "options", "known"),
    [
        ([5, 1], ["sigmoid"], {}, True),
        ([5, 30, 20, 20, 1], ["relu", "relu", "relu", "sigmoid"], {}, True),
        ([5, 128, 64, 3], ["relu", "relu", "sigmoid"], {}, False),  # 8,384 weights behind the first layer
        ([5, 128, 63, 1], ["relu", "relu", "sigmoid"], {}, True),
        ([5, 4, 1], ["tanh", "sigmoid"], {}, False),
        ([5, 4, 3], ["relu", "softmax"], {}, False),
        ([5, 4, 1], ["relu", "sigmoid"], {"dropout": 0.5}, False),
    ],
)
def test_which_networks_are_known(layers: list[int], names: list[str], options: dict[str, Any], known: bool) -> None:
    assert Rest.knows(DeepNetwork(layers, names, **options)) is known


def test_numbers_that_are_not_finite_stay_where_the_plain_engine_has_them() -> None:
    results = []
    for kind in (PanelEngine, PlainEngine):
        case = chapter_case(optimizer="gd", epochs=1, batch_size=13)
        engine = case.engine(kind)
        engine.model.save()["W1"][2, 3] = np.nan
        engine.model.save()["b0"][1] = np.inf
        with np.errstate(all="ignore"):
            results.append(run(engine, case))
    ours, theirs = results
    assert np.isnan(theirs["losses"]).all()
    for name in ("losses", "W1", "b1", "b0"):
        assert np.array_equal(np.isnan(ours[name]), np.isnan(theirs[name])), name


def test_settling_between_epochs_changes_no_bit() -> None:
    case = chapter_case(dtype="float32", m=40, batch_size=16)
    looked_at = chapter_case(dtype="float32", m=40, batch_size=16, settled=True)
    assert_same_bits(run(looked_at.engine(PanelEngine), looked_at), run(case.engine(PanelEngine), case))


# --- the loops that it is made of -------------------------------------------------------------------------------


@njit(error_model="numpy")
def combined(w: Any, x: Any, z: Any) -> None:
    """z (units, n) = w (units, count) x (count, n), all flat but for their shapes."""
    for o in range(len(w)):
        combine(w.reshape(-1), o * w.shape[1], 1, x.reshape(-1), 0, x.shape[1], len(x), z.reshape(-1), o * z.shape[1],
                z.shape[1])  # fmt: skip


@njit(error_model="numpy")
def dotted(x: Any, y: Any) -> Any:
    return dot(x, 0, y, 0, len(x))


@njit(error_model="numpy")
def converted(source: Any, s0: Any, room: Any, x: Any) -> None:
    convert(source, s0, room, x, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("units", "count", "n"), [(1, 1, 16), (3, 5, 32), (20, 30, 64)])
def test_rows_are_combined_and_multiplied(dtype: str, units: int, count: int, n: int) -> None:
    rng = np.random.default_rng(0)
    w, x = rng.integers(-9, 9, (units, count)).astype(dtype), rng.integers(-9, 9, (count, n)).astype(dtype)
    z = np.full((units, n), np.nan, dtype=dtype)
    combined(w, x, z)
    assert np.array_equal(z, w @ x)  # whole numbers: every order of sums gives the same
    assert dotted(x[0], x[-1]) == x[0] @ x[-1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("source", ["uint8", "float32"])
@pytest.mark.parametrize("room", [1, 7, STRIP - 1, STRIP, STRIP + 1, 3 * STRIP])
def test_a_strip_is_converted_as_far_as_the_sample_goes(room: int, source: str, dtype: str) -> None:
    samples = np.arange(1, 4 * STRIP + 1).astype(source)
    x = aligned_zeros(STRIP + 1, dtype)
    x[:] = np.nan
    converted(samples, 5, room, x)
    expected = np.where(np.arange(STRIP) < room, samples[5 : 5 + STRIP], 0)
    assert np.array_equal(x[:STRIP], expected)
    assert np.isnan(x[STRIP])
