"""Folders of photographs: finding the files and their classes, and reading them through the cache."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from catopt_xp.data.cache import cache_file, load_rows, load_skipped, store_rows
from catopt_xp.data.dataset import DataSet, check_on_error, checked_img_shape, checked_size, checked_whole
from catopt_xp.data.decoding import check_some_decoded, decode_files, photograph_size, warn_of_skipped
from catopt_xp.io.console import plain, warn

DEFAULT_SHAPE = (224, 224)
RECIPE = 2  # a change in how photographs are decoded takes the next number, so that no old cache file is read
ENDINGS = (".jpg", ".jpeg", ".png")
_FLAT_NAME = re.compile(r"([^.]+)\.\d+\.[^.]+")  # cat.0.jpg
_SPLIT_STREAM = 2  # keeps these random numbers apart from those of weights and row orders with the same seed
_LAYOUTS = "training_set/cats and training_set/dogs (and test_set), one folder per class, or names such as cat.0.jpg"

Decoder = Callable[[list[Path], tuple[int, int], str, bool | None], tuple[NDArray[np.uint8], dict[int, str]]]
Classes = Mapping[str, list[Path]]
"""The photographs of each class, by class name, in the order in which they are trained."""


@dataclass(frozen=True)
class Listing:
    """The photographs of a folder: both sets have the same classes in the same order; `dev` may be None."""

    train: Classes
    dev: Classes | None
    notice: str | None = None


def get_cat_set(
    data_root: str | os.PathLike[str],
    img_shape: tuple[int, int] = (224, 224),
    train_size: int | None = 1000,
    test_size: int | None = 200,
    dtype: DTypeLike = "uint8",
    on_error: str = "raise",
    cache: bool = True,
    progress: bool | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Photographs of cats and dogs as arrays.

    data_root: a folder with training_set/cats, training_set/dogs, test_set/cats and test_set/dogs, or another
    layout that `load_data` takes.
    img_shape: (width, height) in pixels. train_size, test_size: photographs per class, the first ones in
    sorted order; None is all; where there are fewer, all are taken, with a warning. test_size=0: no test set.
    dtype: "uint8" pixels 0..255, or "float32" values 0..1. on_error: "raise" or "skip" (files that cannot be
    decoded).
    cache: keep the decoded pixels on disk. progress: show a bar; None: when stderr is a terminal.
    Returns train_X, train_Y, dev_X, dev_Y: X (n_x, m) with n_x = height * width * 3, cats before dogs,
    sample-major (`X.T` is C-contiguous); Y (1, m) int64, cats 1, dogs 0. The last two are None for
    test_size=0.
    Raises FileNotFoundError for a folder that is missing; ValueError for other classes, no photographs, or a
    damaged one.

    >>> get_cat_set("no/such/folder")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no/such/folder: no such folder of photographs
    """
    kind = np.dtype(dtype)
    if kind not in (np.uint8, np.float32):
        raise ValueError(f'dtype: must be "uint8" or "float32", got {dtype!r}')
    data = get_photograph_set(
        data_root, img_shape, train_size, test_size, on_error=on_error, cache=cache, progress=progress
    )
    if data.classes != ("dog", "cat"):
        raise ValueError(f"{data_root}: the classes must be cats and dogs, found {plain(', '.join(data.classes))}")
    if data.dev_X is None and test_size != 0:
        raise FileNotFoundError(f"{Path(data_root) / 'test_set'}: no such folder; add it, or ask for test_size=0")
    for notice in data.notices:  # four arrays have no other place for it
        warn(notice)
    if kind == np.uint8:
        return data.train_X, data.train_Y, data.dev_X, data.dev_Y
    return _unit_range(data.train_X), data.train_Y, _unit_range(data.dev_X), data.dev_Y


