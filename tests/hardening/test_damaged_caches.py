"""Cache files that are not what was written: each is made anew with one line, and never trained from."""

from __future__ import annotations

import io
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catopt_xp.data.cache import _listing
from catopt_xp.data.dataset import DataSet
from catopt_xp.data.drawn.drawings import get_drawn_set
from catopt_xp.data.photographs import get_photograph_set

SHAPE = (6, 4)
Get = Callable[[], DataSet]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CATOPT_XP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["photographs", "drawn"])
def get(request: pytest.FixtureRequest, tmp_path: Path, cache: Path) -> Get:
    """Gets a small set through the cache, which is filled already."""
    if request.param == "drawn":
        asked: Get = lambda: get_drawn_set(SHAPE, 4, 2)  # noqa: E731
    else:
        rng = np.random.default_rng(0)
        for name in ("cats", "dogs"):
            (tmp_path / "set" / "training_set" / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / "training_set" / name / f"{number}.png")
        asked = lambda: get_photograph_set(tmp_path / "set", SHAPE)  # noqa: E731
    asked()
    return asked


def saved(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def zipped(rows: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, rows=rows)
    return stream.getvalue()


def header_of(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n" + bytes(1000)


DAMAGES: dict[str, Callable[[bytes, np.ndarray[Any, Any]], bytes]] = {
    "empty": lambda whole, rows: b"",
    "one byte": lambda whole, rows: whole[:1],
    "the header alone": lambda whole, rows: whole[:128],
    "cut in the header": lambda whole, rows: whole[:70],
    "cut by a byte": lambda whole, rows: whole[:-1],
    "longer by a byte": lambda whole, rows: whole + b"\0",
    "twice": lambda whole, rows: whole + whole,
    "garbage": lambda whole, rows: b"x" * len(whole),
    "zeros, as after a power failure": lambda whole, rows: bytes(len(whole)),
    "fewer rows": lambda whole, rows: saved(rows[:-1]),
    "more rows": lambda whole, rows: saved(np.concatenate([rows, rows])),
    "turned": lambda whole, rows: saved(np.ascontiguousarray(rows.T)),
    "flat": lambda whole, rows: saved(rows.reshape(-1)),
    "column-major": lambda whole, rows: saved(np.asfortranarray(rows)),
    "other numbers": lambda whole, rows: saved(rows.astype(np.int8)),
    "floats": lambda whole, rows: saved(rows.astype(np.float32)),
    "objects": lambda whole, rows: saved(rows.astype(object), allow_pickle=True),
    "an archive": lambda whole, rows: zipped(rows),
    "a huge shape": lambda whole, rows: header_of(f"({2**62}, {2**62})"),
    "a negative shape": lambda whole, rows: header_of("(-1, 72)"),
    "no shape": lambda whole, rows: header_of("None"),
    "code": lambda whole, rows: header_of("__import__('os').abort()"),
}


def assert_made_anew(get: Get, cache: Path, expected: np.ndarray[Any, Any], whole: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = get()
    (notice,) = [notice for notice in data.notices if "damaged cache" in notice]
    (file,) = cache.glob("*.npy")
    assert notice.startswith(f"{file}: damaged cache file (")
    assert notice.endswith("); it is made anew")
    assert "\n" not in notice
    np.testing.assert_array_equal(data.train_X, expected)
    assert file.read_bytes() == whole
    assert list(cache.iterdir()) == [file]
    assert not [notice for notice in get().notices if "damaged cache" in notice]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(damage: str, get: Get, cache: Path) -> None:
    (file,) = cache.glob("*.npy")
    whole, expected = file.read_bytes(), np.array(get().train_X)
    file.write_bytes(DAMAGES[damage](whole, np.load(file)))
    assert_made_anew(get, cache, expected, whole)


@pytest.mark.parametrize("times", [8, pytest.param(1000, marks=pytest.mark.long)])
def test_a_cache_changed_anywhere_in_its_header_or_length_is_made_anew(
    times: int, get: Get, cache: Path, record: Callable[..., None]
) -> None:
    """Bits flipped in the header, or cut or lengthened at a random place; the pixels themselves have no checksum."""
    (file,) = cache.glob("*.npy")
    whole, expected, rng = file.read_bytes(), np.array(get().train_X), random.Random(times)
    for _ in range(times):
        changed = bytearray(whole)
        if rng.random() < 0.5:
            changed[rng.randrange(128)] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.5:
            del changed[rng.randrange(len(changed)) :]
        else:
            changed += rng.randbytes(rng.randint(1, 200))
        file.write_bytes(changed)
        assert_made_anew(get, cache, expected, whole)
    record(tried=times, broke=0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_or_a_folder_in_the_place_of_a_cache_file_is_not_waited_for(get: Get, cache: Path) -> None:
    (file,) = cache.glob("*.npy")
    expected = np.array(get().train_X)
    for make in (os.mkfifo, os.mkdir):
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink()
        make(file)
        with pytest.warns(UserWarning, match=r"cannot be written .* going on in memory"):
            data = get()
        assert [notice for notice in data.notices if "damaged cache file (no file)" in notice]
        np.testing.assert_array_equal(data.train_X, expected)


@pytest.mark.parametrize(
    "listing",
    [
        "",
        "{",
        "[]",
        "null",
        '{"99": "x"}',
        '{"-1": "x"}',
        '{"a": "x"}',
        "[" * 100_000,
        '{"0": "x"}',
        '{"2": "x", "3": "y"}',
    ],
    ids=lambda text: text[:8],
)
def test_a_damaged_list_of_skipped_photographs_is_made_anew(listing: str, tmp_path: Path, cache: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(np.full((8, 8, 3), 40 * number + len(name), dtype=np.uint8)).save(
                tmp_path / name / f"{number}.png"
            )

    def get() -> DataSet:
        return get_photograph_set(tmp_path, SHAPE, dev_fraction=0, on_error="skip")

    (tmp_path / "cats" / "1.png").write_text("no photograph")
    with pytest.warns(UserWarning, match="skipped 1"):
        expected = get()
    (file,) = cache.glob("*.json")
    right = file.read_text()
    file.write_text(listing)
    with pytest.warns(UserWarning, match="skipped 1"):
        found = get()
    np.testing.assert_array_equal(found.train_X, expected.train_X)
    assert found.train_Y.tolist() == expected.train_Y.tolist()
    assert file.read_text() == right


def test_a_list_that_fits_no_rows_goes(tmp_path: Path, cache: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / name / f"{number}.png")

    def get() -> DataSet:
        return get_photograph_set(tmp_path, SHAPE, dev_fraction=0, on_error="skip")

    get()
    (file,) = cache.iterdir()
    file.with_suffix(".json").write_text(json.dumps(_listing({0: "of another time"})))
    for damaged in (1, 0):
        data = get()
        assert data.train_X.shape[1] == 6
        assert len(data.notices) == damaged
    assert list(cache.iterdir()) == [file]
