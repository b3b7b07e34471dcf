"""`catopt-xp bench`: seconds per epoch of this library's engines against batch size, beside the floor of the machine.

All contenders train from the same weights on the same rows in the same order. Before anything is timed, their losses
are compared. Then they take turns: in each round every contender makes some steps, and ratios are taken within a round,
so that other programs and the processor's clock affect all contenders alike. Medians over the rounds count. The floor
is measured twice: what this machine can reach, the best of many measurements, and what it reached in each round.

A contender of another library is timed by handing its `Entry` to `Measurement`, as `benchmarks/peers` does.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from catopt_xp.backend.machine import cpu_count, cpu_model, host_free_memory
from catopt_xp.backend.xp import NumpyBackend
from catopt_xp.commands.floor import READ_AND_WRITTEN, Floor, measure_floor
from catopt_xp.data.dataset import check_memory
from catopt_xp.data.order import batches, epoch_order
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.plain import Settings
from catopt_xp.io.files import write_whole
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import OPTIMIZERS
from catopt_xp.version import __version__

Rows = NDArray[np.int64]

PIXEL_STREAM, LABEL_STREAM = 3, 4  # keep these random numbers apart from those of weights and orders
SIGNAL_EVERY = 8  # one column in so many tells the classes apart
SIGNAL = np.uint8(16)  # a bit that is set in those columns in every sample of class 1

CHECKED_STEPS = 12  # updates whose losses are compared
TOLERANCE = 1e-3  # relative difference of a loss, float32 against float64, over CHECKED_STEPS updates
RATES = {"gd": 0.02, "momentum": 0.1, "rmsprop": 1e-3, "adam": 1e-3}  # the loss moves at these rates, but does not jump

BATCH_SIZES: tuple[int, ...] = (1, 8, 64, 128, 512, 2000)
QUICK_BATCH_SIZES: tuple[int, ...] = (8, 64, 2000)
ROUNDS, QUICK_ROUNDS = 7, 3
SECONDS, QUICK_SECONDS = 0.9, 0.3
BUSY = 0.3  # share of the processors that other programs took in the last minute
RESULTS = "bench.json"
FORMAT = 1  # version of the file; a change that readers must know counts it up


class BenchError(RuntimeError):
    """A contender does not do the work, or the work cannot be timed; the message is one line."""


# --- the work ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A network, a set and a way to train on it. Everything is a function of these few numbers.

    The default is the reference workload, the chapter's: 2000 pictures of 224x224x3 pixels, layers of 30, 20, 20 and 1
    units. The pixels are noise with a planted signal: nothing is downloaded, and the loss still moves.

    `n_x`: pixels of a sample; `hidden`: units of the hidden layers, relu (the output is one sigmoid); `m`: samples;
    `optimizer`: a name of `OPTIMIZERS`; `learning_rate`: per step, None takes the chapter's; `seed`: of everything;
    `dtype`: of the weights, float32 or float64.

    Raises ValueError for an unknown optimizer, or numbers below 1.

    >>> work = Workload(n_x=12, m=10, batch_size=4)
    >>> work.batches, work.rate, work.pixels().shape, work.targets().shape
    (3, 1e-05, (10, 12), (1, 10))
    """

    n_x: int = 150528
    hidden: tuple[int, ...] = (30, 20, 20)
    m: int = 2000
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float | None = None
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; choose {', '.join(OPTIMIZERS)}")
        if not self.hidden or min(self.n_x, self.m, self.batch_size, *self.hidden) < 1:
            raise ValueError(
                "a workload needs at least 1 pixel, sample, hidden layer and unit, and a batch_size from 1"
            )

    @property
    def layers(self) -> list[int]:
        """Units of every layer, the input first."""
        return [self.n_x, *self.hidden, 1]

    @property
    def activations(self) -> list[str]:
        """The activation of every layer after the input."""
        return ["relu"] * len(self.hidden) + ["sigmoid"]

    @property
    def rate(self) -> float:
        """The learning rate per step."""
        return OPTIMIZERS[self.optimizer][1] if self.learning_rate is None else self.learning_rate

    @property
    def batches(self) -> int:
        """Mini-batches, that is updates, in an epoch; the last one may be short."""
        return len(batches(self.m, self.batch_size))

    def pixels(self) -> NDArray[np.uint8]:
        """The set, (m, n_x) uint8; the set drawn last is kept."""
        return _pixels(self.n_x, self.m, self.seed)

    def targets(self) -> NDArray[Any]:
        """Labels 0 and 1, (1, m), of the weights' type."""
        return _labels(self.m, self.seed).astype(self.dtype).reshape(1, -1)

    def network(self) -> DeepNetwork:
        """A new network with the initial weights."""
        network = DeepNetwork(self.layers, self.activations, seed=self.seed)
        if self.dtype == "float32":
            return network
        twin = DeepNetwork(self.layers, self.activations, dtype=self.dtype)
        twin.load(network.save())  # float64 draws would be other numbers
        return twin

    def weights(self) -> dict[str, NDArray[Any]]:
        """Initial weights by name: `W0, W1, …` (n_out, n_in) by He, `b0, b1, …` (n_out, 1), zero."""
        return {name: np.array(values) for name, values in self.network().save().items()}

    def order(self, epoch: int) -> Rows:
        """The order of the rows in an epoch, (m,)."""
        return epoch_order(self.m, epoch, self.seed)

    def row_batches(self) -> Iterator[Rows]:
        """Yields the rows of each mini-batch, epoch after epoch, without an end.

        >>> [len(rows) for rows in itertools.islice(Workload(n_x=1, m=10, batch_size=4).row_batches(), 4)]
        [4, 4, 2, 4]
        """
        for epoch in itertools.count():
            order = self.order(epoch)
            for part in batches(self.m, self.batch_size):
                yield order[part]


