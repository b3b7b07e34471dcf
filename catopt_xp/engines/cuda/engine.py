"""The panel engine on an NVIDIA GPU: two launches a step, the steps of an epoch in CUDA graphs.

The kernels are in `step.cu`; `launches.py` has the sizes and grids, `source.py` the text that is compiled. In a process
alone, weights and moments stay where the network and the optimizer have them; `sharing.py` says what several ranks do
instead. The kernels read the numbers and rows of each step from tables on the device, so one graph serves every chunk
of every epoch. Nothing waits for the device but the host, which waits for the chunk before the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.xp import Array, Backend
from catopt_xp.engines.cuda.device import CupyDevice, Device
from catopt_xp.engines.cuda.launches import CHUNK_STEPS, EVALUATED, MIDDLE_THREADS, chunk_end, geometry_of, places
from catopt_xp.engines.cuda.sharing import Room, shared
from catopt_xp.engines.cuda.source import address, is_aligned, scalars, source, table_width
from catopt_xp.engines.plain import PlainEngine, Settings, Weights
from catopt_xp.nn.functional import pixel_scale
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer

Rows = NDArray[np.int64]


class CudaEngine(PlainEngine):
    """The steps of an epoch in two launches each; arguments as for `PlainEngine`, within `gpu_obstacle`.

    `ranks`: the processes that train together; None: this one alone. One of several is given the columns of its share:
    `samples` (m, columns). `model` and `optimizer` are whole on every rank, and up to date once every rank has called
    `settle`. `device`: where the kernels run; None: the backend's GPU.
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
        *,
        weights: Weights | None = None,
        ranks: Ranks | None = None,
        device: Device | None = None,
    ) -> None:
        assert weights is None, "the kernels know no weights of samples"
        super().__init__(model, optimizer, samples, targets, backend, settings, weights=weights, ranks=ranks)
        self.network = model
        self.geometry = geometry_of(model, samples, max(self.lengths), self.tensor_cores)
        self.aligned, rule = is_aligned(samples), type(optimizer)
        self._scalars = scalars(rule)
        self.device: Device = CupyDevice(backend) if device is None else device
        self.device.load(source(self.geometry, model.activation_func, rule, self.aligned))
        self._buffers = {name: backend.zeros(shape, model.dtype) for name, shape in self.geometry.buffer_shapes.items()}
        self._state, self.sums = shared(model.neuron_cnt[0], self.ranks, optimizer, self.geometry, self.device, backend)
        self._room = self.sums.room(self._buffers["part"])
        self._evaluated: Room | None = None  # the room of an evaluation, once there is one
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
            self._multiply(self.samples, self.slices[first].start, self.lengths[first], self._room)
            self.sums.after_product(self._room, self.lengths[first])
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
        self._state.read()
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

    def _multiply(self, samples: Array, start: int, count: int, room: Room) -> None:
        """`W0 X` of the samples that `_rows` names from `start` on: a step without an update."""
        line = np.array([[0, 0, start, count]], dtype=np.int32)
        self.device.upload(self._places[self.batches :], line)
        self.device.upload(self._base, np.array([self.batches], dtype=np.int32))
        self._stream(0, samples, room)

    def _upload_numbers(self, epoch: int, start: int, end: int) -> None:
        """The rule's numbers of each step, in the order of `scalars`, then l2 and the decay's factor."""
        optimizer, lines = self.optimizer, []
        for k in range(start, end):
            if self.settings.schedule_by_step:
                optimizer.epoch = epoch + k / self.batches
            optimizer.samples = self.lengths[k]
            numbers = optimizer.advance()
            shrink = 1.0 - optimizer.learning_rate * optimizer.weight_decay
            lines.append([*(numbers[name] for name in self._scalars), optimizer.step_l2, shrink])
        self.device.upload(self._table[start:end], np.array(lines, dtype=self.geometry.dtype))

    def _queue(self, first: int, count: int) -> None:
        """So many steps from `first` on, which `_base` names; a whole chunk is one graph, where there may be one."""

        def launches() -> None:
            for ahead in range(count):
                self._middle(ahead)
                self._stream(ahead, self.samples, self._room)
                self.sums.after_product(self._room, int(self._lengths_behind[first + ahead]))
            self.device.launch("advance", (1,), 1, [self._base, np.int32(count)], 0)

        if count == CHUNK_STEPS and self._warm and self.sums.in_graphs:
            if self._graph is None:
                self._graph = self.device.capture(launches)
            self._graph()
        else:
            launches()
            self._warm = True

    def _middle(self, ahead: int) -> None:
        geometry, buffers = self.geometry, self._buffers
        rest = self._state.flat()[0][geometry.tiles.units * geometry.tiles.n_x :]
        part, tiles = self.sums.for_middle(self._room)
        place = [self._rows, self._places, self._base, np.int32(ahead)]
        sizes = [np.int32(tiles), np.int32(geometry.batch_size)]
        data = [rest, self.targets, np.int64(self.targets.shape[1])]
        out = [buffers["d"], buffers["gradients"], buffers["block_losses"]]
        arguments = [part, *sizes, *place, *data, *out]
        self.device.launch("middle", (geometry.middle_blocks,), MIDDLE_THREADS, arguments, geometry.middle_shared)

    def _stream(self, ahead: int, samples: Array, room: Room) -> None:
        geometry, buffers = self.geometry, self._buffers
        parameters, *moments = self._state.flat()
        moments += [parameters] * (2 - len(moments))  # a rule with fewer does not look at the others
        data = [samples, np.int64(geometry.tiles.n_x), np.int32(room.batch)]
        place = [self._rows, self._places, self._table, self._base, np.int32(ahead)]
        rest = [np.int32(geometry.middle_blocks), buffers["gradients"], buffers["block_losses"], self.losses]
        arguments = [*data, *place, buffers["d"], parameters, *moments, room.part, *rest]
        self.device.launch("stream", geometry.stream.grid, geometry.stream.threads, arguments, geometry.stream.shared)

    # --- what others see ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Waits for the steps that are queued; from here on, others may change the weights."""
        if self._attached:
            self.device.synchronize()
            self._attached, self._following = False, None
        self._state.write()

    def fetch_losses(self) -> NDArray[Any]:
        self.device.synchronize()
        return super().fetch_losses()

    def evaluate(self, samples: Array, targets: Array, weights: Array | None = None) -> tuple[float, float]:
        """As `PlainEngine.evaluate`; by products of tiles, so that their bits are those of any number of GPUs."""
        if str(samples.dtype) != self.geometry.sample_dtype:  # the kernels read sets of one type
            return super().evaluate(samples, targets, weights)
        self._attach()
        if self._evaluated is None:
            shape = self.geometry.tiles.count, self.geometry.evaluated, self.geometry.tiles.units
            self._evaluated = self.sums.room(self.backend.empty(shape, self.geometry.dtype))
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
                self.sums.add_up(room, stop - start)
                self.device.synchronize()
                Z[:, start:stop] = room.total[0, : stop - start].T
            Z *= np.dtype(self.geometry.dtype).type(pixel_scale(samples.dtype))
            return Z

        self.device.synchronize()
        self._state.write_upper()
        return self.network.evaluate_from(product, targets, weights)

    def next_product(self) -> NDArray[Any]:
        """`W0 X` of the batch that follows, (units, its samples), on the host."""
        assert self._following is not None
        self.sums.add_up(self._room, len(self._following))
        self.device.synchronize()
        total: NDArray[Any] = self.backend.to_host(self._room.total)[0, : len(self._following)].T
        scaled: NDArray[Any] = total * np.dtype(self.geometry.dtype).type(pixel_scale(self.samples.dtype))
        return scaled

    def versions(self) -> dict[str, str]:
        geometry = self.geometry
        return {"kernels": f"{geometry.products}, {geometry.tiles.length} features, {geometry.samples} samples"}


class CoresEngine(CudaEngine):
    """The same without tensor cores: what runs where theirs fail their check, and what they are held to."""

    tensor_cores = False
