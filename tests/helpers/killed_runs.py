"""Commands in processes of their own that are killed or signalled at some moment, and what they must leave.

A server that has imported everything forks a process for each command, so that moments fall into the work and not into
imports, and hundreds of them take minutes. What a process runs is the real command line, to its exit.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import catopt_xp
from catopt_xp.training.checkpoint import read_checkpoint

SIGNALS_REASON = "SIGKILL, SIGTERM and fork are POSIX"
LIMIT = 120.0  # seconds, after which a process counts as hanging
TIMES = ("seconds", "timings", "run")  # of a history: what differs between runs of the same bits

SERVER = """
import json, os, sys
import catopt_xp.estimators.arrays
from catopt_xp import training
from catopt_xp.commands import main as cli
import PIL.Image, PIL.PngImagePlugin, PIL.JpegImagePlugin

sys.modules["matplotlib"] = None  # a figure takes longer than all the rest

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
            os.close(file)
        os.environ.update(asked["environment"])
        sys.argv = ["catopt-xp", *asked["words"]]
        cli.entry("catopt-xp")
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Runs commands one at a time: `run` answers exit status, standard output and standard error.

    `span`: how long the command in question takes, in seconds, by `measure`; moments are drawn from it.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.environment, self.span = folder, environment, 1.0
        # The package under test is found first; one thread, as a process with threads cannot be forked.
        known = {"PYTHONPATH": str(Path(catopt_xp.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | known | one
        )

    def run(self, words: Sequence[str], *signals: tuple[float, int]) -> tuple[int, str, str]:
        """`signals`: (seconds, signal) sent one after the other, each so long after the one before."""
        out, err = self.folder / "out.txt", self.folder / "err.txt"
        asked = {"words": list(words), "out": str(out), "err": str(err), "environment": self.environment}
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(asked).encode() + b"\n")
        stdin.flush()
        child = int(stdout.readline())
        started = time.monotonic()
        for seconds, number in signals:
            ended, _, _ = select.select([stdout], [], [], seconds)
            if ended:
                self.span = min(self.span, time.monotonic() - started + 0.001)
                break
            _send(child, number)
        status = int(stdout.readline())
        return status, out.read_text(), err.read_text()

    def moment(self, rng: random.Random) -> float:
        """Seconds after the start, at random."""
        return rng.uniform(0, self.span)

    def kill(self, words: Sequence[str], rng: random.Random) -> bool:
        """Kills a command at a random moment; whether it was still running then."""
        return self.run(words, (self.moment(rng), signal.SIGKILL))[0] == -signal.SIGKILL

    def finish(self, words: Sequence[str]) -> str:
        """Runs a command to its end, which must be a good one; its output."""
        status, out, err = self.run(words)
        assert status == 0, err
        assert all("no figure was drawn" in line for line in err.splitlines()), err
        return out

    def measure(self, words: Sequence[str]) -> None:
        """Runs a command to its end, and takes its time as `span`."""
        started = time.monotonic()
        self.finish(words)
        self.span = time.monotonic() - started


def _send(child: int, number: int) -> None:
    """The server waits for the child at once, so a child that has ended is gone, or its number is nobody's yet."""
    try:
        os.kill(child, number)
    except ProcessLookupError:
        return


@contextmanager
def server(folder: Path, **environment: str) -> Iterator[Server]:
    """A server with its files in `folder`; it ends with the block."""
    folder.mkdir(exist_ok=True)
    serving = Server(folder, **environment)
    try:
        yield serving
    finally:
        assert serving.process.stdin is not None
        assert serving.process.stdout is not None
        serving.process.stdin.close()
        serving.process.stdout.close()
        serving.process.wait(LIMIT)


def write_set(file: Path, m: int, n_x: int) -> None:
    """An .npz of pixels with a dev set of a quarter of its size, as `--data` takes it."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, size in (("", m), ("dev_", max(1, m // 4))):
        X = rng.integers(0, 256, (size, n_x), dtype=np.uint8).T
        arrays[f"{name}X"], arrays[f"{name}Y"] = X, (X[:6].mean(axis=0, keepdims=True) > 128).astype(np.int64)
    np.savez(file, **arrays)


def write_rows(file: Path, m: int, n_x: int) -> None:
    """An .npy of rows with its labels, as `--data` streams it."""
    rows = np.random.default_rng(0).integers(0, 256, (m, n_x), dtype=np.uint8)
    np.save(file, rows)
    np.save(file.with_name(f"{file.stem}_labels.npy"), (rows[:, :6].mean(axis=1) > 128).astype(np.int64))


def temporaries(folder: Path) -> list[Path]:
    """What writers that were killed left."""
    return sorted(folder.glob(".*.tmp"))


def age(files: Sequence[Path]) -> None:
    """Makes files look as old as if their writers had been killed a day ago."""
    day_ago = time.time() - 86400
    for file in files:
        os.utime(file, (day_ago, day_ago))


def steps_done(file: Path) -> int:
    """Updates of a checkpoint, which must be whole."""
    steps = read_checkpoint(file)[1]["optimizer"]["steps"]
    assert isinstance(steps, int)
    return steps


def without_times(history: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in history.items() if name not in TIMES}


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Weights, moments, counters, losses, evaluations: everything but times."""
    (arrays, meta), (others, other_meta) = read_checkpoint(one), read_checkpoint(other)
    assert set(arrays) == set(others)
    assert all(np.array_equal(arrays[name], others[name]) for name in arrays)
    for name in ("model", "optimizer"):
        assert meta[name] == other_meta[name]
    run, other_run = meta["run"], other_meta["run"]
    assert (run["epoch"], run["batches"]) == (other_run["epoch"], other_run["batches"])
    assert without_times(run["history"]) == without_times(other_run["history"])


def processes_with(variable: str) -> list[int]:
    """Numbers of the processes whose environment has this `NAME=value`; Linux."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:  # it has ended, or is another user's
                continue
            if variable.encode() in environment.split(b"\0"):
                found.append(int(entry.name))
    return found


def none_is_left(variable: str, seconds: float = 20.0) -> bool:
    """Whether all processes with this in their environment end in that time."""
    limit = time.monotonic() + seconds
    while processes_with(variable):
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True
