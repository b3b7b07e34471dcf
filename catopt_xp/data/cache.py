"""Decoded or drawn pictures kept on disk: one uint8 .npy file per set, read back through a memory map.

Floor F2. A cache file is whole or absent (written under another name, then renamed), a damaged one is noticed and made
anew, and where nothing can be written the work goes on in memory with a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from catopt_xp.files import remove_stale, write_whole


def cache_folder() -> Path:
    """The folder of the cache: CATOPT_XP_CACHE if that is set, else catopt_xp in the user's cache folder.

    Raises NotADirectoryError where CATOPT_XP_CACHE names a file.
    """
    chosen = os.environ.get("CATOPT_XP_CACHE")
    if chosen:
        folder = Path(chosen).expanduser()
        if folder.is_file():
            raise NotADirectoryError(f"CATOPT_XP_CACHE names {folder}, which is a file; name a folder")
        return folder
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "catopt_xp"


def cache_file(kind: str, facts: object) -> Path:
    """The cache file of a set.

    kind: the first part of the file's name. facts: all that the pixels depend on, as JSON can write it.
    """
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return cache_folder() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"


def load_rows(file: Path, shape: tuple[int, int], notices: list[str]) -> NDArray[np.uint8] | None:
    """Map a cached set into memory, read-only.

    shape: (m, n_x) that it must have.
    notices: takes a line where the file is damaged.
    Returns the rows, or None where there is no (whole) file.
    """
    try:
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (ValueError, OSError, EOFError) as error:
        notices.append(f"{file}: damaged cache file ({one_line(error)}); it is made anew")
        return None
    if rows.dtype != np.uint8 or rows.shape != shape or not rows.flags.c_contiguous:
        notices.append(f"{file}: damaged cache file ({rows.dtype} {rows.shape}, not uint8 {shape}); it is made anew")
        return None
    return np.asarray(rows)  # a plain array over the map


def load_skipped(file: Path) -> dict[int, str]:
    """The skipped pictures of a cached set, from the list beside it: place -> reason; empty where there is none."""
    try:
        return {int(k): str(reason) for k, reason in json.loads(file.with_suffix(".json").read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}  # without a whole list the number of rows does not fit, and the set is decoded again


def store_rows(file: Path, rows: NDArray[np.uint8], skipped: Mapping[int, str] | None = None) -> NDArray[np.uint8]:
    """Write a set (m, n_x) to its cache file, and the list of skipped pictures, where there are any, beside it.

    Returns the rows as mapped from the file, so that the memory can go; the given rows, with a warning, where
    writing fails.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if skipped:
            _write(file.with_suffix(".json"), lambda stream: stream.write(json.dumps(dict(skipped)).encode()))
        _write(file, lambda stream: np.save(stream, rows, allow_pickle=False))
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except OSError as error:
        # The system's own words: the error's message names the file and what happened to it once more. NumPy's error
        # for an array of which only a part was written has no number, and speaks of numbers of values.
        reason = os.strerror(error.errno) if error.errno else "disk full"
        warnings.warn(
            f"{file}: cannot be written ({reason}); going on in memory; the pictures are prepared "
            "again next time (CATOPT_XP_CACHE names another folder)",
            stacklevel=2,
        )
        return rows


def _write(file: Path, write: Callable[[BinaryIO], object]) -> None:
    remove_stale(file)  # a set is large: what a killed writer left would fill the disk
    write_whole(file, write)


def one_line(error: BaseException) -> str:
    """An exception's message on one line; its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
