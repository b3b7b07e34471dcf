"""The order of the rows in an epoch, and the mini-batches cut from it. Floor F2."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from catopt_xp.data.dataset import checked_whole

SHUFFLES = ("epoch", "once", "none")
_ORDER_STREAM = 1  # keeps these random numbers apart from those of weights and data splits with the same seed


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
    if shuffle not in SHUFFLES:
        raise ValueError(f'shuffle: {shuffle!r} is not known; use "epoch", "once" or "none"')
    m, epoch, seed = (checked_whole(name, n, 0) for name, n in (("m", m), ("epoch", epoch), ("seed", seed)))
    if shuffle == "none":
        return np.arange(m, dtype=np.int64)
    # The list keeps one length: a seed sequence pads with zeros, so [seed, 1] would equal [seed, 1, 0].
    entropy = [seed, _ORDER_STREAM, epoch if shuffle == "epoch" else 0]
    return np.random.Generator(np.random.PCG64(entropy)).permutation(np.int64(m))


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
