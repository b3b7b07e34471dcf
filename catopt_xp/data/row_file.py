"""Rows of a set that lie in a file: where, and how they are read ahead into memory of a device. Floor F2.

They are read as a file is, not through the memory map: pages that a map has touched count as memory of the process, and
a file that was cut would end it by a signal instead of an error.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.xp import Array, Backend

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


__all__ = ["Reader", "RowFile", "find_rows", "is_mapped"]
