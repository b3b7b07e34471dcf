"""The jobs that the processes of the GPU benchmark do; each returns plain numbers and texts."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.peers_gpu.contenders import GPU_CONTENDERS, EngineEpochs
from benchmarks.peers_gpu.floor import measure_bandwidth, measure_products
from benchmarks.peers_gpu.kernels import measure_launches, measure_plain, measure_steps
from catopt_xp.backend.devices import cuda_version
from catopt_xp.backend.xp import Backend, get_backend
from catopt_xp.commands.bench import BenchError, Contender, Workload, small_workload
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.cuda.engine import CoresEngine, CudaEngine
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.optim.rules import make_optimizer
from catopt_xp.training.train import train

LIBRARIES = ("numpy", "torch", "triton", "jax", "jaxlib", "pytest")
KERNELS = {"panels": CudaEngine, "panels-cores": CoresEngine}


class GpuJobs:
    """The jobs of one process on `device`: "cuda", or "cpu" to rehearse those that need no GPU.

    Workloads are passed as dictionaries of their fields.

    >>> jobs, work = GpuJobs("cpu"), dataclasses.asdict(Workload(n_x=12, m=10, batch_size=4))
    >>> jobs.make("plain", work)["versions"]["catopt_xp"] != ""
    True
    >>> len(jobs.losses("plain", 2))
    6
    >>> jobs.turn("plain", 3) > 0
    True
    """

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self._contenders: dict[str, Contender] = {}

    def _backend(self) -> Backend:
        return get_backend(self.device, strict_device=True)

    def _gpu(self) -> Backend:
        backend = self._backend()
        if backend.name != "cupy":
            raise BenchError(f"there is nothing to measure of {backend.device}, which is no GPU")
        return backend

    # --- contenders ---------------------------------------------------------------------------------------------------

    def make(self, name: str, work: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a contender, in place of an earlier one of that name; returns the seconds that took, and versions."""
        self._contenders.pop(name, None)
        start = time.perf_counter()
        contender = GPU_CONTENDERS[name].make(_workload(work), self.device)
        self._contenders[name] = contender
        made = {"seconds_to_make": time.perf_counter() - start, "versions": contender.versions()}
        return made | {"convention": contender.convention}

    def losses(self, name: str, epochs: int) -> list[float]:
        """Makes some more epochs, and returns the losses of all steps so far."""
        contender = self._contenders[name]
        contender.steps(epochs * contender.workload.batches)
        losses: list[float] = contender.losses().tolist()
        return losses

    def turn(self, name: str, epochs: int) -> float:
        """Mean seconds of some epochs, after one that is not timed."""
        contender = self._contenders[name]
        contender.steps(contender.workload.batches)
        gc.disable()
        try:
            start = time.perf_counter()
            contender.steps(epochs * contender.workload.batches)
            return (time.perf_counter() - start) / epochs
        finally:
            gc.enable()

    def drop(self, *names: str) -> None:
        """Gives back the memory of contenders; without names, of all."""
        for name in names or tuple(self._contenders):
            self._contenders.pop(name, None)
        gc.collect()
        if self.device != "cpu":
            cupy, torch = (sys.modules.get(library) for library in ("cupy", "torch"))
            if cupy is not None:
                cupy.get_default_memory_pool().free_all_blocks()
            if torch is not None:
                torch.cuda.empty_cache()

    def reference(self, work: Mapping[str, Any], epochs: int, device: str) -> list[float]:
        """Losses of the plain engine in float64, with which the others are compared; `device`: where it runs."""
        exact = dataclasses.replace(_workload(work), dtype="float64")
        plain = EngineEpochs(PlainEngine, exact, get_backend(device, strict_device=True))
        plain.steps(epochs * exact.batches)
        losses: list[float] = plain.losses().tolist()
        return losses

    # --- the machine --------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The GPU, the driver, and the libraries' versions. Raises DeviceError where there is no usable GPU."""
        backend = self._backend()
        versions = {}
        for library in LIBRARIES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[library] = importlib.metadata.version(library)
        facts: dict[str, Any] = {"device": backend.device, "versions": versions | backend.versions()}
        if backend.name == "cupy":
            runtime = backend.xp.cuda.runtime
            properties = runtime.getDeviceProperties(int(backend.device.removeprefix("cuda:")))
            facts |= {
                "gpu": properties["name"].decode(),
                "compute_capability": f"{properties['major']}.{properties['minor']}",
                "multiprocessors": properties["multiProcessorCount"],
                "l2_bytes": properties["l2CacheSize"],
                "memory_bytes": properties["totalGlobalMem"],
                "cuda_runtime": cuda_version(runtime.runtimeGetVersion()),
                "cuda_driver": cuda_version(runtime.driverGetVersion()),
            }
        return facts

    def bandwidth(self) -> dict[str, float]:
        """As `measure_bandwidth`."""
        return measure_bandwidth(self._gpu())

    def products(self, dtype: str) -> float:
        """As `measure_products`."""
        return measure_products(self._gpu(), dtype)

    def launches(self) -> dict[str, float]:
        """As `measure_launches`."""
        return measure_launches(self._gpu())

    def steps(self, work: Mapping[str, Any], engine: str) -> dict[str, Any]:
        """As `measure_steps`, of a panel engine by its name among GPU_CONTENDERS."""
        measured = measure_steps(_workload(work), self._gpu(), KERNELS[engine])
        self.drop()
        return measured

    def plain_epoch(self, work: Mapping[str, Any]) -> dict[str, float]:
        """As `measure_plain`."""
        measured = measure_plain(_workload(work), self._backend())
        self.drop()
        return measured

    # --- what a user waits for ----------------------------------------------------------------------------------------

    def first_steps(self, work: Mapping[str, Any]) -> dict[str, float]:
        """Seconds to a first epoch in a process that has made nothing yet, by part.

        `device`: CuPy and its probe; `set`: moved to the device; `engine`: its check, and kernels compiled or loaded;
        `first_epoch`, `second_epoch`.
        """
        workload, laps = _workload(work), Laps()
        pixels = workload.pixels()  # drawn here, but read from a file elsewhere, so not timed
        laps.end("")
        backend = self._backend()
        laps.end("device")
        network = workload.network().to(backend)
        optimizer = make_optimizer(workload.optimizer, network.save(), workload.rate)
        samples, targets = backend.asarray(pixels), backend.asarray(workload.targets())
        backend.synchronize()  # sync
        laps.end("set")
        with backend.activate():
            settings = Settings(workload.batch_size)
            engine, _ = choose_engine("auto", network, optimizer, samples, targets, backend, settings)
            backend.synchronize()  # sync
            laps.end("engine")
            for epoch, name in enumerate(("first_epoch", "second_epoch")):
                for _ in engine.steps(epoch, workload.order(epoch), following=workload.order(epoch + 1)):
                    pass
                engine.fetch_losses()
                laps.end(name)
        del laps.seconds[""]
        return laps.seconds

    def train(self, epochs: int, **options: Any) -> dict[str, Any]:
        """Calls `train` on the drawn set at batch 64, and returns where its time went; `options`: for that call.

        A call of one epoch comes first, so that the drawn set and the kernels are in their caches.
        """
        self._train(1, options)
        start = time.perf_counter()
        result = self._train(epochs, options)
        wall = time.perf_counter() - start
        history = result.history
        return {
            "epochs": epochs,
            "wall": wall,
            "stages": history.timings,
            "epoch": statistics.median(history.seconds),
            "first_epoch": history.seconds[0],
            "device": result.device,
            "engine": result.engine,
            "engine_reason": result.engine_reason,
            "cost": history.full_train_loss[-1],
            "accuracy": history.train_accuracy[-1],
        }

    def _train(self, epochs: int, options: Mapping[str, Any]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return train(
                device=self.device,
                strict_device=True,
                total_epoch=epochs,
                save_dir=folder,
                progress=False,
                verbose=False,
                **options,
            )


def few_steps(device: str = "cuda") -> None:
    """Two epochs of both panel engines on a small workload, for NVIDIA's checkers of memory accesses and races."""
    work, jobs = dataclasses.asdict(small_workload()), GpuJobs(device)
    for name in KERNELS:
        jobs.make(name, work)
        jobs.losses(name, 2)


class Laps:
    """Seconds from one end to the next, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def end(self, name: str) -> None:
        """Ends the current lap under this name, and begins the next."""
        now = time.perf_counter()
        self.seconds[name], self._start = now - self._start, now


def _workload(fields: Mapping[str, Any]) -> Workload:
    return Workload(**{**fields, "hidden": tuple(fields["hidden"])})


__all__ = ["KERNELS", "GpuJobs", "few_steps"]
