"""Seconds per epoch of the reference workload against batch size, ours and its peers, each beside the floor.

An epoch of the slow ones takes half a minute, so that within a batch size all time the same number of steps, and the
seconds per epoch are scaled from it: they are in `extra_info`, with the steps timed and the ratio to the floor. Before
anything is timed, all contenders must agree on the losses of a small workload; where one does not, every test fails.
Contenders of a batch size run one after the other; `python -m benchmarks.peers` interleaves their rounds.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pytest

from benchmarks.peers.contenders import CONTENDERS, QUICK
from benchmarks.peers.peer import drop_sets
from catopt_xp import Backend, get_backend, make_optimizer
from catopt_xp.commands.bench import TOLERANCE, OurEngine, Workload, check_agreement, floor_seconds, small_workload
from catopt_xp.commands.floor import Floor, measure_floor
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.plain import Settings

STEPS = {1: 16, 8: 16, 64: 4, 128: 4, 512: 2, 2000: 1}  # by batch size: how many are timed at once
BUDGET = 1.5  # seconds for the rounds of one contender, where they fit
ROUNDS, SLOW_ROUNDS = (3, 30), 2  # at least and at most; those of a contender whose first one takes all of the budget
OTHER_OPTIMIZERS = ("gd", "momentum", "rmsprop")  # at batch size 64; Adam is timed at all of them


class Steps(Protocol):
    """What can be timed: makes the next `count` updates, and all is done on return."""

    def steps(self, count: int) -> None: ...


@pytest.fixture(scope="session")
def floor(threads: int) -> Floor:
    """What this machine can reach."""
    return measure_floor(threads)


@pytest.fixture(scope="session")
def agreement(threads: int) -> dict[str, dict[str, float]]:
    """How far each contender is from the plain engine in float64, by optimizer; raises where that is too far."""
    agreed = {}
    for optimizer in ("adam", *OTHER_OPTIMIZERS):
        work = small_workload(optimizer)
        able = {name: entry for name, entry in CONTENDERS.items() if entry.obstacle(work) is None}
        agreed[optimizer] = check_agreement(able, threads, work)
    return agreed


@pytest.fixture(scope="module", autouse=True)
def sets() -> Iterator[None]:
    """The pixels are made once for this module, and their memory is given back."""
    yield
    drop_sets()


def measure(benchmark: Any, runner: Steps, work: Workload, floor: Floor, count: int) -> float:
    """Times so many steps, after a warm-up; the seconds per epoch, also noted with where they come from."""
    rounds = SLOW_ROUNDS
    if seconds_of(runner, count) < BUDGET:  # a first call is slower than those that follow
        rounds = int(np.clip(BUDGET / seconds_of(runner, count), *ROUNDS))
    benchmark.group = f"{work.optimizer}, batch size {work.batch_size}: {count} of {work.batches} steps"
    benchmark.pedantic(runner.steps, args=(count,), rounds=rounds)
    epochs = count / work.batches
    seconds: float = benchmark.stats.stats.median / epochs
    benchmark.extra_info |= {
        "steps_timed": count,
        "steps_per_epoch": work.batches,
        "seconds_per_epoch": seconds,  # of the median; a busy machine shows in the best one
        "best_seconds_per_epoch": benchmark.stats.stats.min / epochs,
        "floor_seconds_per_epoch": floor_seconds(floor, work),
        "ratio_to_floor": seconds / floor_seconds(floor, work),
    }
    return seconds


def seconds_of(runner: Steps, count: int) -> float:
    start = time.perf_counter()
    runner.steps(count)
    return time.perf_counter() - start


def compete(benchmark: Any, name: str, work: Workload, threads: int, floor: Floor, agreed: dict[str, float]) -> None:
    """Times a contender, or skips it with the reason."""
    reason = CONTENDERS[name].obstacle(work)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    contender = CONTENDERS[name].make(work, threads)
    seconds = measure(benchmark, contender, work, floor, STEPS[work.batch_size])
    benchmark.extra_info |= {"threads": threads, "versions": contender.versions(), "difference": agreed[name]}
    assert seconds > 0
    assert np.isfinite(contender.losses()).all()


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("batch_size", STEPS)
def test_batch_size(
    name: str,
    batch_size: int,
    agreement: dict[str, dict[str, float]],
    floor: Floor,
    threads: int,
    benchmark: Any,
) -> None:
    compete(benchmark, name, Workload(batch_size=batch_size), threads, floor, agreement["adam"])


@pytest.mark.parametrize("name", QUICK)  # making the chapter's set is slow
@pytest.mark.parametrize("optimizer", OTHER_OPTIMIZERS)
def test_optimizer(
    name: str,
    optimizer: str,
    agreement: dict[str, dict[str, float]],
    floor: Floor,
    threads: int,
    benchmark: Any,
) -> None:
    compete(benchmark, name, Workload(optimizer=optimizer), threads, floor, agreement[optimizer])


# --- on a GPU ---------------------------------------------------------------------------------------------------------


class OnDevice:
    """The engine that `train` takes on a device, with the set resident there."""

    def __init__(self, work: Workload, backend: Backend) -> None:
        self.work, self.backend = work, backend
        network = work.network().to(backend)
        optimizer = make_optimizer(work.optimizer, network.save(), work.rate)
        samples, targets = backend.asarray(work.pixels()), backend.asarray(work.targets())
        settings = Settings(work.batch_size)
        self.engine, self.why = choose_engine("auto", network, optimizer, samples, targets, backend, settings)
        self._running = self._epochs()

    def _epochs(self) -> Iterator[int]:
        """How many steps were made, each time that the engine answers: on a GPU it makes some dozens at a time."""
        for epoch in itertools.count():
            order, following, before = self.work.order(epoch), self.work.order(epoch + 1), 0
            for done in self.engine.steps(epoch, order, following=following):
                yield done - before
                before = done

    def steps(self, count: int) -> None:
        with self.backend.activate():
            while count > 0:
                count -= next(self._running)
            assert count == 0, "the engine made more steps than were asked for"
            self.backend.synchronize()


def difference_of_losses(backend: Backend, threads: int) -> float:
    """The largest relative difference over an epoch, from the plain engine on the CPU in float64."""
    work = small_workload()
    here = OnDevice(work, backend)
    reference = OurEngine("plain", dataclasses.replace(work, dtype="float64"), threads)
    for runner in (here, reference):
        runner.steps(work.batches)
    return float(np.abs(here.engine.fetch_losses() / reference.losses() - 1).max())


def test_the_gpu_runner_on_the_cpu(threads: int) -> None:
    """What the GPU tests run is tried where there is none."""
    assert difference_of_losses(get_backend("cpu"), threads) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", STEPS)
def test_on_gpu(batch_size: int, gpu: Backend, floor: Floor, threads: int, benchmark: Any) -> None:
    assert difference_of_losses(gpu, threads) <= TOLERANCE
    work = Workload(batch_size=batch_size)
    runner = OnDevice(work, gpu)
    seconds = measure(benchmark, runner, work, floor, work.batches)
    benchmark.extra_info |= {"device": str(gpu.device), "engine": runner.engine.name, "floor_of": "the CPU"}
    assert seconds > 0
