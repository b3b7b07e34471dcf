"""Kills a random one of three ranks at a random moment, again and again: all must end, and what is left must go on.

Each time the script measures the time until the last rank has ended, resumes the checkpoint on two ranks, and compares
the bits with those of a run that nothing interrupted (`tests/engines/test_distributed.py`). Linux, mpi4py and mpich.

    python -m benchmarks.kill_ranks [--times 20]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / "tests" / folder) for folder in ("helpers", "engines")]

from test_distributed import assert_goes_on_as_if_nothing_had_been, begun, children

LIMIT = 10.0  # seconds


def is_running(rank: int) -> bool:
    try:
        return Path(f"/proc/{rank}/status").read_text().split("State:")[1].split()[0] not in "ZX"
    except OSError:
        return False


def kill_one(folder: Path, rng: random.Random) -> float:
    """Seconds from the kill to the end of all."""
    with begun(folder / "runs") as process:
        time.sleep(2 * rng.random())
        ranks = children(process)
        assert len(ranks) == 3
        os.kill(rng.choice(ranks), signal.SIGKILL)
        start = time.monotonic()
        process.communicate(timeout=LIMIT)
        while any(map(is_running, ranks)):
            assert time.monotonic() - start < LIMIT
            time.sleep(0.005)
        seconds = time.monotonic() - start
    assert process.returncode != 0
    assert_goes_on_as_if_nothing_had_been(folder / "runs", folder)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    times, rng, slowest = parser.parse_args().times, random.Random(1), 0.0
    for k in range(times):
        with tempfile.TemporaryDirectory() as folder:
            seconds = kill_one(Path(folder), rng)
        slowest = max(slowest, seconds)
        print(f"{k + 1} of {times}: all ended after {seconds:.2f} s, and the rest had the same bits", flush=True)
    print(f"slowest: {slowest:.2f} s")


if __name__ == "__main__":
    main()
