"""The stages of the GPU benchmark, the share of time that each may take, and what each does."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers_gpu.contenders import GPU_CONTENDERS, OURS, missing_library
from benchmarks.peers_gpu.deadline import Clock, Stage, run_command
from benchmarks.peers_gpu.jobs import KERNELS, GpuJobs
from benchmarks.peers_gpu.row import FIRST, Crew, Row
from benchmarks.peers_gpu.worker import Worker
from catopt_xp.backend.machine import thread_count
from catopt_xp.commands.bench import (
    BenchError,
    Workload,
    describe_code,
    describe_machine,
    difference,
    reference_losses,
    small_workload,
)

REFERENCE = Workload()
ROOT = Path(__file__).parents[2]  # the checkout, which has the tests
DEADLINE = 540.0  # seconds
BATCH_SIZES, QUICK_BATCH_SIZES = (8, 64, 128, 2000, 512), (8, 64, 2000)
ROUNDS, QUICK_ROUNDS = 7, 3
SECONDS = 0.1  # length of a turn
EXACT = 1e-9  # relative difference of a loss, between the plain engine in float64 here and on the CPU
TRAIN_EPOCHS = 100
SIZES = (37632, 75264, 301056, 602112)  # features: the state is smaller and larger than the cache
MACHINE = "machine"  # all other stages need this one
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.total"
SANITIZED = "from benchmarks.peers_gpu.jobs import few_steps; few_steps()"


@dataclass(frozen=True)
class GpuPlan:
    """What is done.

    `work`: all but its batch size; `batch_sizes`: in the order in which they are timed; `deadline`: seconds for
    everything; `rounds`: turns of each contender; `tests`: whether the tests marked `gpu` run first; `compiled`: times
    torch.compile too, which takes the longest to make; `explore`: adds what those who work on the kernels want to
    know; `device`: "cuda", or "cpu" for a rehearsal; `train_options`: passed to `train`; `commit`: the commit of the
    code, where the checkout does not tell.
    """

    work: Workload = REFERENCE
    batch_sizes: Sequence[int] = BATCH_SIZES
    deadline: float = DEADLINE
    rounds: int = ROUNDS
    tests: bool = True
    compiled: bool = True
    explore: bool = False
    device: str = "cuda"
    train_options: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None

    def workload(self, batch_size: int) -> Workload:
        """The workload with a batch size."""
        return dataclasses.replace(self.work, batch_size=min(batch_size, self.work.m))

    def names(self, compiled: bool = False) -> list[str]:
        """The contenders that are timed without a request: those of torch.compile where `compiled`, else the others."""
        shown = {name: entry for name, entry in GPU_CONTENDERS.items() if not entry.explored}
        return [name for name, entry in shown.items() if (entry.family == "torch.compile") == compiled]

    def settings(self) -> dict[str, Any]:
        """What must be the same to resume an interrupted measurement."""
        work = dataclasses.asdict(self.work) | {"batch_size": None, "hidden": list(self.work.hidden)}
        return {"workload": work, "rounds": self.rounds, "device": self.device}


def plan_stages(plan: GpuPlan, crew: Crew) -> list[Stage]:
    """The stages of a plan, the most important first; their limits may add up to more than the deadline."""
    stages = [Stage(MACHINE, 60, partial(_machine, crew, plan))]
    if plan.tests:
        stages.append(Stage("tests", 120, _tests))
    stages += [Stage("ceilings", 40, partial(_ceilings, crew)), Stage("agreement", 90, partial(_agreement, crew, plan))]
    for size in plan.batch_sizes:
        stages.append(Stage(f"batch {size}", 70, partial(_row, crew, plan, size, plan.names())))
    stages += [
        Stage("kernels", 45, partial(_kernels, crew, plan)),
        Stage("start-up", 40, partial(_start_up, plan)),
        Stage("train", 90, partial(_train, plan)),
    ]
    if plan.compiled:
        names = [FIRST, *plan.names(compiled=True)]
        stages += [Stage(f"compiled {size}", 110, partial(_row, crew, plan, size, names)) for size in plan.batch_sizes]
    if plan.explore:
        names = [FIRST, *(name for name, entry in GPU_CONTENDERS.items() if entry.explored)]
        stages.append(Stage("sizes", 60, partial(_sizes, crew, plan)))
        stages += [Stage(f"explored {size}", 90, partial(_row, crew, plan, size, names)) for size in plan.batch_sizes]
        stages += [Stage(tool, 90, partial(_sanitizer, tool)) for tool in ("memcheck", "racecheck")]
    return stages


# --- what the stages do -----------------------------------------------------------------------------------------------


def _machine(crew: Crew, plan: GpuPlan, clock: Clock, data: dict[str, Any]) -> None:
    code = describe_code() | ({} if plan.commit is None else {"commit": plan.commit})
    data |= {"code": code, "host": describe_machine()}
    data |= crew.ask("ours", "describe", clock.left())
    data["nvidia-smi"] = nvidia_smi(clock)


def nvidia_smi(clock: Clock) -> dict[str, str] | str:
    """What the driver's tool says about the first GPU, by name, or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        status, text = run_command(command, min(10.0, clock.left()))
    except BenchError as error:
        return str(error)
    values = [value.strip() for value in text.split(",")]
    names = QUERY.split(",")
    return text if status or len(values) != len(names) else dict(zip(names, values, strict=True))


