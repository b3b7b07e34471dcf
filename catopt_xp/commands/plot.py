"""What runs leave, found and read: run folders, histories (JSON, CSV), checkpoints, results of benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from catopt_xp.training.checkpoint import Checkpoint
from catopt_xp.training.history import History
from catopt_xp.training.record import is_drawable

# Of the files of a run, after its name; where two are equally old, the first has more to tell.
ENDINGS = ("_history.json", "_latest.npz", "_history.csv")
OF_COMPARISONS = ".json"


def run_files(source: Path) -> list[Path]:
    """The file itself; of a folder, for each run in it, the file of its history that was written last.

    Raises ValueError for a folder without runs.
    """
    if not source.is_dir():
        if source.exists() and not source.is_file():
            raise ValueError(f"{source} is neither a file nor a folder; give a run folder or a file")
        return [source]
    runs = sorted({file.name.removesuffix(ending) for ending in ENDINGS for file in source.glob(f"*{ending}")})
    if not runs:
        known = ", ".join(f"*{ending}" for ending in ENDINGS)
        raise ValueError(f"{source} holds no run, as it has none of {known}; give a run folder or a file")
    places = [[source / f"{run}{ending}" for ending in (OF_COMPARISONS, *ENDINGS)] for run in runs]
    return [max(filter(Path.exists, files), key=lambda file: file.stat().st_mtime_ns) for files in places]


def read_history(file: Path) -> History:
    """A history from a checkpoint (`.npz`), a CSV (`.csv`) or JSON. Raises ValueError naming what is wrong, OSError."""
    if file.suffix == ".npz":
        return Checkpoint.read(file).history()
    return History.from_csv(file) if file.suffix == ".csv" else History.from_json(file)


def read_benchmark(file: Path) -> dict[str, Any] | None:
    """The results of `catopt-xp bench` in a JSON file; None for a file of another kind. Raises OSError, ValueError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # no text, or no JSON
        return None
    if not isinstance(found, dict) or "rows" not in found:
        return None
    rows = found["rows"]
    tables = [found.get(name, {}) for name in ("workload", "machine")]
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)) or not all(map(_is_table, tables)):
        raise ValueError(f"{file} has no rows of a benchmark; give what catopt-xp bench wrote")
    return found


def _is_row(row: Any) -> bool:
    """Whether this is a row of a benchmark, as far as it is drawn; what is missing the drawing names."""
    if not _is_table(row) or not _is_table(row.get("contenders", {})):
        return False
    times = [row.get("floor_seconds", 1.0), row.get("batch_size", 1)]
    for timed in row.get("contenders", {}).values():
        turns = timed.get("turns") or [] if _is_table(timed) else None
        if not isinstance(turns, list):
            return False
        times += [timed.get("seconds_per_epoch"), *turns]
    return all(is_drawable(time) and 0 < time < math.inf for time in times)


def _is_table(found: Any) -> bool:
    return isinstance(found, dict)


def run_names(files: Sequence[Path]) -> list[str]:
    """Names for runs that lie in these files, as short as tell them apart.

    >>> run_names([Path("runs/adam_history.json"), Path("gd_latest.npz")])
    ['adam', 'gd']
    >>> run_names([Path("adam/model_history.json"), Path("gd/model_history.json")])
    ['adam', 'gd']
    """

    def run(file: Path) -> str:
        return file.stem.removesuffix("_history").removesuffix("_latest")

    def folder(file: Path) -> str:
        return file.resolve().parent.name

    ways: list[Callable[[Path], str]] = [run, lambda file: f"{folder(file)}/{run(file)}", str]
    if len(set(map(run, files))) == 1:
        ways.insert(1, folder)
    named = [[way(file) for file in files] for way in ways]
    return next((names for names in named if len(set(names)) == len(names)), named[-1])
