"""Where the sets of a run lie: on the device whole, or in a file, from where they are streamed."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.machine import size_text
from catopt_xp.backend.xp import Array, Backend, dtype_name
from catopt_xp.data.dataset import DataSet
from catopt_xp.data.order import RowOrder
from catopt_xp.data.resident import ResidentSet, SampleLayout, labels_of, make_resident
from catopt_xp.data.stream import WINDOWS, RowFile, StreamedDevSet, StreamedSet, find_rows, is_mapped
from catopt_xp.nn.labels import check_labels

FITS = 0.8  # of the free memory: what a set may take that is mapped, without being streamed
SHARE = 2  # of a memory limit the set takes this part: network, optimizer and libraries need the rest


@dataclass
class Sets:
    """The training set and the dev set (or None) of a run, on the device or streamed onto it, and the order of rows.

    A `with` block ends what goes on in the background. `order.window`: the most rows in a window of the order; None:
    rows are shuffled over the whole set.
    """

    train: ResidentSet
    dev: ResidentSet | None
    order: RowOrder

    @property
    def stream(self) -> StreamedSet | None:
        """The training set where it is streamed."""
        return self.train if isinstance(self.train, StreamedSet) else None

    @property
    def notices(self) -> list[str]:
        """What was done to the sets."""
        return [*self.train.notices, *([] if self.dev is None else self.dev.notices)]

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch, (m,): numbers of rows of `train.samples`, or places where the set is streamed."""
        return self.order.rows(self.train.m, epoch) if self.stream is None else self.stream.order(epoch)

    def check_pools(self, batch_size: int, reach: int) -> None:
        """Raises ValueError where the windows in memory are too small for what a step may read."""
        if self.stream is not None and (rows := self.stream.rows_needed(batch_size, reach)):
            least = size_text(SHARE * min(WINDOWS * rows, self.stream.m) * self.stream.file.row_bytes)
            raise ValueError(
                f"windows of {self.stream.window} rows are too few for batches of {batch_size}: give a memory_limit of"
                f" at least {least}, or smaller batches"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for one in (self.train, self.dev):
                if one is not None:
                    stack.callback(one.close)


def place_whole(dataset: DataSet, layout: SampleLayout, backend: Backend, order: RowOrder) -> Sets:
    """The sets in memory of the device, checked. Raises TypeError or ValueError for what cannot be trained on."""
    train = make_resident(dataset.train_X, dataset.train_Y, backend, layout)
    return Sets(train, _resident_dev(dataset, layout, backend), order)


def place(
    dataset: DataSet,
    layout: SampleLayout,
    backend: Backend,
    order: RowOrder,
    memory_limit: int | None,
    working_bytes: int,
    recover_from: str = "the run",
) -> Sets:
    """The sets on the device, or streamed where they take more than the memory limit, or than what is free, leaves.

    `memory_limit`: bytes, of which the sets take half (None: what is free); `working_bytes`: what training takes
    besides; `recover_from`: what an error calls a run that goes on, which keeps its windows (`order.window`).
    Raises ValueError where a set fits neither way, TypeError or ValueError for what cannot be trained on.
    """
    limited = memory_limit is not None
    room = memory_limit // SHARE if memory_limit is not None else _free_bytes(backend, working_bytes)
    train, dev = _streamed_files(dataset, layout.dtype, backend, room, limited)

    def labels(X: Any, Y: Any, name: str) -> Array:
        found = labels_of(X, Y, layout.n_x, name)
        return backend.asarray(check_labels(found, layout.output, layout.units, layout.dtype, name.replace("X", "Y")))

    if train is None:
        train_set = make_resident(dataset.train_X, dataset.train_Y, backend, layout)
    else:
        window = _window(order.window, train, room, limited, recover_from)
        order = replace(order, window=window)
        train_labels = labels(dataset.train_X, dataset.train_Y, "X")
        train_set = StreamedSet(train, train_labels, backend, window, order.seed, order.shuffle)
    if dev is not None:
        dev_labels = labels(dataset.dev_X, dataset.dev_Y, "dev_X")
        return Sets(train_set, StreamedDevSet(dev, dev_labels, backend), order)
    return Sets(train_set, _resident_dev(dataset, layout, backend), order)


def _resident_dev(dataset: DataSet, layout: SampleLayout, backend: Backend) -> ResidentSet | None:
    return None if dataset.dev_X is None else make_resident(dataset.dev_X, dataset.dev_Y, backend, layout, "dev_X")


def bytes_on_device(dataset: DataSet, dtype: str) -> int:
    """Bytes of a device that the sets take which cannot be streamed onto it; `dtype`: the network's."""
    sets = [X for X in (dataset.train_X, dataset.dev_X) if X is not None and _streamable(X, dtype) is None]
    return sum(_stored_bytes(X, dtype) for X in sets)


def _free_bytes(backend: Backend, working_bytes: int) -> int:
    try:
        return max(0, backend.free_memory() - working_bytes)
    except OSError:  # a system that does not tell: there nothing is streamed without a memory_limit
        return 1 << 62


def _streamed_files(
    dataset: DataSet, dtype: str, backend: Backend, room: int, limited: bool
) -> tuple[RowFile | None, RowFile | None]:
    """The files from which the training and the dev set are streamed; None for a set that lies in memory."""
    sets = {"X": dataset.train_X} | ({} if dataset.dev_X is None else {"dev_X": dataset.dev_X})
    # A set that lies in the host's memory takes no more of it; it counts against a limit, and on a GPU.
    counted = {name: X for name, X in sets.items() if limited or backend.name != "numpy" or is_mapped(X)}
    needed = {name: _stored_bytes(X, dtype) for name, X in counted.items()}
    fits = room * (1.0 if limited else FITS)
    if sum(needed.values()) <= fits:
        return None, None
    files = {name: _streamable(X, dtype) for name, X in sets.items()}
    kept = {name: size for name, size in needed.items() if files[name] is None}
    beside = sum(kept.values())
    if beside > fits:  # whatever is streamed
        largest = sets[max(kept, key=lambda name: kept[name])]
        if limited or is_mapped(largest):
            raise ValueError(_not_streamable(list(kept), largest, beside, room, dtype))
        return None, None
    return files["X"] if needed.get("X", 0) > fits - beside else None, files.get("dev_X")


def _window(before: int | None, file: RowFile, room: int, limited: bool, recover_from: str) -> int:
    """The most rows in a window: those of the run that goes on (`before`), or what the room allows."""
    if before is None:
        # What is free changes from run to run, and with it the order: a power of two changes rarely.
        memory = room if limited else 2 ** max(0, int(np.log2(max(1, room // SHARE))))
        return max(1, memory // (WINDOWS * file.row_bytes))
    if WINDOWS * before * file.row_bytes > room:
        told = size_text(SHARE * WINDOWS * before * file.row_bytes)
        raise ValueError(f"{recover_from} goes on in windows of {before} rows: give a memory_limit of {told}")
    return before


def _stored_bytes(X: Any, dtype: str) -> int:
    """Bytes of a set as training keeps it: pixels as they are, other numbers in the network's dtype."""
    return int(math.prod(X.shape)) * (1 if dtype_name(X) == "uint8" else np.dtype(dtype).itemsize)


def _streamable(X: Any, dtype: str) -> RowFile | None:
    file = find_rows(X) if isinstance(X, np.ndarray) else None
    return file if file is not None and file.dtype in (np.dtype(np.uint8), np.dtype(dtype)) else None


def _not_streamable(names: list[str], X: Any, needed: int, room: int, dtype: str) -> str:
    takes = "take" if len(names) > 1 else "takes"
    told = f"{' and '.join(names)} {takes} {size_text(needed)} of memory, there is room for {size_text(room)}"
    if not is_mapped(X):
        return f"{told}: give rows in a .npy file, which are streamed, or memory_limit={size_text(SHARE * needed)!r}"
    return f"{told}, and a file of {X.dtype} in this layout is not streamed: write (m, n_x) rows of uint8 or {dtype}"
