"""What every contender has in common: it makes mini-batch updates, and remembers their losses."""

from __future__ import annotations

import abc
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from catopt_xp.bench.workload import Rows, Workload
from catopt_xp.data.order import batches

ORDERS = 16


class Contender(abc.ABC):
    """Trains on a workload: the same rows in the same order from the same weights, one update per mini-batch.

    `workload`: what to do; `threads`: how many it may use. What is made here (weights, sets as floats, compiled code)
    is not part of the time that is taken.
    """

    name: str
    """Its name in the table."""
    convention = "chapter"
    """Whose form of the optimizer it has: a name of `BaseOptimizer.conventions`."""

    def __init__(self, workload: Workload, threads: int) -> None:
        self.workload, self.threads = workload, threads
        self._libraries = ThreadpoolController()  # looking for them takes milliseconds, which no step shall pay

    @abc.abstractmethod
    def steps(self, count: int) -> None:
        """Makes the next `count` mini-batch updates, going on where the last call ended; all is done on return."""

    @abc.abstractmethod
    def losses(self) -> NDArray[np.float64]:
        """The mini-batch loss of every step so far."""

    @abc.abstractmethod
    def versions(self) -> dict[str, str]:
        """The libraries that do the work, by name."""


class Peer(Contender):
    """A contender that is handed the rows of each mini-batch."""

    def __init__(self, workload: Workload, threads: int) -> None:
        super().__init__(workload, threads)
        self._batches = workload.row_batches()
        self._losses: list[float] = []

    def steps(self, count: int) -> None:
        with used_threads(self.threads, self._libraries):
            self._make(list(itertools.islice(self._batches, count)))

    @abc.abstractmethod
    def _make(self, batches: list[Rows]) -> None:
        """One update for each mini-batch of rows; puts its loss into `_losses`."""

    def losses(self) -> NDArray[np.float64]:
        return np.array(self._losses, dtype=np.float64)


class EpochContender(Contender):
    """A contender that makes whole epochs, and brings their losses to the host at the end of each, as training does.

    After ORDERS epochs the row orders come again: drawing them is no part of the time that is taken.
    """

    def __init__(self, workload: Workload, threads: int) -> None:
        super().__init__(workload, threads)
        self.slices = batches(workload.m, workload.batch_size)
        self._orders = [workload.order(epoch) for epoch in range(ORDERS)]
        self._past: list[NDArray[np.float64]] = []  # losses by epoch

    def order(self, epoch: int) -> Rows:
        """The order of the rows in an epoch, (m,)."""
        return self._orders[epoch % ORDERS]

    def steps(self, count: int) -> None:
        """As `Contender.steps`; raises ValueError where `count` updates are not whole epochs."""
        epochs, rest = divmod(count, self.workload.batches)
        if rest:
            raise ValueError(f"{count} steps are not whole epochs of {self.workload.batches}")
        for _ in range(epochs):
            self._past.append(self._make(len(self._past)))

    @abc.abstractmethod
    def _make(self, epoch: int) -> NDArray[np.float64]:
        """The updates of an epoch; its mini-batch losses, once all is done."""

    def losses(self) -> NDArray[np.float64]:
        return np.concatenate([np.zeros(0), *self._past])


@contextmanager
def used_threads(threads: int, libraries: ThreadpoolController) -> Iterator[None]:
    """A `with` block in which this library's own threads and those of matrix products are so many.

    `libraries`: those that make the products.

    >>> from catopt_xp.backend.machine import thread_count
    >>> with used_threads(1, ThreadpoolController()):
    ...     thread_count()
    1
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        with libraries.limit(limits=threads, user_api="blas"):
            yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
