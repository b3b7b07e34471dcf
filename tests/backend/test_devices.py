"""The probe of the GPU, its causes and cures, and the facts about the machine."""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from catopt_xp.backend import devices
from catopt_xp.backend.devices import GpuInfo, Machine, ProbeResult, explain, look_at_machine, probe_gpu
from catopt_xp.backend.machine import cpu_count, host_free_memory
from catopt_xp.backend.xp import _import_cupy

ONE_WHEEL = ("cupy-cuda12x 14.2.0",)
TWO_WHEELS = ("cupy-cuda12x 14.2.0", "cupy-cuda13x 14.2.0")

# Errors as CuPy raises them: told by name and text, so these stand for its own classes.
CUDARuntimeError = type("CUDARuntimeError", (RuntimeError,), {})
OutOfMemoryError = type("OutOfMemoryError", (MemoryError,), {})
CompileException = type("CompileException", (Exception,), {})
DynamicLibNotFoundError = type("DynamicLibNotFoundError", (RuntimeError,), {})

INSUFFICIENT = CUDARuntimeError(
    "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)
NO_DEVICE = CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
MISSING_LIBRARY = ImportError("libcublas.so.12: cannot open shared object file: No such file or directory")
NOT_INSTALLED = ModuleNotFoundError("No module named 'cupy'", name="cupy")

# error, machine, importing -> a piece of the cause, a piece of the cure
CAUSES: dict[str, tuple[BaseException, Machine, bool, str, str]] = {
    "not installed": (NOT_INSTALLED, Machine(), True, "CuPy is not installed", "catopt-xp[cuda12x]"),
    "wheel without files": (
        NOT_INSTALLED,
        Machine(ONE_WHEEL),
        True,
        "the installed cupy-cuda12x cannot be imported",
        "pip uninstall -y cupy-cuda12x",
    ),
    "wrong wheel": (
        MISSING_LIBRARY,
        Machine(ONE_WHEEL, driver_cuda=13000),
        True,
        "libcublas.so.12",
        'then pip install "catopt-xp[cuda13x]"',
    ),
    "two wheels, import": (
        MISSING_LIBRARY,
        Machine(TWO_WHEELS, driver_cuda=12080),
        True,
        "several CuPy packages are installed and overwrite one another: cupy-cuda12x, cupy-cuda13x",
        'pip uninstall -y cupy-cuda12x cupy-cuda13x, then pip install "catopt-xp[cuda12x]"',
    ),
    "two wheels, later": (
        RuntimeError("wrong symbol"),
        Machine(TWO_WHEELS),
        False,
        "several CuPy",
        "uninstall",
    ),
    "half a package": (
        AttributeError("module 'cupy' has no attribute 'cuda'"),
        Machine(),
        False,
        "the installed cupy cannot be imported",
        "pip uninstall -y cupy",
    ),
    "no driver": (INSUFFICIENT, Machine(ONE_WHEEL), False, "there is no NVIDIA driver", "install its driver"),
    "no libcuda": (
        INSUFFICIENT,
        Machine(kernel_driver=True),
        False,
        "libcuda.so.1 is not found",
        "--gpus all",
    ),
    "old driver": (
        INSUFFICIENT,
        Machine(ONE_WHEEL, kernel_driver=True, driver_cuda=11040),
        False,
        "it serves CUDA up to 11.4, and cupy-cuda12x needs a newer one",
        "update the NVIDIA driver",
    ),
    "no device": (NO_DEVICE, Machine(kernel_driver=True), False, "finds no GPU", "nvidia-smi"),
    "hidden device": (
        NO_DEVICE,
        Machine(visible_devices=""),
        False,
        "CUDA_VISIBLE_DEVICES='' hides every GPU",
        "unset it",
    ),
    "no such device": (
        CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal"),
        Machine(),
        False,
        "there is no GPU number 3",
        "nvidia-smi",
    ),
    "memory, CuPy": (
        OutOfMemoryError("Out of memory allocating 512 bytes (allocated so far: 0 bytes)."),
        Machine(),
        False,
        "the memory of cuda:3 is full",
        "end the processes",
    ),
    "memory, CUDA": (
        CUDARuntimeError("cudaErrorMemoryAllocation: out of memory"),
        Machine(),
        False,
        "the memory of cuda:3 is full",
        "another GPU",
    ),
    "compiler, headers": (
        CompileException("/tmp/x.cu(4): catastrophic error: cannot open source file"),
        Machine(),
        False,
        "cannot compile a kernel",
        "[ctk]",
    ),
    "compiler, library": (
        DynamicLibNotFoundError('Failure finding "libnvrtc.so"'),
        Machine(),
        False,
        "cannot compile a kernel",
        "[ctk]",
    ),
    "architecture": (
        CUDARuntimeError("cudaErrorNoKernelImageForDevice: no kernel image is available"),
        Machine(),
        False,
        "no code for this GPU",
        "another CuPy",
    ),
    "anything else": (
        CUDARuntimeError("cudaErrorDevicesUnavailable: busy"),
        Machine(ONE_WHEEL),
        False,
        "failed its first test (CUDARuntimeError: cudaErrorDevicesUnavailable: busy)",
        "nvidia-smi",
    ),
}


@pytest.mark.parametrize("name", CAUSES)
def test_each_cause_has_its_own_text_and_cure(name: str) -> None:
    error, machine, importing, cause, cure = CAUSES[name]
    result = explain(error, machine, index=3, importing=importing)
    assert not result.usable
    assert cause in result.cause
    assert cure in result.cure
    for phrase in (result.cause, result.cure):
        assert "\n" not in phrase
        assert not phrase.endswith(".")


def test_a_page_of_advice_is_reduced_to_its_original_error() -> None:
    page = ImportError("=====\nFailed to import CuPy.\n\nmuch advice\n=====")
    page.__cause__ = MISSING_LIBRARY
    result = explain(page, Machine(ONE_WHEEL), importing=True)
    assert "ImportError: libcublas.so.12: cannot open shared object file" in result.cause
    assert "advice" not in result.cause
    assert len(explain(RuntimeError("long " * 1000), Machine()).cause) < 400


def fake_cupy(count: Any = 1, answer: Any = None) -> Any:
    """As much of CuPy as the probe touches; ``count`` and ``answer`` may be exceptions to raise."""

    def device_count() -> int:
        if isinstance(count, Exception):
            raise count
        return int(count)

    class OnDevice:
        def __add__(self, other: int) -> OnDevice:
            return self

        def get(self) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return np.asarray([1.0, 2.0, 3.0] if answer is None else answer)

    cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=device_count), Device=lambda i: nullcontext())
    return SimpleNamespace(cuda=cuda, arange=lambda n, dtype: OnDevice())


