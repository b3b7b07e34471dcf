"""What all peers on a CPU have in common: they are handed the rows of each mini-batch, and want the set as floats."""

from __future__ import annotations

import abc
import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from catopt_xp.commands.bench import Contender, Rows, Workload, drop_pixels, used_threads
from catopt_xp.nn.functional import pixel_scale


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
        """Makes one update for each mini-batch of rows, and puts its loss into `_losses`."""

    def losses(self) -> NDArray[np.float64]:
        return np.array(self._losses, dtype=np.float64)


def floats(work: Workload) -> NDArray[np.float32]:
    """The set as float32 in [0, 1], (m, n_x); the set made last is kept."""
    return _floats(work.n_x, work.m, work.seed)


def columns(work: Workload) -> NDArray[np.float64]:
    """The set as the chapter has it, float64 in [0, 1], (n_x, m); the set made last is kept."""
    return _columns(work.n_x, work.m, work.seed)


@functools.lru_cache(maxsize=1)
def _floats(n_x: int, m: int, seed: int) -> NDArray[np.float32]:
    made = Workload(n_x=n_x, m=m, seed=seed).pixels().astype(np.float32)
    made *= np.float32(pixel_scale(np.dtype(np.uint8)))
    return made


@functools.lru_cache(maxsize=1)
def _columns(n_x: int, m: int, seed: int) -> NDArray[np.float64]:
    made = np.ascontiguousarray(Workload(n_x=n_x, m=m, seed=seed).pixels().T, dtype=np.float64)
    made /= 255.0
    return made


def drop_sets() -> None:
    """Gives back the memory of all sets that are kept."""
    drop_pixels()
    _floats.cache_clear()
    _columns.cache_clear()
