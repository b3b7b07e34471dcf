"""The panel engine on an NVIDIA GPU: two launches a step, the steps of an epoch in CUDA graphs. Floor F3.

The kernels are in `step.cu`, what is launched with what in `cuda_plan.py`. Weights and moments stay where the network
and the optimizer have them; per-step numbers and row numbers are read from tables on the device, so one graph serves
every chunk of every epoch, and nothing waits for the device but the host, for the chunk before the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.xp import Array, Backend
from catopt_xp.engines.cuda_plan import (
    CHUNK_STEPS,
    EVALUATED,
    MIDDLE_THREADS,
    SUMMING_THREADS,
    address,
    chunk_end,
    places,
    plan_of,
)
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.nn.functional import pixel_scale
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer

Rows = NDArray[np.int64]
KERNELS = ("stream", "middle", "advance", "subtotals", "join")


class Device(Protocol):
    """What the engine needs of a GPU; the tests have one that runs the kernels on the CPU."""

    def load(self, source: str) -> None:
        """Compiles the kernels of a source."""

    def launch(self, kernel: str, grid: Sequence[int], threads: int, arguments: Sequence[Any], shared: int) -> None:
        """Queues a kernel: arguments are arrays of the device and NumPy numbers; `shared`: bytes for each block."""

    def upload(self, array: Array, values: NDArray[Any]) -> None:
        """Queues a copy from the host; the values may change once this returns."""

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        """Records launches without running them; what it returns queues them all at once."""

    def mark(self) -> Callable[[], None]:
        """A place in the queue; what it returns waits until the device has come there."""

    def attach(self) -> None:
        """What is queued from now on comes after all that was queued elsewhere."""

    def synchronize(self) -> None:
        """Waits until all that was queued is done."""


class CupyDevice:
    """A `Device` by CuPy, with a stream of its own: a capture needs one."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.cupy = backend, backend.xp
        with backend.activate():
            self.stream = self.cupy.cuda.Stream(non_blocking=True)
        self._kernels: dict[str, Any] = {}
        # What was uploaded since the host last waited: CUDA may read a copy's source after the call has returned.
        self._uploaded: list[NDArray[Any]] = []

    def load(self, source: str) -> None:
        with self.backend.activate():
            module = self.cupy.RawModule(code=source, options=("--std=c++17",))
            self._kernels = {name: module.get_function(name) for name in KERNELS}

    def launch(self, kernel: str, grid: Sequence[int], threads: int, arguments: Sequence[Any], shared: int) -> None:
        function = self._kernels[kernel]
        if shared > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = shared
        with self.backend.activate(), self.stream:
            function(tuple(grid), (threads,), tuple(arguments), shared_mem=shared)

    def upload(self, array: Array, values: NDArray[Any]) -> None:
        held = np.array(values, order="C")
        self._uploaded.append(held)
        with self.backend.activate():
            array.set(held, stream=self.stream)

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        with self.backend.lock, self.backend.activate(), self.stream:
            self.stream.begin_capture()
            try:
                launches()
            finally:
                graph = self.stream.end_capture()

        def replay() -> None:
            with self.backend.activate():
                graph.launch(stream=self.stream)

        return replay

    def mark(self) -> Callable[[], None]:
        with self.backend.activate():
            event = self.cupy.cuda.Event(disable_timing=True)
            event.record(self.stream)
        wait: Callable[[], None] = event.synchronize
        return wait

    def attach(self) -> None:
        self.backend.synchronize()  # sync

    def synchronize(self) -> None:
        with self.backend.activate():
            self.stream.synchronize()  # sync
        self._uploaded.clear()


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
        self.plan = plan_of(model, optimizer, samples, max(self.lengths), self.tensor_cores)
        self.device: Device = CupyDevice(backend) if device is None else device
        self.device.load(self.plan.source())
        self._buffers = {name: backend.zeros(shape, model.dtype) for name, shape in self.plan.buffer_shapes.items()}
        self._products = self._room(self._buffers["part"])
        self._evaluated: Products | None = None  # the room of an evaluation, once there is one
        self._nodes = backend.asarray(np.array(self._own_nodes(), dtype=np.int32))  # (nodes, 2)
        self._rows = backend.zeros((max(self.m + self.lengths[0], EVALUATED),), "int32")
        self._places = backend.zeros((self.batches + 1, 4), "int32")
        self._table = backend.zeros((self.batches + 1, self.plan.numbers), model.dtype)
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
        """The rule's numbers of each step, in the order of `CudaPlan.scalars`, then l2 and the decay's factor."""
        optimizer, lines = self.optimizer, []
        for k in range(start, end):
            if self.settings.schedule_by_step:
                optimizer.epoch = epoch + k / self.batches
            scalars = optimizer.advance()
            shrink = 1.0 - optimizer.learning_rate * optimizer.weight_decay
            lines.append([*(scalars[name] for name in self.plan.scalars), optimizer.l2, shrink])
        self.device.upload(self._table[start:end], np.array(lines, dtype=self.plan.dtype))

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
        return [(0, self.plan.tiles)]

    def _to_add(self) -> tuple[Array, int]:
        """What `middle` adds up: products of how many tiles."""
        return self._products.part, self.plan.tiles

    def _middle(self, ahead: int) -> None:
        plan, buffers = self.plan, self._buffers
        rest = self._flat_state()[0][plan.units * plan.neuron_cnt[0] :]
        part, tiles = self._to_add()
        place = [self._rows, self._places, self._base, np.int32(ahead)]
        sizes = [np.int32(tiles), np.int32(plan.batch_size)]
        data = [rest, self.targets, np.int64(self.targets.shape[1])]
        out = [buffers["d"], buffers["gradients"], buffers["block_losses"]]
        arguments = [part, *sizes, *place, *data, *out]
        self.device.launch("middle", (plan.middle_blocks,), MIDDLE_THREADS, arguments, plan.middle_shared)

    def _stream(self, ahead: int, samples: Array, products: Products) -> None:
        plan, buffers = self.plan, self._buffers
        parameters, *moments = self._flat_state()
        moments += [parameters] * (2 - len(moments))  # a rule with fewer does not look at the others
        data = [samples, np.int64(plan.neuron_cnt[0]), np.int32(products.batch)]
        place = [self._rows, self._places, self._table, self._base, np.int32(ahead)]
        rest = [np.int32(plan.middle_blocks), buffers["gradients"], buffers["block_losses"], self.losses]
        arguments = [*data, *place, buffers["d"], parameters, *moments, products.part, *rest]
        self.device.launch("stream", plan.stream_grid, plan.threads, arguments, plan.stream_shared)

    def _subtotals(self, products: Products, count: int, own: Array) -> None:
        """Sums of `part`'s first samples over each of the nodes, into `own` (nodes, batch, units)."""
        arguments = [products.part, np.int32(products.batch), self._nodes, own]
        grid = count, len(self._nodes)
        self.device.launch("subtotals", grid, SUMMING_THREADS, arguments, self.plan.sums_shared)

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
        if str(samples.dtype) != self.plan.sample_dtype:  # the kernels read sets of one type
            return super().evaluate(samples, targets)
        self._attach()
        if self._evaluated is None:
            shape = self.plan.tiles, self.plan.evaluated, self.plan.units
            self._evaluated = self._room(self.backend.empty(shape, self.plan.dtype))
        room, self._following = self._evaluated, None

        def product(rows: slice) -> Array:
            chunk, count = samples[rows, :], rows.stop - rows.start
            if self.plan.aligned and address(chunk) % 8:
                chunk = chunk.copy()
            Z = self.backend.empty((self.plan.units, count), self.plan.dtype)
            for start in range(0, count, room.batch):
                stop = min(count, start + room.batch)
                self.device.attach()  # what was made of the last products has been made
                self.device.upload(self._rows[: stop - start], np.arange(start, stop, dtype=np.int32))
                self._multiply(chunk, 0, stop - start, room)
                self._add_up(room, stop - start)
                self.device.synchronize()
                Z[:, start:stop] = room.total[0, : stop - start].T
            Z *= np.dtype(self.plan.dtype).type(pixel_scale(samples.dtype))
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
        scaled: NDArray[Any] = total * np.dtype(self.plan.dtype).type(pixel_scale(self.samples.dtype))
        return scaled

    def versions(self) -> dict[str, str]:
        return {"kernels": f"{self.plan.products}, {self.plan.tile} features, {self.plan.samples} samples"}


class CoresEngine(CudaEngine):
    """The same without tensor cores: what runs where theirs fail their check, and what they are held to."""

    tensor_cores = False


__all__ = ["CoresEngine", "CudaEngine", "CupyDevice", "Device"]
