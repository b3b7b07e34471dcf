"""The same seed gives the same bits, whatever the process that trains is like: environment, memory, threads.

`tests/helpers/fixed_job.py` is trained in processes that differ in all that should not matter, and in processes of
several ranks. Threads and ranks of like processes are tests of `test_panel_engine.py` and `test_distributed.py`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fixed_job
import pytest
import ranks

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
# Says the checksums of all numbers of the job. What is kept in memory before it moves all that is allocated later.
PROGRAM = """
import json, locale, random, sys
sys.path.insert(0, sys.argv[1])
told = json.loads(sys.argv[2])
try:
    locale.setlocale(locale.LC_ALL, "")
except locale.Error:
    pass
draw = random.Random(told["heap"])
kept = [bytearray(draw.randrange(1, 5000)) for _ in range(draw.randrange(20000))]
del kept[:: draw.randrange(2, 5)]
import numpy as np
np.random.seed(told["heap"] % 2**32)
random.seed(told["heap"])
import fixed_job
found = fixed_job.everything(tuple(told["optimizers"]))
print(json.dumps({name: fixed_job.crc(value) for name, value in found.items()}))
"""
LOCALES = ("C", "C.UTF-8", "POSIX", "tr_TR.UTF-8", "de_DE.UTF-8", "no_SUCH")
ALLOCATORS: tuple[dict[str, str], ...] = (
    {},
    {"PYTHONMALLOC": "malloc", "MALLOC_PERTURB_": "165"},
    {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_ARENA_MAX": "1"},
    {"MALLOC_TOP_PAD_": "12345", "MALLOC_MMAP_MAX_": "0"},
)


def process(number: int, tmp_path: Path, optimizers: list[str]) -> dict[str, Any]:
    """What the process of this number is like: command, environment, folder. Number 0 is as plain as can be."""
    draw = random.Random(number)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    environment |= {"OMP_NUM_THREADS": str(1 + number % 4), "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    folder, flags, first = tmp_path, [], []
    if number:
        environment |= draw.choice(ALLOCATORS) | {
            "LC_ALL": draw.choice(LOCALES),
            "TZ": draw.choice(["UTC", "Asia/Tokyo"]),
        }
        environment |= {"PYTHONHASHSEED": str(draw.randrange(2**32)), "PADDING": "x" * draw.randrange(10**5)}
        flags = draw.choice([[], ["-O"], ["-B"], ["-X", "utf8=0"], ["-X", "dev", "-W", "ignore"]])
        folder = tmp_path / draw.choice(["a folder", "ordner ä", "x" * 200])
        folder.mkdir(exist_ok=True)
        if draw.random() < 0.3 and shutil.which("setarch"):
            first = ["setarch", "-R"]  # the same addresses in every process
    told = json.dumps({"heap": number, "optimizers": optimizers})
    command = [*first, sys.executable, *flags, "-c", PROGRAM, str(HELPERS), told]
    return {"args": command, "env": environment, "cwd": folder}


@pytest.mark.parametrize("processes", [3, pytest.param(24, marks=pytest.mark.long)])
def test_unlike_processes_give_the_same_bits(processes: int, tmp_path: Path, record: Callable[..., None]) -> None:
    optimizers = ["adam"] if processes < 10 else ["gd", "momentum", "rmsprop", "adam"]
    expected: dict[str, int] = {}
    for number in range(processes):
        like = process(number, tmp_path, optimizers)
        done = subprocess.run(**like, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"process {number}: {done.stderr}"
        found = json.loads(done.stdout.splitlines()[-1])
        expected = expected or found
        assert len(found) > 60
        other = [name for name in expected if found[name] != expected[name]]
        assert not other, f"process {number} ({like['env'].get('LC_ALL')}, {like['args'][:5]}) differs in {other}"
    record(processes=processes, numbers_compared=len(expected), differing=0)


RANKS = """
import os, sys, zlib
import numpy as np
sys.path.insert(0, sys.argv[1])
import catopt_xp, fixed_job
from mpi4py import MPI
comm = MPI.COMM_WORLD
given = dict(comm=comm, engine="panels", optimizer=sys.argv[2], learning_rate=fixed_job.RATES[sys.argv[2]])
found = fixed_job.fit(**given)
told = {name: fixed_job.crc(value) for name, value in found.items()}, os.environ["PYTHONHASHSEED"], os.getcwd()
told = comm.gather(told)
if comm.rank == 0:
    import json
    print(json.dumps(told))
"""


def told_by_ranks(count: int, optimizer: str, tmp_path: Path) -> list[Any]:
    """What each of `count` ranks found, which differ in hash seed, threads, size of environment and folder."""
    words: list[str] = []
    for rank in range(count):
        folder = tmp_path / f"rank {rank}"
        folder.mkdir(exist_ok=True)
        variables = {"PYTHONHASHSEED": rank + 1, "OMP_NUM_THREADS": 1 + rank % 2, "PADDING": "x" * 777 * rank}
        words += [":"] if rank else []
        words += ["-n", "1", "-wdir", str(folder)]
        words += [word for name, value in variables.items() for word in ("-env", name, str(value))]
        words += [sys.executable, "-c", RANKS, str(HELPERS), optimizer]
    assert ranks.MPIEXEC is not None
    done = subprocess.run([ranks.MPIEXEC, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.skipif(ranks.OBSTACLE is not None, reason=str(ranks.OBSTACLE))
@pytest.mark.parametrize("counts", [[1, 2], pytest.param([1, 2, 3, 4], marks=pytest.mark.long)])
def test_unlike_ranks_give_the_same_bits(counts: list[int], tmp_path: Path, record: Callable[..., None]) -> None:
    optimizers = ["adam"] if len(counts) < 3 else ["gd", "momentum", "rmsprop", "adam"]
    for optimizer in optimizers:
        expected: dict[str, int] = {}
        for count in counts:
            told = told_by_ranks(count, optimizer, tmp_path)
            assert len({(seed, folder) for _, seed, folder in told}) == count  # they were unlike
            expected = expected or told[0][0]
            assert [found for found, _, _ in told] == [expected] * count
    record(ranks=counts, optimizers=optimizers, differing=0)


# Of the initial weights, row orders and dropout masks of `fixed_job.drawn`. They are the same with NumPy 2.0 to 2.5,
# on Python 3.11 to 3.13 (results/across_versions.json): a version with others breaks what the README promises.
DRAWN = {"weights": 4134401685, "orders": 81560576, "masks": 3180973147}


def test_what_is_drawn_has_the_bits_of_every_version() -> None:
    found = fixed_job.drawn()
    groups = {kind: [found[name] for name in sorted(found) if name.split("/")[0] == kind] for kind in DRAWN}
    assert sum(map(len, groups.values())) == len(found)
    assert {kind: fixed_job.crc(*arrays) for kind, arrays in groups.items()} == DRAWN
