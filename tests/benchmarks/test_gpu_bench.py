"""The GPU benchmark without a GPU: floors, contenders on the CPU, and what watches kernels, on stand-ins."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_runs import CpuDevice

from benchmarks.peers_gpu import floor as gpu_floor
from benchmarks.peers_gpu import jobs as gpu_jobs
from benchmarks.peers_gpu import kernels as gpu_kernels
from benchmarks.peers_gpu.contenders import COLUMNS, GPU_CONTENDERS, EngineEpochs, missing_library
from benchmarks.peers_gpu.epochs import ORDERS
from benchmarks.peers_gpu.floor import Ceilings, epoch_bytes, step_bytes
from benchmarks.peers_gpu.jobs import GpuJobs
from benchmarks.peers_gpu.kernels import Recorder, measure_launches, measure_plain, measure_steps
from catopt_xp.backend.machine import thread_count
from catopt_xp.backend.xp import NumpyBackend
from catopt_xp.commands.bench import BenchError, Contender, Workload, difference, reference_losses, small_workload
from catopt_xp.engines.cuda.engine import CoresEngine, CudaEngine
from catopt_xp.engines.plain import PlainEngine
from catopt_xp.optim.rules import OPTIMIZERS

THREADS = thread_count()
TINY = Workload(n_x=40, m=20, batch_size=8)
CPU = NumpyBackend()
MEASURED = {"bandwidth": {"copy": 4.3e12, "in_place": 4e12, "in_place_state": 6e12}, "float32": 5e13, "float16": 7.5e14}

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
needs_fibers = pytest.mark.skipif(cuda_on_cpu.obstacle() is not None, reason=str(cuda_on_cpu.obstacle()))


# The floor.


def test_the_floor_counts_one_state_and_two_pixel_passes() -> None:
    floors = [1e3 * epoch_bytes(Workload(batch_size=size)) / 4.3e12 for size in (8, 64, 128, 2000)]
    np.testing.assert_allclose(floors, [6.441, 0.947, 0.543, 0.1652], atol=5e-4)
    work = Workload(n_x=1000, hidden=(10, 5), m=100, batch_size=25, optimizer="momentum")
    assert step_bytes(work) == 8 * 2 * 1000 * 10 + 2 * 25 * 1000
    assert epoch_bytes(work) == 4 * step_bytes(work)
    assert epoch_bytes(work, sample_bytes=4) == epoch_bytes(work) + 2 * 3 * 100 * 1000


def test_the_floor_is_the_larger_of_bytes_and_the_faster_products() -> None:
    ceilings = Ceilings.from_json(MEASURED)
    assert ceilings == Ceilings(4.3e12, 5e13, 7.5e14)
    floor = ceilings.floor(Workload(batch_size=2000))
    assert floor["seconds"] == floor["by_bytes"] == pytest.approx(1.652e-4, rel=1e-3)
    assert floor["by_float32"] == pytest.approx(4 * 150528 * 30 * 2000 / 5e13)
    assert floor["by_tensor_cores"] == pytest.approx(3 * 4 * 150528 * 30 * 2000 / 7.5e14)
    slow = dataclasses.replace(ceilings, float16=1e13).floor(Workload(batch_size=2000))
    assert slow["seconds"] == slow["by_float32"]


@pytest.mark.parametrize("lost", MEASURED)
def test_without_one_of_the_ceilings_there_is_no_floor(lost: str) -> None:
    assert Ceilings.from_json({name: rate for name, rate in MEASURED.items() if name != lost}) is None


# The contenders, on the CPU.


def agreement(contender: Contender) -> float:
    """In two parts, of which the second goes on where the first ended."""
    work = contender.workload
    contender.steps(3 * work.batches)
    contender.steps(work.batches)
    reference = reference_losses(work, THREADS, contender.convention, 4 * work.batches)
    return difference(contender.name, contender.losses(), reference)


@needs_torch
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("resident", ["uint8", "float32"])
def test_torch_step_by_step_agrees(resident: str, optimizer: str) -> None:
    contender = GPU_CONTENDERS[f"torch-{resident}"].make(small_workload(optimizer), "cpu")
    assert contender.name == f"torch-{resident}"
    assert agreement(contender) < 1e-5
    assert "torch" in contender.versions()


def graph_on_cpu(work: Workload, **options: Any) -> Any:
    """`TorchGraph` whose graphs are the work itself, done again."""
    from benchmarks.peers_gpu.torch_peer import REHEARSALS, TorchGraph

    class OnCpu(TorchGraph):
        def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
            for _ in range(REHEARSALS):
                self._count_anew()
                work()
            return work

    return OnCpu(work, "cpu", **options)


@needs_torch
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"whole_epoch": True}, {"whole_epoch": True, "tf32": True}])
def test_torch_with_graphs_agrees_after_its_rehearsals(optimizer: str, options: dict[str, Any]) -> None:
    work = small_workload(optimizer)
    assert agreement(graph_on_cpu(work, resident="uint8", **options)) < 1e-5


@needs_torch
@pytest.mark.parametrize("batch_size", [1, 5, 20])  # whole batches alone, and one batch
def test_torch_gathers_rows_that_are_no_whole_words(batch_size: int) -> None:
    work = Workload(n_x=37, m=20, batch_size=batch_size, learning_rate=1e-3)
    assert agreement(graph_on_cpu(work, resident="uint8")) < 1e-5
    assert agreement(graph_on_cpu(work, resident="float32")) < 1e-5


@needs_torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_torch_compiled_agrees(optimizer: str) -> None:
    from benchmarks.peers_gpu.torch_peer import TorchCompiled

    contender = TorchCompiled(small_workload(optimizer), "cpu", "uint8", backend="eager")
    assert agreement(contender) < 1e-5


@needs_jax
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["jax-uint8", "jax-float32", "jax-tf32", "jax-unrolled-uint8"])
def test_jax_agrees(name: str, optimizer: str) -> None:
    contender = GPU_CONTENDERS[name].make(small_workload(optimizer), "cpu")
    assert contender.name == name
    assert agreement(contender) < 1e-5
    assert "jax" in contender.versions()


@needs_jax
def test_jax_takes_a_set_that_is_whole_batches() -> None:
    work = dataclasses.replace(small_workload(), batch_size=48)
    assert agreement(GPU_CONTENDERS["jax-uint8"].make(work, "cpu")) < 1e-5


@needs_fibers
@pytest.mark.parametrize("kind", [CudaEngine, CoresEngine])
def test_the_panel_engines_agree(kind: type[CudaEngine]) -> None:
    work = Workload(n_x=300, m=20, batch_size=8, learning_rate=1e-3)
    assert agreement(EngineEpochs(partial(kind, device=CpuDevice()), work, CPU)) < 1e-5


def test_a_contender_makes_whole_epochs_and_its_orders_come_again() -> None:
    contender = EngineEpochs(PlainEngine, TINY, CPU)
    contender.steps(0)
    assert contender.losses().size == 0
    contender.steps(2 * TINY.batches)
    assert contender.losses().size == 2 * TINY.batches
    with pytest.raises(ValueError, match="4 steps are not whole epochs of 3"):
        contender.steps(4)
    np.testing.assert_array_equal(contender.order(ORDERS + 1), TINY.order(1))


def test_what_the_panel_engine_cannot_run_is_named() -> None:
    broad = dataclasses.replace(TINY, hidden=(600,))
    backend = NumpyBackend()
    backend.name = "cupy"
    with pytest.raises(RuntimeError, match="the panel engine cannot run this: the first layer has 600 units"):
        EngineEpochs(CudaEngine, broad, backend)


def test_every_contender_has_a_column_and_those_who_round_are_explored() -> None:
    assert COLUMNS[0] == GPU_CONTENDERS["panels"].column == "panels"
    assert all(entry.explored for entry in GPU_CONTENDERS.values() if entry.rounded)
    assert {entry.family for entry in GPU_CONTENDERS.values()} == {"ours", "torch", "torch.compile", "jax"}


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jax" else object())
    assert missing_library("jax-uint8") == "jax is not installed"
    assert missing_library("torch-uint8") is None


# What watches kernels, on stand-ins for CuPy.


class StandInEvent:
    """Each record is a millisecond after the one before."""

    now = 0.0

    def record(self, stream: Any = None) -> None:
        StandInEvent.now += 1.0
        self.time = StandInEvent.now

    def synchronize(self) -> None:
        assert self.time > 0


class StandInStream:
    def __init__(self, non_blocking: bool = False) -> None:
        self.launches = self.waits = 0
        self.recording = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def synchronize(self) -> None:
        self.waits += 1

    def begin_capture(self) -> None:
        self.recording = True

    def end_capture(self) -> Any:
        self.recording = False
        return SimpleNamespace(launch=lambda stream: None)


class StandInArray(np.ndarray[Any, Any]):
    def set(self, values: Any, stream: Any = None) -> None:
        self[...] = values


class StandInModule:
    """NumPy with the parts of CuPy that measure."""

    def __init__(self) -> None:
        runtime = SimpleNamespace(memGetInfo=lambda: (700, 1000))
        self.launched: list[tuple[Any, ...]] = []
        self.cuda = SimpleNamespace(
            Event=StandInEvent,
            Stream=StandInStream,
            get_elapsed_time=lambda first, last: last.time - first.time,
            runtime=runtime,
        )

    def RawKernel(self, code: str, name: str) -> Callable[..., None]:
        assert f"void {name}(" in code
        return lambda *arguments: self.launched.append(arguments)

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(used_bytes=lambda: 300, total_bytes=lambda: 400, free_all_blocks=lambda: None)

    def zeros(self, shape: Any, dtype: Any, device: str = "cpu") -> Any:
        return np.zeros(shape, dtype).view(StandInArray)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class StandInBackend(NumpyBackend):
    def __init__(self) -> None:
        super().__init__()
        self.xp = StandInModule()

    def elementwise(self, name: str, inputs: str, outputs: str, body: str) -> Any:
        def kernel(factor: Any, *arrays: Any) -> None:
            for array in arrays:
                array *= factor

        return kernel


class WatchedCpu(CpuDevice):
    """Counts what is done once more, after the epochs that are watched."""

    stream = None

    def facts(self, kernel: str) -> dict[str, int]:
        return {"registers": 64, "local_bytes": 0}


@needs_fibers
@pytest.mark.parametrize(("batch_size", "steps"), [(2, 5), (10, 1)])
def test_the_steps_of_the_panel_engine_are_taken_apart(
    batch_size: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_kernels, "SECONDS", 0.0)
    monkeypatch.setattr(gpu_kernels, "REPEATS", 2)
    device = WatchedCpu()
    work = Workload(n_x=300, m=10, batch_size=batch_size, learning_rate=1e-3)
    measured = measure_steps(work, StandInBackend(), CudaEngine, device)
    assert set(measured["kernels"]) == {"middle", "stream"}
    again = -(-gpu_kernels.LEAST_LAUNCHES // steps) * steps
    for kernel in measured["kernels"].values():
        assert kernel["seconds"] == pytest.approx(1e-3 / again)  # a millisecond for all of them
        assert kernel["registers"] == 64
        assert kernel["grid"][0] >= 1
    both = -(-gpu_kernels.LEAST_LAUNCHES // (2 * steps)) * steps
    assert measured["step"] == pytest.approx(1e-3 / both)
    assert measured["stream_bandwidth"] == pytest.approx(step_bytes(work) / measured["kernels"]["stream"]["seconds"])
    assert measured["epoch"]["device"] == pytest.approx(1e-3)
    assert measured["epoch"]["wall"] >= measured["epoch"]["host_queue"]
    assert [state["epoch"] for state in measured["memory"]] == [1, 2]
    assert measured["memory"][0]["used"] == 300


@needs_fibers
def test_what_is_launched_again_is_the_first_chunk_from_its_first_step() -> None:
    device = CpuDevice()
    recorder = Recorder(device)
    work = Workload(n_x=300, m=100, batch_size=2, learning_rate=1e-3)  # two chunks
    contender = EngineEpochs(partial(CudaEngine, device=recorder), work, CPU)
    contender.steps(work.batches)
    assert [launch[0] for launch in recorder.launches] == ["middle", "stream"] * 32
    assert recorder.kernels == ["middle", "stream"]
    assert recorder.waited > 0
    base = next(array for array, _ in reversed(recorder.uploads) if array.shape == (1,))
    assert base[0] == work.batches
    queue, count = recorder.again(["stream"])
    assert (count, base[0]) == (32, 0)
    before = device.launches["stream"]
    queue()
    assert device.launches["stream"] - before == 32


class Headless(CudaEngine):
    """An engine that ends its chunks otherwise."""

    def _queue(self, first: int, count: int) -> None:
        pass


@needs_fibers
def test_launches_of_another_form_are_said() -> None:
    with pytest.raises(BenchError, match="the recorder must learn their new form"):
        measure_steps(dataclasses.replace(TINY, n_x=300), StandInBackend(), Headless, WatchedCpu())


def test_a_launch_is_timed_alone_and_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "LAUNCHES", 3)
    monkeypatch.setattr(gpu_kernels, "REPEATS", 2)
    backend = StandInBackend()
    costs = measure_launches(backend)
    assert costs["device"] == costs["node"] == pytest.approx(1e-3 / 3)
    assert min(costs["host"], costs["graph_host"], costs["upload"]) > 0
    assert backend.xp.launched[0] == ((1,), (32,), (0,))
    assert len(backend.xp.launched) == 3 * (1 + 2 + 3 + 1)  # warm, on the host, on the GPU with its own, recorded


def test_the_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_floor, "COPY_BYTES", 4 * 3000)
    monkeypatch.setattr(gpu_floor, "NUMBERS", 500)
    monkeypatch.setattr(gpu_floor, "SIDE", 20)
    backend = StandInBackend()
    rates = gpu_floor.measure_bandwidth(backend)
    expected = {"copy": 2 * 4 * 3000, "in_place": 2 * 4 * 3000, "in_place_state": 2 * 4 * 3 * 500}
    assert rates == {name: pytest.approx(moved / 1e-3) for name, moved in expected.items()}
    for dtype in ("float32", "float16"):
        assert gpu_floor.measure_products(backend, dtype) == pytest.approx(2 * 20**3 / 1e-3)


def test_the_plain_engine_is_timed_on_both_sides() -> None:
    times = measure_plain(TINY, CPU)
    assert times["host"] == times["device"] > 0  # on a CPU both are the same


# The jobs.


def test_jobs_make_check_time_and_forget_contenders() -> None:
    jobs, work = GpuJobs("cpu"), dataclasses.asdict(TINY)
    made = jobs.make("plain", work)
    assert made["seconds_to_make"] > 0
    assert made["versions"]["numpy"] == np.__version__
    losses = jobs.losses("plain", 2)
    np.testing.assert_allclose(losses, jobs.reference(work, 2, "cpu"), rtol=1e-5)
    assert jobs.turn("plain", 2) > 0
    assert len(jobs.losses("plain", 0)) == (2 + 1 + 2) * TINY.batches  # one epoch before the turn
    jobs.drop()
    with pytest.raises(KeyError, match="plain"):
        jobs.turn("plain", 1)


def test_a_gpu_job_on_the_cpu_is_refused() -> None:
    for job in ("bandwidth", "launches"):
        with pytest.raises(BenchError, match="nothing to measure of cpu"):
            getattr(GpuJobs("cpu"), job)()


def test_the_first_epochs_are_taken_apart() -> None:
    laps = GpuJobs("cpu").first_steps(dataclasses.asdict(TINY))
    assert list(laps) == ["device", "set", "engine", "first_epoch", "second_epoch"]
    assert min(laps.values()) > 0


def test_a_call_of_train_is_timed() -> None:
    options = {"train_size": 4, "dev_size": 2, "img_shape": (8, 8)}
    trained = GpuJobs("cpu").train(2, **options)
    assert (trained["epochs"], trained["device"]) == (2, "cpu")
    assert sum(trained["stages"].values()) <= trained["wall"]
    assert 0 < trained["epoch"] < trained["wall"]


@needs_fibers
def test_the_run_for_the_checkers_takes_both_panel_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Noted(GpuJobs):
        def make(self, name: str, work: Any) -> dict[str, Any]:
            made.append(name)
            return super().make("plain", work)

        def losses(self, name: str, epochs: int) -> list[float]:
            return super().losses("plain", epochs)

    monkeypatch.setattr(gpu_jobs, "GpuJobs", Noted)
    gpu_jobs.few_steps("cpu")
    assert made == ["panels", "panels-cores"]


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = GpuJobs("cpu").describe()
    assert facts["device"] == "cpu"
    assert facts["versions"]["numpy"] == np.__version__
    gpu = {
        "name": b"Some GPU",
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
        "l2CacheSize": 5,
        "totalGlobalMem": 6,
    }
    backend = StandInBackend()
    backend.name, backend.device = "cupy", "cuda:0"
    backend.xp.cuda.runtime = SimpleNamespace(
        getDeviceProperties=lambda index: gpu, runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13010
    )
    monkeypatch.setattr(GpuJobs, "_backend", lambda self: backend)
    monkeypatch.setattr(StandInBackend, "versions", lambda self: {"cupy": "14"})
    facts = GpuJobs().describe()
    assert (facts["gpu"], facts["compute_capability"], facts["l2_bytes"]) == ("Some GPU", "9.0", 5)
    assert (facts["cuda_runtime"], facts["cuda_driver"]) == ("13.0", "13.1")


def test_memory_is_given_back_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    pool = SimpleNamespace(free_all_blocks=lambda: given.append("cupy"))
    cuda = SimpleNamespace(empty_cache=lambda: given.append("torch"))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(get_default_memory_pool=lambda: pool))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    GpuJobs().drop()
    assert given == ["cupy", "torch"]
