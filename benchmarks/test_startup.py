"""Seconds that a user waits at the start: the import, and the panel engine's first step.

Each is a process of its own, timed from its start to its end, so Python's own start is in all of them; the table has it
as a line of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import catopt_xp
from catopt_xp.commands.bench import OURS, Workload

IMPORT_NUMPY, IMPORT, NOTHING = "import numpy", "import catopt_xp", "pass"
FIRST_STEP = """
from catopt_xp.commands.bench import OURS, Workload

ours = OURS["panels"].make(Workload(n_x=3000, m=64, batch_size=32), 2)
ours.steps(1)
assert ours.losses()[0] > 0
"""


def run_python(code: str, compiled: Path | None = None) -> None:
    """Runs code in a new process, with numba's compiled code kept in the folder `compiled`."""
    package = str(Path(catopt_xp.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    if compiled is not None:
        environment["NUMBA_CACHE_DIR"] = str(compiled)
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.fixture
def numba() -> None:
    """The panel engine needs it."""
    reason = OURS["panels"].obstacle(Workload(n_x=3000))
    if reason is not None:
        pytest.skip(f"the panel engine cannot run: {reason}")


@pytest.mark.parametrize("code", [NOTHING, IMPORT_NUMPY, IMPORT], ids=["python alone", "numpy", "catopt_xp"])
def test_import(benchmark: Any, code: str) -> None:
    benchmark.group = "start, import"
    benchmark.pedantic(run_python, args=(code,), rounds=5, warmup_rounds=1)
    assert benchmark.stats.stats.rounds == 5


@pytest.mark.usefixtures("numba")
def test_first_step_with_kept_code(benchmark: Any, tmp_path: Path) -> None:
    """Every start but the first: compiled code is read from the folder where it is kept."""
    benchmark.group = "start, first step"
    run_python(FIRST_STEP, tmp_path)
    kept = sorted(tmp_path.rglob("*.nbc"))
    assert kept
    benchmark.pedantic(run_python, args=(FIRST_STEP, tmp_path), rounds=5)
    assert sorted(tmp_path.rglob("*.nbc")) == kept  # nothing was compiled again


@pytest.mark.usefixtures("numba")
def test_first_step_with_nothing_kept(benchmark: Any, tmp_path: Path) -> None:
    """The first start on a machine: everything is compiled."""
    benchmark.group = "start, first step"
    rounds = iter(range(10))

    def empty_folder() -> tuple[tuple[str, Path], dict[str, object]]:
        folder = tmp_path / str(next(rounds))
        folder.mkdir()
        return (FIRST_STEP, folder), {}

    benchmark.pedantic(run_python, setup=empty_folder, rounds=2)
    assert len(list(tmp_path.rglob("*.nbc"))) >= 2
