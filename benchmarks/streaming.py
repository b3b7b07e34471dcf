"""A set of 10 GB trained for an epoch within 1 GB of memory: peak memory, and samples per second beside the bounds.

The set is uint8 noise with labels that can be learned, written to disk and dropped from the page cache before each use.
Beside the streamed epoch: the same network on a set that lies in memory, and how fast the disk alone gives the file.
Each is a process of its own; they take turns.

    python -m benchmarks.streaming [--gigabytes 10] [--memory-limit 1GB] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import catopt_xp
from catopt_xp.backend.machine import cpu_model, host_free_memory, memory_size, thread_count
from catopt_xp.data.stream import BLOCK
from catopt_xp.io.files import write_whole

N_X = 224 * 224 * 3
BATCH = 64
RESIDENT = 6000  # samples of the set in memory: 0.9 GB
ROWS = 500  # drawn at a time
TURNS = 3


def draw(file: Path, m: int) -> None:
    """Noise (m, n_x); of samples of class 1 the first half of the pixels is a little brighter."""
    rng = np.random.Generator(np.random.PCG64(0))
    labels = rng.integers(0, 2, m)
    noise = rng.integers(0, 250, (ROWS, N_X), dtype=np.uint8)
    with file.open("wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (m, N_X)}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, m, ROWS):
            # Every row is shifted by its own amount: drawing 10 GB anew takes minutes, and noise is noise.
            shifts = rng.integers(0, N_X, min(ROWS, m - start))
            rows = np.stack([np.roll(noise[k], shift) for k, shift in enumerate(shifts)])
            rows[:, : N_X // 2] += (5 * labels[start : start + len(rows), None]).astype(np.uint8)
            rows.tofile(stream)
        stream.flush()
        os.fsync(stream.fileno())
    np.save(file.with_name(f"{file.stem}_labels.npy"), labels)


def drop_from_cache(file: Path) -> None:
    """The file's pages leave the page cache, all that can."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_memory() -> int:
    """Bytes of memory that this process had at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def training(file: Path, limit: str | None, epochs: int) -> dict[str, Any]:
    """Trains in this process; seconds of each epoch and by stage, and the peak of memory."""
    if limit is None:  # read into memory, as arrays are that a caller has there
        X, Y = np.array(np.load(file, mmap_mode="r")[:RESIDENT]).T, np.load(file.with_name(f"{file.stem}_labels.npy"))
        given: dict[str, Any] = {"X": X, "Y": Y[:RESIDENT]}
    else:
        given = {"data": file, "memory_limit": limit}
    result = catopt_xp.train(
        **given, total_epoch=epochs, batch_size=BATCH, print_interval=epochs, save_dir=None, verbose=False, device="cpu"
    )
    history = result.history
    return {
        "engine": result.engine,
        "m": history.run["m"],
        "window": history.run["window"],
        "seconds": history.seconds,
        "timings": history.timings,
        "train_loss": history.train_loss,
        "train_accuracy": history.train_accuracy,
        "peak_memory": peak_memory(),
    }


def reading(file: Path) -> dict[str, Any]:
    """Reads the file from one end to the other, in blocks of the size that training reads, past the page cache."""
    block, size = mmap.mmap(-1, BLOCK), 0  # at the beginning of a page, as the disk wants it
    start = time.perf_counter()
    handle = os.open(file, os.O_RDONLY | os.O_DIRECT)
    while count := os.preadv(handle, [block], size):
        size += count
        if count < BLOCK:  # the end of the file
            break
    os.close(handle)
    return {"bytes": size, "rate": size / (time.perf_counter() - start)}


def in_a_process(what: str, *words: str) -> dict[str, Any]:
    """What a process of its own, which does one thing, has found."""
    command = [sys.executable, "-m", "benchmarks.streaming", "--do", what, *words]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise SystemExit(process.stderr)
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def measure(file: Path, limit: str, say: Any) -> dict[str, Any]:
    """All of it, in turns, with the file dropped from the page cache before what is to read the disk."""
    turns: dict[str, list[dict[str, Any]]] = {"cold_read": [], "streamed": [], "resident": []}
    for turn in range(TURNS):
        drop_from_cache(file)
        turns["cold_read"].append(in_a_process("read", str(file)))
        say(f"turn {turn}: the disk is read at {turns['cold_read'][-1]['rate'] / 1e9:.2f} GB/s")
        drop_from_cache(file)
        turns["streamed"].append(found := in_a_process("train", str(file), limit, "1"))
        rate, peak = found["m"] / found["seconds"][0], found["peak_memory"]
        wait = found["timings"]["wait"]
        say(f"turn {turn}: streamed {rate:.0f} samples/s ({wait:.1f} s waited), peak memory {peak / 1e9:.3f} GB")
        turns["resident"].append(found := in_a_process("train", str(file), "none", "3"))
        say(f"turn {turn}: resident {found['m'] / min(found['seconds'][1:]):.0f} samples/s")
    return turns


def summary(turns: dict[str, Any]) -> dict[str, float]:
    """Medians over the turns."""
    middle = TURNS // 2
    streamed = sorted(x["m"] / x["seconds"][0] for x in turns["streamed"])[middle]
    resident = sorted(x["m"] / min(x["seconds"][1:]) for x in turns["resident"])[middle]
    cold = sorted(x["rate"] for x in turns["cold_read"])[middle]
    return {
        "peak_memory": max(x["peak_memory"] for x in turns["streamed"]),
        "streamed_samples_per_second": streamed,
        "resident_samples_per_second": resident,
        "ratio": streamed / resident,
        "disk_bytes_per_second": cold,
        "disk_samples_per_second": cold / N_X,
        "ratio_to_the_slower_of_disk_and_training": streamed / min(resident, cold / N_X),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--memory-limit", default="1GB")
    parser.add_argument("--folder", type=Path, help="on the disk to read from (default: that of temporary files)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--do", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do:
        what, file, *words = args.do
        if what == "read":
            print(json.dumps(reading(Path(file))))
        else:
            print(json.dumps(training(Path(file), None if words[0] == "none" else words[0], int(words[1]))))
        return

    def say(text: str) -> None:
        print(text, flush=True)

    m = int(args.gigabytes * 1e9) // N_X
    memory_size(args.memory_limit)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = Path(folder) / "noise.npy"
        room = os.statvfs(folder)
        if room.f_bavail * room.f_frsize < 1.2 * m * N_X:
            raise SystemExit(f"{folder} has no room for {m * N_X / 1e9:.1f} GB; give another --folder")
        say(f"drawing {m} samples of {N_X} pixels ({m * N_X / 1e9:.2f} GB)")
        draw(file, m)
        facts: dict[str, Any] = {
            "format": 1,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {
                "cpu": cpu_model(),
                "processors": os.cpu_count(),
                "free_memory": host_free_memory(),
                "load": os.getloadavg()[0],
                "system": platform.platform(),
                "python": platform.python_version(),
            },
            "versions": {
                "catopt_xp": catopt_xp.__version__,
                "numpy": np.__version__,
                "numba": importlib.metadata.version("numba"),
            },
            "threads": thread_count(),
            "workload": {"n_x": N_X, "m": m, "hidden": [30, 20, 20], "batch_size": BATCH, "optimizer": "adam"},
            "memory_limit": args.memory_limit,
        }
        turns = measure(file, args.memory_limit, say)
    results = facts | {"summary": summary(turns), "turns": turns}
    for name, value in results["summary"].items():
        say(f"{name:<44}{value:>16,.3f}")
    if args.json:
        text = json.dumps(results, indent=1) + "\n"
        write_whole(args.json, lambda out: out.write(text.encode()))


if __name__ == "__main__":
    main()
