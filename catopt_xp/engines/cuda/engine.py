"""The panel engine on an NVIDIA GPU: two launches a step, the steps of an epoch in CUDA graphs.

The kernels are in `step.cu`, what is launched with what in `launches.py`. Weights and moments stay where the network
and the optimizer have them; per-step numbers and row numbers are read from tables on the device, so one graph serves
every chunk of every epoch, and nothing waits for the device but the host, for the chunk before the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.ranks import Exchange
from catopt_xp.backend.xp import Array, Backend
from catopt_xp.engines.cuda.device import CupyDevice, Device
from catopt_xp.engines.cuda.launches import (
    CHUNK_STEPS,
    EVALUATED,
    MIDDLE_THREADS,
    SUMMING_THREADS,
    chunk_end,
    geometry_of,
    places,
)
from catopt_xp.engines.cuda.source import address, is_aligned, scalars, source, table_width
from catopt_xp.engines.cuda.transport import Transport, choose_transport
from catopt_xp.engines.panels import PANEL, merges
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.nn.functional import pixel_scale
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer

Rows = NDArray[np.int64]


class Products:
    """Where a launch of `stream` leaves the products of up to `batch` samples: `part` (tiles, batch, units)."""

    def __init__(self, backend: Backend, part: Array) -> None:
        self.part, self.batch = part, int(part.shape[1])
        self.total = backend.zeros((1, *part.shape[1:]), part.dtype)  # where they are added up besides in `middle`


class CudaEngine(PlainEngine):
    """The steps of an epoch in two launches each; arguments as for `PlainEngine`, within `gpu_obstacle`.

    `device`: where the kernels run; None: the backend's GPU.
    """

    name = "panels"
    reach = CHUNK_STEPS + 1
    tensor_cores = True  # where they fit

    def __init__(
        self,
        model: DeepNetwork,
        optimizer: BaseOptimizer,
        samples: Array,
        targets: Array,
        backend: Backend,
        settings: Settings,
        device: Device | None = None,
    ) -> None:
        super().__init__(model, optimizer, samples, targets, backend, settings)
        self.network = model
        self.geometry = geometry_of(model, samples, max(self.lengths), self.tensor_cores)
        self.aligned, rule = is_aligned(samples), type(optimizer)
        self._scalars = scalars(rule)
        self.device: Device = CupyDevice(backend) if device is None else device
        self.device.load(source(self.geometry, model.activation_func, rule, self.aligned))
        self._buffers = {name: backend.zeros(shape, model.dtype) for name, shape in self.geometry.buffer_shapes.items()}
        self._products = self._room(self._buffers["part"])
        self._evaluated: Products | None = None  # the room of an evaluation, once there is one
        self._nodes = backend.asarray(np.array(self._own_nodes(), dtype=np.int32))  # (nodes, 2)
        self._rows = backend.zeros((max(self.m + self.lengths[0], EVALUATED),), "int32")
        self._places = backend.zeros((self.batches + 1, 4), "int32")
        self._table = backend.zeros((self.batches + 1, table_width(rule)), model.dtype)
        self._base = backend.zeros((1,), "int32")
        self._graph: Callable[[], None] | None = None
        self._warm = False  # whether every kernel has run: a capture must not load one
        self._attached = False
        self._following: Rows | None = None  # the rows whose products `part` holds, with the weights as they are

    # --- steps --------------------------------------------------------------------------------------------------------

    def steps(self, epoch: int, order: Rows, first: int = 0, following: Rows | None = None) -> Iterator[int]:
        """As `PlainEngine.steps`, a chunk at a time; it ends where `Settings.pause_every` says."""
        self._attach()
        behind = order[:0] if following is None else following[self.slices[0]]
        self._place(order, behind)
        if self._following is None or not np.array_equal(self._following, order[self.slices[first]]):
            self._first_product(first)
        waits: list[Callable[[], None]] = []
        self.device.upload(self._base, np.array([first], dtype=np.int32))
        k = first
        while k < self.batches:
            end = chunk_end(k, self.batches, epoch * self.batches, self.settings.pause_every)
            self._attach()  # whoever looked at the weights after the last chunk has left them as they were
            self._following = None  # while the chunk is queued, whatever happens
            self._upload_numbers(epoch, k, end)
            self._queue(k, end - k)
            self._following = order[self.slices[end]] if end < self.batches else behind
            k = end
            waits.append(self.device.mark())
            if len(waits) > 1:
                waits.pop(0)()  # sync: the host stays one chunk ahead, no more
            yield k

    def _attach(self) -> None:
        if not self._attached:
            self.device.attach()
            self._attached = True

    def _place(self, order: Rows, behind: Rows) -> None:
        """The epoch's rows and where each step finds its own."""
        used = self.slices[-1].stop
        rows = np.concatenate([order[:used], behind]).astype(np.int32)
        self.device.upload(self._rows[: len(rows)], rows)
        table = places(len(order), self.settings.batch_size, self.settings.drop_last, len(behind) > 0)
        self.device.upload(self._places, table)
        self._lengths_behind = table[:, 3]

    def _first_product(self, first: int) -> None:
        """The product of batch `first`."""
        part = self.slices[first]
        self._multiply(self.samples, part.start, part.stop - part.start, self._products)

    def _multiply(self, samples: Array, start: int, count: int, products: Products) -> None:
        """`W0 X` of the samples that `_rows` names from `start` on: a step without an update."""
        line = np.array([[0, 0, start, count]], dtype=np.int32)
        self.device.upload(self._places[self.batches :], line)
        self.device.upload(self._base, np.array([self.batches], dtype=np.int32))
        self._stream(0, samples, products)

    def _upload_numbers(self, epoch: int, start: int, end: int) -> None:
        """The rule's numbers of each step, in the order of `scalars`, then l2 and the decay's factor."""
        optimizer, lines = self.optimizer, []
        for k in range(start, end):
            if self.settings.schedule_by_step:
                optimizer.epoch = epoch + k / self.batches
            scalars = optimizer.advance()
            shrink = 1.0 - optimizer.learning_rate * optimizer.weight_decay
            lines.append([*(scalars[name] for name in self._scalars), optimizer.l2, shrink])
        self.device.upload(self._table[start:end], np.array(lines, dtype=self.geometry.dtype))

    def _queue(self, first: int, count: int) -> None:
        """So many steps from `first` on, which `_base` names; a whole chunk is one graph."""

        def launches() -> None:
            for ahead in range(count):
                self._middle(ahead)
                self._stream(ahead, self.samples, self._products)
            self.device.launch("advance", (1,), 1, [self._base, np.int32(count)], 0)

        if count == CHUNK_STEPS and self._warm:
            if self._graph is None:
                self._graph = self.device.capture(launches)
            self._graph()
        else:
            launches()
            self._warm = True

    def _flat_state(self) -> list[Array]:
        """Parameters and moments as the kernels work on them, each flat."""
        return self.optimizer.flat_state()

    def _room(self, part: Array) -> Products:
        return Products(self.backend, part)

    def _own_nodes(self) -> list[tuple[int, int]]:
        """The subtrees of tiles whose sums `_add_up` makes, as (first, length): all of them are one."""
        return [(0, self.geometry.tiles.count)]

    def _to_add(self) -> tuple[Array, int]:
        """What `middle` adds up: products of how many tiles."""
        return self._products.part, self.geometry.tiles.count

    def _middle(self, ahead: int) -> None:
        geometry, buffers = self.geometry, self._buffers
        rest = self._flat_state()[0][geometry.tiles.units * geometry.tiles.n_x :]
        part, tiles = self._to_add()
        place = [self._rows, self._places, self._base, np.int32(ahead)]
        sizes = [np.int32(tiles), np.int32(geometry.batch_size)]
        data = [rest, self.targets, np.int64(self.targets.shape[1])]
        out = [buffers["d"], buffers["gradients"], buffers["block_losses"]]
        arguments = [part, *sizes, *place, *data, *out]
        self.device.launch("middle", (geometry.middle_blocks,), MIDDLE_THREADS, arguments, geometry.middle_shared)

    def _stream(self, ahead: int, samples: Array, products: Products) -> None:
        geometry, buffers = self.geometry, self._buffers
        parameters, *moments = self._flat_state()
        moments += [parameters] * (2 - len(moments))  # a rule with fewer does not look at the others
        data = [samples, np.int64(geometry.tiles.n_x), np.int32(products.batch)]
        place = [self._rows, self._places, self._table, self._base, np.int32(ahead)]
        rest = [np.int32(geometry.middle_blocks), buffers["gradients"], buffers["block_losses"], self.losses]
        arguments = [*data, *place, buffers["d"], parameters, *moments, products.part, *rest]
        self.device.launch("stream", geometry.stream.grid, geometry.stream.threads, arguments, geometry.stream.shared)

    def _subtotals(self, products: Products, count: int, own: Array) -> None:
        """Sums of `part`'s first samples over each of the nodes, into `own` (nodes, batch, units)."""
        arguments = [products.part, np.int32(products.batch), self._nodes, own]
        grid = count, len(self._nodes)
        self.device.launch("subtotals", grid, SUMMING_THREADS, arguments, self.geometry.subtotals_shared)

    def _add_up(self, products: Products, count: int) -> None:
        """Into `total` the sum of all tiles' products."""
        self._subtotals(products, count, products.total)

    # --- what others see ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Waits for the steps that are queued; from here on, others may change the weights."""
        if self._attached:
            self.device.synchronize()
            self._attached, self._following = False, None

    def fetch_losses(self) -> NDArray[Any]:
        self.device.synchronize()
        return super().fetch_losses()

    def evaluate(self, samples: Array, targets: Array) -> tuple[float, float]:
        """As `PlainEngine.evaluate`; by products of tiles, so that their bits are those of any number of GPUs."""
        if str(samples.dtype) != self.geometry.sample_dtype:  # the kernels read sets of one type
            return super().evaluate(samples, targets)
        self._attach()
        if self._evaluated is None:
            shape = self.geometry.tiles.count, self.geometry.evaluated, self.geometry.tiles.units
            self._evaluated = self._room(self.backend.empty(shape, self.geometry.dtype))
        room, self._following = self._evaluated, None

        def product(rows: slice) -> Array:
            chunk, count = samples[rows, :], rows.stop - rows.start
            if self.aligned and address(chunk) % 8:
                chunk = chunk.copy()
            Z = self.backend.empty((self.geometry.tiles.units, count), self.geometry.dtype)
            for start in range(0, count, room.batch):
                stop = min(count, start + room.batch)
                self.device.attach()  # what was made of the last products has been made
                self.device.upload(self._rows[: stop - start], np.arange(start, stop, dtype=np.int32))
                self._multiply(chunk, 0, stop - start, room)
                self._add_up(room, stop - start)
                self.device.synchronize()
                Z[:, start:stop] = room.total[0, : stop - start].T
            Z *= np.dtype(self.geometry.dtype).type(pixel_scale(samples.dtype))
            return Z

        self._write_rest()
        return self.network.evaluate_from(product, targets)

    def _write_rest(self) -> None:
        """Brings what lies behind W0 up to date in the network."""
        self.device.synchronize()

    def next_product(self) -> NDArray[Any]:
        """`W0 X` of the batch that follows, (units, its samples), on the host."""
        assert self._following is not None
        self._add_up(self._products, len(self._following))
        self.device.synchronize()
        total: NDArray[Any] = self.backend.to_host(self._products.total)[0, : len(self._following)].T
        scaled: NDArray[Any] = total * np.dtype(self.geometry.dtype).type(pixel_scale(self.samples.dtype))
        return scaled

    def versions(self) -> dict[str, str]:
        geometry = self.geometry
        return {"kernels": f"{geometry.products}, {geometry.tiles.length} features, {geometry.samples} samples"}


