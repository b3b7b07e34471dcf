"""Shared fixtures: the backends that every formula is tested on, and a cache folder of our own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from catopt_xp.backend.devices import DeviceError
from catopt_xp.backend.xp import Backend, NumpyBackend, get_backend
from catopt_xp.engines import choose
from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.engines.plain import PlainEngine

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background: tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines: a loaded machine is no failure. In CI every run has the same examples.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests are skipped, with the reason, unless `-m` names them."""
    if "long" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="long: `pytest -m long` runs it, tests/hardening/README.md has its last full run")
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The data cache lies in a temporary folder: tests neither read nor fill the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATOPT_XP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def strict_backend() -> Backend:
    """The portable backend over array_api_strict, on a device whose arrays NumPy cannot take by accident."""
    xp = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")
    return Backend(xp, name="strict", device=xp.Device("device1"))


@pytest.fixture(scope="session", params=["numpy", "strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn; without a usable GPU "cuda" is skipped, with the cause."""
    if request.param == "numpy":
        return NumpyBackend()
    if request.param == "strict":
        strict: Backend = request.getfixturevalue("strict_backend")
        return strict
    try:
        return get_backend("cuda", strict_device=True)
    except DeviceError as error:
        pytest.skip(str(error))


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


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    """The stand-in for CuPy, also where ``import cupy`` finds it."""
    module = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.fixture
def crash_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """`crash_after(n, action)` calls `action` once a run has done n updates, before anything is saved."""
    whole = {kind: kind.steps for kind in (PlainEngine, PanelEngine)}

    def install(updates: int, action: Callable[[], None]) -> None:
        count = 0

        def counted(engine: PlainEngine, *arguments: Any) -> Any:
            nonlocal count
            for done in whole[type(engine)](engine, *arguments):
                count += 1
                if count == updates:
                    action()
                yield done

        for kind in whole:
            monkeypatch.setattr(kind, "steps", counted)

    return install


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No earlier check of an engine is remembered, and none made here is kept."""
    choose._check.cache_clear()
    yield
    choose._check.cache_clear()
