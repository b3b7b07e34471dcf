"""A set that is larger than memory: its rows are read from a file in windows, ahead of the steps that train them.

Two pools of two windows each lie in memory: one is trained, the next one read meanwhile. An engine sees an array like
any other, of which `order` names the rows. The file is read as a file, not through the memory map: pages that a map has
touched count as memory of the process, and a file that was cut would end it by a signal instead of an error.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.xp import Array, Backend
from catopt_xp.data.order import Pool, window_bounds, window_pools
from catopt_xp.data.resident import ResidentSet

BLOCK = 8 << 20  # bytes read at a time: what a second Ctrl-C waits for, and what is staged for a GPU


@dataclass(frozen=True)
class RowFile:
    """`m` rows of `n_x` numbers of type `dtype`, one after the other from the byte `offset` of a file on."""

    path: Path
    offset: int
    m: int
    n_x: int
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.n_x * self.dtype.itemsize


def find_rows(X: Any) -> RowFile | None:
    """Where the samples of a memory-mapped X (n_x, m) lie in its file; None where they do not lie there in rows.

    >>> find_rows(np.zeros((3, 5)))
    """
    mapped, memory = _map_of(X)
    if mapped is None or memory is None or X.ndim != 2 or not X.T.flags.c_contiguous or not X.dtype.isnative:
        return None
    if mapped.mode == "c" or mapped.filename is None:  # written to in memory alone, or without a name
        return None
    # A part of a map keeps the offset of the whole; that begins at a multiple of a page.
    begins = mapped.offset - mapped.offset % mmap.ALLOCATIONGRANULARITY
    offset = begins + X.ctypes.data - np.frombuffer(memory, dtype=np.uint8).ctypes.data
    return RowFile(Path(mapped.filename), int(offset), int(X.shape[1]), int(X.shape[0]), X.dtype)


def is_mapped(X: Any) -> bool:
    """Whether an array is a memory map of a file, or a part of one."""
    return _map_of(X)[0] is not None


def _map_of(X: Any) -> tuple[np.memmap[Any, Any] | None, mmap.mmap | None]:
    """The memory map that an array is a view of, and the memory that it maps."""
    mapped, owner = None, X
    while isinstance(owner, np.ndarray):
        mapped = owner if isinstance(owner, np.memmap) else mapped
        owner = owner.base
    return (mapped, owner) if isinstance(owner, mmap.mmap) else (None, None)


class Reader:
    """Reads rows of a file in a thread of its own, one request after the other; `name`: of the set, for messages."""

    def __init__(self, file: RowFile, backend: Backend, name: str) -> None:
        self.file, self.backend, self.name = file, backend, name
        self._stream: FileIO | None = None  # opened by the thread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="catopt_xp_reader")
        self._closed = threading.Event()
        self._staging: NDArray[Any] | None = None

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Has `work` done, which calls `fill`; what it raises, the future's `result` raises.

        What the device does with the memory to be filled has been queued by now, and is waited for.
        """

        def done() -> None:
            with self.backend.activate():
                with self.backend.lock:
                    self.backend.synchronize()  # sync
                work()

        return self._thread.submit(done)

    def fill(self, rows: slice, into: Array, at: int) -> None:
        """Reads rows into `into[at], into[at + 1], …`, an array (·, n_x) of the device."""
        step = max(1, BLOCK // self.file.row_bytes)
        for start in range(rows.start, rows.stop, step):
            if self._closed.is_set():  # nobody waits for the rest
                return
            count = min(step, rows.stop - start)
            place = slice(at + start - rows.start, at + start - rows.start + count)
            if self.backend.name == "numpy":
                self._read(start, into[place])
                continue
            if self._staging is None:
                self._staging = _host_block(self.backend, (step, self.file.n_x), self.file.dtype)
            self._read(start, self._staging[:count])
            self._upload(into[place, :], self._staging[:count])

    def _read(self, row: int, out: NDArray[Any]) -> None:
        """Fills `out` (·, n_x), C-contiguous, from this row of the file on."""
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        try:
            if self._stream is None:
                self._stream = FileIO(self.file.path)
            self._stream.seek(self.file.offset + row * self.file.row_bytes)
            while done < len(view):
                read = self._stream.readinto(view[done:])
                if not read:
                    break
                done += read
            if hasattr(os, "posix_fadvise"):
                # What does not fit memory fits no page cache either: these pages serve for the next block. To fill all
                # memory with pages of the file costs more than to read it.
                begin = self._stream.tell() - done
                os.posix_fadvise(self._stream.fileno(), begin, done, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            told = f"{self.file.path} cannot be read at sample {row} ({error.strerror or error}); check the disk"
            raise OSError(error.errno, told) from error
        if done < len(view):
            at = row + done // self.file.row_bytes
            raise OSError(f"{self.file.path} ends at sample {at} of {self.file.m}: it was cut; write it again")
        if out.dtype.kind == "f" and not (np.isfinite(out.min()) and np.isfinite(out.max())):
            bad, feature = (int(i[0]) for i in np.nonzero(~np.isfinite(out)))
            raise ValueError(
                f"{self.name} is not finite at feature {feature}, sample {row + bad}; replace NaN and infinity first"
            )

    def _upload(self, into: Array, block: NDArray[Any]) -> None:
        """The one place where rows go to a device; `block` may change once this returns."""
        with self.backend.lock:
            if hasattr(into, "set"):  # CuPy: straight from the pinned block
                into.set(block)
            else:
                into[...] = self.backend.asarray(block)
            self.backend.synchronize()  # sync

    def close(self) -> None:
        """Ends the thread, after the block that it reads."""
        self._closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None:
            self._stream.close()


def _host_block(backend: Backend, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory of the host to read into before a copy to the device: pinned where there is CuPy."""
    if backend.name != "cupy":
        return np.empty(shape, dtype=dtype)
    count = shape[0] * shape[1]
    memory = backend.xp.cuda.alloc_pinned_memory(count * dtype.itemsize)
    return np.frombuffer(memory, dtype=dtype, count=count).reshape(shape)


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
