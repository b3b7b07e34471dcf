"""Ranks: the processes of one run, each the owner of some panels, and all that travels between them.

Everything that has to do with MPI is here. A rank keeps its panels' columns of the set, of W0 and of its moments; from
step to step only sums of products travel, one block for each whole subtree of the panels' tree that a rank owns
(`engines/panels.py`). No gradient is ever exchanged. A communicator is mpi4py's, or what behaves like one.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.devices import DeviceError, fall_back
from catopt_xp.backend.machine import thread_count
from catopt_xp.backend.xp import Backend, NumpyBackend, get_backend
from catopt_xp.data.decoding import decode_files
from catopt_xp.engines.panels import PANEL, grain, subtrees

Floats = NDArray[Any]

# What launchers tell their processes: how many there are, and which one this is.
LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
FORWARDING = 0.5  # seconds for a launcher to pass on what was said, before it ends everything
ROWS = 64  # of a set, that are exchanged at a time


class RankError(ConnectionError):
    """What went wrong on another rank, or between ranks; the message says where.

    An OSError, as what it repeats often is one: who lives on after one, on the rank that it comes from, does so on all.
    """


class Ranks:
    """The processes that train one network together.

    `comm`: their communicator, or None for a process of its own.

    >>> ranks = Ranks()
    >>> ranks.rank, ranks.size, ranks.share(100_000)
    (0, 1, slice(0, 100000, None))
    """

    def __init__(self, comm: Any = None) -> None:
        for name in ("Get_rank", "Get_size", "Allgatherv", "Alltoallv", "allgather", "bcast", "Abort"):
            if comm is not None and not hasattr(comm, name):
                raise TypeError(f"comm is a {type(comm).__name__}; give a communicator of mpi4py, or None")
        self.rank = 0 if comm is None else int(comm.Get_rank())
        self.size = 1 if comm is None else int(comm.Get_size())
        self.comm = None if self.size == 1 else comm
        self.sent_bytes = 0  # sums of products, to each of the others
        self.decodes = False  # whether the set was decoded in shares, so that each has its own columns already
        self._agreed: BaseException | None = None

    def panels(self, n_x: int, rank: int | None = None) -> tuple[int, int]:
        """First and stop panel of a rank (None: this one), of all that `n_x` features have."""
        count, rank = -(-n_x // PANEL), self.rank if rank is None else rank
        return count * rank // self.size, count * (rank + 1) // self.size

    def share(self, n_x: int, rank: int | None = None) -> slice:
        """The features of a rank (None: this one). Raises ValueError where there are more ranks than panels."""
        count = -(-n_x // PANEL)
        if count < self.size:
            told = f"{n_x} features are {count} panel{'s' * (count > 1)} of {PANEL}"
            raise ValueError(f"{self.size} ranks are too many, as {told}: start at most {count}")
        first, stop = self.panels(n_x, rank)
        return slice(first * PANEL, min(n_x, stop * PANEL))

    def nodes(self, n_x: int) -> list[list[tuple[int, int]]]:
        """For each rank the subtrees that its panels are, as (first, length); the last may end beyond the last panel.

        >>> Ranks().nodes(9 * 1024)
        [[(0, 16)]]
        """
        found, count = [], -(-n_x // PANEL)
        for rank in range(self.size):
            first, stop = self.panels(n_x, rank)
            task = grain(first, stop, count)
            found.append([(k * task, n * task) for k, n in subtrees(first // task, -(-stop // task))])
        return found

    # --- decisions ------------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return flag if self.comm is None else any(self.comm.allgather(flag))

    def from_first(self, value: Any) -> Any:
        """The first rank's value."""
        return value if self.comm is None else self.comm.bcast(value, root=0)

    def threads(self) -> int:
        """This rank's fair part of the threads that there are for all ranks on this machine."""
        here = 1 if self.comm is None else self.comm.allgather(platform.node()).count(platform.node())
        return max(1, thread_count() // here)

    def place(self) -> int:
        """How many ranks before this one are on this machine."""
        return 0 if self.comm is None else self.comm.allgather(platform.node())[: self.rank].count(platform.node())

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A `with` block that every rank leaves in one way: where one raises, the others raise RankError naming it.

        Such blocks may be nested; nothing else in them may wait for another rank.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
        if self.comm is not None and (error is None or error is not self._agreed):
            told = self.comm.allgather(None if error is None else f"{type(error).__name__}: {error}")
            failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
            if failed:
                self._agreed = error or RankError(f"rank {failed[0][0]} of {self.size}: {failed[0][1]}")
                raise self._agreed
        if error is not None:
            raise error

    @contextmanager
    def one_by_one(self, first_alone: bool) -> Iterator[None]:
        """A `with` block that the first rank has left before the others enter it, if `first_alone`; else at once.

        Raises RankError on the others where the first one fails.
        """
        if first_alone and self.rank:
            with self.agreed():
                pass
        yield
        if first_alone and not self.rank:
            with self.agreed():
                pass

    def is_agreed(self, error: BaseException) -> bool:
        """Whether every rank left an `agreed` block because of this error."""
        return error is self._agreed

    def check_same(self, content: bytes, what: str) -> None:
        """Raises RankError, on every rank, where one has another content than the first."""
        if self.comm is None:
            return
        sums = self.comm.allgather(zlib.crc32(content))
        other = next((rank for rank, number in enumerate(sums) if number != sums[0]), None)
        if other is not None:
            self._agreed = RankError(
                f"rank {other} has other {what} than rank 0: start all ranks with the same arguments, on processors of "
                "one type, with the same versions of NumPy and numba"
            )
            raise self._agreed

    def abort(self, error: BaseException) -> NoReturn:
        """Ends the processes of all ranks, with status 1: the others wait for one that is not coming."""
        assert self.comm is not None
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error on rank {self.rank} of {self.size}: {text}", file=sys.__stderr__, flush=True)
        time.sleep(FORWARDING)
        self.comm.Abort(1)
        raise SystemExit(1)

    # --- arrays ---------------------------------------------------------------------------------------------------

    def gather(self, own: Floats, counts: Sequence[int]) -> Floats:
        """The ranks' flat arrays, of so many numbers each, one after the other."""
        if self.comm is None:
            return own
        everyone = np.empty(sum(counts), dtype=own.dtype)
        self.comm.Allgatherv(own, [everyone, list(counts)])
        self.sent_bytes += own.nbytes
        return everyone

    def gather_columns(self, W: Floats, shares: Sequence[slice]) -> None:
        """Fills W (units, n_x) with every rank's columns, which are `shares`; this rank's are right already."""
        if self.comm is None:
            return
        own = np.ascontiguousarray(W[:, shares[self.rank]])
        counts = [W.shape[0] * (part.stop - part.start) for part in shares]
        everyone = np.empty(sum(counts), dtype=W.dtype)
        self.comm.Allgatherv(own, [everyone, counts])
        for part, block in zip(shares, np.split(everyone, np.cumsum(counts)[:-1]), strict=True):
            if part != shares[self.rank]:
                W[:, part] = block.reshape(W.shape[0], -1)

    def decode(
        self, files: Sequence[Path], img_shape: tuple[int, int], on_error: str, progress: bool | None = None
    ) -> tuple[NDArray[np.uint8], dict[int, str]]:
        """As `decode_files`, each rank a share of the files; of all rows, (m, columns), it returns its columns."""
        if self.comm is None:
            return decode_files(files, img_shape, on_error, progress)
        self.decodes = True
        start, stop = len(files) * self.rank // self.size, len(files) * (self.rank + 1) // self.size
        rows: NDArray[np.uint8] = np.empty((0, img_shape[0] * img_shape[1] * 3), dtype=np.uint8)
        broken: dict[int, str] = {}
        with self.agreed():
            self.share(rows.shape[1])  # enough panels
            if start < stop:
                rows, broken = decode_files(files[start:stop], img_shape, on_error, progress)
        places = self.comm.allgather({start + place: text for place, text in broken.items()})
        return self.columns_of(rows), {place: text for some in places for place, text in some.items()}

    def columns_of(self, rows: Floats) -> Floats:
        """This rank's columns, (m, columns), of a set whose rows (·, n_x) are spread over the ranks in their order."""
        assert self.comm is not None
        n_x, counts = rows.shape[1], self.comm.allgather(len(rows))
        shares = [self.share(n_x, rank) for rank in range(self.size)]
        widths = [part.stop - part.start for part in shares]
        begins = np.cumsum([0, *counts])
        columns = np.empty((begins[-1], widths[self.rank]), dtype=rows.dtype)
        for start in range(0, max(counts), ROWS):
            mine = rows[start : start + ROWS]
            out = np.concatenate([mine[:, part].reshape(-1) for part in shares])
            lengths = [max(0, min(ROWS, count - start)) for count in counts]
            received = [length * widths[self.rank] for length in lengths]
            back = np.empty(sum(received), dtype=rows.dtype)
            self.comm.Alltoallv([out, [len(mine) * width for width in widths]], [back, received])
            for begin, block in zip(begins, np.split(back, np.cumsum(received)[:-1]), strict=False):
                columns[begin + start :][: block.size // widths[self.rank]] = block.reshape(-1, widths[self.rank])
        return columns


def rank_backend(ranks: Ranks, device: Any, strict_device: bool | None) -> Backend:
    """Where this rank trains: on a GPU of its own, or, where one rank has none, all on CPUs. Arguments as for
    `get_backend`, whose backends are taken as they are, but "cuda:N". Warns and raises as it does.
    """
    if isinstance(device, Backend):
        return device
    with ranks.agreed():
        wanted = os.environ.get("CATOPT_XP_DEVICE") or device if device == "auto" else device
        if wanted not in ("auto", "cpu", "cuda"):
            raise ValueError(f'ranks take a device each, not {wanted!r}: choose "auto", "cpu" or "cuda"')
    if wanted == "cpu":
        return get_backend("cpu")
    backend, cause = _own_gpu(ranks, wanted)
    causes = [cause] if ranks.comm is None else ranks.comm.allgather(cause)
    told = next((text for text in causes if text), None)
    if told is None:
        return backend
    if wanted == "cuda":
        with ranks.agreed():
            fall_back(f"ranks cannot train on GPUs: {told}.", strict_device)
    return NumpyBackend(f"ranks cannot train on GPUs: {told}")


def _own_gpu(ranks: Ranks, wanted: str) -> tuple[Backend, str]:
    """The GPU for this rank, of those that it sees, or why there is none: no two ranks have the same."""
    number, place, cause = ranks.place(), None, ""
    try:
        backend = get_backend(wanted, strict_device=True)
        if number and backend.name == "cupy":
            with suppress(DeviceError):  # a launcher may show each rank one GPU alone
                backend = get_backend(f"cuda:{number}", strict_device=True)
    except DeviceError as error:
        backend, cause = NumpyBackend(), f"rank {ranks.rank}: {str(error).rstrip('.')}"
    if backend.name == "cupy":
        bus = backend.xp.cuda.runtime.deviceGetPCIBusId(int(backend.device.removeprefix("cuda:")))
        place = platform.node(), bus
    elif not cause:
        cause = f"rank {ranks.rank}: {backend.reason}"
    places = [place] if ranks.comm is None else ranks.comm.allgather(place)
    sharing = places.count(place)
    if place is not None and sharing > 1:
        cause = f"{sharing} ranks on {place[0]} would share one GPU: start as many ranks as there are GPUs"
    return backend, cause


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """How many processes an MPI launcher started together, and which of them this is; (1, 0) without one.

    >>> launched({"PMI_SIZE": "4", "PMI_RANK": "2"})
    (4, 2)
    """
    for size, rank in LAUNCHERS:
        if environment.get(size, "").isdigit() and environment.get(rank, "").isdigit():
            return int(environment[size]), int(environment[rank])
    return 1, 0


def world() -> Any:
    """The communicator of all processes that were started together. Raises ImportError, naming the extra."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, and no MPI library
        told = f'training over ranks needs mpi4py and an MPI library ({error}): pip install "catopt-xp[distributed]"'
        raise ImportError(told) from error
    return MPI.COMM_WORLD


class Exchange(Protocol):
    """What a rank's engine needs of the others: `distributed.Ranks`."""

    rank: int
    size: int
    sent_bytes: int

    def share(self, n_x: int) -> slice:
        """This rank's features."""

    def panels(self, n_x: int) -> tuple[int, int]:
        """This rank's first panel, and the next one's."""

    def nodes(self, n_x: int) -> list[list[tuple[int, int]]]:
        """Each rank's subtrees."""

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""

    def from_first(self, value: Any) -> Any:
        """The first rank's value."""

    def gather(self, own: Floats, counts: Sequence[int]) -> Floats:
        """All ranks' numbers."""

    def gather_columns(self, W: Floats, shares: Sequence[slice]) -> None:
        """Fills in what other ranks care for."""
