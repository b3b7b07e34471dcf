"""Where the numbers of a fixed small job depend on the versions of Python, NumPy, numba and Pillow.

    python tests/hardening/across_versions.py FOLDER PYTHON [PYTHON …]

makes an environment for each row of `rows`, runs `tests/helpers/fixed_job.py` in it, and lets it go on from the
checkpoints of the newest one. It writes
results/across_versions.json: which numbers have the same bits everywhere, and by how much
the others differ. What FOLDER has from an earlier call is not made again. Some minutes; it needs uv and an index.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environments
import numpy as np

from catopt_xp.backend.machine import cpu_model

JOB = environments.REPOSITORY / "tests" / "helpers" / "fixed_job.py"
NUMPY = ("2.0", "2.1", "2.2", "2.3", "2.4", "2.5")
NUMBA = ("0.61.0", "0.62.0", "0.64.0", "0.66.0")
PILLOW = ("11.0.0", "11.3.0", "12.0.0", "12.3.0")
WITHOUT_WHEELS = {("3.11", "2.5"), ("3.13", "2.0")}  # NumPy has none for that Python
Array = np.ndarray[Any, Any]


def rows(pythons: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Name, Python and requirements of each environment. One thing differs at a time; the first row is the newest."""
    known = {version(python): python for python in pythons}
    newest = list(known)[-1]
    for short, python in reversed(known.items()):
        yield f"python {short}, newest", python, ["numpy", "numba", "pillow"]
    for short, python in known.items():
        for numpy in NUMPY:
            if (short, numpy) not in WITHOUT_WHEELS:
                yield f"python {short}, numpy {numpy}", python, [f"numpy=={numpy}.*", "pillow"]
    oldest = next(iter(known))
    for numba in NUMBA:
        yield f"python {oldest}, numba {numba}", known[oldest], ["numpy==2.1.*", f"numba=={numba}", "pillow"]
    for pillow in PILLOW:
        yield f"python {newest}, pillow {pillow}", known[newest], ["numpy", f"pillow=={pillow}"]


def version(python: str) -> str:
    """3.13, say."""
    return environments.run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()


def made(folder: Path, python: str, requirements: list[str], reference: Path | None) -> tuple[dict[str, str], Path]:
    """The versions of an environment, and the folder with the numbers of the job there."""
    interpreter, out = folder / "bin" / "python", folder / "out"
    if not (out / "numbers.npz").exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was ended
        environments.make(folder, python, [*requirements, "threadpoolctl", "tqdm"])
        environment = os.environ | {"PYTHONPATH": str(environments.REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(folder / "numba")}
        words = [interpreter, JOB, out, *([reference] if reference else [])]
        environments.run(words, env=environment, cwd=folder)
        shutil.rmtree(folder / "numba", ignore_errors=True)
    return environments.versions(interpreter), out


def difference(here: Array, there: Array) -> float:
    """The largest difference over the largest magnitude; 0.0 stands for the same bits, and for nothing else."""
    assert here.shape == there.shape
    assert here.dtype == there.dtype
    if here.tobytes() == there.tobytes():
        return 0.0
    off = np.abs(here.astype(np.float64) - there.astype(np.float64)).max()
    return max(float(off / (np.abs(there.astype(np.float64)).max() or 1.0)), sys.float_info.min)


def group(name: str) -> str:
    """What a number is part of, as the result says it."""
    first, *rest = name.split("/")
    if first in ("weights", "orders", "masks", "pictures"):
        return first
    if first == "resumed":
        return f"{rest[0]}, resumed from the reference's checkpoint"
    if rest[-1] in ("losses", "evaluations"):
        return f"{first}, {rest[0]}, {rest[1]}: losses"
    return f"{first}, {rest[0]}, {rest[1]}: weights and moments"


def compare(here: dict[str, Array], there: dict[str, Array]) -> dict[str, float]:
    """The largest difference in each group of numbers that both have."""
    found: dict[str, float] = {}
    for name, array in here.items():
        if name in there:
            found[group(name)] = max(found.get(group(name), 0.0), difference(array, there[name]))
    return found


def main(folder: Path, pythons: list[str]) -> None:
    table: list[dict[str, Any]] = []
    reference: Path | None = None
    expected: dict[str, Array] = {}
    for name, python, requirements in rows(pythons):
        start = time.monotonic()
        told, out = made(folder / name.replace(" ", "_").replace(",", ""), python, requirements, reference)
        with np.load(out / "numbers.npz") as file:
            numbers = {key: file[key] for key in file.files}
        if reference is None:
            reference, expected = out, numbers
        off = compare(numbers, expected)
        versions = {key: told[key] for key in ("python", "numpy", "numba", "llvmlite", "pillow") if key in told}
        table.append({"environment": name, "versions": versions, "differences": off})
        print(f"{name}: {max(off.values()):.1e}, {time.monotonic() - start:.0f} s", flush=True)
    groups = sorted({key for row in table for key in row["differences"]})
    largest = {key: max(row["differences"].get(key, 0.0) for row in table) for key in groups}
    where = {"date": time.strftime("%Y-%m-%d"), "processor": cpu_model(), "system": platform.platform(terse=True)}
    same = [key for key, value in largest.items() if value == 0]
    others = {key: value for key, value in largest.items() if value}
    found = {"environments": len(table), "same bits everywhere": same, "largest relative differences": others}
    environments.write("across_versions.json", where | found | {"reference": table[0]["environment"], "table": table})
    print(same, others, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
