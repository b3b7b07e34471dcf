"""The two products of the first layer, over a batch of rows gathered from a sample-major set.

Floor F1. A batch of images as floats is larger than any cache, so both products go by blocks of features: each block is
gathered, converted, used and forgotten. The blocks are dealt into a fixed number of tasks, which a CPU runs on all its
threads; the sums over tasks are made in order, so they do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from catopt_xp.backend import Array, Backend
from catopt_xp.functional import pixel_scale
from catopt_xp.threads import deal

MIN_WIDTH = 768  # features; narrower products run far below the machine's rate
MANY = 256  # samples from which the transposed product is the faster one


class Batch:
    """The chosen rows of a sample-major set, seen by the first layer in blocks of features.

    A block that holds the whole batch is kept for the backward pass; several are gathered again, which costs less than
    writing a batch of floats to memory and reading it back.
    """

    def __init__(self, backend: Backend, dtype: Any, samples: Array, rows: Array | slice, count: int) -> None:
        self.backend, self.dtype, self.samples, self.rows, self.count = backend, dtype, samples, rows, count
        self.scale = pixel_scale(samples.dtype)
        n_x, float_bytes = samples.shape[1], 8 if str(dtype).endswith("float64") else 4
        width = min(backend.cache_bytes // (float_bytes * max(1, count)), -(-n_x // backend.tasks))
        self.width = min(n_x, max(MIN_WIDTH, width // 16 * 16))
        self.columns = [slice(a, min(n_x, a + self.width)) for a in range(0, n_x, self.width)]
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

        Z, *others = self.backend.run(self._tasks(product))
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

        self.backend.run(self._tasks(product))

    def _tasks(self, work: Callable[[Sequence[slice]], Any]) -> list[Callable[[], Any]]:
        """The blocks in at most `backend.tasks` runs of neighbours, each bound to the work on it."""
        return [partial(work, blocks) for blocks in deal(self.columns, self.backend.tasks)]

    def _block(self, columns: slice) -> Array:
        """Samples as floats, (m, width), for reading only."""
        if self._whole is not None:
            return self._whole
        x = self.backend.gather(self.samples, self.rows, columns.start, columns.stop, self.dtype)
        if len(self.columns) == 1:
            self._whole = x
        return x
