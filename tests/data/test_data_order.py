"""Row orders and mini-batches: every row once, and nothing kept between epochs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.data.order import batches, epoch_order


@given(m=st.integers(0, 300), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**64))
def test_an_order_is_a_permutation_and_a_function_of_its_arguments(m: int, epoch: int, seed: int) -> None:
    order = epoch_order(m, epoch, seed)
    assert order.dtype == np.int64
    assert order.shape == (m,)
    assert sorted(order.tolist()) == list(range(m))
    np.testing.assert_array_equal(order, epoch_order(m, epoch, seed))


@given(epoch=st.integers(0, 1000), other=st.integers(0, 1000), seed=st.integers(0, 2**32))
def test_epochs_differ_only_where_asked(epoch: int, other: int, seed: int) -> None:
    once = epoch_order(100, epoch, seed, "once")
    np.testing.assert_array_equal(once, epoch_order(100, other, seed, "once"))
    np.testing.assert_array_equal(epoch_order(100, epoch, seed, "none"), np.arange(100))
    same = (epoch_order(100, epoch, seed) == epoch_order(100, other, seed)).all()
    assert same == (epoch == other)


def test_seeds_differ() -> None:
    assert (epoch_order(100, 0, seed=0) != epoch_order(100, 0, seed=1)).any()


def test_the_order_depends_on_no_global_state() -> None:
    first = epoch_order(50, 2, 3)
    np.random.default_rng(0).random(7)
    epoch_order(50, 9, 9)
    np.testing.assert_array_equal(first, epoch_order(50, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0, 0, "daily"), "shuffle: 'daily' is not known"),
        ((-1, 0), "m: must be a whole number from 0, got -1"),
        ((10, -1), "epoch: must be a whole number from 0, got -1"),
        ((10, 0, -5), "seed: must be a whole number from 0, got -5"),
        ((10, 0, 0.5), "seed: must be a whole number from 0, got 0.5"),
    ],
)
def test_wrong_orders_are_refused_on_one_line(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        epoch_order(*arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@given(m=st.integers(1, 500), batch_size=st.integers(1, 600))
def test_batches_cover_every_row_once(m: int, batch_size: int) -> None:
    cut = batches(m, batch_size)
    assert [row for part in cut for row in range(m)[part]] == list(range(m))
    lengths = [part.stop - part.start for part in cut]
    assert all(length == min(batch_size, m) for length in lengths[:-1])
    assert 1 <= lengths[-1] <= min(batch_size, m)


@given(m=st.integers(1, 500), batch_size=st.integers(1, 600))
def test_a_dropped_last_batch_is_the_short_one(m: int, batch_size: int) -> None:
    kept = batches(m, batch_size, drop_last=True)
    assert len(kept) >= 1
    assert {part.stop - part.start for part in kept} == {min(batch_size, m)}
    assert kept == batches(m, batch_size)[: len(kept)]


@pytest.mark.parametrize(("m", "batch_size"), [(0, 1), (5, 0), (5, -2)])
def test_impossible_batches_are_refused(m: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="must be a whole number from 1"):
        batches(m, batch_size)