def test_probe_runs_a_kernel_and_reads_it_back() -> None:
    assert probe_gpu(fake_cupy) == ProbeResult(True)
    wrong = probe_gpu(lambda: fake_cupy(answer=[1.0, 2.0, 4.0]))
    assert not wrong.usable
    assert "answered [1.0, 2.0, 4.0]" in wrong.cause


@pytest.mark.parametrize(("count", "cure"), [(1, "take cuda:0"), (4, "take one of cuda:0 to cuda:3")])
def test_probe_names_the_devices_there_are(count: int, cure: str) -> None:
    result = probe_gpu(lambda: fake_cupy(count), index=7)
    assert result.cause == f"there is no GPU number 7: this process sees {count}"
    assert result.cure == cure


@pytest.mark.parametrize("broken", [fake_cupy(INSUFFICIENT), fake_cupy(answer=NO_DEVICE), object(), None])
def test_probe_never_raises(broken: Any) -> None:
    result = probe_gpu(lambda: broken)
    assert not result.usable
    assert result.cause
    assert result.cure


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy").mkdir()
    text = "import warnings\nwarnings.warn('several')\nraise ImportError('libnvrtc.so.12: no such file')\n"
    (tmp_path / "cupy" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(devices, "look_at_machine", lambda: Machine(("cupy-cuda12x 14.2.0",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = probe_gpu(_import_cupy)
    assert "the installed cupy-cuda12x cannot be imported" in result.cause
    assert "libnvrtc.so.12: no such file" in result.cause


def test_other_packages_named_cupy_something_are_no_conflict() -> None:
    machine = Machine(("cupy-cuda12x 14.2.0", "cupy-xarray 0.1.4", "cupynumeric 25.3"))
    assert machine.cupy_wheels == ["cupy-cuda12x"]
    assert Machine(("cupy 14.2.0", "cupy-rocm-5-0 13.0.0")).cupy_wheels == ["cupy", "cupy-rocm-5-0"]


def test_the_facts_list_the_installed_distributions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("cupy_cuda99x", "numpy_like"):
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    machine = look_at_machine()
    assert "cupy-cuda99x 1.0" in machine.cupy_distributions
    assert all(name.startswith("cupy") for name in machine.cupy_distributions)
    assert machine.visible_devices == "1"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_free_memory_is_what_the_system_has_available(tmp_path: Path) -> None:
    write(tmp_path, meminfo="MemTotal: 16000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n")
    assert host_free_memory(tmp_path, tmp_path) == 8000 * 1024


def test_free_memory_respects_every_group_around_the_process(tmp_path: Path) -> None:
    write(tmp_path, meminfo="MemAvailable: 8000 kB\n")
    write(tmp_path / "self", cgroup="0::/outer/inner\n")
    outer = tmp_path / "groups" / "outer"
    write(outer, memory__max="5000\n", memory__current="3000\n", memory__stat="anon 9\ninactive_file 500\n")
    write(outer / "inner", memory__max="max\n", memory__current="2000\n")
    assert host_free_memory(tmp_path, tmp_path / "groups") == 5000 - 3000 + 500
    write(outer / "inner", memory__max="2100\n")
    assert host_free_memory(tmp_path, tmp_path / "groups") == 100
    write(outer / "inner", memory__max="1900\n")
    assert host_free_memory(tmp_path, tmp_path / "groups") == 0


def test_a_group_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("io.text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")  # as in the locale "C"
    write(tmp_path, meminfo="MemAvailable: 8000 kB\n")
    folder = tmp_path / "groups" / "größe"
    write(folder, memory__max="5000\n", memory__current="3000\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_bytes("0::/größe\n".encode())
    assert host_free_memory(tmp_path, tmp_path / "groups") == 2000


def test_free_memory_respects_groups_of_version_1_seen_from_a_container(tmp_path: Path) -> None:
    write(tmp_path, meminfo="MemAvailable: 8000 kB\n")
    write(tmp_path / "self", cgroup="7:cpu,cpuacct:/x\n5:memory:/docker/0123\n0::/unknown\n")
    files = {"memory__limit_in_bytes": "4000\n", "memory__usage_in_bytes": "1000\n"}
    write(tmp_path / "groups" / "memory", **files, memory__stat="total_inactive_file 10\n")
    assert host_free_memory(tmp_path, tmp_path / "groups") == 3010


@pytest.fixture
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)


@pytest.mark.parametrize(
    ("quota", "processors"),
    [("max 100000", 8), ("50000 100000", 1), ("150000 100000", 2), ("400000 100000", 4), ("9900000 100000", 8)],
)
def test_processors_are_those_of_the_quota(tmp_path: Path, eight_processors: None, quota: str, processors: int) -> None:
    write(tmp_path / "self", cgroup="0::/outer/inner\n")
    write(tmp_path / "groups" / "outer", cpu__max=f"{quota}\n")
    write(tmp_path / "groups" / "outer" / "inner", cpu__max="max 100000\n")
    assert cpu_count(tmp_path, tmp_path / "groups") == processors


@pytest.mark.parametrize(("quota", "processors"), [("-1", 8), ("300000", 3), ("250000", 3)])
def test_processors_are_those_of_a_quota_of_version_1(
    tmp_path: Path, eight_processors: None, quota: str, processors: int
) -> None:
    write(tmp_path / "self", cgroup="5:memory:/x\n7:cpu,cpuacct:/docker/0123\n")
    write(tmp_path / "groups" / "cpu", cpu__cfs_quota_us=f"{quota}\n", cpu__cfs_period_us="100000\n")
    assert cpu_count(tmp_path, tmp_path / "groups") == processors


def test_without_control_groups_all_processors_count(tmp_path: Path, eight_processors: None) -> None:
    assert cpu_count(tmp_path, tmp_path) == 8


def test_free_memory_without_proc_asks_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_free_memory(tmp_path, tmp_path) > 0
    monkeypatch.delattr("os.sysconf_names")
    with pytest.raises(OSError, match=r"the free memory of this system .* cannot be read"):
        host_free_memory(tmp_path, tmp_path)


def test_a_gpu_is_described_in_one_line() -> None:
    assert str(GpuInfo(0, "GPU X", 8 * 2**30, 2**30)) == "GPU X, 8.0 GiB in all, 1.0 GiB free"
    broken = GpuInfo(1, "GPU Y", 8 * 2**30, None, "its memory is full")
    assert str(broken) == "GPU Y, 8.0 GiB in all, cannot be used: its memory is full"
