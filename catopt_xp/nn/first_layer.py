"""The two products of the first layer, over a batch of rows gathered from a sample-major set.

A batch of images as floats is larger than any cache, so both products go by blocks of features: each block is
gathered, converted, used and forgotten. The blocks are dealt into a fixed number of tasks, which a CPU runs on all its
threads; the sums over tasks are made in order, so they do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from catopt_xp.backend.threads import deal
from catopt_xp.backend.xp import Array, Backend
from catopt_xp.nn.functional import pixel_scale

MIN_WIDTH = 768  # features; narrower products run far below the machine's rate
WHOLE_WIDTH = 4 * MIN_WIDTH  # features up to which a batch of at most twice the cache's size is one block
MANY = 256  # samples from which the transposed product is the faster one


def float_bytes(dtype: Any) -> int:
    """Bytes of a number of float32 or float64.

    >>> float_bytes("float64")
    8
    """
    return 8 if str(dtype).endswith("float64") else 4


@lru_cache
def feature_blocks(n_x: int, count: int, itemsize: int, cache_bytes: int, tasks: int) -> Sequence[slice]:
    """The features in blocks, for batches of `count` samples that become floats of so many bytes.

    A block fits the cache and there are as many as tasks, unless blocks would be too narrow; a small batch is one.

    >>> feature_blocks(64, 200, 4, 1 << 20, 16)
    (slice(0, 64, None),)
    """
    fitting, shared = cache_bytes // (itemsize * max(1, count)), -(-n_x // tasks)
    width = min(n_x, max(MIN_WIDTH, min(fitting // 16, -(-shared // 16)) * 16))
    small = n_x <= WHOLE_WIDTH and itemsize * count * n_x <= 2 * cache_bytes
    if small or n_x < 2 * MIN_WIDTH:
        width = n_x
    return tuple(slice(a, min(n_x, a + width)) for a in range(0, n_x, width))


class Batch:
    """The chosen rows of a sample-major set, seen by the first layer in blocks of features.

    A block that holds the whole batch is kept for the backward pass; several are gathered again, which costs less than
    writing a batch of floats to memory and reading it back.
    """

    def __init__(self, backend: Backend, dtype: Any, samples: Array, rows: Array | slice, count: int) -> None:
        self.backend, self.dtype, self.samples, self.rows, self.count = backend, dtype, samples, rows, count
        self.scale = pixel_scale(samples.dtype)
        self.columns = feature_blocks(samples.shape[1], count, float_bytes(dtype), backend.cache_bytes, backend.tasks)
        self._whole: Array | None = None

    def times_weights(self, W: Array) -> Array:
        """`W (X * scale)`: (units, n_x) times (n_x, m). The scale multiplies the small result, pixels stay whole."""
        xp = self.backend.xp
        many = self.count > MANY

        def product(blocks: Sequence[slice]) -> Array:
            total = None
            for columns in blocks:
                x = self._block(columns)
                part = xp.matmul(x, W[:, columns].T) if many else xp.matmul(W[:, columns], x.T)
                total = part if total is None else xp.add(total, part)  # (m, units) or (units, m)
            return total

        Z, *others = self._run(product)
        for other in others:
            Z += other
        if self.scale != 1.0:
            Z *= self.scale
        return Z.T if many else Z

    def weight_gradient(self, dZ: Array, out: Array) -> None:
        """`dZ (X * scale)^T` into `out` (units, n_x); the scale multiplies dZ, a copy of it, so no bias sees it."""
        scaled = dZ * self.scale if self.scale != 1.0 else dZ

        def product(blocks: Sequence[slice]) -> None:
            for columns in blocks:
                self.backend.matmul(scaled, self._block(columns), out[:, columns])

        self._run(product)

    def _run(self, work: Callable[[Sequence[slice]], Any]) -> list[Any]:
        """The work on all blocks, in at most `backend.tasks` tasks of neighbours; their results."""
        if len(self.columns) == 1:
            return [work(self.columns)]
        return self.backend.run([partial(work, blocks) for blocks in deal(self.columns, self.backend.tasks)])

    def _block(self, columns: slice) -> Array:
        """Samples as floats, (m, width), for reading only."""
        if self._whole is not None:
            return self._whole
        x = self.backend.gather(self.samples, self.rows, columns.start, columns.stop, self.dtype)
        if len(self.columns) == 1:
            self._whole = x
        return x
