"""A training set that is larger than memory: read in windows of rows, ahead of the steps that train them. Floor F2.

Two pools of two windows each lie in memory: one is trained, the next one read meanwhile. An engine sees an array like
any other, of which `order` names the rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.xp import Array, Backend
from catopt_xp.data.order import Pool, window_bounds, window_pools
from catopt_xp.data.resident import ResidentSet
from catopt_xp.data.row_file import Reader, RowFile

Rows = NDArray[np.int64]
WINDOWS = 4  # in memory: two pools of two


class Engine(Protocol):
    """What a stream needs of an engine: `engines.PlainEngine`."""

    slices: list[slice]

    @property
    def batches(self) -> int:
        """Mini-batches in an epoch."""

    @property
    def reach(self) -> int:
        """Batches, from the first that is not done on, that the next step may read."""

    def steps(self, epoch: int, order: Rows, first: int = 0, following: Rows | None = None) -> Iterator[int]:
        """The updates of an epoch."""


class StreamedRows:
    """The rows of a file, as `evaluate_rows` asks for them: `samples[a:b, :]`, from the first to the last.

    Two such chunks are in memory, one of them being read; a chunk may be overwritten once the next one is asked for.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.shape = reader.file.m, reader.file.n_x
        self.dtype = reader.backend.empty((1, 1), reader.file.dtype).dtype
        self._buffers: list[Array] = []
        self._ahead: tuple[slice, Future[None]] | None = None

    def __getitem__(self, key: tuple[slice, slice]) -> Array:
        rows, _ = key
        count = rows.stop - rows.start
        if not self._buffers or self._buffers[0].shape[0] < count:
            backend, shape = self.reader.backend, (count, self.shape[1])
            self._buffers = [backend.empty(shape, self.reader.file.dtype) for _ in range(2)]
        reading = self._ahead[1] if self._ahead is not None and self._ahead[0] == rows else self._read(rows)
        reading.result()
        chunk = self._buffers[0][:count, :]
        following = slice(rows.stop, min(self.shape[0], rows.stop + count))
        self._buffers.reverse()
        if following.start < following.stop:
            self._ahead = following, self._read(following)
        else:
            self._ahead, self._buffers = None, []
        return chunk

    def _read(self, rows: slice) -> Future[None]:
        """Starts to read into the first buffer."""
        return self.reader.submit(partial(self.reader.fill, rows, self._buffers[0], 0))


class StreamedDevSet(ResidentSet):
    """A set that is evaluated alone, chunk by chunk: `file`, `labels`, `backend`, `name` as for `StreamedSet`."""

    def __init__(self, file: RowFile, labels: Array, backend: Backend, name: str = "dev_X") -> None:
        self.reader = Reader(file, backend, name)
        super().__init__(StreamedRows(self.reader), labels, [])

    def close(self) -> None:
        self.reader.close()


