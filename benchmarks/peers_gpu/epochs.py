"""What all contenders on a GPU have in common: they train whole epochs."""

from __future__ import annotations

import abc

import numpy as np
from numpy.typing import NDArray

from catopt_xp.commands.bench import Contender, Rows, Workload
from catopt_xp.data.order import batches

ORDERS = 16  # row orders that are drawn beforehand


class EpochContender(Contender):
    """A contender that makes whole epochs, and brings their losses to the host at the end of each, as training does.

    The row orders repeat after ORDERS epochs, so that drawing them is not timed.
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
        """Makes the updates of an epoch, and returns its mini-batch losses once all is done."""

    def losses(self) -> NDArray[np.float64]:
        return np.concatenate([np.zeros(0), *self._past])
