"""Ranks: the processes that train one network together, and everything that travels between them.

All of MPI is here. A rank keeps its own columns of the set, of W0 and of W0's moments; from step to step only sums of
products travel, never a gradient. Which panels and columns a rank has is decided in `engines/ranks.py`; here a share is
a slice of columns. A communicator is mpi4py's, or behaves like one.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.devices import DeviceError, fall_back
from catopt_xp.backend.machine import thread_count
from catopt_xp.backend.xp import Backend, NumpyBackend, get_backend

Floats = NDArray[Any]

# The variables by which launchers tell a process how many processes there are, and which one it is.
LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
FORWARDING = 0.5  # seconds for a launcher to pass on what was said, before it ends everything
ROWS = 64  # rows of a set that are exchanged at a time


class RankError(ConnectionError):
    """Something went wrong on another rank, or between ranks; the message says where.

    It is an OSError because what it repeats often is one: an exception that one rank survives, all ranks survive.
    """


class Ranks:
    """The processes that train one network together. Without a communicator: this process alone, which is rank 0 of 1.

    `comm`: their communicator, or None.

    >>> ranks = Ranks()
    >>> ranks.rank, ranks.size, ranks.any(False), ranks.everyone("here")
    (0, 1, False, ['here'])
    """

    def __init__(self, comm: Any = None) -> None:
        for name in ("Get_rank", "Get_size", "Allgatherv", "Alltoallv", "allgather", "Abort"):
            if comm is not None and not hasattr(comm, name):
                raise TypeError(f"comm is a {type(comm).__name__}; give a communicator of mpi4py, or None")
        self.rank = 0 if comm is None else int(comm.Get_rank())
        self.size = 1 if comm is None else int(comm.Get_size())
        self.comm = None if self.size == 1 else comm
        self.sent_bytes = 0  # sums of products, to each of the others
        self._agreed: BaseException | None = None

    # --- decisions ------------------------------------------------------------------------------------------------

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; all must call this. Raises RankError where a rank has failed in `agreed`."""
        return [value] if self.comm is None else self._exchange(value, None)

    def _exchange(self, value: Any, failure: str | None) -> list[Any]:
        """Every rank's value, or RankError for the first rank that has failed, unless this one has."""
        assert self.comm is not None
        answers = self.comm.allgather((value, failure))
        failed = [(rank, text) for rank, (_, text) in enumerate(answers) if text is not None]
        if failed and failure is None:
            self._agreed = RankError(f"rank {failed[0][0]} of {self.size}: {failed[0][1]}")
            raise self._agreed
        return [value for value, _ in answers]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A `with` block that every rank leaves in one way: where one raises, the others raise RankError naming it.

        They raise it at the end of the block, or where they wait for the others in it: at whatever asks for a value of
        every rank (`everyone`, `any`, `from_first`, and all that call these). So what runs in such a block needs no
        block of its own. An exchange of arrays cannot tell of a failure: in a block, ask for a value before it, as
        `columns_of` does.
        """
        try:
            yield
        except BaseException as error:
            if self.comm is not None and error is not self._agreed:
                self._agreed = error
                self._exchange(None, f"{type(error).__name__}: {error}")
            raise
        self.everyone(None)

    @contextmanager
    def one_by_one(self, first_alone: bool) -> Iterator[None]:
        """A `with` block that the first rank has left before the others enter it, if `first_alone`; else at once.

        It belongs into an `agreed` block, where the others raise RankError if the first one fails.
        """
        if first_alone and self.rank:
            self.everyone(None)
        yield
        if first_alone and not self.rank:
            self.everyone(None)

    def is_agreed(self, error: BaseException) -> bool:
        """Whether every rank left an `agreed` block because of this error."""
        return error is self._agreed

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return any(self.everyone(flag))

    def from_first(self, value: Any) -> Any:
        """The first rank's value."""
        return self.everyone(value)[0]

    def check_same(self, content: bytes, what: str) -> None:
        """Raises RankError, on every rank, where one has other content than the first."""
        sums = self.everyone(zlib.crc32(content))
        other = next((rank for rank, number in enumerate(sums) if number != sums[0]), None)
        if other is not None:
            self._agreed = RankError(
                f"rank {other} has other {what} than rank 0: start all ranks with the same arguments, on processors of "
                "one type, with the same versions of NumPy and numba"
            )
            raise self._agreed

    def abort(self, error: BaseException) -> NoReturn:
        """Ends the processes of all ranks, with status 1, because the others wait for this one, which has failed."""
        assert self.comm is not None
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error on rank {self.rank} of {self.size}: {text}", file=sys.__stderr__, flush=True)
        time.sleep(FORWARDING)
        self.comm.Abort(1)
        raise SystemExit(1)

    # --- machines and devices -------------------------------------------------------------------------------------

    def threads(self) -> int:
        """This rank's fair part of the threads that there are for all ranks on this machine."""
        return max(1, thread_count() // self.everyone(platform.node()).count(platform.node()))

    def place(self) -> int:
        """The number of ranks before this one on this machine."""
        return self.everyone(platform.node())[: self.rank].count(platform.node())

    def backend(self, device: Any, strict_device: bool | None) -> Backend:
        """Where this rank trains: on a GPU of its own, or, where one rank has none, all ranks on CPUs.

        Arguments as for `get_backend`, which is asked where this process is alone; several ranks take a Backend as it
        is, but not "cuda:N". Warns and raises as `get_backend` does.
        """
        if self.size == 1:
            return get_backend(device, strict_device)
        if isinstance(device, Backend):
            return device
        wanted = os.environ.get("CATOPT_XP_DEVICE") or device if device == "auto" else device
        if wanted not in ("auto", "cpu", "cuda"):
            raise ValueError(f'ranks take a device each, not {wanted!r}: choose "auto", "cpu" or "cuda"')
        if wanted == "cpu":
            return get_backend("cpu")
        backend, cause = _own_gpu(self, wanted)
        told = next((text for text in self.everyone(cause) if text), None)
        if told is None:
            return backend
        if wanted == "cuda":
            fall_back(f"ranks cannot train on GPUs: {told}.", strict_device)
        return NumpyBackend(f"ranks cannot train on GPUs: {told}")

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
        """Fills W (units, n_x) with every rank's columns; `shares`: whose are whose. This rank's are right already."""
        if self.comm is None:
            return
        own = np.ascontiguousarray(W[:, shares[self.rank]])
        counts = [W.shape[0] * (part.stop - part.start) for part in shares]
        everyone = np.empty(sum(counts), dtype=W.dtype)
        self.comm.Allgatherv(own, [everyone, counts])
        for part, block in zip(shares, np.split(everyone, np.cumsum(counts)[:-1]), strict=True):
            if part != shares[self.rank]:
                W[:, part] = block.reshape(W.shape[0], -1)

    def columns_of(self, rows: Floats, shares: Sequence[slice]) -> Floats:
        """This rank's columns, (m, columns), of a set whose rows (·, n_x) are spread over the ranks in their order.

        `shares`: each rank's columns.
        """
        if self.comm is None:
            return rows
        counts = self.everyone(len(rows))
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


def _own_gpu(ranks: Ranks, wanted: str) -> tuple[Backend, str]:
    """A GPU for this rank, of those that it sees, or a CPU and the cause; no two ranks have the same GPU."""
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
    sharing = ranks.everyone(place).count(place)
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
