"""Feature panels: how the first layer is split and laid out, and in which order its products are summed.

A panel is PANEL columns of the first layer's weights, the last one ragged; inside it, columns go by strips of STRIP.
One pass over the panels makes a step (README, "How it works"): gradient, update and the next batch's product, while the
panel is near. Whoever works on a panel, a thread or a rank, only adds its product to those of its neighbours, and that
sum has one shape: a binary tree on panel numbers. So results do not depend on how many of them there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]

PANEL = 1024  # columns: a constant of the algorithm, never tuned to a machine
STRIP = 64  # columns that lie together in memory
STRIPS = PANEL // STRIP
# A task is some panels, a whole subtree of at most MOST_TASK: about ENOUGH_TASKS or more of them, so that threads end
# together, and few enough that their sums, of a large batch, stay below TASK_NUMBERS.
MOST_TASK, ENOUGH_TASKS, TASK_NUMBERS = 8, 32, 2**22


class Split:
    """The first layer's `units` x `n_x` weights as panels, laid out strip by strip: (strips, units, STRIP).

    >>> split = Split(n_x=1100, units=3)
    >>> split.panels, split.strips
    (2, 18)
    """

    def __init__(self, n_x: int, units: int) -> None:
        self.n_x, self.units = n_x, units
        self.strips = math.ceil(n_x / STRIP)
        self.panels = math.ceil(n_x / PANEL)

    def pack(self, W: Floats, packed: Floats) -> None:
        """`W` (units, n_x) into `packed` (strips, units, STRIP); columns beyond n_x become 0.

        >>> split, packed = Split(n_x=65, units=1), np.empty((2, 1, 64))
        >>> split.pack(np.ones((1, 65)), packed)
        >>> packed.sum(axis=(1, 2))
        array([64.,  1.])
        """
        whole = self.n_x // STRIP
        packed[:whole] = W[:, : whole * STRIP].reshape(self.units, whole, STRIP).transpose(1, 0, 2)
        if whole < self.strips:
            rest = self.n_x - whole * STRIP
            packed[whole] = 0
            packed[whole, :, :rest] = W[:, whole * STRIP :]

    def unpack(self, packed: Floats, W: Floats) -> None:
        """`packed` (strips, units, STRIP) into `W` (units, n_x), in place."""
        whole = self.n_x // STRIP
        columns = W[:, : whole * STRIP].reshape(self.units, whole, STRIP)  # an axis is split: still a view of W
        columns[...] = packed[:whole].transpose(1, 0, 2)
        if whole < self.strips:
            W[:, whole * STRIP :] = packed[whole, :, : self.n_x - whole * STRIP]

    def task_length(self, numbers: int, most: int = MOST_TASK) -> int:
        """Panels in a task, a power of two up to `most`, where a panel's product is so many numbers."""
        length = 1
        while length < most:
            tasks = math.ceil(self.panels / length)
            if tasks < 2 * ENOUGH_TASKS and tasks * numbers <= TASK_NUMBERS:
                break
            length *= 2
        return length


def tree_sum(blocks: Floats) -> Floats:
    """The sum of `blocks` (k, n) over k by a binary tree on block numbers, (n,); uses the blocks up.

    Blocks 0 and 1 are added, 2 and 3, …; then those sums likewise. A block without a neighbour waits.

    >>> tree_sum(np.array([[1.0], [2.0], [4.0]]))
    array([7.])
    """
    step, count = 1, len(blocks)
    while step < count:
        to = blocks[: count - step : 2 * step]
        to += blocks[step :: 2 * step]
        step *= 2
    first: Floats = blocks[0]
    return first


def subtrees(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The largest whole subtrees that make up the blocks `start … stop - 1`, as (first, length), in order.

    Whoever owns these blocks hands on one sum for each: all that the tree above needs.

    >>> list(subtrees(3, 10))
    [(3, 1), (4, 4), (8, 2)]
    """
    while start < stop:
        aligned = start & -start or stop  # at 0 a subtree of any length may begin
        length = min(aligned, 1 << ((stop - start).bit_length() - 1))
        yield start, length
        start += length


def grain(first: int, stop: int, panels: int) -> int:
    """Panels of the longest task, up to MOST_TASK, that cuts `first … stop - 1` into whole subtrees of all `panels`.

    >>> grain(0, 12, 20), grain(12, 20, 20), grain(12, 13, 20)
    (4, 4, 1)
    """
    bounds = first | (stop if stop < panels else 0) | MOST_TASK
    return bounds & -bounds


def merges(nodes: Sequence[tuple[int, int]]) -> list[int]:
    """How many sums come together once each node is there: what finishes the tree above subtrees.

    `nodes`: (first, length) of each, in order, from 0 and without gaps, as `subtrees` cuts them. Whoever takes their
    sums one by one adds, after the k-th, so many times the last one to the one before it, which takes its place.

    >>> merges([(0, 2), (2, 1), (3, 1)])
    [0, 0, 2]
    """
    waiting: list[int] = []  # lengths, each less than the one before: two that are equal are neighbours in the tree
    found = []
    for _, length in nodes:
        count = 0
        while waiting and waiting[-1] == length:
            length, count = length + waiting.pop(), count + 1
        waiting.append(length)
        found.append(count)
    found[-1] += len(waiting) - 1  # without neighbours: they wait for the end, as in the tree
    return found


def join_subtrees(nodes: Sequence[tuple[int, int]], sums: Sequence[Floats]) -> Floats:
    """What `tree_sum` makes of all blocks, from the sums of the subtrees that they were cut into; uses the sums up.

    `nodes`: as for `merges`; `sums`: one (n,) for each.

    >>> join_subtrees([(0, 2), (2, 1), (3, 1)], [np.array([3.0]), np.array([4.0]), np.array([8.0])])
    array([15.])
    """
    waiting: list[Floats] = []
    for total, count in zip(sums, merges(nodes), strict=True):
        waiting.append(total)
        for _ in range(count):
            last = waiting.pop()
            waiting[-1] += last
    return waiting[0]


def aligned_zeros(count: int, dtype: Any, skew: int = 0) -> Floats:
    """A flat array of zeros that starts `skew` bytes after a multiple of 4096: whole vectors never cross cache lines.

    >>> aligned_zeros(3, np.float32).ctypes.data % 64
    0
    """
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + 8192, dtype=np.uint8)
    start = -memory.ctypes.data % 4096 + skew
    array: Floats = memory[start : start + size].view(dtype)
    return array


def padded(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple.

    >>> padded(30, 4)
    32
    """
    return -(-count // multiple) * multiple


__all__ = [
    "MOST_TASK",
    "PANEL",
    "STRIP",
    "STRIPS",
    "Split",
    "aligned_zeros",
    "grain",
    "join_subtrees",
    "merges",
    "padded",
    "subtrees",
    "tree_sum",
]
