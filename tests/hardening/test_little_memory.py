"""Commands that run out of memory, at any point: one clear line, what was saved stays whole, and a resumption fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from catopt_xp.engines.choose import numba_obstacle

if sys.platform != "linux":
    pytest.skip("the address space is limited as Linux does it", allow_module_level=True)

Record = Callable[..., None]
HELPERS = Path(__file__).resolve().parents[1] / "helpers"
MODULE = [sys.executable, "-m", "catopt_xp"]
# Megabytes between two limits, and the most, beyond what a process has at its start.
SHORT = {"plain": (6, 36)}
LONG = {
    "plain": (1, 60),
    "panels": (12, 600),
    "photographs": (6, 90),
    "drawings": (6, 60),
    "compare": (10, 200),
    "bench": (250, 1000),  # the panel engine compiles
    "evaluate": (12, 120),
    "export": (6, 60),
}


def alone() -> dict[str, str]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return (
        os.environ | one | {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HELPERS)]))}
    )


@pytest.mark.parametrize(
    ("case", "limits"),
    [*SHORT.items(), *(pytest.param(*pair, marks=pytest.mark.long) for pair in LONG.items())],
)
def test_a_command_in_any_little_memory(case: str, limits: tuple[int, int], record: Record) -> None:
    command = [sys.executable, str(HELPERS / "little_memory.py"), case, *map(str, limits)]
    done = subprocess.run(command, capture_output=True, text=True, env=alone(), check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["broke"] == []
    assert found["ended"]["status 0"] > 0, "there was never enough memory: nothing was seen"
    assert found["ended"]["status 1"] > 0, "there was always enough memory: nothing was seen"
    record(**found, megabytes_between=limits[0], most=limits[1])


@pytest.mark.parametrize("step", [400, pytest.param(25, marks=pytest.mark.long)])
def test_a_process_that_cannot_even_start_ends_with_a_line(step: int, tmp_path: Path, record: Record) -> None:
    """From the memory of an interpreter to enough. Below some limit libraries end the process in words of their own."""
    words = "train --img-shape 24x24 --train-size 4 --dev-size 2 --hidden 5 --epochs 1 --device cpu --save-dir run"
    ends: dict[str, int] = {}
    for megabytes in range(100, 1500, step):
        done = subprocess.run(
            ["bash", "-c", f'ulimit -v {megabytes * 1024}; exec "$@"', "bash", *MODULE, *words.split(), "--quiet"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=alone() | {"CATOPT_XP_CACHE": str(tmp_path / "cache")},
            timeout=600,
            check=False,
        )
        last = (done.stderr.splitlines() or [""])[-1]
        theirs = any(words in done.stderr for words in ("OpenBLAS", "Fatal Python error"))
        kind = "OpenBLAS or Python ends it" if theirs and done.returncode else f"status {done.returncode}"
        ends[kind] = ends.get(kind, 0) + 1
        assert theirs or done.returncode in (0, 1), f"{megabytes} MB: {done.returncode}, {done.stderr[-2000:]}"
        assert done.returncode == 0 or theirs or last.startswith("catopt-xp: error: "), done.stderr[-2000:]
        assert "Traceback" not in done.stderr, f"{megabytes} MB: {done.stderr[-2000:]}"
        assert not list(tmp_path.rglob("*.tmp"))
    assert ends["status 0"] > 0
    record(tried=sum(ends.values()), ends=ends, broke=0)


def test_the_compiler_is_not_begun_where_it_would_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from catopt_xp.engines import choose

    monkeypatch.setattr(choose, "address_room", lambda: 100 << 20)
    told = numba_obstacle()
    if told is not None and "brings a faster one" in told:
        pytest.skip("numba is not installed")
    assert told == "out of memory for it: numba may take 512 MiB, and the limit (ulimit -v) leaves 100 MiB"
