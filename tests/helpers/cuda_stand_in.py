"""A stand-in for CuPy whose kernels run on the CPU (`cuda_on_cpu`), for tests of what talks to CuPy.

It takes everything as late as a GPU may: what is queued runs when the host waits for it, a copy reads its source then.
And it refuses what CuPy and CUDA refuse, or would take wrongly without a word.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import numpy as np
from cuda_runs import library

SHARED_BY_DEFAULT = 48 * 1024  # bytes that a kernel may use without asking


class DeviceArray(np.ndarray[Any, Any]):
    """An array that the kernels work on. NumPy looks at it freely: it sees what has been done so far."""

    stand_in: StandIn | None = None

    def __array_finalize__(self, source: Any) -> None:
        self.stand_in = getattr(source, "stand_in", None)

    @property
    def device(self) -> Any:
        return SimpleNamespace(id=0)

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)

    def set(self, values: np.ndarray[Any, Any], stream: Stream) -> None:
        assert self.stand_in is not None
        assert self.stand_in.devices, "no device is active"
        assert stream.captured is None, "a copy from pageable memory within a capture"
        if (self.dtype, self.shape) != (values.dtype, values.shape):
            raise TypeError(f"{values.dtype} {values.shape} cannot be set to {self.dtype} {self.shape}")
        assert self.flags.c_contiguous
        assert values.flags.c_contiguous
        source = weakref.ref(values)

        def copy() -> None:
            there = source()
            assert there is not None, "the source of a copy is gone before it was read"
            self[...] = there

        stream.put(copy)


class Stream:
    def __init__(self, stand_in: StandIn, non_blocking: bool = False) -> None:
        assert stand_in.devices, "a stream belongs to the device that is active when it is made"
        assert non_blocking, "a capture needs a stream of its own"
        self.stand_in = stand_in
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.ptr = id(self)
        stand_in.all_streams.append(self)

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def __enter__(self) -> Self:
        assert self.stand_in.devices, "the stream's device is not active"
        self.stand_in.streams.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        assert self.stand_in.streams.pop() is self

    def synchronize(self) -> None:
        assert self.captured is None, "the host waits within a capture"
        while self.queue:
            self.queue.pop(0)()

    def begin_capture(self) -> None:
        assert self.stand_in.streams[-1:] == [self]
        self.captured = []

    def end_capture(self) -> Graph:
        assert self.captured is not None
        recorded, self.captured = self.captured, None
        return Graph(recorded)


class Graph:
    def __init__(self, recorded: list[Callable[[], None]]) -> None:
        self.recorded = recorded

    def launch(self, stream: Stream) -> None:
        for work in self.recorded:
            stream.put(work)


class Event:
    def __init__(self, disable_timing: bool = False) -> None:
        self.stream: Stream | None = None
        self.passed = False

    def record(self, stream: Stream) -> None:
        self.stream = stream
        stream.put(partial(setattr, self, "passed", True))

    def synchronize(self) -> None:
        assert self.stream is not None
        while not self.passed:
            self.stream.queue.pop(0)()


class RawKernel:
    def __init__(self, stand_in: StandIn, source: str, name: str) -> None:
        self.stand_in, self.library, self.name = stand_in, library(source), name
        assert name in self.library.names
        self.max_dynamic_shared_size_bytes = SHARED_BY_DEFAULT
        self.loaded = False

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int
    ) -> None:
        assert self.stand_in.streams, "the launch would go to the default stream"
        stream = self.stand_in.streams[-1]
        assert type(grid) is type(block) is type(args) is tuple
        for argument in args:  # a Python number would go as 64 bits, whatever the kernel takes
            assert isinstance(argument, np.ndarray | np.int32 | np.int64), type(argument)
        assert shared_mem <= self.max_dynamic_shared_size_bytes, "more shared memory than the kernel was allowed"
        assert self.loaded or stream.captured is None, "the first launch loads the kernel, which a capture may not"
        self.loaded = True
        self.stand_in.launched += 1
        stream.put(partial(self.library.launch, self.name, grid, block, args, shared_mem))


class StandIn(ModuleType):
    """What `CupyDevice` and `CupyBackend` use of CuPy; where it has nothing of its own, NumPy's."""

    ndarray = DeviceArray
    __version__ = "of the tests"

    def __init__(self) -> None:
        super().__init__("cupy")
        self.devices: list[int] = []  # those that are active, the innermost last
        self.streams: list[Stream] = []
        self.all_streams: list[Stream] = []
        self.launched = self.allocated = 0
        runtime = SimpleNamespace(
            memGetInfo=lambda: (2**33, 2**34), getDeviceProperties=lambda index: {"name": b"stand-in"}
        )
        self.cuda = SimpleNamespace(
            Device=partial(Device, self), Stream=partial(Stream, self), Event=Event, runtime=runtime
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> Any:
        assert self.devices, "kernels are compiled for the device that is active"
        assert options == ("--std=c++17",)
        return SimpleNamespace(get_function=partial(RawKernel, self, code))

    def zeros(self, shape: Any, dtype: Any) -> DeviceArray:
        return self._new(np.zeros(shape, dtype))

    def asarray(self, x: Any, dtype: Any = None) -> DeviceArray:
        return self._new(np.array(x, dtype))

    def _new(self, host: np.ndarray[Any, Any]) -> DeviceArray:
        assert self.devices, "memory comes from the device that is active"
        assert all(stream.captured is None for stream in self.all_streams), "an allocation within a capture"
        array = host.view(DeviceArray)
        array.stand_in = self
        self.allocated += array.nbytes
        return array

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(used_bytes=lambda: self.allocated, free_bytes=lambda: 0)


class Device:
    def __init__(self, stand_in: StandIn, index: int) -> None:
        self.stand_in, self.id = stand_in, index

    def __enter__(self) -> Self:
        self.stand_in.devices.append(self.id)
        return self

    def __exit__(self, *error: object) -> None:
        self.stand_in.devices.pop()

    def synchronize(self) -> None:
        for stream in self.stand_in.all_streams:
            stream.synchronize()
