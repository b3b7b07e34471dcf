"""One call for every kind of data: the built-in drawings, a folder of photographs, an .npz or .npy file, arrays."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from catopt_xp.backend.machine import free_room
from catopt_xp.backend.xp import as_array
from catopt_xp.data.dataset import DataArgumentError, DataSet, check_on_error, checked_img_shape
from catopt_xp.data.decoding import decode_files
from catopt_xp.data.drawn.drawings import get_drawn_set
from catopt_xp.data.photographs import DEFAULT_SHAPE, Decoder, get_photograph_set
from catopt_xp.io.archives import read_arrays
from catopt_xp.io.console import one_line, plain

Source = str | os.PathLike[str] | tuple[Any, ...] | DataSet | None


def load_data(
    data: Source = None,
    img_shape: tuple[int, int] | None = None,
    train_size: int | None = None,
    dev_size: int | None = None,
    seed: int = 0,
    on_error: str = "raise",
    progress: bool | None = None,
    decode: Decoder = decode_files,
) -> DataSet:
    """Load the data of a run.

    data: None, the built-in drawn cats and dogs; a folder of photographs (see `get_photograph_set`); an .npz
    file with X, Y and, if there is a dev set, dev_X and dev_Y; an .npy file of rows (m, n_x), NAME.npy, which is mapped
    into memory, with NAME_labels.npy, (m,) or (·, m), beside it, and, if there is a dev set, NAME_dev.npy and
    NAME_dev_labels.npy; the arrays (X, Y) or (X, Y, dev_X, dev_Y); or a
    DataSet, which is loaded already.
    X is (n_x, m), Y (1, m).
    img_shape: (width, height) in pixels, for pictures. train_size, dev_size: pictures per class; None is all
    photographs, or 1000 and 200 drawings. seed: of the drawings, and of the split where a folder has no test
    set.
    on_error: "raise" or "skip" (photographs that cannot be decoded).
    progress: show a bar while photographs are decoded or drawings drawn; None: when stderr is a terminal.
    decode: what decodes photographs; where it is another one than `decode_files`, the cache is left alone.
    Returns a DataSet. Arrays are handed on as they are: their shapes and values are checked where they are
    trained.
    Raises FileNotFoundError, ValueError or TypeError, naming file or argument; DataArgumentError, a ValueError,
    where the arguments beside `data` cannot be meant or do not go with it.

    >>> load_data((np.zeros((3, 5)), np.ones((1, 5)))).name
    'arrays'
    """
    check_on_error(on_error)
    if isinstance(data, str) and not data:  # which Path would take for the current folder
        raise DataArgumentError(
            "data is empty; give a folder of photographs, an .npz or .npy file, or None for the drawings"
        )
    if data is None:
        sizes = 1000 if train_size is None else train_size, 200 if dev_size is None else dev_size
        return get_drawn_set(img_shape or DEFAULT_SHAPE, *sizes, seed=seed, progress=progress)
    if isinstance(data, str | os.PathLike) and not _is_array_file(Path(data)):
        return get_photograph_set(
            data, img_shape, train_size, dev_size, seed, on_error=on_error, progress=progress, decode=decode
        )
    if train_size is not None or dev_size is not None:
        raise DataArgumentError(
            "train_size, dev_size: apply to pictures only, as --train-size and --dev-size do; cut arrays before you"
            " hand them over"
        )
    if isinstance(data, str | os.PathLike):
        loaded = (_load_npy if Path(data).suffix.lower() == ".npy" else _load_npz)(Path(data))
    elif isinstance(data, DataSet):
        loaded = dataclasses.replace(data)
    elif isinstance(data, tuple | list) and len(data) in (2, 4):
        names = ("X", "Y", "dev_X", "dev_Y")
        loaded = DataSet(*(_array(part, name) for part, name in zip(data, names, strict=False)))
    else:
        what = f"{len(data)} arrays" if isinstance(data, tuple | list) else type(data).__name__
        known = "a folder, an .npz or .npy file, (X, Y), (X, Y, dev_X, dev_Y) or a DataSet"
        raise TypeError(f"data: {known} expected, got {what}")
    if img_shape is not None:
        loaded.img_shape = checked_img_shape(img_shape)
        width, height = loaded.img_shape
        shape = np.shape(loaded.train_X)
        if shape[:1] != (width * height * 3,):
            raise DataArgumentError(
                f"img_shape: {width}x{height} RGB pictures have {width * height * 3} values, X is {shape}; give another"
                " --img-shape, or none"
            )
    return loaded


def _array(part: Any, name: str) -> Any:
    """What has a dtype as it is, anything else, such as lists, as an array. Raises TypeError or ValueError."""
    return part if part is None or hasattr(part, "dtype") else as_array(part, name)


def _is_array_file(path: Path) -> bool:
    """Whether this is an .npz or .npy file rather than a folder; raises ValueError for another kind of file."""
    if path.is_dir():
        return False
    if path.suffix.lower() in (".npz", ".npy"):
        return True
    if path.is_file():
        raise ValueError(
            f"{path}: cannot be read as data; give a folder of photographs, an .npz file with X and Y, or an .npy file"
        )
    return False


def _load_npy(path: Path) -> DataSet:
    """Map rows and load their labels, and those of the dev set where there is one; never unpickles."""
    started = time.perf_counter()
    rows, labels = _rows_and_labels(path)
    dev_path = path.with_name(f"{path.stem}_dev{path.suffix}")
    dev_rows, dev_labels = _rows_and_labels(dev_path) if dev_path.is_file() else (None, None)
    return DataSet(
        rows.T,
        labels,
        None if dev_rows is None else dev_rows.T,
        dev_labels,
        name=str(path),
        timings={"read": time.perf_counter() - started, "decode": 0.0},
    )


def _rows_and_labels(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows (m, n_x), mapped, and labels (·, m)."""
    beside = path.with_name(f"{path.stem}_labels{path.suffix}")
    for file in (path, beside):
        if not file.is_file():
            whose = "" if file == path else f", where the labels of {path} are expected: save them as (m,) numbers"
            raise FileNotFoundError(f"{file}: no such file{whose}")
    found = []
    for file in (path, beside):
        try:
            array = np.load(file, mmap_mode="r" if file == path else None, allow_pickle=False)
        except Exception as error:  # NumPy's parser raises almost anything at a damaged header
            raise ValueError(f"{file}: cannot be read as an .npy file of numbers ({one_line(error)})") from error
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
            raise ValueError(f"{file}: must hold one array of numbers, such as np.save writes")
        found.append(array)
    rows, labels = found
    if rows.ndim != 2:
        raise ValueError(f"{path}: has shape {rows.shape}; it must be (m, n_x), a sample in each row")
    labels = np.atleast_2d(labels)
    if labels.ndim != 2 or labels.shape[1] != len(rows):
        raise ValueError(f"{beside}: has shape {labels.shape}; {path} has {len(rows)} rows, and takes a label for each")
    return rows, labels


def _load_npz(path: Path) -> DataSet:
    """Read X, Y, dev_X, dev_Y from an .npz file; never unpickles."""
    started = time.perf_counter()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        arrays, names = read_arrays(path, free_room(), ("X", "Y", "dev_X", "dev_Y"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as an .npz file of plain arrays ({error})") from error
    missing = [name for name in ("X", "Y") if name not in arrays]
    missing += [name for name in ("dev_X", "dev_Y") if name not in arrays and ("dev_X" in arrays or "dev_Y" in arrays)]
    if missing:
        has = plain(", ".join(names)) or "no arrays"
        raise ValueError(f"{path}: {' and '.join(missing)} missing; the file has {has}")
    for name, array in arrays.items():
        if array.dtype.kind not in "buif":
            raise ValueError(f"{path}: {name} must hold numbers, not {array.dtype}")
        if name.endswith("X") and array.ndim != 2:
            raise ValueError(f"{path}: {name} has shape {array.shape}; it must be (n_x, m), a sample in each column")
    return DataSet(
        arrays["X"],
        arrays["Y"],
        arrays.get("dev_X"),
        arrays.get("dev_Y"),
        name=str(path),
        timings={"read": time.perf_counter() - started, "decode": 0.0},
    )