class StreamedSet(ResidentSet):
    """A set of which four windows are in memory: `samples` (places, n_x) and `targets` (·, places), on one device.

    `file`: the rows; `labels` (·, m), checked, on `backend`; `window`: the most rows in a window; `seed`, `shuffle`: of
    the order, as for `window_order`; `name`: of the set, for messages. Call `close` when done.
    """

    def __init__(
        self, file: RowFile, labels: Array, backend: Backend, window: int, seed: int, shuffle: str, name: str = "X"
    ) -> None:
        self.file, self.labels, self.backend, self.window = file, labels, backend, window
        self.seed, self.shuffle = seed, shuffle
        bounds = window_bounds(file.m, window)
        lengths = [stop - start for start, stop in pairwise(bounds)]
        self.pools, self.least, self._half = len(lengths) // 2, 2 * min(lengths), 2 * max(lengths)
        places = 2 * self._half
        samples = backend.empty((places, file.n_x), file.dtype)
        super().__init__(samples, backend.zeros((labels.shape[0], places), labels.dtype), [])
        self.reader = Reader(file, backend, name)
        self.rows = StreamedRows(self.reader)
        self.waited = 0.0  # seconds that steps waited for rows
        self._known: dict[int, tuple[list[Pool], NDArray[np.int64]]] = {}  # by epoch: pools, and where each one ends
        self._reading: dict[int, Future[None]] = {}  # by the pool's number, counted from the first epoch on

    @property
    def m(self) -> int:
        return self.file.m

    @property
    def whole(self) -> tuple[Any, Array]:
        return self.rows, self.labels

    @property
    def stored_bytes(self) -> int:
        """Bytes of the rows in memory."""
        return 2 * self._half * self.file.row_bytes

    def order(self, epoch: int) -> Rows:
        """The epoch's order as places in `samples`, (m,)."""
        pools, _ = self._pools(epoch)
        return np.concatenate([self._begin(epoch * self.pools + k) + pool.order for k, pool in enumerate(pools)])

    def steps(
        self, engine: Engine, epoch: int, order: Rows, first: int = 0, following: Rows | None = None
    ) -> Iterator[int]:
        """`engine.steps`, each step once the rows that it may read are there.

        Raises OSError or ValueError where they cannot be read, or hold what cannot be trained.
        """
        steps, done = engine.steps(epoch, order, first, following), first
        while done < engine.batches:
            last = min(engine.batches, done + engine.reach) - 1
            needed = self._number(epoch, engine.slices[last].stop - 1)
            if following is not None and done + engine.reach > engine.batches:
                needed = self._number(epoch + 1, engine.slices[0].stop - 1)
            # Nothing is read for an epoch that does not follow.
            end = (epoch + (1 if following is None else 2)) * self.pools
            self._advance(self._number(epoch, engine.slices[done].start), needed, end)
            done = next(steps)
            yield done

    def rows_needed(self, batch_size: int, reach: int) -> int:
        """The rows that a pool must have, so that all that a step may read lies in two pools; 0 where it has them."""
        needed = (reach + 1) * batch_size
        return 0 if needed <= self.least else needed

    def take_waited(self) -> float:
        """Seconds that steps waited for rows, since this was last asked."""
        waited, self.waited = self.waited, 0.0
        return waited

    def close(self) -> None:
        """Ends the reading."""
        self.reader.close()

    def _pools(self, epoch: int) -> tuple[list[Pool], NDArray[np.int64]]:
        if epoch not in self._known:
            self._known = {e: known for e, known in self._known.items() if e >= epoch - 1}
            pools = window_pools(self.m, self.window, epoch, self.seed, self.shuffle)
            self._known[epoch] = pools, np.cumsum([len(pool.order) for pool in pools])
        return self._known[epoch]

    def _number(self, epoch: int, position: int) -> int:
        """The number of the pool in which a position of the epoch's order lies."""
        _, stops = self._pools(epoch)
        return epoch * self.pools + int(np.searchsorted(stops, position, side="right"))

    def _begin(self, number: int) -> int:
        """The first place of a pool."""
        return number % 2 * self._half

    def _advance(self, first: int, last: int, end: int) -> None:
        """Waits for the pools `first` to `last`; those before may be overwritten. Reads ahead, not beyond `end`."""
        self._reading = {number: reading for number, reading in self._reading.items() if number >= first}
        for number in range(first, min(first + 2, end)):
            if number not in self._reading:
                pools, _ = self._pools(number // self.pools)
                pool = pools[number % self.pools]
                self._reading[number] = self.reader.submit(partial(self._fill, pool, self._begin(number)))
        started = time.perf_counter()
        for number in range(first, last + 1):
            self._reading[number].result()
        self.waited += time.perf_counter() - started

    def _fill(self, pool: Pool, at: int) -> None:
        for part in pool.windows:
            count = part.stop - part.start
            self.reader.fill(part, self.samples, at)
            self.targets[:, at : at + count] = self.labels[:, part]
            at += count


__all__ = ["WINDOWS", "StreamedRows", "StreamedSet"]