def _tests(clock: Clock, data: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    status, text = run_command(command, clock.left(), ROOT, {"PYTHONPATH": str(ROOT)})
    data |= {"status": status, "summary": (text.splitlines() or [""])[-1].strip("= ")}
    if status:
        data["output"] = text
        raise BenchError(f"pytest ended with {status}: {data['summary']}")


def _ceilings(crew: Crew, clock: Clock, data: dict[str, Any]) -> None:
    data["bandwidth"] = crew.ask("ours", "bandwidth", clock.left())
    for dtype in ("float32", "float16"):
        data[dtype] = crew.ask("ours", "products", clock.left(), dtype)
    data["nvidia-smi"] = nvidia_smi(clock)  # its clocks, while it is at work


def _agreement(crew: Crew, plan: GpuPlan, clock: Clock, data: dict[str, Any]) -> None:
    """Compares everyone with the plain engine in float64 on the CPU, on a small workload. Ours run twice."""
    work = small_workload()
    fields, exact = dataclasses.asdict(work), reference_losses(work, thread_count())
    epochs = len(exact) // work.batches
    here = crew.ask("ours", "reference", clock.left(), fields, epochs, plan.device)
    agreed = {"plain, float64": difference("plain in float64", np.array(here), exact, EXACT)}
    absent: dict[str, str] = {}
    data |= {"differences": agreed, "absent": absent, "same_bits": {}}
    for name in plan.names():
        family, entry = GPU_CONTENDERS[name].family, GPU_CONTENDERS[name]
        missing = None if plan.device == "cpu" else missing_library(name)
        try:
            if missing is not None:
                raise BenchError(missing)
            runs = []
            for _ in range(2 if entry.side == OURS else 1):
                crew.ask(family, "make", clock.left(), name, fields)
                crew.ask(family, "losses", clock.left(), name, epochs - 1)
                runs.append(crew.ask(family, "losses", clock.left(), name, 1))  # goes on where the first call ended
            agreed[name] = difference(name, np.array(runs[0]), exact)
        except BenchError as error:
            absent[name] = str(error)
        else:
            if entry.side == OURS:
                data["same_bits"][name] = runs[0] == runs[1]
    crew.drop(10.0)
    faults = [f"{name}: {why}" for name, why in absent.items() if GPU_CONTENDERS[name].side == OURS]
    faults += [f"{name}: two runs differ" for name, same in data["same_bits"].items() if not same]
    if faults:
        raise BenchError("; ".join(faults))


def _row(crew: Crew, plan: GpuPlan, size: int, names: Sequence[str], clock: Clock, data: dict[str, Any]) -> None:
    Row(crew, plan.workload(size), names, plan.rounds, SECONDS).run(clock, data)


def _kernels(crew: Crew, plan: GpuPlan, clock: Clock, data: dict[str, Any]) -> None:
    """Measures a launch, the plain engine's epochs, and the kernels of both panel engines at each batch size."""
    data["launches"] = crew.ask("ours", "launches", clock.left())
    data["plain"] = {
        str(size): crew.ask("ours", "plain_epoch", clock.left(), dataclasses.asdict(plan.workload(size)))
        for size in plan.batch_sizes
    }
    cases = [(engine, plan.workload(size)) for size in plan.batch_sizes for engine in KERNELS]
    _measure_steps(crew, cases, clock, data)


def _sizes(crew: Crew, plan: GpuPlan, clock: Clock, data: dict[str, Any]) -> None:
    """Measures the panel engine with fewer and more features: its state fits into the cache, or does not."""
    small = plan.workload(plan.batch_sizes[0])
    cases = [(FIRST, dataclasses.replace(small, n_x=n_x)) for n_x in (*SIZES, small.n_x)]
    _measure_steps(crew, cases, clock, data)


def _measure_steps(crew: Crew, cases: Sequence[tuple[str, Workload]], clock: Clock, data: dict[str, Any]) -> None:
    steps: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    data |= {"steps": steps, "failed": failed}
    for engine, work in cases:
        try:
            measured = crew.ask("ours", "steps", clock.left(), dataclasses.asdict(work), engine)
            steps.append({"name": engine, **measured})
        except BenchError as error:
            failed[f"{engine}, batch {work.batch_size}, {work.n_x} features"] = str(error)
    crew.drop(10.0)
    if not steps:
        raise BenchError("; ".join(f"{case}: {why}" for case, why in failed.items()))


def _start_up(plan: GpuPlan, clock: Clock, data: dict[str, Any]) -> None:
    """Times the first epoch in two new processes: with nothing compiled, then with all in CuPy's cache."""
    with tempfile.TemporaryDirectory(prefix="catopt_xp-cache-") as cache:
        for name in ("cold", "warm"):
            with Worker(partial(GpuJobs, plan.device), {"CUPY_CACHE_DIR": cache}) as worker:
                data[name] = worker.ask("first_steps", clock.left(), dataclasses.asdict(plan.workload(64)))


def _train(plan: GpuPlan, clock: Clock, data: dict[str, Any]) -> None:
    with Worker(partial(GpuJobs, plan.device)) as worker:
        data |= worker.ask("train", clock.left(), TRAIN_EPOCHS, **plan.train_options)


def _sanitizer(tool: str, clock: Clock, data: dict[str, Any]) -> None:
    """Runs NVIDIA's checker of memory accesses or of races over a few steps of both panel engines."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", sys.executable, "-c", SANITIZED]
    status, text = run_command(command, clock.left(), ROOT, {"PYTHONPATH": str(ROOT)})
    data |= {"status": status, "output": text}
    if status:
        raise BenchError(f"{tool} ended with {status}")


__all__ = ["DEADLINE", "MACHINE", "GpuPlan", "nvidia_smi", "plan_stages"]
