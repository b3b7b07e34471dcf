"""What the GPU engine launches, computed without a GPU: sizes, grids, memory, tables, the text before the source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.data.order import batches, epoch_order
from catopt_xp.engines.cuda import launches
from catopt_xp.engines.cuda.launches import (
    CHUNK_STEPS,
    MOST_BATCH,
    MOST_SHARED,
    MOST_UNITS,
    StepGeometry,
    chunk_end,
    geometry_of,
    places,
    size_obstacle,
)
from catopt_xp.engines.cuda.source import address, is_aligned, prelude, scalars, source, table_width
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.nn.parameters import layer_shapes
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS, Adam, GradientDescent

REFERENCE = StepGeometry((150528, 30, 20, 20, 1), 64, "float32", "uint8")
Kernels = tuple[StepGeometry, Sequence[str], type[BaseOptimizer]]  # what a source is made from
HIDDEN = st.lists(st.integers(1, 40), max_size=4)


@st.composite
def kernels(draw: Any) -> Kernels:
    hidden, outputs = draw(HIDDEN), draw(st.integers(1, 12))
    units = draw(st.integers(1, MOST_UNITS))
    neurons = (draw(st.integers(1, 200_000)), *([units, *hidden] if hidden else []), outputs)
    activations = ["relu"] * (len(neurons) - 2) + ["softmax" if outputs > 1 and draw(st.booleans()) else "sigmoid"]
    kind = OPTIMIZERS[draw(st.sampled_from(sorted(OPTIMIZERS)))][0]
    dtype = draw(st.sampled_from(["float32", "float64"]))
    samples = draw(st.sampled_from(["uint8", dtype]))
    geometry = StepGeometry(neurons, draw(st.integers(1, MOST_BATCH)), dtype, samples, draw(st.booleans()))
    return geometry, activations, kind


def geometries() -> st.SearchStrategy[StepGeometry]:
    return kernels().map(lambda found: found[0])


def defined(
    geometry: StepGeometry,
    activations: Sequence[str] = (),
    optimizer: type[BaseOptimizer] = Adam,
    aligned: bool = True,
) -> dict[str, str]:
    """What the text before the source defines, by name; tables as their numbers. Without `activations`: all relu."""
    text = prelude(geometry, activations or [*["relu"] * (len(geometry.neuron_cnt) - 2), "sigmoid"], optimizer, aligned)
    tables = re.findall(r"constexpr int (\w+)\[\] = \{(.*)\};", text)
    return dict(re.findall(r"#define (\w+) (.*)", text)) | dict(tables)


def numbers(names: dict[str, str], table: str) -> list[int]:
    return [int(x) for x in names[table].split(", ")]


# --- the reference network ----------------------------------------------------------------------------------------


def test_the_launches_of_the_reference_network() -> None:
    tiles, stream = REFERENCE.tiles, REFERENCE.stream
    assert (REFERENCE.products, stream.threads, tiles.length, stream.resident) == ("tensor", 256, 256, 2)
    assert (tiles.count, REFERENCE.upper.size, stream.upper_blocks) == (588, 1091, 5)
    assert (stream.grid, REFERENCE.middle_blocks, REFERENCE.samples) == ((593, 1), 64, 1)
    assert (stream.shared, REFERENCE.middle_shared) == (40960, 7216)
    assert REFERENCE.buffer_bytes == 4 * (588 * 64 * 30 + 4 * 2 * 3 * 32 * 4 + 64 * 1091 + 64)


def test_its_launches_without_tensor_cores() -> None:
    for dtype, length, count, shared in (("float32", 256, 588, 49984), ("float64", 128, 1176, 50752)):
        geometry = replace(REFERENCE, dtype=dtype, tensor_cores=False)
        tiles, stream = geometry.tiles, geometry.stream
        assert (geometry.products, stream.threads, tiles.length, tiles.count) == ("cores", 128, length, count)
        assert (stream.grid, stream.shared) == ((count + 9, 1), shared)


@pytest.mark.parametrize(
    ("batch_size", "samples", "blocks", "chunk"),
    [(1, 1, 1, 8), (8, 1, 8, 8), (9, 1, 9, 16), (128, 1, 128, 16), (129, 2, 65, 16), (2000, 16, 125, 16)],
)
def test_a_larger_batch_has_more_samples_to_a_block(batch_size: int, samples: int, blocks: int, chunk: int) -> None:
    geometry = replace(REFERENCE, batch_size=batch_size)
    assert (geometry.samples, geometry.middle_blocks, geometry.stream.chunk) == (samples, blocks, chunk)


@pytest.mark.parametrize(
    ("units", "groups", "group"),
    [(1, 1, 1), (32, 1, 32), (33, 2, 17), (64, 2, 32), (65, 3, 22), (100, 4, 25), (128, 4, 32)],
)
def test_the_first_layer_s_units_go_by_groups(units: int, groups: int, group: int) -> None:
    geometry = replace(REFERENCE, neuron_cnt=(1000, units, 1))
    assert (geometry.tiles.groups, geometry.tiles.group, geometry.stream.grid[1]) == (groups, group, groups)


def test_tensor_cores_take_pixels_and_float32_alone() -> None:
    for dtype, samples, asked in (
        ("float32", "float32", True),
        ("float64", "uint8", True),
        ("float32", "uint8", False),
    ):
        assert replace(REFERENCE, dtype=dtype, sample_dtype=samples, tensor_cores=asked).products == "cores"


# --- any network --------------------------------------------------------------------------------------------------


@given(geometries())
def test_every_unit_tile_sample_and_parameter_has_its_block(geometry: StepGeometry) -> None:
    tiles, stream, parameters = geometry.tiles, geometry.stream, geometry.upper.size
    blocks, groups = stream.grid
    of_tiles = blocks - stream.upper_blocks
    assert (of_tiles - 1) * tiles.length < tiles.n_x <= of_tiles * tiles.length
    assert (groups - 1) * tiles.group < tiles.units <= groups * tiles.group
    assert tiles.group <= 32
    assert (stream.upper_blocks - 1) * stream.threads < parameters + 1 <= stream.upper_blocks * stream.threads
    samples = geometry.samples
    assert (geometry.middle_blocks - 1) * samples < geometry.batch_size <= geometry.middle_blocks * samples
    assert geometry.middle_blocks <= 128
    assert tiles.length % stream.threads == 0


@given(geometries())
def test_the_upper_layers_lie_as_the_parameters_do(geometry: StepGeometry) -> None:
    """The tables are offsets into the flat parameters behind W0."""
    shapes, at, found = layer_shapes(list(geometry.neuron_cnt)), 0, {}
    for name, shape in list(shapes.items())[1:]:
        found[name] = at
        at += shape[0] * shape[1]
    names, widths = defined(geometry), geometry.neuron_cnt[1:]
    assert geometry.upper.size == int(names["REST"]) == at
    assert numbers(names, "WIDTH") == list(widths)
    assert numbers(names, "B_AT") == [found[f"b{k}"] for k in range(len(widths))]
    assert numbers(names, "W_AT")[1:] == [found[f"W{k}"] for k in range(1, len(widths))]
    assert int(names["REST_WEIGHTS"]) == found["b0"]
    assert numbers(names, "LEVEL_AT") == [sum(widths[:k]) for k in range(len(widths))]
    assert len(numbers(names, "ACTIVATION")) == len(widths)


@given(geometries())
def test_memory_is_a_function_of_batch_and_network(geometry: StepGeometry) -> None:
    tiles, batch_size = geometry.tiles, geometry.batch_size
    assert geometry.buffer_shapes["part"] == (tiles.count, batch_size, tiles.units)
    samples, units = -(-batch_size // 16) * 16, tiles.groups * -(-tiles.group // 16) * 16
    terms = 3 * samples * units // 2  # of two bytes each, where a number has four
    d = terms if geometry.products == "tensor" else batch_size * tiles.units
    expected = tiles.count * batch_size * tiles.units + d
    expected += geometry.middle_blocks * (geometry.upper.size + 1)
    assert geometry.buffer_bytes == expected * geometry.itemsize


@given(geometries())
def test_shared_memory_holds_what_the_kernels_lay_out(geometry: StepGeometry) -> None:
    """As the sources cut it up: `cores.cu`, `tensor.cu` and `middle`."""
    size, names = geometry.itemsize, {name: int(x) for name, x in defined(geometry).items() if x.isdigit()}
    group, tile, threads, chunk = (names[name] for name in ("GROUP", "TILE", "THREADS", "CHUNK"))
    padded, tiles16, warps = -(-group // 8) * 8, -(-group // 16), threads // 32
    if geometry.products == "tensor":
        terms = 2 * names["D_CHUNK"] // 16 * tiles16 * 3 * 32 * 16
        sums = warps * names["Z_CHUNK"] * (16 * tiles16 + names["SUMS_APART"]) * 4
        rows = max(geometry.batch_size, geometry.evaluated)
        assert names["WORK_SHARED"] >= max(terms, sums)
        assert names["ROWS_SHARED"] >= rows
        assert geometry.stream.shared == names["WORK_SHARED"] + 2 * 8 * names["ROWS_SHARED"]
        assert names["WORK_SHARED"] % 16 == names["ROWS_SHARED"] % 16 == 0
    else:
        d, x, sums = chunk * padded, chunk * (tile + 4), warps * chunk * padded
        assert names["X_SHARED"] >= max(d, x, sums)
        assert geometry.stream.shared == (padded * (tile + 4) + names["X_SHARED"]) * size + 4 * chunk
    tiles, samples = geometry.tiles, geometry.samples
    sums = -(-tiles.count // names["SUBTREE"]) * tiles.units
    assert geometry.middle_shared == (geometry.upper.size + samples * (2 * names["LEVELS"] + 1) + sums) * size
    assert geometry.subtotals_shared == sums * size


# --- the text before the source -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rule_s_names_are_bound_in_the_order_of_the_table(name: str) -> None:
    kind = OPTIMIZERS[name][0]
    optimizer = kind({"W0": np.zeros((1, 1))}, 1e-3)
    activations, rule_numbers = ("relu", "relu", "relu", "sigmoid"), list(optimizer.advance())
    assert scalars(kind) == rule_numbers
    text = source(REFERENCE, activations, kind)
    for k, scalar in enumerate(rule_numbers):
        assert f"const Number {scalar} = numbers[{k}];" in text
    for k, moment in enumerate(kind.moment_names):
        assert f" Number {moment} = moment{k};" in text
        assert f" moment{k} = plain({moment});" in text
    l2, shrink = f"numbers[{len(rule_numbers)}]", f"numbers[{len(rule_numbers) + 1}]"
    assert f"if ({l2} != 0) gradient += {l2} * parameter;" in text
    assert f"parameter *= {shrink};" in text
    assert kind.kernel in text
    names = defined(REFERENCE, activations, kind)
    assert table_width(kind) == int(names["NUMBERS"]) == len(rule_numbers) + 2
    assert int(names["MOMENTS"]) == len(kind.moment_names)


@pytest.mark.parametrize(
    ("dtype", "samples", "last", "expected"),
    [
        ("float32", "uint8", "sigmoid", ("float", "unsigned char", "float", f"float({1 / 255!r})", "0")),
        ("float64", "float64", "softmax", ("double", "double", "long long", "double(1.0)", "1")),
    ],
)
def test_types_and_scale_are_defined(dtype: str, samples: str, last: str, expected: tuple[str, ...]) -> None:
    names = defined(StepGeometry((50, 4, 3), 8, dtype, samples), ("tanh", last), GradientDescent)
    assert tuple(names[name] for name in ("REAL", "SAMPLE", "TARGET", "SCALE", "SOFTMAX")) == expected
    assert numbers(names, "ACTIVATION") == [int(names["TANH"]), int(names["NONE"])]


@pytest.mark.parametrize(
    ("n_x", "aligned", "expected"), [(64, True, "1"), (64, False, "0"), (60, True, "0"), (7, True, "0")]
)
def test_aligned_rows_are_loaded_four_pixels_at_a_time(n_x: int, aligned: bool, expected: str) -> None:
    geometry = StepGeometry((n_x, 4, 1), 8, "float32", "uint8")
    assert defined(geometry, aligned=aligned)["ALIGNED"] == expected


@given(kernels())
def test_a_source_needs_no_header_and_names_its_kernels(parts: Kernels) -> None:
    text = source(*parts)
    assert "#include" not in text
    assert "\nPRODUCTS" not in text
    assert "\nRULE" not in text
    assert text.count("tile_step(const SAMPLE") == 1
    assert re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(', text) == [
        "stream",
        "middle",
        "advance",
        "subtotals",
        "join",
    ]


@given(kernels(), geometries())
def test_the_source_depends_on_features_and_batch_by_what_is_defined_alone(parts: Kernels, other: StepGeometry) -> None:
    """So that few sources are compiled: none for each number of features or batch size."""
    geometry, *rule = parts
    neurons = (other.neuron_cnt[0] // 8 * 8 or 8, *geometry.neuron_cnt[1:])
    here = replace(geometry, neuron_cnt=(8, *geometry.neuron_cnt[1:]), batch_size=100)
    there = replace(geometry, neuron_cnt=neurons, batch_size=17)
    assert source(here, *rule) == source(there, *rule)


# --- tables -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 60), st.booleans(), st.booleans())
def test_places_name_the_rows_of_every_step(m: int, batch_size: int, drop_last: bool, goes_on: bool) -> None:
    table, parts = places(m, batch_size, drop_last, goes_on), batches(m, batch_size, drop_last)
    order, following = epoch_order(m, 0), epoch_order(m, 1)
    rows = np.concatenate([order[: parts[-1].stop], following[parts[0]] if goes_on else order[:0]])
    assert (table.shape, table.dtype) == ((len(parts) + 1, 4), np.int32)
    for k, part in enumerate(parts):
        begin, length, after, count = table[k]
        assert np.array_equal(rows[begin : begin + length], order[part])
        expected = order[parts[k + 1]] if k + 1 < len(parts) else following[parts[0]] if goes_on else order[:0]
        assert np.array_equal(rows[after : after + count], expected)
    assert table[-1].tolist() == [0, 0, 0, 0]


@given(st.integers(1, 300), st.integers(0, 1000), st.none() | st.integers(1, 100))
def test_chunks_cover_an_epoch_and_end_where_the_caller_looks(count: int, epochs: int, every: int | None) -> None:
    before, ends = epochs * count, [0]
    while ends[-1] < count:
        ends.append(chunk_end(ends[-1], count, before, every))
        assert 0 < ends[-1] - ends[-2] <= CHUNK_STEPS
    assert ends[-1] == count
    if every is not None:
        assert {end for end in range(1, count + 1) if (before + end) % every == 0} <= set(ends)


# --- obstacles ----------------------------------------------------------------------------------------------------


def small(units: int = 8, behind: tuple[int, ...] = (1,), batch_size: int = 8) -> StepGeometry:
    return StepGeometry((1000, units, *behind), batch_size, "float32", "uint8")


def test_obstacles_stand_at_their_edges() -> None:
    assert size_obstacle(small(units=MOST_UNITS)) is None
    told = "the first layer has 129 units, more than 128, for which whole products win"
    assert size_obstacle(small(units=129)) == told
    assert size_obstacle(small(batch_size=MOST_BATCH)) is None
    assert size_obstacle(small(batch_size=2001)) == "batches of 2001, more than 2000, for which whole products win"


def test_an_upper_part_that_fills_shared_memory_is_an_obstacle() -> None:
    """Of a first layer of 100 units and a second of `n`: 101n weights and biases, and what the layers give."""
    fits = max(n for n in range(1, 400) if small(100, (n, 1)).middle_shared <= MOST_SHARED)
    assert size_obstacle(small(100, (fits, 1))) is None
    needed = small(100, (fits + 1, 1)).middle_shared
    told = f"the network needs {needed} bytes of shared memory, a block has {MOST_SHARED}"
    assert size_obstacle(small(100, (fits + 1, 1))) == told


@given(geometries())
def test_any_first_layer_allowed_fits_into_shared_memory(geometry: StepGeometry) -> None:
    assert geometry.stream.shared <= MOST_SHARED
    if geometry.middle_shared <= MOST_SHARED and geometry.tiles.units <= MOST_UNITS:
        assert size_obstacle(geometry) is None


# --- the objects at hand ------------------------------------------------------------------------------------------


def test_a_geometry_is_made_of_the_objects_of_a_run() -> None:
    model = DeepNetwork([40, 6, 3], ["relu", "softmax"], dtype="float64")
    samples = np.zeros((5, 40), np.uint8)
    assert geometry_of(model, samples, 5) == StepGeometry((40, 6, 3), 5, "float64", "uint8")
    assert is_aligned(samples) == (samples.ctypes.data % 8 == 0)


def test_an_address_is_read_off_either_interface() -> None:
    class OnGpu:
        __cuda_array_interface__ = {"data": (12345, False)}  # noqa: RUF012

    host = np.zeros(16, np.uint8)
    assert address(host) == host.ctypes.data
    assert address(host[3:]) == host.ctypes.data + 3
    assert address(OnGpu()) == 12345


def test_the_limits_are_those_of_the_design() -> None:
    assert (MOST_UNITS, MOST_BATCH, MOST_SHARED) == (128, 2000, 96 * 1024)
    assert 24 <= launches.CHUNK_STEPS <= 64  # a few dozen: what an interrupt waits for
