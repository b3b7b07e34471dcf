"""One batch size: each contender is made and checked in its family's process, then all take turns."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks.peers_gpu.contenders import GPU_CONTENDERS, missing_library
from benchmarks.peers_gpu.deadline import Clock
from benchmarks.peers_gpu.jobs import GpuJobs
from benchmarks.peers_gpu.worker import OutOfTime, Worker
from catopt_xp.commands.bench import BenchError, Workload, difference

ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {
    "jax": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # otherwise JAX takes most of the memory, which others need
}
FIRST = "panels"  # the others are compared with it
CHECKED_STEPS = 12  # at least so many losses must be the reference's
TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 5e-2  # relative difference of a loss; float32 stays within 1e-6
TURNS_SECONDS, TIMING_SHARE = 2.5, 0.3  # kept for the turns of each contender; at most this share of a row's time
MOST_EPOCHS = 2000  # in a turn


class Crew:
    """The processes of the benchmark, one for each family of contenders. Ends them when its `with` block ends."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.close()

    def family(self, name: str) -> Worker:
        """The process of a family, by its name."""
        if name not in self._workers:
            self._workers[name] = Worker(partial(GpuJobs, self.device), ENVIRONMENTS.get(name))
        return self._workers[name]

    def of(self, contender: str) -> Worker:
        """The process that holds a contender."""
        return self.family(GPU_CONTENDERS[contender].family)

    def ask(self, family: str, job: str, limit: float, *arguments: Any) -> Any:
        """As `Worker.ask` of a family's process. A failure ends that process: its GPU may be in any state."""
        worker = self.family(family)
        try:
            return worker.ask(job, limit, *arguments)
        except BenchError:
            if limit > 0:
                worker.close()
            raise

    def drop(self, limit: float) -> None:
        """Lets every process give its memory back; one that cannot is ended."""
        for worker in self._workers.values():
            if worker.running:
                try:
                    worker.ask("drop", limit)
                except BenchError:
                    worker.close()


class Row:
    """The contenders at one batch size. `run` puts all that it finds into `data`, even where it fails.

    `work`: with the batch size; `names`: of GPU_CONTENDERS; `rounds`: how many turns each has; `seconds`: about how
    long a turn is.
    """

    def __init__(self, crew: Crew, work: Workload, names: Sequence[str], rounds: int, seconds: float) -> None:
        self.crew, self.work, self.names = crew, work, names
        self.rounds, self.seconds = rounds, seconds
        self._fields = dataclasses.asdict(work)
        self._start_of: dict[str, int] = {}  # the start of its process in which a contender was made
        self._count: dict[str, int] = {}  # epochs in a turn
        self._cost: dict[str, float] = {}  # seconds of a turn, about

    def run(self, clock: Clock, data: dict[str, Any]) -> None:
        """Checks and times within the clock; raises BenchError where nobody can be timed."""
        timed: dict[str, Any] = {}
        absent: dict[str, str] = {}
        data |= {"batch_size": self.work.batch_size, "steps": self.work.batches, "contenders": timed, "absent": absent}
        try:
            epochs = -(-CHECKED_STEPS // self.work.batches)
            reference = self._reference(epochs, clock, data)
            for name in self.names:
                with _noted(name, absent):
                    timed[name] = self._join(name, epochs, reference, clock)
            data["rounds"] = self._turns(clock, timed, absent)
        finally:
            self.crew.drop(10.0)
        if not any("turns" in found for found in timed.values()):
            raise BenchError(f"nobody was timed: {'; '.join(f'{name}: {why}' for name, why in absent.items())}")

    def _reference(self, epochs: int, clock: Clock, data: dict[str, Any]) -> np.ndarray[Any, Any]:
        """The losses of the plain engine in float64, on the device or else on the CPU."""
        try:
            losses = self.crew.ask("ours", "reference", clock.left() / 2, self._fields, epochs, self.crew.device)
        except BenchError as error:
            data["reference_on_cpu"] = str(error)
            losses = self.crew.ask("ours", "reference", clock.left() / 2, self._fields, epochs, "cpu")
        return np.array(losses)

    def _join(self, name: str, epochs: int, reference: np.ndarray[Any, Any], clock: Clock) -> dict[str, Any]:
        """Makes a contender, checks it, and measures how many epochs fit into a turn."""
        missing = None if self.crew.device == "cpu" else missing_library(name)
        if missing is not None:
            raise BenchError(missing)
        limit = clock.left() - min(TIMING_SHARE * clock.seconds, TURNS_SECONDS * len(self.names))
        if limit <= 0:
            raise OutOfTime("no time was left to make it")
        found = self._make(name, limit)
        losses = self._ask(name, "losses", clock, epochs)
        tolerance = ROUNDED_TOLERANCE if GPU_CONTENDERS[name].rounded else TOLERANCE
        found["difference"] = difference(name, np.array(losses), reference, tolerance)
        once = self._ask(name, "turn", clock, 1)
        self._count[name] = max(1, min(MOST_EPOCHS, int(self.seconds / once)))
        self._cost[name] = once * (1 + self._count[name])
        return found

    def _make(self, name: str, limit: float) -> dict[str, Any]:
        made: dict[str, Any] = self.crew.ask(GPU_CONTENDERS[name].family, "make", limit, name, self._fields)
        self._start_of[name] = self.crew.of(name).starts
        return made

    def _ask(self, name: str, job: str, clock: Clock, epochs: int) -> Any:
        return self.crew.ask(GPU_CONTENDERS[name].family, job, clock.left(), name, epochs)

    def _turns(self, clock: Clock, timed: dict[str, Any], absent: dict[str, str]) -> int:
        """Lets all take turns, round by round, while there is time; returns the number of rounds."""
        rounds = 0
        while rounds < self.rounds:
            left = [name for name in timed if name not in absent]
            if not left or (rounds and sum(self._cost[name] for name in left) > clock.left()):
                break
            for name in left:
                with _noted(name, absent):
                    self._turn(name, clock, timed[name].setdefault("turns", []))
            rounds += 1
        for name, found in timed.items():
            if found.get("turns"):
                found["seconds_per_epoch"] = statistics.median(found["turns"])
                found["epochs_timed"] = self._count[name]
            if found.get("turns") and timed.get(FIRST, {}).get("turns"):
                found["ratio"] = median_ratio(found["turns"], timed[FIRST]["turns"])
        return rounds

    def _turn(self, name: str, clock: Clock, turns: list[float]) -> None:
        worker = self.crew.of(name)
        if not worker.running or worker.starts != self._start_of[name]:  # another's failure ended its process
            self._make(name, clock.left())
        turns.append(self._ask(name, "turn", clock, self._count[name]))


@contextlib.contextmanager
def _noted(name: str, absent: dict[str, str]) -> Iterator[None]:
    """Notes the reason of a failure inside, which takes the contender out."""
    try:
        yield
    except BenchError as error:
        absent[name] = str(error)


def median_ratio(theirs: Iterable[float], first: Iterable[float]) -> float:
    """The median over the rounds of one contender's time over the first one's.

    >>> median_ratio([2.0, 4.0, 6.0], [1.0, 1.0, 2.0])
    3.0
    """
    return statistics.median(their / own for their, own in zip(theirs, first, strict=False))


__all__ = ["FIRST", "Crew", "Row"]
