"""The table: seconds per epoch of every contender at every batch size, timed in turns.

What differs from minute to minute (other programs, the processor's clock) shall fall on all alike: in each round every
contender makes some steps, one after the other, and ratios are taken within a round. Medians over the rounds count. The
floor is taken twice: what this machine can reach, the best of many measurements, and what it reached in each round.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from catopt_xp.backend.machine import cpu_count, cpu_model, host_free_memory
from catopt_xp.bench.agreement import BenchError, check_agreement, small_workload
from catopt_xp.bench.base_contender import Contender
from catopt_xp.bench.contenders import CONTENDERS, available
from catopt_xp.bench.floor import Floor, measure_floor
from catopt_xp.bench.workload import Workload, drop_sets
from catopt_xp.data.dataset import check_memory
from catopt_xp.io.files import write_whole
from catopt_xp.version import __version__

BATCH_SIZES: tuple[int, ...] = (1, 8, 64, 128, 512, 2000)
QUICK_BATCH_SIZES: tuple[int, ...] = (8, 64, 2000)
ALL_CONTENDERS = tuple(CONTENDERS)
QUICK_CONTENDERS = tuple(name for name in CONTENDERS if name != "chapter")  # it takes longer than all others together
ROUNDS, QUICK_ROUNDS = 7, 3
SECONDS, QUICK_SECONDS = 0.9, 0.3
BUSY = 0.3  # of the processors, taken by others over the last minute
RESULTS = "bench.json"
FORMAT = 1  # of the file; a change that readers must know counts it up


@dataclass(frozen=True)
class Plan:
    """What is timed.

    `workload`: all but its batch size; `contenders`: names of CONTENDERS, those that others are compared with first;
    `rounds`: how often each has its turn; `seconds`: about how long a turn is, at least one step and at most an epoch.

    Raises ValueError for an unknown contender, or for an empty list.
    """

    workload: Workload
    threads: int
    batch_sizes: Sequence[int] = BATCH_SIZES
    contenders: Sequence[str] = ALL_CONTENDERS
    rounds: int = ROUNDS
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        if not self.batch_sizes or not self.contenders:
            raise ValueError("a benchmark needs at least one batch size and one contender")
        for name in self.contenders:
            available(name)

    def workloads(self) -> list[Workload]:
        """The workload with each batch size, none beyond all samples, none twice.

        >>> [work.batch_size for work in Plan(Workload(m=100), 1, [8, 64, 128, 512]).workloads()]
        [8, 64, 100]
        """
        sizes = dict.fromkeys(min(size, self.workload.m) for size in self.batch_sizes)
        return [dataclasses.replace(self.workload, batch_size=size) for size in sizes]


def run_table(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Checks, measures and times; says a line for each batch size, and returns all of it, JSON-able.

    Raises BenchError where a contender computes something else, or where none can run; ValueError without the memory.
    """
    work = plan.workload
    check_memory("the pixels of the benchmark", work.n_x * work.m, "choose a smaller --n-x or --samples")
    absent = {name: why for name in plan.contenders if (why := available(name, work)) is not None}
    names = [name for name in plan.contenders if name not in absent]
    for name, why in absent.items():
        say(f"{name} is left out: {why}")
    if not names:
        raise BenchError("no contender is left to be timed; name others with --contenders")
    machine = describe_machine()
    if machine["load"] is not None and machine["load"] > BUSY * machine["processors"]:
        say(f"other programs are at work (load {machine['load']:.1f}): these times will be too long, and not all alike")
    agreement = check_agreement(names, plan.threads, small_workload(work.optimizer))
    say(f"all agree: losses differ by at most {max(agreement.values()):.1e} of their size")
    floor = measure_floor(plan.threads)
    say(f"floor: {floor}")
    say(f"seconds per epoch; (…x): times {names[0]}'s; ~: some steps were timed, and scaled to an epoch")
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for sized in plan.workloads():
        floor = floor.better(measure_floor(plan.threads))
        contenders, missing = _make(names, sized, plan.threads)
        for name, why in missing.items():
            say(f"batch {sized.batch_size}: {name} is left out: {why}")
        for contender in contenders:
            versions |= contender.versions()
        rows.append(_row(contenders, sized, plan) | {"absent": missing})
        say(line(_against_floor(rows[-1], sized, floor)))
        # An engine and its running epoch hold one another: without this they would wait in memory.
        del contenders, contender
        gc.collect()
    drop_sets()
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": describe_code(),
        "machine": machine,
        "versions": versions,
        "threads": plan.threads,
        "workload": dataclasses.asdict(work) | {"batch_size": None, "learning_rate": work.rate},
        "rounds": plan.rounds,
        "agreement": agreement,
        "floor": dataclasses.asdict(floor),
        "absent": absent,
        "rows": [_against_floor(row, sized, floor) for row, sized in zip(rows, plan.workloads(), strict=True)],
    }


def _make(names: Sequence[str], work: Workload, threads: int) -> tuple[list[Contender], dict[str, str]]:
    """The contenders for a batch size, and why others are missing: each takes memory from those after it."""
    contenders, missing = [], {}
    for name in names:
        why = available(name, work)
        if why is None:
            contenders.append(CONTENDERS[name](work, threads))
        else:
            missing[name] = why
    if not contenders:
        raise BenchError(f"batch {work.batch_size}: no contender can run: {'; '.join(missing.values())}")
    return contenders, missing


def _row(contenders: Sequence[Contender], work: Workload, plan: Plan) -> dict[str, Any]:
    """One batch size: all contenders, in turns."""
    counts = [_steps_in_a_turn(contender, work, plan.seconds) for contender in contenders]
    turns: list[list[float]] = [[] for _ in contenders]  # seconds per epoch
    floors: list[float] = []
    for _ in range(plan.rounds):
        measure_floor(plan.threads, in_turn=True)  # the first one after some peers runs at half the speed
        floors.append(measure_floor(plan.threads, in_turn=True).seconds(work))
        for contender, count, seconds in zip(contenders, counts, turns, strict=True):
            contender.steps(1)  # after the others' turns its data are far from the processor, its memory given back
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
    """The row with the floor, and how many times that each contender takes."""
    lowest = floor.seconds(work)
    timed = {name: x | {"of_floor": x["seconds_per_epoch"] / lowest} for name, x in row["contenders"].items()}
    return {**row, "floor_seconds": lowest, "contenders": timed}


def _steps_in_a_turn(contender: Contender, work: Workload, seconds: float) -> int:
    """How many steps take so long; it warms up meanwhile."""
    once = seconds_of(contender, 1)
    if once < seconds:  # the first one compiles, or touches its memory for the first time
        once = seconds_of(contender, 2) / 2
    return max(1, min(work.batches, int(seconds / max(once, 1e-9))))


def seconds_of(contender: Contender, count: int) -> float:
    """Wall-clock seconds that so many steps take."""
    start = time.perf_counter()
    contender.steps(count)
    return time.perf_counter() - start


def line(row: Mapping[str, Any]) -> str:
    """One batch size in words.

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
    """Processor, how many of it, free memory in bytes, programs that ran in the last minute, system and Python."""
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
    """The version of this package; in a checkout also its commit, with "-dirty" where files differ from it."""
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
    """Writes `bench.json` into a folder, whole or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RESULTS
    text = json.dumps(results, indent=1) + "\n"
    write_whole(file, lambda stream: stream.write(text.encode()))
    return file
