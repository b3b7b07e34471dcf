"""The work that is timed: pixels, labels, initial weights and row orders, all of them functions of a few numbers.

The reference workload is the chapter's: 2000 pictures of 224x224x3 pixels, layers of 30, 20, 20 and 1 units.
The pixels are noise with a planted signal, so that nothing is downloaded and the loss still moves.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.data.order import batches, epoch_order
from catopt_xp.nn.functional import pixel_scale
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import OPTIMIZERS

Rows = NDArray[np.int64]

PIXEL_STREAM, LABEL_STREAM = 3, 4  # keep these random numbers apart from those of weights and orders
SIGNAL_EVERY = 8  # columns; one in so many tells the classes apart
SIGNAL = np.uint8(16)  # a bit that is set in those columns in every sample of class 1


@dataclass(frozen=True)
class Workload:
    """A network, a set and a way to train on it.

    `n_x`: pixels of a sample; `hidden`: units of the hidden layers, relu (the output is one sigmoid); `m`: samples;
    `optimizer`: a name of `OPTIMIZERS`; `learning_rate`: per step, None takes the chapter's; `seed`: of everything;
    `dtype`: of the weights, float32 or float64.

    Raises ValueError for an unknown optimizer, or numbers below 1.

    >>> work = Workload(n_x=12, m=10, batch_size=4)
    >>> work.batches, work.rate, work.pixels().shape, work.targets().shape
    (3, 1e-05, (10, 12), (1, 10))
    """

    n_x: int = 150528
    hidden: tuple[int, ...] = (30, 20, 20)
    m: int = 2000
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float | None = None
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; choose {', '.join(OPTIMIZERS)}")
        if not self.hidden or min(self.n_x, self.m, self.batch_size, *self.hidden) < 1:
            raise ValueError(
                "a workload needs at least 1 pixel, sample, hidden layer and unit, and a batch_size from 1"
            )

    @property
    def layers(self) -> list[int]:
        """Units of every layer, the input first."""
        return [self.n_x, *self.hidden, 1]

    @property
    def activations(self) -> list[str]:
        """The activation of every layer after the input."""
        return ["relu"] * len(self.hidden) + ["sigmoid"]

    @property
    def rate(self) -> float:
        """The learning rate per step."""
        return OPTIMIZERS[self.optimizer][1] if self.learning_rate is None else self.learning_rate

    @property
    def batches(self) -> int:
        """Mini-batches, that is updates, in an epoch; the last one may be short."""
        return len(batches(self.m, self.batch_size))

    def pixels(self) -> NDArray[np.uint8]:
        """The set, (m, n_x) uint8; the one drawn last is kept."""
        return _pixels(self.n_x, self.m, self.seed)

    def floats(self) -> NDArray[np.float32]:
        """The same set as float32 in [0, 1], (m, n_x), for those that want it so; the one made last is kept."""
        return _floats(self.n_x, self.m, self.seed)

    def columns(self) -> NDArray[np.float64]:
        """The same set as the chapter has it, float64 in [0, 1], (n_x, m); the one made last is kept."""
        return _columns(self.n_x, self.m, self.seed)

    def targets(self) -> NDArray[Any]:
        """Labels 0 and 1, (1, m), of the weights' type."""
        return _labels(self.m, self.seed).astype(self.dtype).reshape(1, -1)

    def network(self) -> DeepNetwork:
        """A new network with the initial weights."""
        network = DeepNetwork(self.layers, self.activations, seed=self.seed)
        if self.dtype == "float32":
            return network
        twin = DeepNetwork(self.layers, self.activations, dtype=self.dtype)
        twin.load(network.save())  # the same numbers in every type: float64 draws are others
        return twin

    def weights(self) -> dict[str, NDArray[Any]]:
        """Initial weights by name: `W0, W1, …` (n_out, n_in) by He, `b0, b1, …` (n_out, 1), zero."""
        return {name: np.array(values) for name, values in self.network().save().items()}

    def order(self, epoch: int) -> Rows:
        """The order of the rows in an epoch, (m,)."""
        return epoch_order(self.m, epoch, self.seed)

    def row_batches(self) -> Iterator[Rows]:
        """The rows of each mini-batch, epoch after epoch, without an end.

        >>> [len(rows) for rows in itertools.islice(Workload(n_x=1, m=10, batch_size=4).row_batches(), 4)]
        [4, 4, 2, 4]
        """
        for epoch in itertools.count():
            order = self.order(epoch)
            for part in batches(self.m, self.batch_size):
                yield order[part]


@functools.lru_cache(maxsize=1)
def _pixels(n_x: int, m: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.Generator(np.random.PCG64([seed, PIXEL_STREAM]))
    pixels = rng.integers(0, 256, (m, n_x), dtype=np.uint8)
    columns = pixels[:, ::SIGNAL_EVERY]
    columns |= _labels(m, seed)[:, None] * SIGNAL
    return pixels


@functools.lru_cache(maxsize=1)
def _floats(n_x: int, m: int, seed: int) -> NDArray[np.float32]:
    floats = _pixels(n_x, m, seed).astype(np.float32)
    floats *= np.float32(pixel_scale(np.dtype(np.uint8)))
    return floats


@functools.lru_cache(maxsize=1)
def _columns(n_x: int, m: int, seed: int) -> NDArray[np.float64]:
    columns = np.ascontiguousarray(_pixels(n_x, m, seed).T, dtype=np.float64)
    columns /= 255.0
    return columns


def _labels(m: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.Generator(np.random.PCG64([seed, LABEL_STREAM]))
    return rng.permutation(np.arange(m, dtype=np.uint8) % 2)  # half of each class


def drop_sets() -> None:
    """Gives the memory of the sets that are kept back."""
    _pixels.cache_clear()
    _floats.cache_clear()
    _columns.cache_clear()
