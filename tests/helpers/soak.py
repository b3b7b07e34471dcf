"""What a process holds, and whether it grows while the same work is done over and over, for the tests of long use."""

from __future__ import annotations

import gc
import os
import re
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OBSTACLE = None if sys.platform == "linux" else "what a process holds is read from /proc, which is Linux's"
TENTH = 10
UNIT = np.arange(4096, dtype=np.float64)


@dataclass(frozen=True)
class Holdings:
    """Open handles and mapped files by what they name, names of threads, and files below a folder."""

    handles: Counter[str]
    maps: Counter[str]
    threads: Counter[str]
    files: Counter[str]

    @classmethod
    def now(cls, folder: Path) -> Holdings:
        """Those of this process; `folder`: where it is to leave no files behind, temporary ones included."""
        gc.collect()
        handles: list[str] = []
        for number in os.listdir("/proc/self/fd"):
            try:
                handles.append(os.readlink(f"/proc/self/fd/{number}"))
            except FileNotFoundError:  # the one that listed the folder
                continue
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        maps = [words[5] for words in lines if len(words) == 6 and words[5].startswith("/")]
        threads = [thread.name for thread in threading.enumerate()]
        return cls(Counter(handles), Counter(maps), Counter(threads), Counter(str(x) for x in folder.rglob("*")))

    def beyond(self, before: Holdings) -> list[str]:
        """What there is more than before, a line for each."""
        return [
            f"{count} more of {kind}: {name}"
            for kind in ("handles", "maps", "threads", "files")
            for name, count in (getattr(self, kind) - getattr(before, kind)).items()
        ]


def resident_bytes() -> int:
    """Memory of this process that lies in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def yardstick() -> float:
    """Seconds of a piece of work that is always the same: how fast the machine is just now."""
    start = time.perf_counter()
    total = 0.0
    for _ in range(8):
        total += float(np.sqrt(UNIT).sum()) + sum(range(500))
    assert total > 0
    return time.perf_counter() - start


def tenths_ratio(seconds: Sequence[float]) -> float:
    """The median of the last tenth over that of the first one."""
    part = max(1, len(seconds) // TENTH)
    return float(np.median(seconds[-part:]) / np.median(seconds[:part]))


def slope(values: Sequence[float], apart: int) -> float:
    """The growth of values, taken every `apart` times, per time: that of the line through them by least squares."""
    if len(values) < 2:
        return 0.0
    return float(np.polyfit(np.arange(len(values)) * apart, np.asarray(values, dtype=np.float64), 1)[0])


class Pace:
    """Seconds of each time and of the yardstick, and memory in RAM every `apart` times."""

    def __init__(self, apart: int) -> None:
        self.apart = apart
        self.seconds: list[float] = []
        self.yards: list[float] = []
        self.resident: list[int] = []

    def add(self, seconds: float) -> None:
        """Records one more time."""
        if len(self.seconds) % self.apart == 0:
            self.resident.append(resident_bytes())
        self.seconds.append(seconds)
        self.yards.append(yardstick())

    def told(self) -> dict[str, Any]:
        """For a record: figures of the time, which nothing is asserted of, and of the memory in RAM."""
        return {
            "seconds_median": float(f"{np.median(self.seconds):.3g}"),
            "last_tenth_over_first": round(tenths_ratio(self.seconds), 3),
            "yardstick_last_tenth_over_first": round(tenths_ratio(self.yards), 3),
            "resident_mb_first": round(self.resident[0] / 1e6, 1),
            "resident_mb_last": round(self.resident[-1] / 1e6, 1),
            "resident_bytes_per_time": round(slope(self.resident, self.apart), 1),
        }


@dataclass
class Soaked:
    """What `soak` found: `beyond`, lines of what is held more than before; `traced`, bytes of Python's objects and
    NumPy's arrays that each time left behind, with the places that hold most of them; `pace`, of the untraced times."""

    beyond: list[str]
    traced: float
    places: list[str]
    pace: Pace

    def told(self, times: int) -> dict[str, Any]:
        """For a record."""
        return {"times": times, "left_behind": self.beyond, "traced_bytes_per_time": round(self.traced, 1)} | (
            self.pace.told()
        )


def soak(work: Callable[[], object], times: int, folder: Path, warm: int = 2, traced: int = 4) -> Soaked:
    """Does `work` `times` times, after `warm` times that may fill caches, then `traced` times to see what stays."""
    for _ in range(warm):
        work()
    before, pace = Holdings.now(folder), Pace(max(1, times // 50))
    for _ in range(times):
        start = time.perf_counter()
        work()
        pace.add(time.perf_counter() - start)
    beyond = Holdings.now(folder).beyond(before)
    with Traced() as trace:
        for _ in range(2):
            work()
        trace.begin()
        for _ in range(traced):
            work()
        grown = trace.grown()
    return Soaked(beyond, grown / traced, trace.places, pace)


class Traced:
    """A `with` block in which `grown()` tells by how many bytes traced memory has grown since `begin()`."""

    def __enter__(self) -> Traced:
        tracemalloc.start(1)
        self.places: list[str] = []
        return self

    def __exit__(self, *error: object) -> None:
        tracemalloc.stop()

    def begin(self) -> None:
        """Counts from here on."""
        self._before, self._bytes = self._look()

    def grown(self) -> int:
        """Bytes since then; `places` names those that grew most."""
        after, size = self._look()
        changes = sorted(after.compare_to(self._before, "lineno"), key=lambda change: -change.size_diff)
        self.places = [str(change) for change in changes[:6] if change.size_diff > 0]
        return size - self._bytes

    @staticmethod
    def _look() -> tuple[tracemalloc.Snapshot, int]:
        # Caches keep what was looked up, up to a bound: the interpreter's of attributes, that of regular expressions.
        re.purge()
        (sys._clear_internal_caches if hasattr(sys, "_clear_internal_caches") else sys._clear_type_cache)()
        gc.collect()
        own = (tracemalloc.Filter(False, tracemalloc.__file__), tracemalloc.Filter(False, __file__))
        shown = tracemalloc.take_snapshot().filter_traces(own)
        return shown, sum(trace.size for trace in shown.traces)


def object_bytes(value: Any) -> int:
    """Bytes of a list or dict of numbers and texts, its own and those of what it holds."""
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return sys.getsizeof(value) + sum(object_bytes(part) for part in parts)


def own_temporary_folder(patch: Any, folder: Path) -> Path:
    """Makes `folder` the place of temporary files, here and in processes that are started."""
    folder.mkdir(parents=True)
    patch.setenv("TMPDIR", str(folder))
    patch.setattr(tempfile, "tempdir", None)  # found again
    return folder