@functools.lru_cache(maxsize=1)
def _pixels(n_x: int, m: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.Generator(np.random.PCG64([seed, PIXEL_STREAM]))
    pixels = rng.integers(0, 256, (m, n_x), dtype=np.uint8)
    columns = pixels[:, ::SIGNAL_EVERY]
    columns |= _labels(m, seed)[:, None] * SIGNAL
    return pixels


def _labels(m: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.Generator(np.random.PCG64([seed, LABEL_STREAM]))
    return rng.permutation(np.arange(m, dtype=np.uint8) % 2)  # half of each class


def drop_pixels() -> None:
    """Gives back the memory of the set that is kept."""
    _pixels.cache_clear()


def state_bytes(work: Workload) -> int:
    """Bytes that a step cannot avoid: the first layer's weights and moments are read and written once.

    >>> state_bytes(Workload()) / 1e6
    108.38016
    """
    return READ_AND_WRITTEN * work.n_x * work.hidden[0] * (1 + len(OPTIMIZERS[work.optimizer][0].moment_names))


def operations(work: Workload) -> int:
    """Operations of an epoch: each sample is multiplied with the first layer twice, forward and for the gradient.

    >>> operations(Workload()) / 1e9
    36.12672
    """
    return 4 * work.n_x * work.hidden[0] * work.m


def floor_seconds(floor: Floor, work: Workload) -> float:
    """The least seconds of an epoch: each step moves the state, and the epoch does the operations.

    >>> floor = Floor(bandwidth=50e9, rate=300e9, threads=2, traffic_by="", product_by="")
    >>> round(floor_seconds(floor, Workload(batch_size=64)), 3)
    0.19
    """
    return floor.seconds(work.batches * state_bytes(work), operations(work))


# --- the contenders ---------------------------------------------------------------------------------------------------


class Contender(abc.ABC):
    """Trains on a workload, one update per mini-batch, and remembers the losses.

    `workload`: what to do; `threads`: how many threads it may use. The constructor makes weights, sets as floats and
    compiled code, which are not timed.
    """

    name: str
    """Its name in the table."""
    convention = "chapter"
    """Whose form of the optimizer it has: a name of `BaseOptimizer.conventions`."""

    def __init__(self, workload: Workload, threads: int) -> None:
        self.workload, self.threads = workload, threads
        self._libraries = ThreadpoolController()  # the search for them takes milliseconds, so no step does it

    @abc.abstractmethod
    def steps(self, count: int) -> None:
        """Makes the next `count` mini-batch updates from where the last call ended; all is done on return."""

    @abc.abstractmethod
    def losses(self) -> NDArray[np.float64]:
        """The mini-batch loss of every step so far."""

    @abc.abstractmethod
    def versions(self) -> dict[str, str]:
        """The versions of the libraries that do the work, by name."""


class OurEngine(Contender):
    """An engine of this library, by name.

    `convention`: whose form of the optimizer it takes, a name of `BaseOptimizer.conventions`; the rest as for
    `Contender`. Raises ValueError where the engine cannot run this, RuntimeError where it fails its check.

    >>> ours = OurEngine("plain", Workload(n_x=12, m=10, batch_size=4), threads=1)
    >>> ours.steps(4)
    >>> ours.losses().shape
    (4,)
    """

    def __init__(self, engine: str, workload: Workload, threads: int, convention: str = "chapter") -> None:
        super().__init__(workload, threads)
        network = workload.network()
        # All contenders have this beta; a convention has its library's default.
        beta = {"beta": 0.9} if workload.optimizer == "rmsprop" else {}
        kind = OPTIMIZERS[workload.optimizer][0]
        optimizer = kind.preset(convention, network.save(), workload.rate, **beta)
        settings = Settings(workload.batch_size)
        with used_threads(threads, self._libraries):
            self._engine, why = choose_engine(
                engine, network, optimizer, workload.pixels(), workload.targets(), NumpyBackend(), settings
            )
        self.name, self.convention = self._engine.name, convention
        if self.name != engine:
            raise RuntimeError(f"{engine} was not run: {why}")
        self._past: list[NDArray[np.floating]] = []  # losses of the epochs that are over
        self._done = 0  # batches of the current epoch
        self._running = self._epochs()

    def _epochs(self) -> Iterator[None]:
        """Makes step after step, without an end."""
        for epoch in itertools.count():
            order, following = self.workload.order(epoch), self.workload.order(epoch + 1)
            for done in self._engine.steps(epoch, order, following=following):
                self._done = done
                yield
            self._past.append(self._engine.fetch_losses())
            self._done = 0

    def steps(self, count: int) -> None:
        with used_threads(self.threads, self._libraries):
            for _ in range(count):
                next(self._running)

    def losses(self) -> NDArray[np.float64]:
        now = self._engine.fetch_losses()[: self._done]
        return np.concatenate([*self._past, now]).astype(np.float64)

    def versions(self) -> dict[str, str]:
        numba = {"numba": importlib.metadata.version("numba")} if self.name == "panels" else {}
        return {"catopt_xp": __version__, "numpy": np.__version__} | numba


@contextmanager
def used_threads(threads: int, libraries: ThreadpoolController) -> Iterator[None]:
    """Limits the threads of this library and of matrix products inside a `with` block.

    `libraries`: those that make the products.

    >>> from catopt_xp.backend.machine import thread_count
    >>> with used_threads(1, ThreadpoolController()):
    ...     thread_count()
    1
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        with libraries.limit(limits=threads, user_api="blas"):
            yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@dataclass(frozen=True)
class Entry:
    """How to make a contender, and what it needs.

    `make`: makes it for a workload and a number of threads; `memory`: about how many bytes it takes for a workload,
    besides the pixels; `library`: the module that must be installed, and its name for pip; `lacks`: a phrase for each
    optimizer that it does not have.
    """

    make: Callable[[Workload, int], Contender]
    memory: Callable[[Workload], int]
    library: tuple[str, str] = ("numpy", "numpy")
    lacks: Mapping[str, str] = field(default_factory=dict)

    def obstacle(self, work: Workload) -> str | None:
        """Why the contender cannot run this workload here, as a phrase, or None.

        >>> print(OURS["plain"].obstacle(Workload(n_x=12)))
        None
        """
        module, distribution = self.library
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed (pip install {distribution})"
        if work.optimizer in self.lacks:
            return self.lacks[work.optimizer]
        needed, free = self.memory(work), host_free_memory()
        if needed > free:
            return f"it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        return None


def state_numbers(work: Workload) -> int:
    """Numbers in the first layer's weights, gradient and two moments.

    >>> state_numbers(Workload(n_x=100, hidden=(10, 5)))
    4000
    """
    return 4 * work.n_x * work.hidden[0]


def our_memory(work: Workload) -> int:
    """About how many bytes an engine of this library takes besides the pixels.

    >>> our_memory(Workload()) / 1e9
    0.14450688
    """
    return 4 * 2 * state_numbers(work)


OURS: Mapping[str, Entry] = {
    "panels": Entry(partial(OurEngine, "panels"), our_memory, library=("numba", "numba")),
    "plain": Entry(partial(OurEngine, "plain"), our_memory),
}


# --- do all compute the same? -----------------------------------------------------------------------------------------


def small_workload(optimizer: str = "adam") -> Workload:
    """A workload of the same kind that takes milliseconds; its mini-batches are 40, 40 and 16 samples."""
    return Workload(n_x=3000, m=96, batch_size=40, optimizer=optimizer, learning_rate=RATES[optimizer])


def check_agreement(contenders: Mapping[str, Entry], threads: int, work: Workload) -> dict[str, float]:
    """The largest relative difference of each contender's losses from the plain engine's in float64, by name.

    `contenders`: all must be able to run here. A contender with its own convention (PyTorch's RMSprop) is compared with
    the plain engine in that convention. Raises BenchError naming the first one that differs by more than TOLERANCE.

    >>> check_agreement(OURS, 1, small_workload())["plain"] < 1e-4
    True
    """
    differences = {}
    for name, entry in contenders.items():
        contender = entry.make(work, threads)
        contender.steps(CHECKED_STEPS - 5)
        contender.steps(5)  # the second call must go on where the first ended
        reference = reference_losses(work, threads, contender.convention)
        differences[name] = difference(name, contender.losses(), reference)
    return differences


def reference_losses(
    work: Workload, threads: int, convention: str = "chapter", steps: int = CHECKED_STEPS
) -> NDArray[np.float64]:
    """The losses of the first `steps` updates by the plain engine in float64, on a CPU.

    >>> reference_losses(small_workload(), threads=1, steps=3).shape
    (3,)
    """
    plain = OurEngine("plain", dataclasses.replace(work, dtype="float64"), threads, convention)
    plain.steps(steps)
    return plain.losses()


def difference(
    name: str, losses: NDArray[np.float64], reference: NDArray[np.float64], tolerance: float = TOLERANCE
) -> float:
    """The largest difference of a contender's losses from the reference's, relative to the reference.

    Raises BenchError naming the contender where the difference exceeds `tolerance`, or where losses are missing.

    >>> difference("panels", np.array([0.7, 0.6]), np.array([0.7, 0.6]))
    0.0
    """
    if losses.shape != reference.shape:
        raise BenchError(f"{name} made {losses.size} steps of {reference.size}: it is not timed")
    largest = float(np.max(np.abs(losses - reference) / reference))
    if not largest <= tolerance:
        raise BenchError(
            f"{name} does not compute the same: a loss differs by {largest:.1e} of its size, at most"
            f" {tolerance:g} is allowed; mend it, or leave it out"
        )
    return largest


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """What is timed.

    `workload`: all but its batch size; `threads`: of each contender; `contenders`: by name, the first is the one that
    the others are compared with; `rounds`: how many turns each has; `seconds`: about how long a turn is, at least one
    step and at most an epoch.

    Raises ValueError without a batch size or a contender.
    """

    workload: Workload
    threads: int
    batch_sizes: Sequence[int] = BATCH_SIZES
    contenders: Mapping[str, Entry] = field(default_factory=lambda: OURS)
    rounds: int = ROUNDS
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        if not self.batch_sizes or not self.contenders:
            raise ValueError("a benchmark needs at least one batch size and one contender")

    def workloads(self) -> list[Workload]:
        """The workload with each batch size, at most the number of samples, none twice.

        >>> [work.batch_size for work in Measurement(Workload(m=100), 1, [8, 64, 128, 512]).workloads()]
        [8, 64, 100]
        """
        sizes = dict.fromkeys(min(size, self.workload.m) for size in self.batch_sizes)
        return [dataclasses.replace(self.workload, batch_size=size) for size in sizes]


def run_table(measured: Measurement, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Checks, measures and times; says a line for each batch size, and returns all of it as JSON takes it.

    Raises BenchError where a contender computes something else, or where no contender can run; ValueError where the
    memory does not hold the pixels.
    """
    work, threads = measured.workload, measured.threads
    check_memory("the pixels of the benchmark", work.n_x * work.m, "choose a smaller --n-x or --samples")
    able, absent = _able(measured.contenders, work)
    for name, why in absent.items():
        say(f"{name} is left out: {why}")
    if not able:
        raise BenchError("no contender is left to be timed")
    machine = describe_machine()
    if machine["load"] is not None and machine["load"] > BUSY * machine["processors"]:
        say(f"other programs are at work (load {machine['load']:.1f}): these times will be too long, and not all alike")
    agreement = check_agreement(able, threads, small_workload(work.optimizer))
    say(f"all agree: losses differ by at most {max(agreement.values()):.1e} of their size")
    floor = measure_floor(threads)
    say(f"floor: {floor}")
    say(f"seconds per epoch; (…x): times {next(iter(able))}'s; ~: some steps were timed, and scaled to an epoch")
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for sized in measured.workloads():
        floor = floor.better(measure_floor(threads))
        row, used = _row(able, sized, measured, say)
        rows.append(row)
        versions |= used
        say(line(_against_floor(row, sized, floor)))
        gc.collect()  # an engine and its running epoch refer to each other, and would keep their memory
    drop_pixels()
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": describe_code(),
        "machine": machine,
        "versions": versions,
        "threads": threads,
        "workload": dataclasses.asdict(work) | {"batch_size": None, "learning_rate": work.rate},
        "rounds": measured.rounds,
        "agreement": agreement,
        "floor": dataclasses.asdict(floor),
        "absent": absent,
        "rows": [_against_floor(row, sized, floor) for row, sized in zip(rows, measured.workloads(), strict=True)],
    }


def _able(contenders: Mapping[str, Entry], work: Workload) -> tuple[dict[str, Entry], dict[str, str]]:
    """The contenders that can run a workload here, and why the others cannot."""
    absent = {name: why for name, entry in contenders.items() if (why := entry.obstacle(work)) is not None}
    return {name: entry for name, entry in contenders.items() if name not in absent}, absent


def _row(
    able: Mapping[str, Entry], work: Workload, measured: Measurement, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Times one batch size; returns its row, and the versions of what did the work."""
    contenders, absent = _make(able, work, measured.threads)
    for name, why in absent.items():
        say(f"batch {work.batch_size}: {name} is left out: {why}")
    versions: dict[str, str] = {}
    for contender in contenders:
        versions |= contender.versions()
    return _turns(contenders, work, measured) | {"absent": absent}, versions


def _make(able: Mapping[str, Entry], work: Workload, threads: int) -> tuple[list[Contender], dict[str, str]]:
    """Makes the contenders for a batch size, and says why others are missing: each leaves less memory to the next."""
    contenders, missing = [], {}
    for name, entry in able.items():
        why = entry.obstacle(work)
        if why is None:
            contenders.append(entry.make(work, threads))
        else:
            missing[name] = why
    if not contenders:
        raise BenchError(f"batch {work.batch_size}: no contender can run: {'; '.join(missing.values())}")
    return contenders, missing


def _turns(contenders: Sequence[Contender], work: Workload, measured: Measurement) -> dict[str, Any]:
    """Lets all contenders take turns at one batch size."""
    counts = [_steps_in_a_turn(contender, work, measured.seconds) for contender in contenders]
    turns: list[list[float]] = [[] for _ in contenders]  # seconds per epoch
    floors: list[float] = []
    for _ in range(measured.rounds):
        measure_floor(measured.threads, in_turn=True)  # the first one after some peers runs at half the speed
        floors.append(floor_seconds(measure_floor(measured.threads, in_turn=True), work))
        for contender, count, seconds in zip(contenders, counts, turns, strict=True):
            contender.steps(1)  # the turns of others have pushed its data out of the caches and taken its memory
            seconds.append(seconds_of(contender, count) * work.batches / count)
    timed = {}
    for contender, count, seconds in zip(contenders, counts, turns, strict=True):
        timed[contender.name] = {
            "seconds_per_epoch": statistics.median(seconds),
            "ratio": statistics.median(theirs / first for theirs, first in zip(seconds, turns[0], strict=True)),
            "of_floor_in_turns": statistics.median(s / floor for s, floor in zip(seconds, floors, strict=True)),
            "steps_timed": count,
            "turns": seconds,
        }
    return {"batch_size": work.batch_size, "steps": work.batches, "floor_turns": floors, "contenders": timed}


def _against_floor(row: Mapping[str, Any], work: Workload, floor: Floor) -> dict[str, Any]:
    """Adds the floor to a row, and how many times the floor each contender takes."""
    lowest = floor_seconds(floor, work)
    timed = {name: x | {"of_floor": x["seconds_per_epoch"] / lowest} for name, x in row["contenders"].items()}
    return {**row, "floor_seconds": lowest, "contenders": timed}


def _steps_in_a_turn(contender: Contender, work: Workload, seconds: float) -> int:
    """How many steps take about so many seconds; the contender warms up meanwhile."""
    once = seconds_of(contender, 1)
    if once < seconds:  # the first step compiles, or touches its memory for the first time
        once = seconds_of(contender, 2) / 2
    return max(1, min(work.batches, int(seconds / max(once, 1e-9))))


def seconds_of(contender: Contender, count: int) -> float:
    """Wall-clock seconds of the next `count` steps."""
    start = time.perf_counter()
    contender.steps(count)
    return time.perf_counter() - start


def line(row: Mapping[str, Any]) -> str:
    """The text of a row.

    >>> timed = {"seconds_per_epoch": 0.36, "ratio": 1.0, "of_floor": 2.0, "of_floor_in_turns": 1.8, "steps_timed": 32}
    >>> print(line({"batch_size": 64, "steps": 32, "floor_seconds": 0.18, "contenders": {"panels": timed}}))
    batch    64: floor 0.180 s, panels 0.360 s (2.00x the floor, in turns 1.80x)
    """
    parts = [f"floor {row['floor_seconds']:.3f} s"]
    for number, (name, timed) in enumerate(row["contenders"].items()):
        about = "~" if timed["steps_timed"] < row["steps"] else ""
        of_floor = f"{timed['of_floor']:.2f}x the floor, in turns {timed['of_floor_in_turns']:.2f}x"
        ratio = f"{timed['ratio']:.2f}x" if number else of_floor
        parts.append(f"{name} {about}{timed['seconds_per_epoch']:.3f} s ({ratio})")
    return f"batch {row['batch_size']:5d}: {', '.join(parts)}"


def describe_machine() -> dict[str, Any]:
    """The processor and their number, free memory in bytes, the load of the last minute, the system and Python."""
    try:
        free: int | None = host_free_memory()
    except OSError:  # a system that does not tell
        free = None
    return {
        "cpu": cpu_model(),
        "processors": cpu_count(),
        "free_memory": free,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def describe_code() -> dict[str, str]:
    """The version of this package, and in a checkout its commit, with "-dirty" where files differ from it."""
    checkout = Path(__file__).parents[2]
    code = {"version": __version__}
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        try:
            code["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:  # no git, or a checkout that it does not trust
            code["commit"] = f"unknown ({type(error).__name__} of git)"
    return code


def write_table(results: Mapping[str, Any], folder: Path) -> Path:
    """Writes `bench.json` into a folder, whole or not at all, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RESULTS
    text = json.dumps(results, indent=1) + "\n"
    write_whole(file, lambda stream: stream.write(text.encode()))
    return file
