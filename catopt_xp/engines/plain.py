"""The plain engine: the formulas, batch by batch. It is the definition that any other engine is held to.

Floor F3. One step is `forward, backward, zero_grad, add_grad, step`, on whatever device the set lies. Nothing in an
epoch waits for the device: losses stay there and are fetched once, when the epoch has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend import Array, Backend
from catopt_xp.data.order import batches
from catopt_xp.network import BaseRegressionModel
from catopt_xp.optim import BaseOptimizer
from catopt_xp.parameters import common_dtype

Rows = NDArray[np.int64]

WIDE = 128  # units on either side of a weight matrix from which several threads pay


@dataclass
class Settings:
    """What shapes an epoch: batches, their order in accumulation, and whether the schedule moves by step.

    `pause_every`: updates, counted from the first epoch, after which the caller wants to look at the model; an engine
    that makes several updates at a time stops there.
    """

    batch_size: int
    drop_last: bool = False
    accumulate: int = 1
    schedule_by_step: bool = False
    pause_every: int | None = None


class PlainEngine:
    """Runs mini-batch steps of `model` and `optimizer` over a resident set.

    `samples`: (m, n_x) on `backend`, uint8 or float; `targets`: (·, m) on `backend`. The last batch of an epoch may be
    short: its loss and gradient are means over its own samples.
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
    ) -> None:
        self.model, self.optimizer, self.backend, self.settings = model, optimizer, backend, settings
        self.samples, self.targets = samples, targets
        self.slices = batches(samples.shape[0], settings.batch_size, settings.drop_last)
        self.lengths = [part.stop - part.start for part in self.slices]
        # The mini-batch losses of this epoch; they stay on the device until `fetch_losses`.
        self.loss_dtype = common_dtype(model.save())
        self.losses = backend.zeros((len(self.lengths),), self.loss_dtype)
        # The layers after the first use one thread, unless their products are large enough to gain by more.
        later = [p.shape for name, p in model.save().items() if name.startswith("W") and name != "W0"]
        self._narrow = all(min(shape) <= WIDE for shape in later)
        kind = type(optimizer)
        self._direct = kind.step is BaseOptimizer.step and kind.add_grad is BaseOptimizer.add_grad

    @property
    def batches(self) -> int:
        """Mini-batches in an epoch."""
        return len(self.lengths)

    def steps(self, epoch: int, order: Rows, first: int = 0, following: Rows | None = None) -> Iterator[int]:
        """Makes the updates of an epoch, from batch `first` on; after each yields how many batches are done.

        `order`: (m,) row numbers, on the host; `following`: those of the next epoch, if there is one. An engine that
        works ahead makes use of them; this one does not.
        """
        rows = self.backend.asarray(order)
        for start in range(first, self.batches, self.settings.accumulate):
            group = range(start, min(self.batches, start + self.settings.accumulate))
            if self.settings.schedule_by_step:
                self.optimizer.epoch = epoch + start / self.batches
            with self.backend.single_threaded() if self._narrow else nullcontext():
                self._update(epoch, [(k, rows[self.slices[k]]) for k in group])
            yield group.stop

    def versions(self) -> dict[str, str]:
        """What computes besides the backend, by name: another version of it may give other bits."""
        return {}

    def settle(self) -> None:
        """Brings model and optimizer up to date, where an engine keeps their values elsewhere while it runs."""

    def _update(self, epoch: int, group: list[tuple[int, Array]]) -> None:
        """One update from one batch, or from several whose gradients are averaged over all their samples."""
        optimizer = self.optimizer
        if self._direct and len(group) == 1:
            self._gradient(epoch, *group[0])
            optimizer.update(self.model.get_grad_dict())
            return
        samples_in_group = sum(self.lengths[k] for k, _ in group)
        optimizer.zero_grad()
        for k, rows in group:
            self._gradient(epoch, k, rows)
            share = {"weight": self.lengths[k] / samples_in_group} if len(group) > 1 else {}
            optimizer.add_grad(self.model.get_grad_dict(), **share)
        optimizer.step()

    def _gradient(self, epoch: int, k: int, rows: Array) -> None:
        self.model.position = (epoch, k)
        labels = self.backend.xp.take(self.targets, rows, axis=1)
        probabilities = self.model.forward_rows(self.samples, rows)
        loss = self.model.backward(labels)
        self.losses[k] = self.model.loss(labels, probabilities) if loss is None else loss

    def fetch_losses(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The losses of this epoch's batches, (batches,): the one transfer of an epoch."""
        return self.backend.to_host(self.losses).copy()  # sync
