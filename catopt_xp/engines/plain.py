"""The plain engine: the formulas, batch by batch. It is the definition that any other engine is held to.

One step is `forward, backward, zero_grad, add_grad, step`, on whatever device the set lies. Nothing in an
epoch waits for the device: losses stay there and are fetched once, when the epoch has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.threads import deal
from catopt_xp.backend.xp import Array, Backend
from catopt_xp.data.order import batches
from catopt_xp.nn.first_layer import feature_blocks, float_bytes
from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork
from catopt_xp.nn.parameters import Parameters, common_dtype, is_bias
from catopt_xp.optim.base import BaseOptimizer

Rows = NDArray[np.int64]
Weights = NDArray[np.float64]

SQUARED = 65536  # weights whose squares are added at a time
LARGE = 1_000_000  # multiplications of a product from which several threads pay
WIDE = 128  # units on either side of a weight matrix behind the first from which they pay


@dataclass
class Settings:
    """What shapes an epoch: batches, their order in accumulation, and whether the schedule moves by step.

    `pause_every`: updates, counted from the first epoch, after which the caller wants to look at the model; an engine
    that makes several updates at a time stops there. `squares`: whether the sum of the squares of all weights before
    each batch is kept beside its loss, for a caller that reports an L2 penalty. `m`: samples of the set, where
    `samples` are places through which it is streamed.
    """

    batch_size: int
    drop_last: bool = False
    accumulate: int = 1
    schedule_by_step: bool = False
    pause_every: int | None = None
    squares: bool = False
    m: int | None = None


class PlainEngine:
    """Runs mini-batch steps of `model` and `optimizer` over a resident set.

    `samples`: (m, n_x) on `backend`, uint8 or float; `targets`: (·, m) on `backend`. The last batch of an epoch may be
    short: its loss and gradient are means over its own samples. `weights`: of samples, (m,) on the host, or None where
    all are 1: losses and gradients are weighted means then. Where `Settings.m` is given, rows are those that `order`
    names, of however many there are, and hold what is to be trained when a step is asked for. `ranks`: the
    processes that train together, None for this one alone; the formulas need all features, so several ranks take
    another engine, whose `samples` are (m, columns of this rank).
    """

    name = "plain"

    def __init__(
        self,
        model: BaseRegressionModel,
        optimizer: BaseOptimizer,
        samples: Array,
        targets: Array,
        backend: Backend,
        settings: Settings,
        *,
        weights: Weights | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.optimizer, self.backend, self.settings = model, optimizer, backend, settings
        self.ranks = ranks or Ranks()
        self.samples, self.targets = samples, targets
        self.m = samples.shape[0] if settings.m is None else settings.m
        self.slices = batches(self.m, settings.batch_size, settings.drop_last)
        self.lengths = [part.stop - part.start for part in self.slices]
        # The mini-batch losses of this epoch; they stay on the device until `fetch_losses`.
        self.loss_dtype = common_dtype(model.save())
        self.losses = backend.zeros((len(self.lengths),), self.loss_dtype)
        self.weights = weights
        self.device_weights = None if weights is None else backend.asarray(weights, dtype=self.loss_dtype)
        self.sizes: Sequence[float] = self.lengths  # what the sums over each batch of this epoch are divided by
        self._squares: list[Array] = []  # of this epoch's batches, with `Settings.squares`
        # Products use one thread, unless they are large enough to gain by more, and not cut for threads already.
        later = [p.shape for name, p in model.save().items() if name.startswith("W") and name != "W0"]
        self._narrow = all(min(shape) <= WIDE for shape in later) and not self._whole_and_large()
        kind = type(optimizer)
        self._direct = kind.step is BaseOptimizer.step and kind.add_grad is BaseOptimizer.add_grad

    def _whole_and_large(self) -> bool:
        """Whether the first layer's products are of one block, and large enough for several threads."""
        if not isinstance(self.model, DeepNetwork):
            return False
        (units, n_x), count = self.model.save()["W0"].shape, self.lengths[0]
        backend, itemsize = self.backend, float_bytes(self.loss_dtype)
        whole = len(feature_blocks(n_x, count, itemsize, backend.cache_bytes, backend.tasks)) == 1
        return whole and units * n_x * count >= LARGE

    @property
    def batches(self) -> int:
        """Mini-batches in an epoch."""
        return len(self.lengths)

    @property
    def reach(self) -> int:
        """Batches, from the first that is not done on, that the next step may read."""
        return self.settings.accumulate

    def steps(self, epoch: int, order: Rows, first: int = 0, following: Rows | None = None) -> Iterator[int]:
        """Makes the updates of an epoch, from batch `first` on; after each yields how many batches are done.

        `order`: (m,) row numbers, on the host; `following`: those of the next epoch, if there is one. An engine that
        works ahead makes use of them; this one does not.
        """
        self._begin_epoch(order)
        rows = self.backend.asarray(order)
        for start in range(first, self.batches, self.settings.accumulate):
            group = range(start, min(self.batches, start + self.settings.accumulate))
            if self.settings.schedule_by_step:
                self.optimizer.epoch = epoch + start / self.batches
            with self.backend.single_threaded() if self._narrow else nullcontext():
                self._update(epoch, [(k, rows[self.slices[k]]) for k in group])
            yield group.stop

    def _begin_epoch(self, order: Rows) -> None:
        """Finds what the sums over each batch are divided by: its samples, or the sum of their weights."""
        self._squares = []
        if self.weights is not None:
            self.sizes = [float(self.weights[order[part]].sum()) for part in self.slices]
            if 0.0 in self.sizes:
                raise ValueError(
                    "the sample weights of a mini-batch are all zero; leave such samples out, or enlarge batch_size"
                )

    def _begin_batch(self, k: int) -> None:
        """Tells the optimizer how large the batch is, and keeps the squares of the weights where they are asked for."""
        self.optimizer.samples = self.sizes[k]
        if self.settings.squares:
            self._squares.append(self._sum_of_squares())

    def versions(self) -> dict[str, str]:
        """What computes besides the backend, by name: another version of it may give other bits."""
        return {}

    def stops(self, asked: bool) -> bool:
        """Whether to stop after this step, all ranks alike: where one of them was asked to, at once or a step later."""
        return self.ranks.any(asked)

    def settle(self) -> None:
        """Brings model and optimizer up to date, where an engine keeps their values elsewhere while it runs."""

    def _update(self, epoch: int, group: list[tuple[int, Array]]) -> None:
        """One update from one batch, or from several whose gradients are averaged over all their samples."""
        optimizer = self.optimizer
        if self._direct and len(group) == 1:
            self._gradient(epoch, *group[0])
            optimizer.update(self.model.get_grad_dict())
            return
        size = sum(self.sizes[k] for k, _ in group)
        optimizer.zero_grad()
        for k, rows in group:
            self._gradient(epoch, k, rows)
            share = {"weight": self.sizes[k] / size} if len(group) > 1 else {}
            optimizer.add_grad(self.model.get_grad_dict(), **share)
        optimizer.samples = size
        optimizer.step()

    def _gradient(self, epoch: int, k: int, rows: Array) -> None:
        self._begin_batch(k)
        self.model.position = (epoch, k)
        labels = self.backend.xp.take(self.targets, rows, axis=1)
        given = () if self.device_weights is None else (self.backend.xp.take(self.device_weights, rows, axis=0),)
        probabilities = self.model.forward_rows(self.samples, rows)
        loss = self.model.backward(labels, *given)
        self.losses[k] = self.model.loss(labels, probabilities, *given) if loss is None else loss

    def evaluate(self, samples: Array, targets: Array, weights: Array | None = None) -> tuple[float, float]:
        """Accuracy in [0, 1] and mean loss over a set as the engine takes it, with the network as it is now.

        `weights`: of these samples, (m,); None: all are 1.
        """
        self.settle()
        given = () if weights is None else (weights,)  # a model of one's own may know none
        return self.model.evaluate_rows(samples, targets, *given)

    def _sum_of_squares(self) -> Array:
        """The sum of the squares of all weights, without biases: 0-d, on the device."""
        tasks, weights = self.backend.tasks, self._flat_weights()
        if tasks == 1 or sum(x.shape[0] for x in weights) < tasks * SQUARED:
            return self._squares_of(weights)
        pieces = [x[a : a + SQUARED] for x in weights for a in range(0, x.shape[0], SQUARED)]
        first, *others = self.backend.run([partial(self._squares_of, share) for share in deal(pieces, tasks)])
        return sum(others, start=first)

    def _flat_weights(self) -> list[Array]:
        """All weights of the network as flat arrays, wherever they are while the engine runs."""
        parameters = self.model.save()
        if isinstance(parameters, Parameters):
            return [parameters.flat[: parameters.n_weights]]
        return [self.backend.xp.reshape(x, (-1,)) for name, x in parameters.items() if not is_bias(name)]

    def _squares_of(self, pieces: Sequence[Array]) -> Array:
        first, *others = (self.backend.xp.matmul(x, x) for x in pieces)
        return sum(others, start=first)

    def fetch_squares(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Returns the squares that `Settings.squares` asks for, (batches,), in one transfer."""
        return self.backend.to_host(self.backend.xp.stack(self._squares)).astype(np.float64)  # sync

    def fetch_losses(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The losses of this epoch's batches, (batches,): the one transfer of an epoch."""
        return self.backend.to_host(self.losses).copy()  # sync
