"""Where the time of the panel engine's steps goes on a GPU: launches, graph nodes, each kernel, memory.

An epoch's time against the floor says how much is lost. This module says where: the cost of an empty launch and of an
empty node of a graph, the time of each kernel of a step alone, and how long the host queues and waits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers_gpu.contenders import EngineEpochs
from benchmarks.peers_gpu.floor import device_seconds, step_bytes
from catopt_xp.backend.xp import Array, Backend
from catopt_xp.commands.bench import BenchError, Workload
from catopt_xp.engines.cuda.device import CupyDevice
from catopt_xp.engines.cuda.engine import CudaEngine
from catopt_xp.engines.plain import PlainEngine

Launch = tuple[str, Sequence[int], int, Sequence[Any], int]

LAST = "advance"  # the launch that ends a chunk of steps
NOTHING = 'extern "C" __global__ void nothing(int) {}'
LAUNCHES = 1000  # launches of a kernel that does nothing
LEAST_LAUNCHES = 16  # launches of a kernel in a graph that is timed
REPEATS = 11
SECONDS, MOST_EPOCHS = 0.2, 200  # how long epochs are watched, at most so many
PLAIN_EPOCHS = 5


class WatchedDevice(CupyDevice):
    """A GPU that tells about its compiled kernels."""

    def facts(self, kernel: str) -> dict[str, int]:
        """The registers and the bytes of local memory of a thread of a kernel."""
        function = self._kernels[kernel]
        return {"registers": function.num_regs, "local_bytes": function.local_size_bytes}


class Recorder:
    """Wraps a `Device`: records what the first chunk of steps launches, and adds up how long the host waits."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.launches: list[Launch] = []
        self.uploads: list[tuple[Array, NDArray[Any]]] = []
        self.whole = False
        self.waited = 0.0

    def load(self, source: str) -> None:
        self.device.load(source)

    def launch(self, kernel: str, grid: Sequence[int], threads: int, arguments: Sequence[Any], shared: int) -> None:
        if not self.whole:
            self.whole = kernel == LAST
            if not self.whole:
                self.launches.append((kernel, grid, threads, arguments, shared))
        self.device.launch(kernel, grid, threads, arguments, shared)

    def upload(self, array: Array, values: NDArray[Any]) -> None:
        if not self.whole:
            self.launches.clear()  # these launches only prepared the chunk
            self.uploads.append((array, np.array(values)))
        self.device.upload(array, values)

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        replay: Callable[[], None] = self.device.capture(launches)
        return replay

    def mark(self) -> Callable[[], None]:
        return partial(self._timed, self.device.mark())

    def attach(self) -> None:
        self.device.attach()

    def synchronize(self) -> None:
        self._timed(self.device.synchronize)

    def _timed(self, wait: Callable[[], None]) -> None:
        start = time.perf_counter()
        wait()
        self.waited += time.perf_counter() - start

    @property
    def kernels(self) -> list[str]:
        """The names of a step's kernels."""
        return list(dict.fromkeys(launch[0] for launch in self.launches))

    def again(self, kernels: Collection[str]) -> tuple[Callable[[], None], int]:
        """Captures the chunk's launches of some kernels once more; returns what queues them, and their number.

        There are at least LEAST_LAUNCHES. The tables that the kernels read get their first contents again.
        """
        chosen = [launch for launch in self.launches if launch[0] in kernels]
        chosen *= -(-LEAST_LAUNCHES // len(chosen))
        for array, values in self.uploads:
            self.device.upload(array, values)

        def launches() -> None:
            for launch in chosen:
                self.device.launch(*launch)

        return self.capture(launches), len(chosen)

    def facts(self, kernel: str) -> dict[str, Any]:
        """What the compiler made of a kernel, and what its launch asks for."""
        _, grid, threads, _, shared = next(launch for launch in self.launches if launch[0] == kernel)
        return {**self.device.facts(kernel), "grid": list(grid), "threads": threads, "shared_bytes": shared}


def measure_launches(backend: Backend) -> dict[str, float]:
    """Measures the seconds of a launch of an empty kernel, alone and as a node of a graph.

    `host`: the host queues a launch; `device`: the GPU goes from one launch to the next; `node`: the same in a graph of
    LAUNCHES nodes; `graph_host`: the host queues that whole graph; `upload`: the host queues a copy of four bytes.
    """
    with backend.activate():
        xp = backend.xp
        stream = xp.cuda.Stream(non_blocking=True)
        nothing = xp.RawKernel(NOTHING, "nothing")

        def launches() -> None:
            with stream:
                for _ in range(LAUNCHES):
                    nothing((1,), (32,), (np.int32(0),))

        launches()
        stream.synchronize()  # sync
        costs = {"host": _host_seconds(launches, stream) / LAUNCHES}
        costs["device"] = statistics.median(device_seconds(backend, launches, REPEATS, stream)) / LAUNCHES
        with stream:
            stream.begin_capture()
            try:
                launches()
            finally:
                graph = stream.end_capture()
        replay = partial(graph.launch, stream=stream)
        costs["node"] = statistics.median(device_seconds(backend, replay, REPEATS, stream)) / LAUNCHES
        costs["graph_host"] = _host_seconds(replay, stream)
        number, value = xp.zeros(1, "int32"), np.zeros(1, np.int32)
        costs["upload"] = _host_seconds(lambda: number.set(value, stream=stream), stream)
    return costs


def _host_seconds(queue: Callable[[], None], stream: Any) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        queue()
        seconds.append(time.perf_counter() - start)
        stream.synchronize()  # sync
    return statistics.median(seconds)


def measure_steps(
    work: Workload, backend: Backend, kind: type[CudaEngine] = CudaEngine, device: Any = None
) -> dict[str, Any]:
    """Measures a panel engine's steps, epochs and kernels, in seconds, and the memory in use.

    `kernels`: of each kernel the `seconds` of a launch, many in one graph, and what it asks for; `step`: of a step,
    from a graph of whole ones; `epoch`: what an epoch took by the wall clock, on the GPU from its first to its last
    launch, and the host's shares of queueing and waiting; `stream_bandwidth`: the fewest bytes of a step over the time
    of the kernel that moves them; `memory`: after the first epoch and after the last. `device`: where the kernels run,
    None: the backend's GPU. Raises BenchError where the engine's launches have an unknown form.
    """
    with backend.activate():
        recorder = Recorder(WatchedDevice(backend) if device is None else device)
        contender = EngineEpochs(partial(kind, device=recorder), work, backend)
        contender.steps(work.batches)
        if not recorder.whole or "stream" not in recorder.kernels:
            raise BenchError(f"the launches of an epoch end in no {LAST!r}: the recorder must learn their new form")
        memory = [{"epoch": 1} | memory_in_use(backend)]
        epoch, epochs = _watch(contender, recorder)
        memory.append({"epoch": 1 + epochs} | memory_in_use(backend))
        kernels = {
            name: {"seconds": _each(backend, recorder, [name])} | recorder.facts(name) for name in recorder.kernels
        }
        return {
            "batch_size": work.batch_size,
            "n_x": work.n_x,
            "engine": contender.engine.versions(),
            "kernels": kernels,
            "step": _each(backend, recorder, recorder.kernels) * len(kernels),
            "epoch": epoch,
            "stream_bandwidth": step_bytes(work) / kernels["stream"]["seconds"],
            "memory": memory,
        }


def measure_plain(work: Workload, backend: Backend) -> dict[str, float]:
    """Median seconds of an epoch of the plain engine: on the host until all is queued, and on the GPU.

    >>> from catopt_xp.backend.xp import NumpyBackend
    >>> sorted(measure_plain(Workload(n_x=12, m=10, batch_size=4), NumpyBackend()))
    ['device', 'host']
    """
    contender = EngineEpochs(PlainEngine, work, backend)
    contender.steps(work.batches)
    timers = []
    for epoch in range(1, 1 + PLAIN_EPOCHS):
        with backend.activate(), backend.timer() as timer:
            contender.queue(epoch)
        timers.append(timer)
    return {side: statistics.median(getattr(timer, side) for timer in timers) for side in ("host", "device")}


def _each(backend: Backend, recorder: Recorder, kernels: Collection[str]) -> float:
    """Seconds of a launch of these kernels."""
    queue, count = recorder.again(kernels)
    return statistics.median(device_seconds(backend, queue, REPEATS, recorder.device.stream)) / count


def _watch(contender: EngineEpochs, recorder: Recorder) -> tuple[dict[str, float], int]:
    """Watches epochs after the first; returns medians of their seconds by part, and the number of epochs."""
    seen: dict[str, list[float]] = {"wall": [], "device": [], "host_queue": [], "host_wait": []}
    with contender.backend.activate():
        cuda, stream = contender.backend.xp.cuda, recorder.device.stream
        first, last = cuda.Event(), cuda.Event()
        began, epoch = time.perf_counter(), 1
        while epoch == 1 or (time.perf_counter() - began < SECONDS and epoch <= MOST_EPOCHS):
            recorder.waited, start = 0.0, time.perf_counter()
            first.record(stream)
            contender.queue(epoch)
            last.record(stream)
            queued = time.perf_counter() - start - recorder.waited
            contender.engine.fetch_losses()
            wall = time.perf_counter() - start
            on_device = cuda.get_elapsed_time(first, last) / 1e3
            for name, seconds in zip(seen, (wall, on_device, queued, recorder.waited), strict=True):
                seen[name].append(seconds)
            epoch += 1
    return {name: statistics.median(seconds) for name, seconds in seen.items()}, epoch - 1


def memory_in_use(backend: Backend) -> dict[str, int]:
    """The bytes that CuPy's arrays take, that its pool holds, and that are free on the GPU."""
    with backend.activate():
        pool, (free, _) = backend.xp.get_default_memory_pool(), backend.xp.cuda.runtime.memGetInfo()
        return {"used": pool.used_bytes(), "held": pool.total_bytes(), "free": free}
