"""How a device is chosen, the warning when it is not the one asked for, and the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catopt_xp.backend import xp as backend_module
from catopt_xp.backend.devices import DeviceError, DeviceFallbackWarning, ProbeResult
from catopt_xp.backend.xp import CupyBackend, device_report, get_backend

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CATOPT_XP_DEVICE", raising=False)
    monkeypatch.delenv("CATOPT_XP_STRICT_DEVICE", raising=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = ProbeResult(False, "there is no NVIDIA driver", "install its driver")
    monkeypatch.setattr(backend_module, "probe_gpu", lambda load, index=0: failure)


def test_cpu_is_numpy_and_a_backend_is_returned_as_it_is(fake_cupy: Any) -> None:
    cpu = get_backend("cpu")
    assert (cpu.xp, cpu.name, cpu.device, cpu.reason) == (np, "numpy", "cpu", "device='cpu' asks for it")
    assert get_backend(cpu) is cpu
    gpu = CupyBackend(fake_cupy, 1)
    assert get_backend(gpu, strict_device=True) is gpu


@pytest.mark.parametrize("device", ["tpu", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "", None, 0, np.zeros(2)])
def test_an_unknown_device_lists_the_choices(device: Any) -> None:
    with pytest.raises(ValueError, match=r'is not known: choose "auto", "cpu", "cuda", "cuda:N" or a Backend') as e:
        get_backend(device)
    assert "\n" not in str(e.value)
    assert f"device={device!r}" in str(e.value)


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_usable_gpu_is_taken(fake_cupy: Any, device: str, index: int) -> None:
    b = get_backend(device, strict_device=True)
    assert isinstance(b, CupyBackend)
    assert (b.xp, b.index, b.device) == (fake_cupy, index, f"cuda:{index}")
    assert b.reason


def test_auto_takes_the_cpu_without_a_warning_and_says_why(no_gpu: None) -> None:
    b = get_backend("auto", strict_device=True)
    assert b.name == "numpy"
    assert b.reason == "no GPU can be used: there is no NVIDIA driver"


def test_cuda_without_a_gpu_warns_where_it_was_asked_for(no_gpu: None) -> None:
    with pytest.warns(DeviceFallbackWarning) as caught:
        b = get_backend("cuda:1")
    assert (b.name, b.device) == ("numpy", "cpu")
    assert b.reason == "device='cuda:1' cannot be used: there is no NVIDIA driver"
    assert str(caught[0].message) == f"{b.reason}. To use it: install its driver. Running on the CPU."
    assert caught[0].filename == __file__


def test_the_warning_points_outside_the_package_through_any_depth(no_gpu: None) -> None:
    inside = Path(backend_module.__file__).with_name("training.py")
    scope = {"get_backend": get_backend}
    exec(compile("def train(device):\n    return get_backend(device)\n", str(inside), "exec"), scope)
    with pytest.warns(DeviceFallbackWarning) as caught:
        scope["train"]("cuda")
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("argument", "variable"), [(True, None), (None, "1"), (True, "0")])
def test_strict_device_makes_it_an_error(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, argument: bool | None, variable: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv("CATOPT_XP_STRICT_DEVICE", variable)
    with pytest.raises(DeviceError, match=r"no NVIDIA driver\. To use it: install its driver"):
        get_backend("cuda", strict_device=argument)


@pytest.mark.parametrize(("argument", "variable"), [(False, "1"), (None, "0"), (None, "")])
def test_strict_device_can_be_off(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, argument: bool | None, variable: str
) -> None:
    monkeypatch.setenv("CATOPT_XP_STRICT_DEVICE", variable)
    with pytest.warns(DeviceFallbackWarning):
        assert get_backend("cuda", strict_device=argument).device == "cpu"


def test_the_environment_decides_what_auto_means(fake_cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATOPT_XP_DEVICE", "cpu")
    assert get_backend().reason == "CATOPT_XP_DEVICE=cpu asks for it"
    assert get_backend("cuda:1").device == "cuda:1"
    monkeypatch.setenv("CATOPT_XP_DEVICE", "cuda:1")
    assert get_backend().device == "cuda:1"
    assert get_backend("cpu").device == "cpu"
    monkeypatch.setenv("CATOPT_XP_DEVICE", "tpu")
    with pytest.raises(ValueError, match="CATOPT_XP_DEVICE=tpu is not known"):
        get_backend()


def test_this_machine_for_real() -> None:
    report = device_report()
    assert get_backend("auto").device == report.device
    if report.gpu_usable:
        assert report.device == "cuda:0"
        assert report.gpus[0].total_memory > 0
    else:
        with pytest.warns(DeviceFallbackWarning, match="To use it: "):
            assert get_backend("cuda").device == "cpu"
        assert report.gpu_cause
        assert report.gpu_cure
        assert report.gpu_cause in str(report)


def test_report_of_a_machine_with_gpus(fake_cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = fake_cupy.arange

    def arange(n: int, dtype: Any) -> Any:
        if fake_cupy.current[-1] == 1:
            raise MemoryError("Out of memory allocating 512 bytes")
        return zeros(n, dtype)

    monkeypatch.setattr(fake_cupy, "arange", arange)
    report = device_report()
    assert (report.device, report.backend, report.runtime_cuda) == ("cuda:0", "cupy", "12.9")
    assert [(gpu.name, gpu.free_memory) for gpu in report.gpus] == [("Fake GPU", 1000), ("Fake GPU", None)]
    assert "the memory of cuda:1 is full" in report.gpus[1].problem
    assert "GPU cuda:1:     Fake GPU, 1.0 GiB in all, cannot be used" in str(report)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_report_without_a_gpu_is_complete_and_ready_for_json() -> None:
    report = device_report()
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields == report.to_dict()
    assert fields["numpy"] == np.__version__
    assert fields["host_free_memory"] > 0
    assert fields["cpu_count"] >= 1
    assert fields["cpu"]
    lines = str(report).splitlines()
    assert lines[0].startswith(f"device:         {report.device} ({report.backend}): ")
    assert all(line[15] == " " for line in lines)


def test_import_and_numpy_arrays_do_not_load_cupy() -> None:
    code = (
        "import sys, numpy, catopt_xp.backend.xp as b\n"
        "b.get_backend('cpu'); b.backend_of(numpy.zeros(2)); b.asnumpy([1]); b.get_array_module([1])\n"
        "optional = {'cupy', 'numba', 'PIL', 'matplotlib', 'sklearn', 'mpi4py'}\n"
        "print(sorted(optional & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "[]", "")
