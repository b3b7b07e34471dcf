"""Decoded or drawn pictures kept on disk: one uint8 .npy file per set, read back through a memory map.

A cache file is whole or absent (written under another name, then renamed), a damaged one is noticed and made
anew, and where nothing can be written the work goes on in memory with a warning.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import platformdirs
from numpy.typing import NDArray

from catopt_xp.io.console import one_line, warn
from catopt_xp.io.files import write_whole


def cache_folder() -> Path:
    """The folder of the cache: CATOPT_XP_CACHE if that is set, else that of the system for catopt_xp.

    Raises NotADirectoryError where CATOPT_XP_CACHE names a file, ValueError where it names the home of nobody.
    """
    chosen = os.environ.get("CATOPT_XP_CACHE")
    if chosen:
        try:
            folder = Path(chosen).expanduser()
        except RuntimeError as error:
            raise ValueError(f"CATOPT_XP_CACHE is {chosen!r}, and nobody has that home; name a folder") from error
        if folder.is_file():
            raise NotADirectoryError(f"CATOPT_XP_CACHE names {folder}, which is a file; name a folder")
        return folder
    try:
        return platformdirs.user_cache_path("catopt_xp", appauthor=False)
    except RuntimeError:  # the user has no home: nothing can be written to this folder, which is said then
        return Path(os.devnull) / "no home"


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
    header = _header(shape)
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("no file")
        with file.open("rb") as stream:
            if stream.read(len(header)) != header:
                raise ValueError(f"not uint8 {shape} by its header")
        if status.st_size != len(header) + shape[0] * shape[1]:
            raise ValueError(f"{status.st_size} bytes long")
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))  # a plain array over the map
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise MemoryError(f"{file} cannot be mapped") from error
        notices.append(f"{file}: damaged cache file ({one_line(error)}); it is made anew")
        return None


def _header(shape: tuple[int, int]) -> bytes:
    """What the file of a set begins with: anything else there was not written by this module, and is not read."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def load_skipped(file: Path) -> dict[int, str]:
    """The skipped pictures of a cached set, from the list beside it: place -> reason; empty where there is none."""
    try:
        listed = json.loads(file.with_suffix(".json").read_text("utf-8"))
        skipped = {int(k): str(reason) for k, reason in listed["skipped"].items()}
        return skipped if _listing(skipped) == listed else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}  # without a whole list the number of rows does not fit, and the set is decoded again


def _listing(skipped: Mapping[int, str]) -> dict[str, Any]:
    """What is written of skipped pictures. Another place would give pictures the labels of others: hence a checksum."""
    places = {str(k): reason for k, reason in skipped.items()}
    return {"skipped": places, "crc32": zlib.crc32(json.dumps(places).encode())}


def store_rows(file: Path, rows: NDArray[np.uint8], skipped: Mapping[int, str] | None = None) -> NDArray[np.uint8]:
    """Write a set (m, n_x) to its cache file, and the list of skipped pictures, where there are any, beside it.

    Returns the rows as mapped from the file, so that the memory can go; the given rows, with a warning, where
    writing fails.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if skipped:
            write_whole(file.with_suffix(".json"), lambda stream: stream.write(json.dumps(_listing(skipped)).encode()))
        else:
            file.with_suffix(".json").unlink(missing_ok=True)  # one that fitted no rows
        write_whole(file, lambda stream: _write_rows(stream, rows))
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except OSError as error:
        # The system's own words: the error's message names the file and what happened to it once more.
        reason = os.strerror(error.errno) if error.errno else str(error)
        warn(
            f"{file}: cannot be written ({reason}); going on in memory; the pictures are prepared "
            "again next time (CATOPT_XP_CACHE names another folder)"
        )
        return rows


def _write_rows(stream: BinaryIO, rows: NDArray[np.uint8]) -> None:
    """What `np.save` writes; of a full disk NumPy tells neither the reason nor, of the last few bytes, anything."""
    stream.write(_header(rows.shape))
    stream.write(np.ascontiguousarray(rows).reshape(-1).data)
