"""The panel engine on a CPU: one pass over the first layer's weights and moments makes a step.

It computes what the plain engine computes, in another order of sums (`panels.py`, `lanes.py`). Needs numba, the `fast`
extra; its compiled code is kept on disk, so only the first run on a machine waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.threads import run_workers
from catopt_xp.backend.xp import Array, Backend
from catopt_xp.engines.cpu.jit import Compiled
from catopt_xp.engines.cpu.lanes import (
    GRADIENT_ROWS,
    PRODUCT_ROWS,
    PRODUCT_UNITS,
    convert,
    flush_subnormals,
    gradient,
    prefetch,
    product,
    restore,
    take_number,
)
from catopt_xp.engines.cpu.rules import NUMBERS, update
from catopt_xp.engines.cpu.upper_layers import Rest, Rule
from catopt_xp.engines.cpu.vectors import VECTOR_BYTES
from catopt_xp.engines.panels import (
    PANEL,
    STRIP,
    STRIPS,
    Split,
    aligned_zeros,
    join_subtrees,
    padded,
    tree_sum,
)
from catopt_xp.engines.plain import PlainEngine, Settings, Weights
from catopt_xp.engines.ranks import PanelShares
from catopt_xp.nn.functional import pixel_scale
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer

Rows = NDArray[np.int64]
Floats = NDArray[Any]

SAMPLES = 64  # of a batch, at a time: their strip as floats stays in the first cache
STRIDE = STRIP + 16  # floats between two samples of a strip, and of a panel below: no power of two (`lanes.py`)
PANEL_STRIDE = PANEL + 16
LEVELS = 4  # sums of a task's tree that wait at a time: tasks have at most 8 panels
LEAST_WORK = 2_000_000  # multiplications that pay for another thread
AHEAD = 4 * STRIP  # columns between what is read and what is asked for


def _work(
    X: Any,
    now: Any,
    d: Any,
    d_units: int,
    numbers: Any,
    decay: Any,
    W: Any,
    moments: Any,
    units: int,
    following: Any,
    Z: Any,
    length: int,
    counter: Any,
    x: Any,
    g: Any,
    z: Any,
) -> None:
    """One worker's share of a pass over the panels: it takes task after task, until none is left.

    X (m, n_x); now (n,), following (k,): row numbers, either may be empty; d (n, d_units) flat, scaled; W and moments
    packed, flat; Z: for each task its sum of products, flat; length: panels in a task; x, g, z: room to work in.
    """
    before = flush_subnormals()
    n_x, strips = X.shape[1], -(-X.shape[1] // STRIP)
    panels = -(-strips // STRIPS)
    across = -(-units // PRODUCT_UNITS)
    size = -(-len(following) // PRODUCT_ROWS) * across * PRODUCT_ROWS * PRODUCT_UNITS
    fresh = LEVELS * size  # where in z the present panel's product is; below it, those that wait
    while True:
        task = take_number(counter)
        first_panel = task * length
        if first_panel >= panels:
            break
        count = length if first_panel + length <= panels else panels - first_panel
        for q in range(count):
            first = (first_panel + q) * STRIPS
            stop = first + STRIPS if first + STRIPS <= strips else strips

            # Gradient and update, strip by strip; of a large batch, the gradient's sum waits in g.
            for a in range(0, len(now), SAMPLES):
                n = SAMPLES if a + SAMPLES <= len(now) else len(now) - a
                for s in range(first, stop):
                    for i in range(n):
                        prefetch(X, now[a + i] * n_x + s * STRIP + AHEAD, STRIP)
                        convert(X, now[a + i] * n_x + s * STRIP, n_x - s * STRIP, x, i * STRIDE)
                    g0 = (s - first) * d_units * STRIP
                    for h in range(0, d_units, GRADIENT_ROWS):
                        gradient(d, a * d_units + h, d_units, x, 0, STRIDE, n, g, g0 + h * STRIP, a)
                    if a + SAMPLES >= len(now):
                        update(W, moments, s * units * STRIP, g, g0, units * STRIP, numbers, decay)

            # The next batch's product with the fresh weights, some samples at a time.
            for i in range(0, len(following), PRODUCT_ROWS):
                for r in range(PRODUCT_ROWS if i + PRODUCT_ROWS <= len(following) else len(following) - i):
                    if i + r + PRODUCT_ROWS < len(following):
                        prefetch(X, following[i + r + PRODUCT_ROWS] * n_x + first * STRIP, (stop - first) * STRIP)
                    for s in range(first, stop):
                        from_here = following[i + r] * n_x + s * STRIP
                        convert(X, from_here, n_x - s * STRIP, x, r * PANEL_STRIDE + (s - first) * STRIP)
                for t in range(across):
                    w0 = (first * units + t * PRODUCT_UNITS) * STRIP
                    z0 = fresh + (i // PRODUCT_ROWS * across + t) * PRODUCT_ROWS * PRODUCT_UNITS
                    product(x, 0, PANEL_STRIDE, W, w0, units * STRIP, stop - first, z, z0)

            # The tree within the task, as one counts in binary: two sums of a level make one of the next.
            level = 0
            while (q >> level) & 1:
                for j in range(size):
                    z[fresh + j] += z[level * size + j]
                level += 1
            for j in range(size):
                z[level * size + j] = z[fresh + j]
        begun = False
        for level in range(LEVELS):
            if (count >> level) & 1:
                for j in range(size):
                    Z[task * size + j] = z[level * size + j] + (Z[task * size + j] if begun else 0)
                begun = True
    restore(before)


WORK = Compiled(_work)


def _decay(optimizer: BaseOptimizer) -> tuple[float, ...]:
    """What `update` is to do before the rule, at the present step: nothing, or (l2, factor of the weights)."""
    if optimizer.l2 or optimizer.weight_decay:
        return optimizer.step_l2, 1.0 - optimizer.learning_rate * optimizer.weight_decay
    return ()


class PanelEngine(PlainEngine):
    """The steps of an epoch by passes over feature panels; arguments as for `PlainEngine`, within `panel_obstacle`.

    While it runs, W0 and its moments are kept packed by panel, and a small rest of the network packed too; `settle`
    writes them back. One of several ranks has its own columns of the set, and cares for these columns of W0 and its
    moments only; `model` and `optimizer` are whole again after `settle`, which every rank must call.
    """

    name = "panels"
    reach = 2  # the next batch's product is made in the same pass

    def __init__(
        self,
        model: DeepNetwork,
        optimizer: BaseOptimizer,
        samples: Array,
        targets: Array,
        backend: Backend,
        settings: Settings,
        *,
        weights: Weights | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(model, optimizer, samples, targets, backend, settings, weights=weights, ranks=ranks)
        self.network = model
        units = model.neuron_cnt[1]
        self.shares = PanelShares(model.neuron_cnt[0], self.ranks.rank, self.ranks.size)
        self._nodes = self.shares.nodes()
        self._asked, self._stop_agreed = False, False  # to stop: this rank; any of them, as all know by now
        self.split = Split(samples.shape[1], units)
        self.dtype = np.dtype(model.dtype)
        self.scale = self.dtype.type(pixel_scale(samples.dtype))
        self._numbers = NUMBERS[type(optimizer)]
        # Each array starts elsewhere within a page, lest their columns share one place of the cache; behind each is
        # room for the units that a last block reads and does not use.
        numbers, spare = self.split.strips * units * STRIP, PRODUCT_UNITS * STRIP
        count = 1 + len(optimizer.moment_names)
        self._state = [aligned_zeros(numbers + spare, self.dtype, skew=k * 21 * 64) for k in range(count)]
        self._packed = False
        self._following: Rows | None = None  # the rows whose product `_Z` is, with the weights as they are
        self._Z: Floats | None = None  # (units, rows), before scaling
        self._room: dict[int, tuple[Floats, Floats, Floats]] = {}
        self._counter = np.zeros(1, dtype=np.int64)
        d_units = padded(units, GRADIENT_ROWS)
        self._d = aligned_zeros(max(self.lengths) * d_units, self.dtype).reshape(-1, d_units)
        example = self._numbers(*[1.0] * len(self._numbers._fields))
        self._run_panels = WORK.for_types(samples, self._state[0], example, _decay(optimizer))
        knows = Rest.knows(model) and not settings.squares and weights is None
        self._rest = Rest(model, optimizer, example, targets, max(self.lengths)) if knows else None

    # --- steps ----------------------------------------------------------------------------------------------------

    def steps(self, epoch: int, order: Rows, first: int = 0, following: Rows | None = None) -> Iterator[int]:
        self._begin_epoch(order)
        for k in range(first, self.batches):
            if self.settings.schedule_by_step:
                self.optimizer.epoch = epoch + k / self.batches
            if k + 1 < self.batches:
                after = order[self.slices[k + 1]]
            else:
                after = order[:0] if following is None else following[self.slices[0]]
            with self.backend.single_threaded():
                self._step((epoch, k), order[self.slices[k]], after)
            yield k + 1

    def _step(self, position: tuple[int, int], rows: Rows, following: Rows) -> None:
        """One update, in the order of the design: dZ0 from the old weights, the rest of the net, then the panels."""
        optimizer = self.optimizer
        self._begin_batch(position[1])
        self.network.position = position
        Z = self._product(rows)
        scalars = optimizer.advance()
        d, rule = self._d[: len(rows)], (self._numbers(**scalars), _decay(optimizer))
        if self._rest is None:
            self.losses[position[1]] = self._by_formulas(Z, rows, scalars, d)
        else:
            self.losses[position[1]] = self._rest.step(Z, self.scale, self.targets, rows, rule, d)
        self._pass(self.samples, rows, d, rule, following)

    def _by_formulas(self, Z: Floats, rows: Rows, scalars: dict[str, float], d: Floats) -> Any:
        """Forward, loss, backward and update of the rest as the network and the optimizer write them; the loss."""
        self.network.forward_from(Z * self.scale)
        weights = None if self.device_weights is None else self.device_weights[rows]
        loss, dZ = self.network.backward_to(self.targets[:, rows], weights)  # (units, n)
        self.optimizer.update_after("W0", self.network.get_grad_dict(), scalars)
        np.multiply(dZ.T, self.scale, out=d[:, : self.split.units])
        return loss

    def _product(self, rows: Rows) -> Floats:
        """`W0 X` of the rows before scaling, (units, n): what the last pass left, or else a pass without an update."""
        if not self._packed:
            self._pack()
        if self._Z is None or self._following is None or not np.array_equal(self._following, rows):
            self._multiply(self.samples, rows)
        assert self._Z is not None
        return self._Z

    def _multiply(self, samples: Array, rows: Rows) -> None:
        """A pass that changes nothing, for the product of these rows."""
        no_rule = self._numbers(*[1.0] * len(self._numbers._fields)), ()
        self._pass(samples, rows[:0], self._d[:0], no_rule, rows)

    def evaluate(self, samples: Array, targets: Array, weights: Array | None = None) -> tuple[float, float]:
        """As `PlainEngine.evaluate`; products of panels, so that their bits are those of any number of threads."""
        if not self._packed:
            self._pack()
        if self._rest is not None:
            self._rest.unpack()  # the formulas read it; what is packed stays as it is
        kept, scale = (self._Z, self._following), self.dtype.type(pixel_scale(samples.dtype))

        def product(rows: slice) -> Floats:
            self._multiply(samples[rows, :], np.arange(rows.stop - rows.start))
            assert self._Z is not None
            Z: Floats = self._Z * scale
            return Z

        try:
            with self.backend.single_threaded():
                return self.network.evaluate_from(product, targets, weights)
        finally:
            self._Z, self._following = kept

    def _pass(self, samples: Array, rows: Rows, d: Floats, rule: Rule, following: Rows) -> None:
        """Gradient and update with d (n, padded units) of `rows`, and the product of the `following` ones."""
        units, n, k = self.split.units, len(rows), len(following)
        size = padded(k, PRODUCT_ROWS) * padded(units, PRODUCT_UNITS)
        length = self.split.task_length(size, self.shares.most_task)
        tasks = -(-self.split.panels // length)
        Z = np.empty((tasks, size), dtype=self.dtype)
        self._counter[0] = 0
        W, *moments = self._state
        batch = samples, rows, d.reshape(-1), d.shape[1]
        shared = (*batch, *rule, W, tuple(moments), units, following, Z.reshape(-1))

        def work(worker: int) -> None:
            self._run_panels(*shared, length, self._counter, *self._room_for(worker, size))

        self._Z, self._following = None, None
        run_workers(work, min(tasks, 1 + units * self.split.n_x * (n + k + 8) // LEAST_WORK))
        if k:
            across = padded(units, PRODUCT_UNITS) // PRODUCT_UNITS
            blocks = self._total(Z, length).reshape(-1, across, PRODUCT_ROWS, PRODUCT_UNITS)
            by_unit = blocks.transpose(1, 3, 0, 2).reshape(-1, padded(k, PRODUCT_ROWS))
            self._Z, self._following = by_unit[:units, :k], following

    def _total(self, Z: Floats, length: int) -> Floats:
        """The sum over all panels, (n,), of the tasks' sums `Z` (tasks, n), which are used up; `length`: of a task.

        Several ranks exchange the sums of their subtrees, and behind them whether a rank was asked to stop.
        """
        if self.ranks.size == 1:
            return tree_sum(Z)
        size, first = Z.shape[1], self.shares.first // length
        own = np.empty(len(self._nodes[self.ranks.rank]) * size + 1, dtype=Z.dtype)
        for k, (start, count) in enumerate(self._nodes[self.ranks.rank]):
            tasks = Z[start // length - first : -(-(start + count) // length) - first]
            own[k * size : (k + 1) * size] = tree_sum(tasks)
        own[-1] = self._asked
        counts = [len(nodes) * size + 1 for nodes in self._nodes]
        everyone = self.ranks.gather(own, counts)
        sums: list[Floats] = []
        for part, count in zip(np.split(everyone, np.cumsum(counts)[:-1]), counts, strict=True):
            sums += list(part[: count - 1].reshape(-1, size))
            self._stop_agreed = self._stop_agreed or bool(part[-1])
        return join_subtrees([node for nodes in self._nodes for node in nodes], sums)

    def stops(self, asked: bool) -> bool:
        if self.ranks.size == 1:
            return asked
        self._asked = self._asked or asked
        return self._stop_agreed

    def _room_for(self, worker: int, size: int) -> tuple[Floats, Floats, Floats]:
        """Arrays for a worker to work in: samples as floats, a panel's gradient, products that wait for others."""
        room = self._room.get(worker)
        if room is None or len(room[2]) < (LEVELS + 1) * size:
            x = aligned_zeros(max(SAMPLES * STRIDE, PRODUCT_ROWS * PANEL_STRIDE), self.dtype)
            g = aligned_zeros(STRIPS * self._d.shape[1] * STRIP, self.dtype)
            room = self._room[worker] = (x, g, aligned_zeros((LEVELS + 1) * size, self.dtype))
        return room

    # --- the packed state -------------------------------------------------------------------------------------------

    def _whole(self) -> list[Floats]:
        """W0 and each of its moments, as the model and the optimizer have them."""
        state = self.optimizer.save()
        return [self.network.save()["W0"], *(state[f"{name}/W0"] for name in self.optimizer.moment_names)]

    def _arrays(self) -> list[tuple[Floats, Floats]]:
        """This rank's columns of the same, and where they are packed."""
        whole = [W[:, self.shares.columns] for W in self._whole()]
        shape = (self.split.strips, self.split.units, STRIP)
        numbers = self.split.strips * self.split.units * STRIP
        return [(W, flat[:numbers].reshape(shape)) for W, flat in zip(whole, self._state, strict=True)]

    def _pack(self) -> None:
        for W, packed in self._arrays():
            self.split.pack(W, packed)
        if self._rest is not None:
            self._rest.pack()
        self._packed, self._Z = True, None

    def next_product(self) -> Floats:
        """`W0 X` of the batch that follows, (units, its samples)."""
        assert self._Z is not None
        scaled: Floats = self._Z * self.scale
        return scaled

    def _flat_weights(self) -> list[Array]:
        if not self._packed:
            return super()._flat_weights()
        if self._rest is not None:
            self._rest.unpack()
        parameters = self.network.save()
        behind = parameters["W0"].size
        return [self._state[0], parameters.flat[behind : parameters.n_weights]]  # what is packed is padded with zeros

    def versions(self) -> dict[str, str]:
        return {"numba": numba.__version__, "vector": f"{8 * VECTOR_BYTES} bits"}

    def settle(self) -> None:
        if self._packed:
            for W, packed in self._arrays():
                self.split.unpack(packed, W)
            if self._rest is not None:
                self._rest.unpack()
            for W in self._whole():
                self.ranks.gather_columns(W, self.shares.all_columns())
            self._packed, self._Z = False, None
