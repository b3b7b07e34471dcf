"""Can the GPU be used, and if not, why not and what to do; and the report that says so.

Nothing here imports CuPy: `catopt_xp.backend.xp` hands the module in.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from catopt_xp.backend.machine import cpu_count, cpu_model, host_free_memory
from catopt_xp.io.console import warn

INSTALL = 'pip install "catopt-xp[cuda12x]" (or "catopt-xp[cuda13x]" with an NVIDIA driver of 580 or newer)'
INSPECT = "look at the output of nvidia-smi and compare the versions in catopt_xp.device_report()"


class DeviceFallbackWarning(UserWarning):
    """A GPU was asked for and the CPU is used; the text names the cause and the cure."""


class DeviceError(RuntimeError):
    """A GPU was asked for, cannot be used, and the caller allows no fallback to the CPU."""


def fall_back(message: str, strict_device: bool | None) -> None:
    """Says that the CPU is used instead of the GPU that was asked for, at the line that asked.

    Args:
        message: cause and cure, one or two sentences.
        strict_device: True makes it an error; None means True where CATOPT_XP_STRICT_DEVICE is 1.

    Raises:
        DeviceError: strict.
    """
    if strict_device is None:
        strict_device = strict_by_environment()
    if strict_device:
        raise DeviceError(message)
    warn(f"{message} Running on the CPU.", DeviceFallbackWarning)


def strict_by_environment() -> bool:
    """What CATOPT_XP_STRICT_DEVICE says. Raises ValueError for anything but 1 and 0.

    >>> strict_by_environment()
    False
    """
    value = os.environ.get("CATOPT_XP_STRICT_DEVICE", "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"CATOPT_XP_STRICT_DEVICE is {value!r}: set it to 1, to 0, or not at all")
    return value == "1"


@dataclass(frozen=True)
class ProbeResult:
    """Whether a GPU can be used; if not, the cause and the cure, each a phrase without a final stop."""

    usable: bool
    cause: str = ""
    cure: str = ""


def probe_gpu(load_cupy: Callable[[], Any], index: int = 0) -> ProbeResult:
    """Try the GPU: import CuPy, count devices, allocate, run one kernel, read it back. Never raises.

    Args:
        load_cupy: imports CuPy and returns the module.
        index: number of the GPU.

    >>> def no_cupy():
    ...     raise ModuleNotFoundError("No module named 'cupy'", name="cupy")
    >>> probe_gpu(no_cupy).usable
    False
    """
    importing = True
    try:
        xp = load_cupy()
        importing = False
        count = int(xp.cuda.runtime.getDeviceCount())
        if index >= count > 0:
            choice = "cuda:0" if count == 1 else f"one of cuda:0 to cuda:{count - 1}"
            return ProbeResult(False, f"there is no GPU number {index}: this process sees {count}", f"take {choice}")
        with xp.cuda.Device(index):
            answer = (xp.arange(3, dtype="float32") + 1).get().tolist()  # sync
    except Exception as error:
        return explain(error, look_at_machine(), index, importing)
    if answer != [1.0, 2.0, 3.0]:
        return ProbeResult(False, f"a test kernel on cuda:{index} answered {answer}, not [1, 2, 3]", INSPECT)
    return ProbeResult(True)


def explain(error: BaseException, machine: Machine, index: int = 0, importing: bool = False) -> ProbeResult:
    """The cause behind an exception of the probe, and its cure.

    Args:
        error: what was raised; it is told by its type's name and its text, since CuPy may not be importable.
        machine: the facts.
        index: number of the GPU that was asked for.
        importing: whether it was raised while CuPy was being imported.

    >>> explain(RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected"), Machine()).cause
    'the NVIDIA driver finds no GPU'
    """
    text = _one_line(error)
    types = {kind.__name__ for kind in type(error).__mro__}
    if importing or types & {"ImportError", "AttributeError"}:  # half a package fails at its first attribute
        return _import_failure(error, text, machine)
    if "cudaErrorInsufficientDriver" in text:
        return _driver_failure(machine)
    if "cudaErrorNoDevice" in text:
        return _no_device(machine)
    if "cudaErrorInvalidDevice" in text:
        return ProbeResult(False, f"there is no GPU number {index}", "take one that nvidia-smi lists, from cuda:0")
    if "MemoryError" in types or "cudaErrorMemoryAllocation" in text:
        cause = f"the memory of cuda:{index} is full ({text})"
        return ProbeResult(False, cause, "end the processes that nvidia-smi lists on it, or take another GPU")
    if types & {"CompileException", "NVRTCError", "DynamicLibNotFoundError"} or "nvrtc" in text.lower():
        cause = f"CuPy cannot compile a kernel: the CUDA compiler library or its headers are missing ({text})"
        return ProbeResult(False, cause, f"{INSTALL}: these extras bring both, as CuPy's own [ctk] extra")
    if "cudaErrorNoKernelImageForDevice" in text or "cudaErrorUnsupportedPtxVersion" in text:
        cause = f"this CuPy has no code for this GPU and driver ({text})"
        return ProbeResult(False, cause, f"install another CuPy: {INSTALL}")
    if len(machine.cupy_wheels) > 1:
        return _several_wheels(text, machine)
    return ProbeResult(False, f"the GPU failed its first test ({text})", INSPECT)


def _one_line(error: BaseException) -> str:
    # CuPy wraps an import error in a page of advice; the original, which it chains, is the useful part.
    origin = error.__cause__ or error
    return textwrap.shorten(f"{type(origin).__name__}: {origin}", width=300, placeholder=" ...")


def _import_failure(error: BaseException, text: str, machine: Machine) -> ProbeResult:
    wheels = machine.cupy_wheels
    if len(wheels) > 1:
        return _several_wheels(text, machine)
    if not wheels and isinstance(error, ModuleNotFoundError) and error.name == "cupy":
        return ProbeResult(False, "CuPy is not installed", INSTALL)
    name = wheels[0] if wheels else "cupy"
    return ProbeResult(
        False,
        f"the installed {name} cannot be imported: it is broken or made for another CUDA ({text})",
        f"pip uninstall -y {name}, then {_matching_extra(machine)}",
    )


def _several_wheels(text: str, machine: Machine) -> ProbeResult:
    # They share one folder, so removing one of them breaks the other: all must go.
    names = machine.cupy_wheels
    return ProbeResult(
        False,
        f"several CuPy packages are installed and overwrite one another: {', '.join(names)} ({text})",
        f"pip uninstall -y {' '.join(names)}, then {_matching_extra(machine)}",
    )


def _matching_extra(machine: Machine) -> str:
    if machine.driver_cuda is None:
        return INSTALL
    return f'pip install "catopt-xp[cuda{13 if machine.driver_cuda >= 13000 else 12}x]"'


def _driver_failure(machine: Machine) -> ProbeResult:
    # CUDA says "driver version is insufficient" also where there is no driver at all: that would mislead.
    if machine.driver_cuda is not None:
        served = cuda_version(machine.driver_cuda)
        wheel = machine.cupy_wheels[0] if machine.cupy_wheels else "the installed CuPy"
        cause = f"the NVIDIA driver is too old: it serves CUDA up to {served}, and {wheel} needs a newer one"
        return ProbeResult(False, cause, "update the NVIDIA driver, or install the CuPy of an older CUDA")
    if machine.kernel_driver:
        cause = "the NVIDIA kernel driver is loaded, but its library libcuda.so.1 is not found"
        return ProbeResult(False, cause, "start a container with --gpus all; elsewhere reinstall the NVIDIA driver")
    cure = "on a machine with an NVIDIA GPU, install its driver, until nvidia-smi runs"
    return ProbeResult(False, "there is no NVIDIA driver", cure)


def _no_device(machine: Machine) -> ProbeResult:
    if machine.visible_devices is not None:
        cause = f"CUDA_VISIBLE_DEVICES={machine.visible_devices!r} hides every GPU"
        return ProbeResult(False, cause, "unset it, or set it to the number of a GPU that nvidia-smi lists")
    cure = "check that nvidia-smi lists one; start a container with --gpus all"
    return ProbeResult(False, "the NVIDIA driver finds no GPU", cure)


@dataclass(frozen=True)
class GpuInfo:
    """One GPU: name and memory in bytes; where it cannot be used, ``free_memory`` is None, with the cause."""

    index: int
    name: str
    total_memory: int
    free_memory: int | None
    problem: str = ""

    def __str__(self) -> str:
        state = f"cannot be used: {self.problem}" if self.free_memory is None else _gibibytes(self.free_memory)
        return f"{self.name}, {_gibibytes(self.total_memory, 'in all')}, {state}"


@dataclass(frozen=True)
class DeviceReport:
    """What ``catopt_xp.device_report()`` found. ``str()`` gives a block of lines, ``to_dict()`` JSON.

    Memory is in bytes. ``driver_cuda`` is the newest CUDA that the driver serves, ``runtime_cuda`` CuPy's.
    """

    device: str
    backend: str
    reason: str
    gpu_usable: bool
    gpu_cause: str
    gpu_cure: str
    gpus: tuple[GpuInfo, ...]
    driver_cuda: str | None
    runtime_cuda: str | None
    cupy_distributions: tuple[str, ...]
    several_cupy_wheels: bool
    numpy: str
    python: str
    cpu: str
    cpu_count: int
    host_free_memory: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as dicts, lists, strings, numbers and None."""
        fields = asdict(self)
        return fields | {name: list(fields[name]) for name in ("gpus", "cupy_distributions")}

    def __str__(self) -> str:
        lines = [("device", f"{self.device} ({self.backend}): {self.reason}")]
        if not self.gpu_usable:
            lines += [("GPU", f"not usable: {self.gpu_cause}"), ("to use a GPU", self.gpu_cure)]
        lines += [(f"GPU cuda:{gpu.index}", str(gpu)) for gpu in self.gpus]
        packages = ", ".join(self.cupy_distributions) or "none"
        if self.several_cupy_wheels:
            packages += " (they overwrite one another: uninstall all of them, then install one)"
        lines += [
            ("CPU", f"{self.cpu}, {self.cpu_count} logical processors, {_gibibytes(self.host_free_memory)}"),
            ("CUDA", f"driver serves {self.driver_cuda or 'none'}, CuPy runs {self.runtime_cuda or 'none'}"),
            ("CuPy packages", packages),
            ("NumPy, Python", f"{self.numpy}, {self.python}"),
        ]
        return "\n".join(f"{name + ':':<15} {value}" for name, value in lines)


def make_report(device: str, backend: str, reason: str, load_cupy: Callable[[], Any]) -> DeviceReport:
    """The report for the device taken (its text, its backend's name, and why): see :class:`DeviceReport`."""
    machine = look_at_machine()
    result = probe_gpu(load_cupy)
    runtime = load_cupy().cuda.runtime if result.usable else None
    return DeviceReport(
        device=device,
        backend=backend,
        reason=reason,
        gpu_usable=result.usable,
        gpu_cause=result.cause,
        gpu_cure=result.cure,
        gpus=tuple(_gpu_info(load_cupy, index) for index in range(runtime.getDeviceCount() if runtime else 0)),
        driver_cuda=None if machine.driver_cuda is None else cuda_version(machine.driver_cuda),
        runtime_cuda=None if runtime is None else cuda_version(runtime.runtimeGetVersion()),
        cupy_distributions=machine.cupy_distributions,
        several_cupy_wheels=len(machine.cupy_wheels) > 1,
        numpy=np.__version__,
        python=platform.python_version(),
        cpu=cpu_model(),
        cpu_count=cpu_count(),
        host_free_memory=host_free_memory(),
    )


def _gpu_info(load_cupy: Callable[[], Any], index: int) -> GpuInfo:
    xp = load_cupy()
    properties = xp.cuda.runtime.getDeviceProperties(index)
    name, total = properties["name"].decode(), int(properties["totalGlobalMem"])
    result = probe_gpu(load_cupy, index)  # another GPU than the one taken may be full or broken
    if not result.usable:
        return GpuInfo(index, name, total, None, result.cause)
    with xp.cuda.Device(index):
        free, _ = xp.cuda.runtime.memGetInfo()
    return GpuInfo(index, name, total, int(free))


def _gibibytes(count: int, what: str = "free") -> str:
    return f"{count / 2**30:.1f} GiB {what}"


@dataclass(frozen=True)
class Machine:
    """The facts that tell one cause of an unusable GPU from another.

    Args:
        cupy_distributions: every installed distribution whose name starts with "cupy", as "name version".
        kernel_driver: whether the NVIDIA kernel module is loaded.
        driver_cuda: the newest CUDA that the driver library serves (12080 is 12.8); None without a library.
        visible_devices: the environment variable CUDA_VISIBLE_DEVICES.
    """

    cupy_distributions: tuple[str, ...] = ()
    kernel_driver: bool = False
    driver_cuda: int | None = None
    visible_devices: str | None = None

    @property
    def cupy_wheels(self) -> list[str]:
        """The names of those that provide the module ``cupy``: two of them overwrite each other.

        >>> Machine(("cupy-cuda12x 14.2.0", "cupy-xarray 0.1.4")).cupy_wheels
        ['cupy-cuda12x']
        """
        names = [distribution.split()[0] for distribution in self.cupy_distributions]
        return [name for name in names if re.fullmatch(r"cupy(-cuda\w+|-rocm[\w-]+)?", name)]


def look_at_machine() -> Machine:
    """The facts about this machine, read anew at each call.

    >>> isinstance(look_at_machine().kernel_driver, bool)
    True
    """
    found = {
        ((distribution.metadata["Name"] or "").lower(), distribution.version)
        for distribution in importlib.metadata.distributions()
    }
    return Machine(
        cupy_distributions=tuple(sorted(f"{name} {number}" for name, number in found if name.startswith("cupy"))),
        kernel_driver=Path("/proc/driver/nvidia").exists(),
        driver_cuda=_driver_cuda_version(),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _driver_cuda_version() -> int | None:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:  # no NVIDIA driver library here: the answer, not a failure
        return None
    number = ctypes.c_int(0)
    return number.value if driver.cuDriverGetVersion(ctypes.byref(number)) == 0 else None


def cuda_version(number: int) -> str:
    """CUDA's own number of a version, as people write it.

    >>> cuda_version(12080)
    '12.8'
    """
    return f"{number // 1000}.{number % 1000 // 10}"