def get_photograph_set(
    folder: str | os.PathLike[str],
    img_shape: tuple[int, int] | None = None,
    train_size: int | None = None,
    dev_size: int | None = None,
    seed: int = 0,
    dev_fraction: float = 0.2,
    on_error: str = "raise",
    cache: bool = True,
    progress: bool | None = None,
    decode: Decoder = decode_files,
) -> DataSet:
    """A folder of photographs, in one of three layouts, as a DataSet.

    folder: training_set/CLASS and test_set/CLASS; or one folder per class; or files such as cat.0.jpg. Two
    classes or more.
    img_shape: (width, height) in pixels; by default (224, 224), or the common size of the first photographs
    if that is smaller.
    train_size, dev_size: photographs per class, the first ones in sorted order; None is all.
    seed, dev_fraction: the random part of each class that is kept for development, where the layout has no
    test set.
    on_error: "raise" or "skip" (files that cannot be decoded). cache: keep the decoded pixels on disk.
    progress: show a bar; None: when stderr is a terminal. decode: called as `decode_files` is, with another share of
    the pixels to return; the cache, which keeps all of them, is left alone then.
    Returns a DataSet; cats and dogs have the labels 1 and 0, other classes 0, 1, ... in the order of their
    names.
    Raises FileNotFoundError, NotADirectoryError or ValueError, naming folder or file.
    """
    train_size, dev_size = checked_size("train_size", train_size, 1), checked_size("dev_size", dev_size, 0)
    seed = checked_whole("seed", seed, 0)
    check_on_error(on_error)
    root = Path(folder)
    started = time.perf_counter()
    listing = find_photographs(root, seed, dev_fraction)
    train = _first(listing.train, train_size, root, "train")
    dev = _first(listing.dev, dev_size, root, "dev") if listing.dev is not None and dev_size != 0 else {}
    notices = [listing.notice] if listing.notice else []
    files = [file for group in (train, dev) for names in group.values() for file in names]
    shape = checked_img_shape(img_shape) if img_shape is not None else _natural_shape(files[:8], notices)
    reading = time.perf_counter() - started
    rows, broken, timings = _read_rows(root, files, shape, on_error, cache, progress, notices, decode)
    warn_of_skipped(broken)
    classes = ("dog", "cat") if list(train) == ["cat", "dog"] else tuple(train)
    labels = np.array([classes.index(name) for group in (train, dev) for name in group for _ in group[name]])
    kept = np.delete(np.arange(len(files)), list(broken))
    m = int(np.count_nonzero(kept < sum(len(names) for names in train.values())))
    Y = labels[kept][None].astype(np.int64)
    for label, name in enumerate(classes):
        if label not in Y[0, :m]:
            raise ValueError(f"{root}: no photograph of the class {plain(name)} could be decoded")
    return DataSet(
        train_X=rows[:m].T,
        train_Y=Y[:, :m],
        dev_X=rows[m:].T if m < len(kept) else None,
        dev_Y=Y[:, m:] if m < len(kept) else None,
        classes=classes,
        name=f"photographs in {root}",
        img_shape=shape,
        timings={"read": reading + timings["read"], "decode": timings["decode"]},
        notices=notices,
    )


def _unit_range(X: NDArray[np.uint8] | None) -> NDArray[np.float32] | None:
    """Pixels as values 0..1 in the same memory order."""
    return None if X is None else np.divide(X.T, np.float32(255), dtype=np.float32).T


# ---- finding -----------------------------------------------------------------------------------------------


def find_photographs(root: Path, seed: int = 0, dev_fraction: float = 0.2) -> Listing:
    """List a folder's photographs by class and set; hidden files and files with other endings are left out.

    Only the folders of a known layout are looked into, so that links which lead back do no harm. Raises as
    `get_photograph_set`.
    """
    if not 0 <= dev_fraction < 1:
        raise ValueError(f"dev_fraction: must be at least 0 and below 1, got {dev_fraction}")
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder of photographs")
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: a file, where a folder of photographs is expected")
    training_set = _nested(root / "training_set")
    if training_set.is_dir():
        train = _checked(training_set, _by_folder(training_set))
        test_set = _nested(root / "test_set")
        if not test_set.is_dir():
            return Listing(train, None, f"{root}: no test_set beside training_set, so there is no dev set")
        dev = _checked(test_set, _by_folder(test_set))
        if list(dev) != list(train):
            known, other = (plain(", ".join(names)) for names in (train, dev))
            raise ValueError(f"{root}: training_set has the classes {known}, test_set has {other}; they must agree")
        return Listing(train, dev)
    found = _checked(root, _by_folder(root) or _by_name(root))
    if dev_fraction == 0:
        return Listing(found, None)
    train, dev = {}, {}
    for k, (name, files) in enumerate(found.items()):
        rng = np.random.Generator(np.random.PCG64([seed, _SPLIT_STREAM, k]))
        size = min(max(1, round(dev_fraction * len(files))), len(files) - 1)
        chosen = set(rng.permutation(len(files))[:size].tolist())
        train[name] = [file for number, file in enumerate(files) if number not in chosen]
        dev[name] = [file for number, file in enumerate(files) if number in chosen]
    return Listing(train, dev, f"{root}: {dev_fraction:.0%} of each class, drawn with seed {seed}, is the dev set")


