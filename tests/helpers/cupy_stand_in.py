"""Two stand-ins for CuPy without a GPU: one that counts, and one whose kernels run on the CPU (`cuda_on_cpu`).

`FakeCupy` has two devices and arrays that NumPy cannot take by accident; it counts kernels made and launched, and
waits.

`StandIn` takes everything as late as a GPU may: what is queued runs when the host waits for it, a copy reads its source
then. And it refuses what CuPy and CUDA refuse, or would take wrongly without a word.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import numpy as np

# --- one that counts ----------------------------------------------------------------------------------------------


class FakeDevice:
    """A context manager that records which device is current, and who was waited for."""

    def __init__(self, cupy: FakeCupy, index: int) -> None:
        self.cupy, self.id = cupy, index

    def __enter__(self) -> None:
        self.cupy.current.append(self.id)

    def __exit__(self, *error: object) -> None:
        self.cupy.current.pop()

    def synchronize(self) -> None:
        self.cupy.waits.append(self.id)


class FakeArray:
    """A NumPy array in hiding: it has the device that was current, and NumPy cannot take it by accident."""

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    __cuda_array_interface__ = property(lambda self: {"version": 3})

    def __init__(self, cupy: FakeCupy, host: Any, dtype: Any = None) -> None:
        self.cupy, self.host = cupy, np.array(host, dtype=dtype)
        self.device = FakeDevice(cupy, cupy.current[-1])

    def __array__(self, *args: object, **kwargs: object) -> None:
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, key: Any) -> FakeArray:
        return FakeArray(self.cupy, self.host[key])

    def __add__(self, other: Any) -> FakeArray:
        return FakeArray(self.cupy, self.host + other)

    def astype(self, dtype: Any, copy: bool = True) -> FakeArray:
        return self if not copy and self.dtype == dtype else FakeArray(self.cupy, self.host, dtype)

    def copy(self) -> FakeArray:
        return FakeArray(self.cupy, self.host)

    def get(self) -> np.ndarray[Any, Any]:
        copied: np.ndarray[Any, Any] = self.host.copy()
        return copied


class FakeKernel:
    """Runs, on all elements at once, a body whose C and Python differ in the integer division alone."""

    def __init__(self, cupy: FakeCupy, inputs: str, outputs: str, body: str, name: str) -> None:
        self.cupy, self.name = cupy, name
        self.names = [part.split()[-1] for part in f"{inputs}, {outputs}".split(",")]
        self.code = body.replace(" / ", " // ")
        cupy.made.append(name)

    def __call__(self, *arguments: Any) -> None:
        hosts = [x.host.reshape(-1) if isinstance(x, FakeArray) else x for x in arguments]
        scope = dict(zip(self.names, hosts, strict=True)) | {"i": np.arange(hosts[-1].size)}
        exec(self.code, scope)
        hosts[-1][...] = scope[self.names[-1]]
        self.cupy.launched.append(self.name)


class FakeEvent:
    def __init__(self, cupy: FakeCupy) -> None:
        self.cupy, self.time = cupy, 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        self.cupy.waits.append(self.cupy.current[-1])


class FakeCupy(ModuleType):
    """A stand-in for CuPy with two devices and no GPU: it counts kernels made and launched, and waits."""

    ndarray = FakeArray

    def __init__(self) -> None:
        super().__init__("cupy")
        self.current = [0]
        self.made: list[str] = []
        self.launched: list[str] = []
        self.waits: list[int] = []
        self.ElementwiseKernel = partial(FakeKernel, self)
        self.from_dlpack = self.asarray
        self.empty = self.zeros
        properties = {"name": b"Fake GPU", "totalGlobalMem": 2**30}
        self.cuda = SimpleNamespace(
            Device=partial(FakeDevice, self),
            Event=partial(FakeEvent, self),
            get_elapsed_time=lambda first, last: 1000 * (last.time - first.time),
            runtime=SimpleNamespace(
                getDeviceCount=lambda: 2,
                memGetInfo=lambda: (1000, 2**30),
                runtimeGetVersion=lambda: 12090,
                getDeviceProperties=lambda index: properties,
            ),
        )

    def asarray(self, x: Any, dtype: Any = None) -> FakeArray:
        x = getattr(x, "cuda", x)  # an array of another library that wraps one of ours
        return x if isinstance(x, FakeArray) and dtype is None else FakeArray(self, x, dtype)

    def arange(self, n: int, dtype: Any) -> FakeArray:
        return FakeArray(self, np.arange(n), dtype)

    def zeros(self, shape: Any, dtype: Any) -> FakeArray:
        return FakeArray(self, np.zeros(shape), dtype)

    def matmul(self, a: FakeArray, b: FakeArray, out: FakeArray) -> FakeArray:
        np.matmul(a.host, b.host, out=out.host)
        return out

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_bytes=lambda: 24)


# --- one whose kernels run on the CPU -----------------------------------------------------------------------------

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
        from cuda_runs import library  # which compiles, and is not needed by who only counts

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
