"""The split of the first layer into panels: its layout, its tasks, and the tree by which products are summed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.engines.panels import (
    ENOUGH_TASKS,
    MOST_TASK,
    PANEL,
    STRIP,
    STRIPS,
    TASK_NUMBERS,
    Split,
    aligned_zeros,
    grain,
    join_subtrees,
    merges,
    padded,
    subtrees,
    tree_sum,
)

Array = np.ndarray[Any, Any]

dtypes = st.sampled_from([np.float32, np.float64])


# --- the layout ---------------------------------------------------------------------------------------------


def numbered(units: int, n_x: int, dtype: Any) -> Array:
    """(units, n_x) in which every element is another number, none of them 0."""
    return np.arange(1, units * n_x + 1, dtype=dtype).reshape(units, n_x)


# How (units, n_x) numbers may lie in memory: as the model has them, or as a view of something larger.
LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "whole": lambda W: W.copy(),
    "some rows": lambda W: np.vstack([W, W + 1])[: len(W)],
    "some columns": lambda W: np.hstack([W + 1, W, W + 2])[:, W.shape[1] : 2 * W.shape[1]],
    "every other column": lambda W: np.repeat(W, 2, axis=1)[:, ::2],
    "transposed": lambda W: W.T.copy().T,
    "within a flat array": lambda W: np.concatenate([[9], W.ravel(), [9]]).astype(W.dtype)[1:-1].reshape(W.shape),
}


@given(st.integers(1, 3000), st.integers(1, 40), dtypes, st.sampled_from(sorted(LAYOUTS)))
def test_weights_come_back_from_the_packed_layout_as_they_were(n_x: int, units: int, dtype: Any, layout: str) -> None:
    numbers = numbered(units, n_x, dtype)
    W, split = LAYOUTS[layout](numbers), Split(n_x, units)
    packed = np.full((split.strips, units, STRIP), np.nan, dtype=dtype)
    split.pack(W, packed)
    assert np.array_equal(W, numbers)
    rows = packed.transpose(1, 0, 2).reshape(units, -1)  # (units, strips * STRIP)
    assert np.array_equal(rows[:, :n_x], numbers)
    assert not rows[:, n_x:].any()
    W[...] = -1
    split.unpack(packed, W)
    assert np.array_equal(W, numbers)


def test_a_strip_s_columns_lie_together_unit_by_unit() -> None:
    split, W = Split(n_x=2 * STRIP + 3, units=2), numbered(2, 2 * STRIP + 3, np.float64)
    packed = np.empty((3, 2, STRIP))
    split.pack(W, packed)
    assert np.array_equal(packed[1, 0], W[0, STRIP : 2 * STRIP])
    assert np.array_equal(packed[2, 1], [*W[1, 2 * STRIP :], *[0] * (STRIP - 3)])


def test_what_lies_beside_a_view_stays_as_it_was() -> None:
    around = numbered(4, 200, np.float32)
    before, split = around.copy(), Split(n_x=100, units=2)
    split.unpack(np.zeros((split.strips, 2, STRIP), dtype=np.float32), around[1:3, 50:150])
    assert not around[1:3, 50:150].any()
    around[1:3, 50:150] = before[1:3, 50:150]
    assert np.array_equal(around, before)


@given(st.integers(1, 5000))
def test_strips_and_panels_cover_every_column_and_no_more(n_x: int) -> None:
    split = Split(n_x, units=1)
    assert (split.strips - 1) * STRIP < n_x <= split.strips * STRIP
    assert (split.panels - 1) * PANEL < n_x <= split.panels * PANEL
    assert math.ceil(split.strips / STRIPS) == split.panels


def test_the_constants_that_the_bits_of_every_run_depend_on() -> None:
    # The panel is the leaf of the tree of sums; the strip is the layout that its products are summed in.
    assert (PANEL, STRIP, STRIPS) == (1024, 64, 16)
    assert type(STRIPS) is int


# --- tasks --------------------------------------------------------------------------------------------------


@given(st.integers(1, 2_000_000), st.integers(0, 200_000))
def test_a_task_is_a_whole_subtree_no_longer_than_its_sums_make_it(n_x: int, numbers: int) -> None:
    split = Split(n_x, units=1)
    length = split.task_length(numbers)
    assert 1 <= length <= MOST_TASK
    assert length & (length - 1) == 0
    # The sums of all tasks fit the room meant for them, unless the longest tasks are too short for that.
    assert math.ceil(split.panels / length) * numbers <= TASK_NUMBERS or length == MOST_TASK
    if length > 1:  # half as long, there were more tasks than threads need, or sums than there is room for
        tasks = math.ceil(split.panels / (length // 2))
        assert tasks >= 2 * ENOUGH_TASKS or tasks * numbers > TASK_NUMBERS


@pytest.mark.parametrize(
    ("panels", "numbers", "expected"),
    [
        (1, 0, 1),
        (63, 1920, 1),
        (64, 1920, 2),
        (147, 1920, 4),  # the reference network: 37 tasks
        (252, 1920, 4),
        (253, 1920, 8),
        (5000, 1920, 8),
        (2, 2**21, 1),
        (2, 2**21 + 1, 2),
        (4, 2**21, 2),
    ],
)
def test_tasks_are_at_least_32_and_their_sums_at_most_4_million_numbers(
    panels: int, numbers: int, expected: int
) -> None:
    assert Split(panels * PANEL, units=1).task_length(numbers) == expected
    assert Split(panels * PANEL - PANEL + 1, units=1).task_length(numbers) == expected


def test_a_task_is_no_longer_than_asked_for() -> None:
    split = Split(5000 * PANEL, units=1)
    assert [split.task_length(1920, most) for most in (1, 2, 4, 16, 64)] == [1, 2, 4, 16, 64]


@pytest.mark.parametrize("panels", [1, 2, 7, 8, 16, 17, 40])
def test_the_grain_is_the_longest_task_of_whole_subtrees(panels: int) -> None:
    for first, stop in itertools.combinations(range(panels + 1), 2):
        ends = [first] if stop == panels else [first, stop]
        lengths = [length for length in (1, 2, 4, 8) if all(end % length == 0 for end in ends)]
        assert grain(first, stop, panels) == max(lengths)


# --- the tree -----------------------------------------------------------------------------------------------


def whole_tree(node: Callable[[int, int], Array | None], first: int, length: int) -> Array | None:
    """The sum of the subtree of `length` blocks (a power of two) from `first` on; None where there are none.

    `node(first, length)`: a sum that is known already, or None.
    """
    known = node(first, length)
    if known is not None or length == 1:
        return known
    left, right = (whole_tree(node, first + k * length // 2, length // 2) for k in range(2))
    return left if right is None else right if left is None else left + right


def reference(blocks: Array) -> Array:
    def leaf(first: int, length: int) -> Array | None:
        return blocks[first] if length == 1 and first < len(blocks) else None

    total = whole_tree(leaf, 0, 1 << (len(blocks) - 1).bit_length())
    assert total is not None
    return total


def random_blocks(count: int, width: int, seed: int, dtype: Any) -> Array:
    """(count, width) of sizes so different that another order of sums has other bits."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, width)) * 10.0 ** rng.integers(-3, 4, (count, width))).astype(dtype)


