"""Where arrays live: one object names the array module (``xp``), the device and why it was chosen.

NumPy on a CPU, CuPy on an NVIDIA GPU, and one portable backend that uses nothing beyond the Python array API standard.
The tests run every formula on the portable one, which shows that no formula leans on NumPy alone. There is no current
device: a backend is passed on, or read off the arrays with `backend_of`. Importing this module never imports CuPy; the
first request for a GPU does.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np

from catopt_xp.backend.devices import (
    DeviceReport,
    ProbeResult,
    fall_back,
    make_report,
    probe_gpu,
    strict_by_environment,
)
from catopt_xp.backend.machine import host_free_memory
from catopt_xp.backend.threads import Result, run_tasks, single_threaded_products
from catopt_xp.io.console import one_line


def dtype_name(x: Array) -> str:
    """The name of an array's dtype, the same in every namespace and byte order.

    >>> import numpy as np
    >>> dtype_name(np.zeros(1, dtype=">f4"))
    'float32'
    """
    return str(getattr(x.dtype, "name", x.dtype)).rpartition(".")[2]


def is_real(x: Array) -> bool:
    """Whether an array holds booleans, whole numbers or floats.

    >>> import numpy as np
    >>> is_real(np.zeros(1)), is_real(np.zeros(1, dtype=complex)), is_real(np.array(["1"]))
    (True, False, False)
    """
    # The standard's dtypes have no kind, but names that begin with its letter: bool, int8, uint8, float32, complex64.
    return getattr(x.dtype, "kind", dtype_name(x)[0]) in "buif"


class Timer:
    """Time of a ``with`` block: ``host`` and ``device``, in seconds, not-a-number until the block has ended.

    On a CPU both are the same. On a GPU ``host`` is the time until every launch had been queued, ``device``
    the time between two CUDA events around the block: where the two are close, launching takes the time.

    >>> with Timer() as timer:
    ...     total = sum(range(1000))
    >>> timer.host > 0 and timer.device == timer.host
    True
    """

    def __init__(self) -> None:
        self.host = math.nan
        self.device = math.nan
        self._start = math.nan

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.host = self.device = time.perf_counter() - self._start


class CudaTimer(Timer):
    """The :class:`Timer` of GPU number ``index``, on the current stream; ``xp`` is CuPy.

    Leaving the block waits for the GPU. After an exception ``device`` stays not-a-number.
    """

    def __init__(self, xp: Any, index: int) -> None:
        super().__init__()
        self._xp = xp
        self._index = index
        with xp.cuda.Device(index):
            self._first = xp.cuda.Event()
            self._last = xp.cuda.Event()

    def __enter__(self) -> Self:
        with self._xp.cuda.Device(self._index):
            self._first.record()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.device = math.nan
        if error is not None:  # a failed GPU would fail here once more and hide the first error
            return
        with self._xp.cuda.Device(self._index):
            self._last.record()
        self._last.synchronize()  # sync
        self.device = self._xp.cuda.get_elapsed_time(self._first, self._last) / 1000.0


Array: TypeAlias = Any
"""An array of the backend at hand (CuPy ships few types, so this is ``Any`` to a type checker)."""


class Backend:
    """The portable backend: array operations of the Python array API standard, on one device.

    `xp`: an array module that follows the standard; `name`: its short name; `device`: the module's device object, kept
    as it is for the module, `.device` is its text; `reason`: one sentence on why this device was taken.

    >>> b = NumpyBackend()
    >>> b.gather(b.asarray([[1, 2, 3], [4, 5, 6]], dtype="uint8"), b.asarray([1]), 0, 2, "float32")
    array([[4., 5.]], dtype=float32)
    """

    fuses: bool = False
    """Whether :meth:`elementwise` is there."""
    cache_bytes: int = 1 << 20
    """Bytes of a block of floats that stays in fast memory while it is worked on."""
    tasks: int = 1
    """Into how many parts work for :meth:`run` is cut: a constant, so that sums do not depend on the threads."""

    def __init__(self, xp: Any, name: str, device: Any, reason: str = "") -> None:
        self.xp = xp
        self.name = name
        self.device = str(device)
        self.reason = reason
        self._device = device
        # For a thread besides the main one that waits for the device, and for who records launches: CUDA forbids that.
        self.lock = threading.RLock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, device={self.device!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return get_backend, (self.device,)  # a copy or a pickle takes the device anew, wherever it is opened

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        """``x`` on this device, without a copy where that is possible.

        Args:
            x: an array of any library (``__dlpack__`` or ``__cuda_array_interface__``), a list or a number.
            dtype: the wanted type, as a name or a NumPy type; None keeps that of ``x``.
        """
        dtype = self._dtype(dtype)
        if _namespace_of(x) is self.xp and x.device == self._device:
            return x if dtype is None else self.xp.astype(x, dtype, copy=False)
        host = asnumpy(x)
        # Memory that cannot be written is copied: the standard's in-place operators expect arrays that can.
        copy = None if host.flags.writeable else True
        return self.xp.asarray(host, dtype=dtype, device=self._device, copy=copy)

    def to_host(self, x: Array) -> np.ndarray[Any, Any]:
        """``x`` as a NumPy array; on a CPU it shares memory with ``x``."""
        return asnumpy(x)  # sync

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """A new array with whatever values its memory holds."""
        return self.xp.empty(shape, dtype=self._dtype(dtype), device=self._device)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """A new array of zeros."""
        return self.xp.zeros(shape, dtype=self._dtype(dtype), device=self._device)

    def activate(self) -> AbstractContextManager[Any]:
        """A ``with`` block in which ``xp``'s functions and kernels use this device (``cuda:1`` needs it)."""
        return nullcontext()

    def synchronize(self) -> None:
        """Wait until the device has done all its queued work (on a CPU nothing is queued)."""

    def timer(self) -> Timer:
        """A stopwatch for a ``with`` block: see :class:`Timer`."""
        return Timer()

    def versions(self) -> dict[str, str]:
        """What computes, by name: another version of it may give other bits."""
        return {self.name: str(self.xp.__version__)}

    def free_memory(self) -> int:
        """Bytes of memory still available on this device."""
        return host_free_memory()

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        """``out[...] = a @ b``, returning ``out``; ``(p, q) @ (q, r)`` into ``(p, r)``, of one float type."""
        out[...] = a @ b
        return out

    def gather(self, samples: Array, rows: Array | slice | None, start: int, stop: int, dtype: Any) -> Array:
        """Columns ``start:stop`` of some rows, converted: ``(len(rows), stop - start)``, for reading only.

        Args:
            samples: ``(m, n_x)``, uint8 or float, C-contiguous, on this device.
            rows: numbers ``0 <= r < m`` on this device (a GPU does not check them), a slice, or None: all.
            start: the first column.
            stop: the column after the last, ``0 <= start <= stop <= n_x``.
            dtype: the type of the answer. Where there is nothing to convert it may be a view of ``samples``.
        """
        if rows is None:
            window = samples[:, start:stop]
        elif isinstance(rows, slice):
            # The standard knows no slice beyond the end, such as that of a last, short batch.
            window = samples[slice(*rows.indices(samples.shape[0])), start:stop]
        else:
            window = self.xp.take(samples[:, start:stop], rows, axis=0)
        return self.xp.astype(window, self._dtype(dtype), copy=False)

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Runs tasks that do not depend on one another; their results, in order. A device runs one after the other."""
        return [task() for task in tasks]

    def single_threaded(self) -> AbstractContextManager[Any]:
        """A ``with`` block in which matrix products use one thread: small ones lose more than they gain by several."""
        return nullcontext()

    def elementwise(self, name: str, inputs: str, outputs: str, body: str) -> Any:
        """A fused elementwise kernel, on backends with ``fuses``: see :meth:`CupyBackend.elementwise`."""
        raise NotImplementedError(f"the {self.name} backend has no fused kernels: ask backend.fuses first")

    def _dtype(self, dtype: Any) -> Any:
        """The module's own type object for a name or a NumPy type (a strict module takes no other's)."""
        if isinstance(dtype, str | type | np.dtype):
            return getattr(self.xp, np.dtype(dtype).name)
        return dtype


class NumpyBackend(Backend):
    """NumPy on the CPU. ``reason`` says why the CPU was taken.

    >>> NumpyBackend().device
    'cpu'
    """

    tasks = 16

    def __init__(self, reason: str = "") -> None:
        super().__init__(np, name="numpy", device="cpu", reason=reason)

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        return run_tasks(tasks)

    def single_threaded(self) -> AbstractContextManager[Any]:
        return single_threaded_products()

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        return np.asarray(asnumpy(x), dtype=dtype)

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        return np.matmul(a, b, out=out)

    def gather(self, samples: Array, rows: Array | slice | None, start: int, stop: int, dtype: Any) -> Array:
        # One mixed index copies the window alone; np.take on a column slice first copies all m rows of it
        # (16 times slower for 64 of 2000 rows), and a loop over rows only wins on very few, very long rows.
        window = samples[slice(None) if rows is None else rows, start:stop]
        # Products of memory in another layout may have other bits: whatever the set's, the window lies in rows.
        down, across = window.strides
        in_rows = across == window.itemsize and down >= across * window.shape[1] and window.flags.aligned
        return window if in_rows and window.dtype == dtype else window.astype(dtype, order="C")


class CupyBackend(Backend):
    """CuPy on one NVIDIA GPU.

    Args:
        xp: the imported CuPy module.
        index: number of the GPU, as CUDA counts them.
        reason: why it was taken.
    """

    fuses = True
    cache_bytes = 1 << 30  # a GPU wants few, large launches: the bound is memory use, not the cache

    def __init__(self, xp: Any, index: int = 0, reason: str = "") -> None:
        super().__init__(xp, name="cupy", device=f"cuda:{index}", reason=reason)
        self.index = index

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        with self.activate():
            if not isinstance(x, self.xp.ndarray):
                if hasattr(x, "__cuda_array_interface__"):
                    x = self.xp.asarray(x)
                elif _is_on_cuda(x):
                    x = self.xp.from_dlpack(x)
                else:
                    return self.xp.asarray(asnumpy(x), dtype=dtype)
            if x.device.id != self.index:
                x = x.copy()  # a copy lands on the active device
            return x if dtype is None else x.astype(dtype, copy=False)

    def to_host(self, x: Array) -> np.ndarray[Any, Any]:
        """``x`` as a NumPy array: a copy, after all the work that ``x`` waits for."""
        with self.activate():
            return asnumpy(x)  # sync

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        with self.activate():
            return self.xp.empty(shape, dtype=dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        with self.activate():
            return self.xp.zeros(shape, dtype=dtype)

    def activate(self) -> AbstractContextManager[Any]:
        device: AbstractContextManager[Any] = self.xp.cuda.Device(self.index)
        return device

    def synchronize(self) -> None:
        self.xp.cuda.Device(self.index).synchronize()  # sync

    def timer(self) -> Timer:
        return CudaTimer(self.xp, self.index)

    def versions(self) -> dict[str, str]:
        name = self.xp.cuda.runtime.getDeviceProperties(self.index)["name"]
        return {self.name: str(self.xp.__version__), "gpu": name.decode()}

    def free_memory(self) -> int:
        with self.activate():
            free, _ = self.xp.cuda.runtime.memGetInfo()
            return int(free) + int(self.xp.get_default_memory_pool().free_bytes())

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        with self.activate():
            return self.xp.matmul(a, b, out=out)

    def gather(self, samples: Array, rows: Array | slice | None, start: int, stop: int, dtype: Any) -> Array:
        with self.activate():
            if rows is None or isinstance(rows, slice):  # a view and its conversion: one launch already
                return samples[slice(None) if rows is None else rows, start:stop].astype(dtype, copy=False)
            width = stop - start
            picked = self.xp.empty((len(rows), width), dtype=dtype)
            kernel = self.elementwise(
                "catopt_xp_gather",
                "raw T samples, raw R rows, int64 n_x, int64 start, int64 width",
                "U out",
                "out = samples[rows[i / width] * n_x + start + i % width]",
            )
            kernel(samples, rows, samples.shape[1], start, width, picked)
            return picked

    def elementwise(self, name: str, inputs: str, outputs: str, body: str) -> Any:
        """A ``cupy.ElementwiseKernel``, built once for each set of arguments and compiled at its first call.

        Args:
            name: the kernel's name, a C identifier.
            inputs: typed parameters as CuPy writes them, such as ``"T g, float32 learning_rate"``.
            outputs: likewise; a parameter that is updated in place is an output.
            body: the CUDA C++ of one element.

        Call it inside :meth:`activate`.
        """
        return _elementwise_kernel(self.xp, name, inputs, outputs, body)


@functools.cache
def _elementwise_kernel(xp: Any, name: str, inputs: str, outputs: str, body: str) -> Any:
    # A new kernel object on every call would cost more than the launch itself, hence the cache.
    return xp.ElementwiseKernel(inputs, outputs, body, name)


def get_backend(device: str | Backend = "auto", strict_device: bool | None = None) -> Backend:
    """The backend of a device.

    `device`: "auto" (the GPU if it passes a probe, else the CPU), "cpu", "cuda" (which is "cuda:0") or "cuda:N"; a
    backend is returned as it is. Where the environment variable CATOPT_XP_DEVICE is set, "auto" means what it says.
    `strict_device`: whether a GPU that was asked for and cannot be used is an error (None: if CATOPT_XP_STRICT_DEVICE
    is 1). Returns the backend; its `reason` says why this device was taken.

    Raises ValueError for an unknown device, DeviceError for a strict one that cannot be used; warns
    (DeviceFallbackWarning) where NumPy on the CPU stands in for one.

    >>> get_backend("cpu").xp.__name__
    'numpy'
    """
    if isinstance(device, Backend):
        return device
    if strict_device is None:
        strict_device = strict_by_environment()  # what is wrong there is said on a CPU too
    backend, failure = _resolve(device)
    if failure is None:
        return backend
    fall_back(f"{backend.reason}. To use it: {failure.cure}.", strict_device)
    return backend


def _resolve(device: Any) -> tuple[Backend, ProbeResult | None]:
    """The backend, and if a GPU was asked for in vain, the probe that says why."""
    asked, wanted = f"device={device!r}", device
    from_environment = os.environ.get("CATOPT_XP_DEVICE")
    if from_environment and isinstance(device, str) and device == "auto":
        asked, wanted = f"CATOPT_XP_DEVICE={from_environment}", from_environment
    match = re.fullmatch(r"auto|cpu|cuda(:(?P<index>\d+))?", wanted) if isinstance(wanted, str) else None
    if match is None:
        raise ValueError(f'{asked} is not known: choose "auto", "cpu", "cuda", "cuda:N" or a Backend')
    if wanted == "cpu":
        return NumpyBackend(reason=f"{asked} asks for it"), None
    index = int(match["index"] or 0)
    result = probe_gpu(_import_cupy, index)
    if result.usable:
        reason = "a test kernel ran on it" if wanted == "auto" else f"{asked} asks for it"
        return CupyBackend(_import_cupy(), index, reason), None
    if wanted == "auto":
        return NumpyBackend(reason=f"no GPU can be used: {result.cause}"), None
    return NumpyBackend(reason=f"{asked} cannot be used: {result.cause}"), result


def _import_cupy() -> Any:
    with warnings.catch_warnings():
        # CuPy warns of two CuPy packages in a page of text; the probe and the device report say it in a line.
        warnings.simplefilter("ignore")
        import cupy
    return cupy


def device_report() -> DeviceReport:
    """Which device "auto" takes, why not the other one, and the versions and sizes that matter for it.

    >>> report = device_report()
    >>> report.device in str(report)
    True
    """
    backend, _ = _resolve("auto")
    return make_report(backend.device, backend.name, backend.reason, _import_cupy)


def backend_of(*arrays: Any) -> Backend:
    """The backend of these arrays; lists, numbers and None have no say, and alone mean NumPy.

    Raises:
        TypeError: the arrays live on different devices, or one is of a library that has no ``xp`` here.

    >>> import numpy as np
    >>> backend_of(np.zeros(3), None, 2.0).device
    'cpu'
    """
    found: dict[str, tuple[int, Backend]] = {}
    for position, x in enumerate(arrays, start=1):
        backend = _backend_of_one(position, x)
        if backend is not None:
            found.setdefault(f"{backend.device} ({backend.name})", (position, backend))
    if len(found) > 1:
        places = ", ".join(f"argument {position} on {place}" for place, (position, _) in found.items())
        raise TypeError(f"arrays of different devices: {places}; move them to one with backend.asarray(x)")
    return next((backend for _, backend in found.values()), NumpyBackend("the arrays are host data"))


def _backend_of_one(position: int, x: Any) -> Backend | None:
    if isinstance(x, np.ndarray):
        return NumpyBackend("the arrays are NumPy's")
    cupy: Any = sys.modules.get("cupy")  # whoever holds a CuPy array has imported it
    cupy_array: Any = getattr(cupy, "ndarray", ())
    if isinstance(x, cupy_array):
        return CupyBackend(cupy, x.device.id, "the arrays are CuPy's")
    if isinstance(x, np.generic):  # a number, though it has the methods of an array
        return None
    xp = _namespace_of(x)
    if xp is not None:
        return Backend(xp, xp.__name__, x.device, f"the arrays are {xp.__name__}'s")
    if hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__"):
        kind = f"{type(x).__module__}.{type(x).__qualname__}"
        raise TypeError(f"argument {position} is a {kind}, which has no xp: convert it with backend.asarray(x)")
    return None


def get_array_module(*arrays: Any) -> Any:
    """The array module of these arrays: see :func:`backend_of`.

    >>> import numpy as np
    >>> get_array_module(np.zeros(3)) is np
    True
    """
    return backend_of(*arrays).xp


def asnumpy(x: Any) -> np.ndarray[Any, Any]:
    """An array of any library on any device, or a list, as a NumPy array; host memory is shared, not copied.

    Raises ValueError for an array with masked values, which would come back as numbers.

    >>> asnumpy([1, 2])
    array([1, 2])
    """
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
            raise ValueError("masked values are no numbers: fill them first, as x.filled(0) does")
        return np.asarray(x)  # of a subclass, the array
    if _is_on_cuda(x):
        import cupy

        on_device = cupy.asarray(x) if hasattr(x, "__cuda_array_interface__") else cupy.from_dlpack(x)
        host: np.ndarray[Any, Any] = on_device.get()  # sync
        return host
    if hasattr(x, "__dlpack__"):
        return np.from_dlpack(x)
    return np.asarray(x)


def _is_on_cuda(x: Any) -> bool:
    if hasattr(x, "__cuda_array_interface__"):
        return True
    # DLPack's device types: 2 is CUDA memory, 13 CUDA managed memory.
    return hasattr(x, "__dlpack_device__") and int(x.__dlpack_device__()[0]) in (2, 13)


def _namespace_of(x: Any) -> Any:
    """The array API module that ``x`` names as its own, or None."""
    return x.__array_namespace__() if hasattr(x, "__array_namespace__") else None


def as_array(x: Any, name: str, backend: Backend | None = None, wanted: str = "give real numbers") -> Array:
    """`x`, an array of any library, a list or a number, as an array of real numbers of `backend` (None: NumPy).

    `name`: of the argument, and `wanted`: what to do, for messages. Raises TypeError or ValueError in one line for what
    is no array, holds anything else, or has masked values.

    >>> as_array([1, 2], "Y")
    array([1, 2])
    >>> as_array(["cat"], "Y")
    Traceback (most recent call last):
    TypeError: Y holds <U3; give real numbers
    """
    try:
        array = (backend or NumpyBackend()).asarray(x)
    except (TypeError, ValueError, BufferError) as error:  # lists of unequal lengths, a mask, memory that is not shared
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name} cannot be taken as an array ({one_line(error)}); {wanted}") from error
    if not is_real(array):
        raise TypeError(f"{name} holds {str(array.dtype).rpartition('.')[2]}; {wanted}")
    return array