def _nested(folder: Path) -> Path:
    """The folder, or the one of the same name in it: archives may unpack to training_set/training_set."""
    return folder / folder.name if (folder / folder.name).is_dir() else folder


def _photographs_in(folder: Path) -> list[Path]:
    """The photographs right in a folder, by name. A link to nothing is among them: decoding names it."""
    files = (file for file in folder.iterdir() if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
    return sorted(file for file in files if not _is_other(file))


def _is_other(file: Path) -> bool:
    """Whether this is a folder, a pipe or a device: reading a pipe would wait for ever."""
    try:
        return not stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return False


def _by_folder(root: Path) -> dict[str, list[Path]]:
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    return {folder.name: files for folder in folders if (files := _photographs_in(folder))}


def _by_name(root: Path) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {}
    for file in _photographs_in(root):
        match = _FLAT_NAME.fullmatch(file.name)
        if match is not None:
            classes.setdefault(match[1], []).append(file)
    return classes


def _checked(root: Path, found: dict[str, list[Path]]) -> Classes:
    """Sort the classes, cats before dogs; raise ValueError where there are fewer than two."""
    if not found:
        loose = _photographs_in(root)
        if loose:
            told = f"nothing says which class a photograph is of ({plain(loose[0].name)})"
            raise ValueError(f"{root}: {told}; expected {_LAYOUTS}")
        raise ValueError(f"{root}: no photographs ({', '.join(ENDINGS)}) found; expected {_LAYOUTS}")
    if len(found) == 1:
        name = plain(next(iter(found)))
        raise ValueError(f"{root}: only one class with photographs found ({name}); two or more are needed")
    singular = {name.lower().removesuffix("s"): name for name in found}
    if len(found) == 2 and set(singular) == {"cat", "dog"}:
        return {name: found[singular[name]] for name in ("cat", "dog")}
    return {name: found[name] for name in sorted(found)}


def _first(classes: Classes, size: int | None, root: Path, part: str) -> Classes:
    """The first `size` of each class; a warning where there are fewer."""
    short = [f"{len(files)} of {name}" for name, files in classes.items() if size is not None and len(files) < size]
    if short:
        warn(
            f"{root}: {size} photographs per class asked for the {part} set, found {plain(', '.join(short))}; "
            "taking all of them"
        )
    return {name: files[:size] for name, files in classes.items()}


def _natural_shape(files: list[Path], notices: list[str]) -> tuple[int, int]:
    """224x224, or the one size of these photographs where that is smaller."""
    shapes = {photograph_size(file) for file in files}
    shape = shapes.pop()
    if shapes or shape is None or shape == DEFAULT_SHAPE or max(shape) > DEFAULT_SHAPE[0]:
        return DEFAULT_SHAPE
    notices.append(f"the photographs are {shape[0]}x{shape[1]} pixels and stay so (img_shape sets another size)")
    return shape


# ---- reading -----------------------------------------------------------------------------------------------


def _read_rows(
    root: Path,
    files: list[Path],
    shape: tuple[int, int],
    on_error: str,
    cache: bool,
    progress: bool | None,
    notices: list[str],
    decode: Decoder,
) -> tuple[NDArray[np.uint8], dict[int, str], dict[str, float]]:
    """The pixels of the files that decode, what is wrong with the others, and the seconds spent."""
    started = time.perf_counter()
    cache = cache and decode is decode_files
    facts = [RECIPE, str(root.resolve()), shape, on_error, [_stamp(file, root) for file in files]]
    file = cache_file("photographs", facts)
    broken = load_skipped(file) if cache and on_error == "skip" else {}
    rows = load_rows(file, (len(files) - len(broken), shape[0] * shape[1] * 3), notices) if cache else None
    timings = {"read": time.perf_counter() - started, "decode": 0.0}
    if rows is None:
        rows, broken = decode(files, shape, on_error, progress)
        check_some_decoded(files, broken)
        timings["decode"] = time.perf_counter() - started
        if cache:
            rows = store_rows(file, rows, broken)
    return rows, broken, timings


def _stamp(file: Path, root: Path) -> tuple[str, int, int]:
    """Name, size and time of a file; -1 where it is a link to nothing, which decoding will name."""
    name = str(file.relative_to(root))
    try:
        status = file.stat()
    except OSError:
        return name, -1, -1
    return name, status.st_size, status.st_mtime_ns
