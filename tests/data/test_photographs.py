"""Photographs: every layout, size and mode; broken files named; the cache whole, used, never in the way."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catopt_xp.data import cache, decoding, photographs
from catopt_xp.data.decoding import decode_images
from catopt_xp.data.photographs import get_cat_set, get_photograph_set
from catopt_xp.io.files import write_whole

CAT_COLOUR, DOG_COLOUR = (200, 40, 30), (20, 60, 220)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CATOPT_XP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def paint(
    file: Path, colour: tuple[int, ...] = CAT_COLOUR, size: tuple[int, int] = (20, 16), mode: str = "RGB"
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file, **({"quality": 95} if file.suffix.lower() != ".png" else {}))
    return file


def chapter_folder(root: Path, train: int = 3, test: int = 2) -> Path:
    for part, count in (("training_set", train), ("test_set", test)):
        for k in range(count):
            paint(root / part / "cats" / f"cat.{k}.png", (200 + k, 40, 30))
            paint(root / part / "dogs" / f"dog.{k}.png", (20, 60, 220 + k))
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return chapter_folder(tmp_path / "data")


# ---- the chapter's call ------------------------------------------------------------------------------------


def test_get_cat_set_is_the_chapters(folder: Path) -> None:
    train_X, train_Y, dev_X, dev_Y = get_cat_set(folder, (4, 2), 2, 1)
    assert train_X.shape == (4 * 2 * 3, 4)
    assert dev_X.shape == (4 * 2 * 3, 2)
    assert train_X.dtype == np.uint8
    assert train_X.T.flags.c_contiguous
    assert dev_X.T.flags.c_contiguous
    assert train_Y.tolist() == [[1, 1, 0, 0]]
    assert dev_Y.tolist() == [[1, 0]]
    assert [train_X[:3, k].tolist() for k in range(4)] == [
        [200, 40, 30],
        [201, 40, 30],
        [20, 60, 220],
        [20, 60, 221],
    ]


def test_float32_is_the_chapters_range_in_the_same_order(folder: Path) -> None:
    pixels, Y, _, _ = get_cat_set(folder, (4, 2), 2, 1)
    values, Y_again, dev, _ = get_cat_set(folder, (4, 2), 2, 1, dtype="float32")
    assert values.dtype == dev.dtype == np.float32
    assert values.T.flags.c_contiguous
    np.testing.assert_allclose(values, pixels / 255, rtol=1e-7)
    np.testing.assert_array_equal(Y, Y_again)


def test_img_shape_is_width_height_and_values_are_row_major(tmp_path: Path) -> None:
    root = chapter_folder(tmp_path / "data", 1, 1)
    colours = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)  # (height 2, width 3, RGB)
    Image.fromarray(colours).save(root / "training_set" / "cats" / "cat.0.png")
    train_X, *_ = get_cat_set(root, (3, 2), 1, 1)
    np.testing.assert_array_equal(train_X[:, 0], np.arange(18))


def test_first_names_in_sorted_order_whatever_the_disk_says(tmp_path: Path) -> None:
    root = chapter_folder(tmp_path / "data", 1, 1)
    for red, name in ((1, "b.png"), (2, "a.PNG"), (3, "cat.10.png"), (4, "cat.2.png")):
        paint(root / "training_set" / "cats" / name, (red, 0, 0))
    with pytest.warns(UserWarning, match="3 photographs per class asked for the train set, found 1 of dog"):
        train_X, train_Y, *_ = get_cat_set(root, (1, 1), 3, 1)
    assert train_X[0, :3].tolist() == [2, 1, 200]  # a.PNG, b.png, cat.0.png
    assert train_Y.tolist() == [[1, 1, 1, 0]]


def test_more_asked_than_there_are_takes_all_with_one_line(folder: Path) -> None:
    with pytest.warns(UserWarning, match="photographs per class asked for") as caught:
        train_X, _, dev_X, _ = get_cat_set(folder, (4, 2))
    assert (train_X.shape[1], dev_X.shape[1]) == (6, 4)
    lines = [str(warning.message) for warning in caught]
    assert len(lines) == 2
    assert "1000 photographs per class asked for the train set, found 3 of cat, 3 of dog" in lines[0]
    assert "200 photographs per class asked for the dev set, found 2 of cat, 2 of dog" in lines[1]
    assert not any("\n" in line for line in lines)


def test_none_takes_all_and_zero_no_test_set(folder: Path) -> None:
    train_X, _, dev_X, dev_Y = get_cat_set(folder, (4, 2), None, 0)
    assert train_X.shape[1] == 6
    assert dev_X is None
    assert dev_Y is None


def test_other_dtypes_and_other_classes_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match='dtype: must be "uint8" or "float32"'):
        get_cat_set(folder, (4, 2), 1, 1, dtype="float64")
    for part in ("training_set", "test_set"):
        (folder / part / "dogs").rename(folder / part / "mice")
    with pytest.raises(ValueError, match="the classes must be cats and dogs, found cats, mice"):
        get_cat_set(folder, (4, 2), 1, 1)


def test_a_missing_test_set_is_an_error_unless_none_is_asked_for(folder: Path) -> None:
    (folder / "test_set").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="test_set: no such folder"):
        get_cat_set(folder, (4, 2), 1, 1)
    with pytest.warns(UserWarning, match="no test_set beside training_set"):
        assert get_cat_set(folder, (4, 2), 1, 0)[2] is None


# ---- layouts -----------------------------------------------------------------------------------------------


def test_an_archive_that_unpacks_into_itself(tmp_path: Path, folder: Path) -> None:
    for part in ("training_set", "test_set"):
        (tmp_path / "deep" / part).mkdir(parents=True)
        (folder / part).rename(tmp_path / "deep" / part / part)
    assert get_cat_set(tmp_path / "deep", (4, 2), 3, 2)[0].shape == (24, 6)


def test_one_folder_per_class_splits_a_seeded_part_and_says_so(tmp_path: Path) -> None:
    for label, name in enumerate(("wren", "ant", "bee")):
        for k in range(10):
            paint(tmp_path / "zoo" / name / f"{k}.png", (10 * label, k, 0), (2, 2))
    data = get_photograph_set(tmp_path / "zoo", seed=3)
    assert data.classes == ("ant", "bee", "wren")
    assert (data.train_X.shape, data.dev_X.shape) == ((12, 24), (12, 6))
    assert data.train_Y.tolist() == [[0] * 8 + [1] * 8 + [2] * 8]
    assert data.train_X[0].tolist() == [10] * 8 + [20] * 8 + [0] * 8  # red names the class
    assert any("20% of each class, drawn with seed 3" in notice for notice in data.notices)
    assert any("2x2 pixels" in notice for notice in data.notices)
    for label in range(3):
        parts = [X[1, Y[0] == label].tolist() for X, Y in ((data.train_X, data.train_Y), (data.dev_X, data.dev_Y))]
        assert sorted(parts[0] + parts[1]) == list(range(10))
        assert parts == [sorted(parts[0]), sorted(parts[1])]
    same, other = (get_photograph_set(tmp_path / "zoo", seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(data.dev_X, same.dev_X)
    assert (data.dev_X != other.dev_X).any()
    assert get_photograph_set(tmp_path / "zoo", dev_fraction=0).dev_X is None


def test_flat_names_and_case(tmp_path: Path) -> None:
    for k in range(5):
        paint(tmp_path / f"cat.{k}.JPG", CAT_COLOUR)
        paint(tmp_path / f"dog.{k}.jpeg", DOG_COLOUR)
    paint(tmp_path / "readme.png")
    data = get_photograph_set(tmp_path, (2, 2))
    assert data.classes == ("dog", "cat")
    assert data.train_Y.tolist() == [[1] * 4 + [0] * 4]
    assert data.dev_Y.tolist() == [[1, 0]]
    assert np.abs(data.train_X[:3, 0].astype(int) - CAT_COLOUR).max() <= 4
    assert np.abs(data.train_X[:3, -1].astype(int) - DOG_COLOUR).max() <= 4


@pytest.mark.parametrize("names", [("Cat", "Dog"), ("CATS", "dogs"), ("dog", "cat")])
def test_cats_are_one_however_the_folders_are_written(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        for k in range(2):
            paint(tmp_path / "pets" / name / f"{k}.png", CAT_COLOUR if "c" in name.lower() else DOG_COLOUR)
    data = get_photograph_set(tmp_path / "pets", (1, 1))
    assert data.classes == ("dog", "cat")
    assert data.train_Y.tolist() == [[1, 0]]
    assert data.train_X[0].tolist() == [CAT_COLOUR[0], DOG_COLOUR[0]]


def test_hidden_files_other_endings_pipes_and_link_loops_are_left_out(folder: Path) -> None:
    cats = folder / "training_set" / "cats"
    paint(cats / ".hidden.png")
    paint(folder / "training_set" / ".thumbnails" / "x.png")
    (cats / "notes.txt").write_text("no photograph")
    (cats / "folder.png").mkdir()
    os.mkfifo(cats / "pipe.png")
    (cats / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "training_set" / "loop").symlink_to("loop")
    listing = photographs.find_photographs(folder)
    assert {name: [file.name for file in files] for name, files in listing.train.items()} == {
        "cat": ["cat.0.png", "cat.1.png", "cat.2.png"],
        "dog": ["dog.0.png", "dog.1.png", "dog.2.png"],
    }


def test_default_shape(tmp_path: Path) -> None:
    root = chapter_folder(tmp_path / "data", 2, 1)
    assert get_photograph_set(root).img_shape == (20, 16)
    paint(root / "training_set" / "cats" / "cat.1.png", size=(30, 30))
    data = get_photograph_set(root)
    assert data.img_shape == (224, 224)
    assert data.train_X.shape == (224 * 224 * 3, 4)


def empty(root: Path) -> None:
    root.mkdir()


def one_class(root: Path) -> None:
    paint(root / "cats" / "a.png")


def other_test_classes(root: Path) -> None:
    chapter_folder(root)
    (root / "test_set" / "dogs").rename(root / "test_set" / "mice")


def empty_training_set(root: Path) -> None:
    (root / "training_set" / "cats").mkdir(parents=True)


def a_file(root: Path) -> None:
    root.write_text("not a folder")


def nothing(root: Path) -> None:
    assert not root.exists()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (nothing, FileNotFoundError, "no such folder of photographs"),
        (a_file, NotADirectoryError, "a file, where a folder of photographs is expected"),
        (empty, ValueError, "no photographs .* found; expected training_set/cats"),
        (empty_training_set, ValueError, "training_set: no photographs"),
        (one_class, ValueError, r"only one class with photographs found \(cats\)"),
        (other_test_classes, ValueError, "training_set has the classes cat, dog, test_set has cats, mice"),
    ],
)
def test_folders_that_are_none_have_one_clear_line(
    tmp_path: Path, make: Callable[[Path], None], kind: type[Exception], message: str
) -> None:
    make(tmp_path / "photos")
    with pytest.raises(kind, match=message) as caught:
        get_photograph_set(tmp_path / "photos")
    assert str(caught.value).startswith(str(tmp_path / "photos"))
    assert "\n" not in str(caught.value)


# ---- decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "colour", "ending", "expected"),
    [
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("L", 77, "png", (77, 77, 77)),
        ("L", 77, "jpg", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("I;16", 257 * 100, "png", (100, 100, 100)),
        ("RGBA", (0, 0, 0, 0), "png", (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), "png", (255, 0, 0)),
        ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
        ("LA", (40, 0), "png", (255, 255, 255)),
        ("P", 0, "png", (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], ending: str, expected: tuple[int, int, int]
) -> None:
    image = Image.new(mode, (16, 16), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(tmp_path / f"a.{ending}")
    row = decode_images([tmp_path / f"a.{ending}"], (1, 1))[0].astype(int)
    assert np.abs(row - expected).max() <= 3


def test_a_transparent_palette_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "a.png", transparency=1)
    assert decode_images([tmp_path / "a.png"], (1, 1)).tolist() == [[255, 255, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(24, 16), (960, 640)])  # as it is, and large enough for reduced-size decoding
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    upright = Image.new("RGB", size, (0, 0, 0))
    upright.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // 2))  # white at the top left
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert decoding.photograph_size(tmp_path / "a.jpg") == size
    picture = decode_images([tmp_path / "a.jpg"], (6, 4)).reshape(4, 6, 3).astype(int)
    assert picture[0, 0].min() > 220
    assert picture[0, -1].max() < 35
    assert picture[-1, 0].max() < 35
    assert picture[-1, -1].max() < 35


def test_unreadable_exif_is_a_remark_and_no_failure(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.png", exif=b"Exif\x00\x00not an exif block")
    with pytest.warns(UserWarning, match=r"remarked on 1 of the photographs.*unreadable EXIF data"):
        assert decode_images([tmp_path / "a.png"], (1, 1)).tolist() == [[9, 9, 9]]


def test_large_jpeg_files_are_decoded_reduced_to_nearly_the_same_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize(
        (800, 600), Image.Resampling.BICUBIC
    )
    smooth.save(tmp_path / "a.jpg", quality=95)
    smooth.save(tmp_path / "a.png")
    reduced, full = (decode_images([tmp_path / name], (40, 30)).astype(int) for name in ("a.jpg", "a.png"))
    assert np.abs(reduced - full).max() < 12
    assert np.abs(reduced - full).mean() < 2


def spoil(file: Path, how: str) -> Path:
    if how == "text":
        file.write_text("this is no photograph")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
        file.symlink_to(file.parent / "gone.png")
    return file


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("how", ["text", "empty", "truncated", "link to nothing"])
def test_broken_files_are_named_and_by_choice_skipped(folder: Path, how: str, ending: str) -> None:
    bad = spoil(paint(folder / "training_set" / "cats" / f"broken.{ending}"), how)
    with pytest.raises((ValueError, OSError)) as caught:
        get_photograph_set(folder, (4, 2))
    assert str(caught.value).startswith(f"{bad}: ")
    assert "\n" not in str(caught.value)
    for _ in range(2):  # decoded, then from the cache: the same, and said again
        with pytest.warns(UserWarning, match="skipped 1 that") as warned:
            data = get_photograph_set(folder, (4, 2), on_error="skip")
        assert str(bad) in str(warned[0].message)
        assert len(warned) == 1
        assert data.train_Y.tolist() == [[1, 1, 1, 0, 0, 0]]
        assert data.train_X[2].tolist() == [30, 30, 30, 220, 221, 222]
        assert data.dev_Y.tolist() == [[1, 1, 0, 0]]
    assert data.timings["decode"] == 0.0


def test_a_class_with_nothing_but_broken_files_is_an_error(folder: Path) -> None:
    for file in (folder / "training_set" / "cats").iterdir():
        spoil(file, "text")
    with (
        pytest.raises(ValueError, match="no photograph of the class cat could be decoded"),
        pytest.warns(UserWarning, match="skipped 3 that"),
    ):
        get_photograph_set(folder, (4, 2), on_error="skip")
    with pytest.raises(ValueError, match="not a photograph that Pillow can read"):
        decode_images(list((folder / "training_set" / "cats").iterdir()), (4, 2), on_error="skip")


@pytest.mark.parametrize("limit", [100, 250])  # Pillow refuses above twice its limit, and warns above it
def test_decompression_bombs_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    file = paint(tmp_path / "bomb.png")  # 320 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"bomb\.png: refused, too many pixels"):
        decode_images([file], (2, 2))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
    ids=["memory", "EMFILE", "EIO", "EACCES"],
)
def test_errors_of_the_system_are_not_skipped_as_bad_photos(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    unlucky, opened = folder / "training_set" / "cats" / "cat.1.png", Image.open

    def failing(file: Path, formats: tuple[str, ...]) -> Image.Image:
        if file == unlucky:
            raise error
        return opened(file, formats=formats)

    monkeypatch.setattr(Image, "open", failing)
    with pytest.raises(type(error)) as caught:
        get_photograph_set(folder, (4, 2), on_error="skip")
    assert str(caught.value).startswith(f"{unlucky}: ")
    assert "damaged" not in str(caught.value)
    assert not own_cache.exists()
    monkeypatch.setattr(Image, "open", opened)
    assert get_photograph_set(folder, (4, 2), on_error="skip").train_X.shape == (24, 6)


def test_an_offset_to_nowhere_is_a_damaged_photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(file: Path, formats: tuple[str, ...]) -> Image.Image:
        raise OSError(errno.EINVAL, "Invalid argument")  # what a seek to there says

    file = paint(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", failing)
    with pytest.raises(ValueError, match=r"a\.png: damaged photograph \(.*Invalid argument\)"):
        decode_images([file], (4, 2))


def test_photographs_are_decoded_by_as_many_threads_as_there_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, asked = decoding.ThreadPoolExecutor, []

    def counted(threads: int) -> object:
        asked.append(threads)
        return pool(threads)

    monkeypatch.setattr(decoding, "ThreadPoolExecutor", counted)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    decode_images([paint(tmp_path / "a.png")], (4, 2))
    assert asked == [3]


def test_wrong_arguments_of_decoding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_error: 'ignore' is not known"):
        decode_images([paint(tmp_path / "a.png")], on_error="ignore")
    with pytest.raises(ValueError, match="img_shape: must be"):
        decode_images([tmp_path / "a.png"], (4, 0))
    with pytest.raises(ValueError, match="no photographs given"):
        decode_images([])
    with pytest.raises(ValueError, match="files: an empty name"):
        decode_images([""])
    with pytest.raises(ValueError, match=r": a folder, where the file of a photograph is expected$") as caught:
        decode_images([tmp_path])
    assert "damaged" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^the 1000000x1000000 pixels of 1 photograph need 3000\.0 GB of memory"):
        decode_images([tmp_path / "a.png"], (10**6, 10**6))
    with pytest.raises(FileNotFoundError, match=r"none\.png: cannot be read"):
        decode_images([tmp_path / "none.png"])
    with pytest.raises(ValueError, match="dev_fraction: must be"):
        photographs.find_photographs(tmp_path, dev_fraction=1.0)


# ---- the cache ---------------------------------------------------------------------------------------------


def test_the_cache_is_one_whole_file_and_is_used(folder: Path, own_cache: Path) -> None:
    first = get_photograph_set(folder, (4, 2))
    (file,) = own_cache.iterdir()
    assert file.suffix == ".npy"
    assert np.load(file).shape == (10, 24)
    again = get_photograph_set(folder, (4, 2))
    assert first.timings["decode"] > 0
    assert again.timings["decode"] == 0
    np.testing.assert_array_equal(first.train_X, again.train_X)
    np.testing.assert_array_equal(first.dev_X, again.dev_X)
    assert not again.train_X.flags.writeable


@pytest.mark.parametrize("change", ["shape", "time", "size", "name", "count"])
def test_a_change_of_files_or_shape_decodes_anew(folder: Path, own_cache: Path, change: str) -> None:
    get_photograph_set(folder, (4, 2))
    file = folder / "training_set" / "cats" / "cat.0.png"
    if change == "time":
        os.utime(file, (time.time() + 5, time.time() + 5))
    elif change == "size":
        stamp = file.stat()
        paint(file, (1, 2, 3), (33, 31))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    elif change == "name":
        file.rename(file.with_name("other.png"))
    data = get_photograph_set(folder, (2, 4) if change == "shape" else (4, 2), 2 if change == "count" else None)
    assert data.timings["decode"] > 0
    assert len(list(own_cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "another shape"])
def test_a_damaged_cache_file_is_noticed_and_made_anew(folder: Path, own_cache: Path, damage: str) -> None:
    expected = np.array(get_photograph_set(folder, (4, 2)).train_X)
    (file,) = own_cache.iterdir()
    if damage == "another shape":
        np.save(file, np.zeros((3, 3), dtype=np.uint8))
    else:
        file.write_bytes({"truncated": file.read_bytes()[:-1], "empty": b"", "garbage": b"x" * 400}[damage])
    data = get_photograph_set(folder, (4, 2))
    assert [notice for notice in data.notices if "damaged cache file" in notice]
    np.testing.assert_array_equal(data.train_X, expected)
    assert get_photograph_set(folder, (4, 2)).notices == []


def test_a_lost_list_of_skipped_files_decodes_anew(folder: Path, own_cache: Path) -> None:
    spoil(folder / "training_set" / "dogs" / "dog.0.png", "text")
    with pytest.warns(UserWarning, match="skipped 1"):
        get_photograph_set(folder, (4, 2), on_error="skip")
    (listing,) = own_cache.glob("*.json")
    assert list(json.loads(listing.read_text())["skipped"]) == ["3"]
    listing.write_text("{")
    with pytest.warns(UserWarning, match="skipped 1"):
        data = get_photograph_set(folder, (4, 2), on_error="skip")
    assert data.train_Y.tolist() == [[1, 1, 1, 0, 0]]


def test_no_cache_writes_nothing(folder: Path, own_cache: Path) -> None:
    data = get_photograph_set(folder, (4, 2), cache=False)
    assert data.train_X.shape == (24, 6)
    assert not own_cache.exists()


def test_an_unwritable_cache_goes_on_in_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CATOPT_XP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"cannot be written .* going on in memory") as caught:
        data = get_photograph_set(folder, (4, 2))
    assert len(caught) == 1
    assert data.train_X.shape == (24, 6)


def test_what_a_killed_writer_left_is_removed(folder: Path, own_cache: Path) -> None:
    spoil(folder / "training_set" / "dogs" / "dog.0.png", "text")
    with pytest.warns(UserWarning, match="skipped 1"):
        get_photograph_set(folder, (4, 2), on_error="skip")
    written = sorted(own_cache.iterdir())
    for file in written:
        left = file.with_name(f".{file.name}.0123abcd.tmp")
        left.write_bytes(b"half")
        os.utime(left, (0, 0))
        file.unlink()
    with pytest.warns(UserWarning, match="skipped 1"):
        get_photograph_set(folder, (4, 2), on_error="skip")
    assert sorted(own_cache.iterdir()) == written


def test_a_full_disk_leaves_no_file_behind(folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    reason = r"^\S+\.npy: cannot be written \(No space left on device\); going on in memory; the pictures"
    with pytest.warns(UserWarning, match=reason):
        data = get_photograph_set(folder, (4, 2))
    assert data.train_X.shape == (24, 6)
    assert list(own_cache.iterdir()) == []


def test_a_cache_folder_that_is_a_file_is_said_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CATOPT_XP_CACHE", str(tmp_path / "file"))
    with pytest.raises(NotADirectoryError, match=r"^CATOPT_XP_CACHE names .*file, which is a file; name a folder$"):
        get_photograph_set(folder, (4, 2))


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    file.write_bytes(b"old")

    def interrupted(stream: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(file, interrupted)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_two_writers_at_once_both_succeed(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.uint8).reshape(2, 3)
    file = tmp_path / "a.npy"

    def second_writer_first(stream: object) -> None:
        cache.store_rows(file, rows)
        np.save(stream, rows)  # type: ignore[call-overload]

    write_whole(file, second_writer_first)
    np.testing.assert_array_equal(np.load(file), rows)
    assert list(tmp_path.iterdir()) == [file]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATOPT_XP_CACHE", "~/here")
    assert cache.cache_folder() == Path.home() / "here"
    monkeypatch.delenv("CATOPT_XP_CACHE")
    if sys.platform != "linux":
        pytest.skip("where it lies otherwise is known to platformdirs")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_folder() == Path("/somewhere/catopt_xp")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "catopt_xp"


def test_decoding_leaves_the_warning_filters_alone(folder: Path) -> None:
    before = list(warnings.filters)
    get_photograph_set(folder, (4, 2))
    assert list(warnings.filters) == before