counts = st.integers(1, 70)
seeds = st.integers(0, 2**32)


@given(counts, st.integers(1, 5), seeds, dtypes)
def test_the_sum_is_that_of_a_binary_tree_on_block_numbers(count: int, width: int, seed: int, dtype: Any) -> None:
    blocks = random_blocks(count, width, seed, dtype)
    expected = reference(blocks)
    assert np.array_equal(tree_sum(blocks), expected)


def test_another_order_of_sums_would_have_other_bits() -> None:
    blocks = random_blocks(70, 50, 0, np.float32)
    assert not np.array_equal(reference(blocks), np.add.reduce(list(blocks)))


@given(counts, st.sets(st.integers(1, 69), max_size=6), seeds, dtypes)
def test_sums_handed_on_by_any_workers_give_the_bits_of_the_whole_tree(
    count: int, cuts: set[int], seed: int, dtype: Any
) -> None:
    blocks = random_blocks(count, 3, seed, dtype)
    bounds = [0, *sorted(cut for cut in cuts if cut < count), count]
    handed_on = {
        (first, length): tree_sum(blocks[first : first + length].copy())
        for start, stop in itertools.pairwise(bounds)
        for first, length in subtrees(start, stop)
    }
    total = whole_tree(lambda first, length: handed_on.get((first, length)), 0, 1 << (count - 1).bit_length())
    assert total is not None
    assert np.array_equal(total, reference(blocks))


@given(counts, st.sets(st.integers(1, 69), max_size=6), seeds, dtypes)
def test_sums_are_joined_as_the_tree_would_have_it(count: int, cuts: set[int], seed: int, dtype: Any) -> None:
    blocks = random_blocks(count, 3, seed, dtype)
    bounds = [0, *sorted(cut for cut in cuts if cut < count), count]
    nodes = [node for start, stop in itertools.pairwise(bounds) for node in subtrees(start, stop)]
    sums = [tree_sum(blocks[first : first + length].copy()) for first, length in nodes]
    joined = merges(nodes)
    assert all(sum(joined[:k]) < k for k in range(1, len(nodes) + 1)), "more sums joined than were there"
    assert sum(joined) == len(nodes) - 1
    assert np.array_equal(join_subtrees(nodes, sums), reference(blocks))


def test_a_sum_for_each_subtree_is_needed() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        join_subtrees([(0, 2), (2, 1)], [np.zeros(3)])


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_subtrees_are_whole_in_order_and_as_large_as_can_be(start: int, count: int) -> None:
    stop, parts = start + count, list(subtrees(start, start + count))
    reached = start
    for first, length in parts:
        assert first == reached
        assert length & (length - 1) == 0
        assert first % length == 0
        parent = first - first % (2 * length)  # the next larger subtree around it is not all owned
        assert parent < start or parent + 2 * length > stop
        reached += length
    assert reached == stop
    assert len(parts) <= 2 * max(1, count.bit_length())


def test_a_task_s_own_sum_is_a_subtree_of_the_whole() -> None:
    for length in (2, 4, 8):
        blocks = random_blocks(21, 4, length, np.float32)
        tasks = np.array([tree_sum(blocks[a : a + length].copy()) for a in range(0, len(blocks), length)])
        assert np.array_equal(tree_sum(tasks), reference(blocks))


# --- room ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), dtypes, st.integers(0, 50))
def test_arrays_start_where_they_should_and_are_zero(count: int, dtype: Any, lines: int) -> None:
    array = aligned_zeros(count, dtype, skew=64 * lines)
    assert array.shape == (count,)
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    assert not array.any()
    assert array.base is not None
    assert array.base.nbytes <= array.nbytes + 2 * 4096, "more than two pages are spent on where it starts"
    if count:
        assert array.ctypes.data % 4096 == 64 * lines


@pytest.mark.parametrize(("count", "multiple", "expected"), [(0, 4, 0), (1, 4, 4), (4, 4, 4), (30, 4, 32), (7, 1, 7)])
def test_a_count_is_rounded_up_to_a_multiple(count: int, multiple: int, expected: int) -> None:
    assert padded(count, multiple) == expected
