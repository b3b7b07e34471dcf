"""The order of the rows in an epoch, and the mini-batches cut from it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from catopt_xp.data.dataset import checked_whole

SHUFFLES = ("epoch", "once", "none")
_ORDER_STREAM = 1  # keeps these random numbers apart from those of weights and data splits with the same seed
_WINDOW_STREAM = 5


def epoch_order(m: int, epoch: int, seed: int = 0, shuffle: str = "epoch") -> NDArray[np.int64]:
    """The row numbers of one epoch in the order of training.

    m: number of samples. epoch: from 0. seed: any whole number from 0.
    shuffle: "epoch", a new order in every epoch; "once", the order of epoch 0 in all of them; "none", 0 ..
    m-1.
    Returns a permutation of 0 .. m-1, shape (m,). It is a function of the arguments alone: nothing is kept
    between epochs, so a resumed run sees the orders of the run that it continues, and every device sees the
    same.
    Raises ValueError for an unknown shuffle, or for what is not a whole number from 0.

    >>> bool((epoch_order(100, epoch=3, seed=7) == epoch_order(100, epoch=3, seed=7)).all())
    True
    >>> epoch_order(4, epoch=3, shuffle="none")
    array([0, 1, 2, 3])
    """
    m = checked_whole("m", m, 0)
    rng = _generator(_ORDER_STREAM, epoch, seed, shuffle)
    return np.arange(m, dtype=np.int64) if rng is None else rng.permutation(np.int64(m))


@dataclass(frozen=True)
class RowOrder:
    """How the rows of a run are ordered: a function of (seed, epoch), with the same bits on every device.

    `shuffle`: as for `epoch_order`; `window`: the most rows in a window of a set that is, or was, streamed (None: rows
    are shuffled over the whole set).

    >>> RowOrder(seed=0, shuffle="none").rows(m=3, epoch=5)
    array([0, 1, 2])
    """

    seed: int = 0
    shuffle: str = "epoch"
    window: int | None = None

    def rows(self, m: int, epoch: int) -> NDArray[np.int64]:
        """The row numbers of an epoch in the order of training, (m,)."""
        if self.window is None:
            return epoch_order(m, epoch, self.seed, self.shuffle)
        return window_order(m, self.window, epoch, self.seed, self.shuffle)


def _generator(stream: int, epoch: int, seed: int, shuffle: str) -> np.random.Generator | None:
    """The random numbers of an epoch's order; None where the rows stay as they are."""
    if shuffle not in SHUFFLES:
        raise ValueError(f'shuffle: {shuffle!r} is not known; use "epoch", "once" or "none"')
    epoch, seed = checked_whole("epoch", epoch, 0), checked_whole("seed", seed, 0)
    if shuffle == "none":
        return None
    # The list keeps one length: a seed sequence pads with zeros, so [seed, 1] would equal [seed, 1, 0].
    return np.random.Generator(np.random.PCG64([seed, stream, epoch if shuffle == "epoch" else 0]))


@dataclass(frozen=True)
class Pool:
    """Two windows of neighbouring rows, as slices, and the order in which their rows are trained.

    `order`: (rows in both,), a permutation of 0, 1, …: places in the windows, one after the other.
    """

    windows: tuple[slice, ...]
    order: NDArray[np.int64]

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row numbers in the order of training."""
        return np.concatenate([np.arange(part.start, part.stop) for part in self.windows])[self.order]


def window_bounds(m: int, window: int) -> list[int]:
    """Where windows of at most `window` of m rows begin, and m: an even number of them, as long as one another.

    Their lengths differ by one row at most, so that no pool is much smaller than another, and each can be read while
    one before it is trained, where there are two or more.

    >>> window_bounds(100, 30)
    [0, 25, 50, 75, 100]
    """
    m, window = checked_whole("m", m, 1), checked_whole("window", window, 1)
    count = 2 * -(-m // (2 * window))
    return [m * k // count for k in range(count + 1)]


def window_pools(m: int, window: int, epoch: int, seed: int = 0, shuffle: str = "epoch") -> list[Pool]:
    """The pools of an epoch in the order of training: windows are shuffled, two neighbours then are a pool.

    Arguments as for `epoch_order`; `window`: the most rows in a window. Raises ValueError as there.
    """
    rng = _generator(_WINDOW_STREAM, epoch, seed, shuffle)
    windows = [slice(start, stop) for start, stop in itertools.pairwise(window_bounds(m, window))]
    if rng is not None:
        windows = [windows[k] for k in rng.permutation(len(windows))]
    pools = []
    for pair in zip(windows[::2], windows[1::2], strict=True):
        count = sum(part.stop - part.start for part in pair)
        pools.append(Pool(pair, np.arange(count, dtype=np.int64) if rng is None else rng.permutation(np.int64(count))))
    return pools


def window_order(m: int, window: int, epoch: int, seed: int = 0, shuffle: str = "epoch") -> NDArray[np.int64]:
    """`epoch_order` for a set that is read in windows: rows are shuffled within pools of two windows alone.

    `window`: the most rows in a window; the other arguments, what is returned and what is raised as for `epoch_order`.

    >>> window_order(6, 2, epoch=0, shuffle="none")
    array([0, 1, 2, 3, 4, 5])
    """
    return np.concatenate([pool.rows for pool in window_pools(m, window, epoch, seed, shuffle)])


def batches(m: int, batch_size: int, drop_last: bool = False) -> list[slice]:
    """The mini-batches of an epoch, as slices of its order.

    m: number of samples. batch_size: at least 1; beyond m it means m. drop_last: leave out a last batch that
    is shorter than the others (never the only one).
    Returns the slices in order; together they cover 0 .. m-1 once, unless the last is dropped.
    Raises ValueError where m or batch_size is not a whole number from 1.

    >>> batches(10, 4)
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    >>> batches(10, 4, drop_last=True)
    [slice(0, 4, None), slice(4, 8, None)]
    """
    m, batch_size = checked_whole("m", m, 1), checked_whole("batch_size", batch_size, 1)
    size = min(batch_size, m)
    stop = m - m % size if drop_last else m
    return [slice(start, min(start + size, m)) for start in range(0, stop, size)]
