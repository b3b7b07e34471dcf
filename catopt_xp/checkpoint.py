"""State <-> `.npz`: flat keys, JSON beside them, no pickle; written whole or not at all.

Floor F1. A checkpoint is an ordinary NumPy archive. Arrays stand under flat keys (`model/W0`, `optimizer/m/W0`), and
everything else in one JSON text under `meta`. Reading never unpickles, so a file can be of any origin.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from catopt_xp.backend.machine import free_room
from catopt_xp.io.archives import HostArrays, read_arrays
from catopt_xp.io.console import plain
from catopt_xp.io.files import write_whole

FORMAT = "catopt_xp checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A file that is not a whole, matching checkpoint; the message names the file and what is wrong with it.

    It is one line that can be printed, whatever the file says.
    """

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


def npz_path(filename: str | os.PathLike[str]) -> Path:
    """The file that `filename` means: with `.npz` appended when it has no such ending, as `numpy.savez` does.

    >>> npz_path("work_dirs/model_latest").name
    'model_latest.npz'
    """
    path = Path(filename)
    return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


def write_checkpoint(filename: str | os.PathLike[str], arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
    """Writes host arrays and JSON-able `meta` as one file; returns its path.

    Raises FloatingPointError naming the first array with a NaN or an infinity, ValueError for a name that an archive
    cannot hold (nothing is written then), OSError when the file cannot be written.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = write_checkpoint(Path(folder, "a"), {"model/W0": np.ones((1, 2))}, {"epoch": 3})
    ...     arrays, meta = read_checkpoint(path)
    >>> arrays["model/W0"], meta["epoch"]
    (array([[1., 1.]]), 3)
    """
    path = npz_path(filename)
    for key, array in arrays.items():
        # An archive would cut the name at the zero, or not be written: its parameter would be lost.
        if "\0" in key or any("\ud800" <= c <= "\udfff" for c in key):
            raise ValueError(f"{key!r} cannot be a name in an archive, so nothing was saved to {path}: rename it")
        if not is_finite(array):
            raise FloatingPointError(f"{key} has values that are not finite, so nothing was saved to {path}")
    text = json.dumps({"format": FORMAT, "version": VERSION, **meta})
    # The last member, so that an archive whose directory was cut short has no meta, and is refused.
    members = {**arrays, "meta": np.frombuffer(text.encode(), dtype=np.uint8)}
    write_whole(path, lambda file: _write_archive(file, members))
    return path


def is_finite(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array has neither NaN nor infinity.

    >>> is_finite(np.array([1.0, np.inf]))
    False
    """
    if array.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is finite only where every term is, and needs no array of booleans; one that overflows decides nothing.
        return bool(np.isfinite(array.sum(dtype=np.float64)) or np.isfinite(array).all())


def _write_archive(file: Any, members: Mapping[str, Any]) -> None:
    # What numpy.savez writes, without its pickling and its timestamps: equal states give equal files.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for key, array in members.items():
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def read_checkpoint(filename: str | os.PathLike[str]) -> tuple[HostArrays, dict[str, Any]]:
    """Arrays and meta of a checkpoint, every byte checked against the archive's checksums.

    Raises FileNotFoundError, or CheckpointError for a truncated, foreign or pickled file, naming what is wrong.
    """
    path = Path(filename)
    path = path if path.exists() else npz_path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise CheckpointError(f"{str(filename)!r} is a folder; give the .npz file in it")
    if not path.is_file():  # reading a pipe would wait for ever
        raise CheckpointError(f"{path} is no file but a pipe or a device; give an .npz file")
    try:
        arrays, _ = read_arrays(path, free_room())
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; the file is damaged or foreign") from error
    return arrays, _read_meta(path, arrays)


def _read_meta(path: Path, arrays: HostArrays) -> dict[str, Any]:
    if "meta" not in arrays:
        raise CheckpointError(f"{path}: meta is missing; it is not a checkpoint of catopt_xp")
    try:
        meta = json.loads(arrays.pop("meta").tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: meta is not JSON ({error}); the file is damaged or foreign") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: meta does not say {FORMAT!r}; the file is foreign")
    if meta.get("version") != VERSION:
        raise CheckpointError(f"{path}: written in format version {meta.get('version')}, this library reads {VERSION}")
    return meta


def group(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under `prefix/`, without it.

    >>> group({"model/W0": 1, "optimizer/m/W0": 2}, "optimizer")
    {'m/W0': 2}
    """
    return {key[len(prefix) + 1 :]: x for key, x in arrays.items() if key.startswith(prefix + "/")}
