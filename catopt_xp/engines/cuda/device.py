"""The device of the GPU engine: it compiles kernels, queues launches and copies, records graphs and waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.xp import Array, Backend

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