class CoresEngine(CudaEngine):
    """The same without tensor cores: what runs where theirs fail their check, and what they are held to."""

    tensor_cores = False


class _Shared(Products):
    """`Products` of several ranks: `own` (nodes, batch, units), and `everyone`'s (ranks nodes, batch, units)."""

    def __init__(self, backend: Backend, part: Array, nodes: int, ranks: int) -> None:
        super().__init__(backend, part)
        self.own = backend.zeros((nodes, *part.shape[1:]), part.dtype)
        self.everyone = backend.zeros((ranks * nodes, *part.shape[1:]), part.dtype)


class CudaRankEngine(CudaEngine):
    """`CudaEngine` for one of several ranks; arguments as there, but for `samples`: (m, columns of this rank).

    `model` and `optimizer` are whole; between two calls of `settle`, which every rank must make, this rank's columns of
    W0 and its moments alone are cared for, in arrays of its own.
    """

    def __init__(
        self,
        ranks: Exchange,
        model: DeepNetwork,
        optimizer: BaseOptimizer,
        samples: Array,
        targets: Array,
        backend: Backend,
        settings: Settings,
        device: Device | None = None,
        transport: Callable[[Exchange, Backend, Device], Transport] = choose_transport,
    ) -> None:
        self.ranks, self._n_x = ranks, model.neuron_cnt[0]
        self._all_nodes = ranks.nodes(self._n_x)
        self._most_nodes = max(map(len, self._all_nodes))
        super().__init__(model, optimizer, samples, targets, backend, settings, device)
        whole = optimizer.flat_state()
        behind = whole[0].shape[0] - self.geometry.tiles.units * self._n_x
        count = self.geometry.tiles.units * self.geometry.tiles.n_x + behind
        self._state = [backend.zeros((count,), model.dtype) for _ in whole]
        self._packed = False
        flat = [node for nodes in self._all_nodes for node in nodes]
        places = [rank * self._most_nodes + k for rank, nodes in enumerate(self._all_nodes) for k in range(len(nodes))]
        self._joins = backend.asarray(np.array([*zip(places, merges(flat), strict=True)], dtype=np.int32))
        self.transport = transport(ranks, backend, self.device)

    # --- steps --------------------------------------------------------------------------------------------------------

    def stops(self, asked: bool) -> bool:
        return self.ranks.any(asked)

    def _room(self, part: Array) -> Products:
        return _Shared(self.backend, part, self._most_nodes, self.ranks.size)

    def _own_nodes(self) -> list[tuple[int, int]]:
        first, _ = self.ranks.panels(self._n_x)
        each, tiles = PANEL // self.geometry.tiles.length, self.geometry.tiles.count
        starts = [((start - first) * each, count * each) for start, count in self._all_nodes[self.ranks.rank]]
        return [(start, min(count, tiles - start)) for start, count in starts]

    def _flat_state(self) -> list[Array]:
        return self._state

    def _to_add(self) -> tuple[Array, int]:
        return self._products.total, 1

    def _attach(self) -> None:
        if not self._packed:
            for whole, own in self._pairs():
                own[...] = whole
            self._packed = True
        super()._attach()

    def _first_product(self, first: int) -> None:
        super()._first_product(first)
        self._add_up(self._products, self.lengths[first])

    def _queue(self, first: int, count: int) -> None:
        """Without a graph: between two launches others have a say."""
        for ahead in range(count):
            self._middle(ahead)
            self._stream(ahead, self.samples, self._products)
            if self._lengths_behind[first + ahead]:
                self._add_up(self._products, int(self._lengths_behind[first + ahead]))
        self.device.launch("advance", (1,), 1, [self._base, np.int32(count)], 0)

    def _add_up(self, products: Products, count: int) -> None:
        assert isinstance(products, _Shared)
        self._subtotals(products, count, products.own)
        self.transport.gather(products.own, products.everyone)
        size = products.batch * self.geometry.tiles.units
        arguments = [products.everyone, np.int32(size), self._joins, np.int32(len(self._joins)), products.total]
        self.device.launch("join", (-(-size // SUMMING_THREADS),), SUMMING_THREADS, arguments, 0)

    # --- the local state ----------------------------------------------------------------------------------------------

    def _pairs(self, rest_alone: bool = False) -> list[tuple[Array, Array]]:
        """What the model and the optimizer have, and the same here: this rank's columns of W0, and what lies behind."""
        share, units, found = self.ranks.share(self._n_x), self.geometry.tiles.units, []
        for whole, own in zip(self.optimizer.flat_state(), self._state, strict=True):
            at, here = units * self._n_x, units * self.geometry.tiles.n_x
            columns = whole[:at].reshape(units, -1)[:, share], own[:here].reshape(units, -1)
            found += [(whole[at:], own[here:])] if rest_alone else [columns, (whole[at:], own[here:])]
        return found

    def _write_rest(self) -> None:
        super()._write_rest()
        for whole, own in self._pairs(rest_alone=True):
            whole[...] = own

    def settle(self) -> None:
        super().settle()
        if self._packed:
            for whole, own in self._pairs():
                whole[...] = own
            for flat in self.optimizer.flat_state():
                W = flat[: self.geometry.tiles.units * self._n_x].reshape(self.geometry.tiles.units, -1)
                host = np.array(self.backend.to_host(W))
                self.ranks.gather_columns(host)
                W[...] = self.backend.asarray(host)
            self._packed = False


class CoresRankEngine(CudaRankEngine):
    """The same without tensor cores."""

    tensor_cores = False
