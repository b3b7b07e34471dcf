"""Photographs: loading a cached set with every byte read, and decoding JPEG files, ours and as the chapter does it.

The pictures are drawn, 500x400 pixels as photographs of pets often are, and written as JPEG files by Pillow.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from catopt_xp import get_cat_set
from catopt_xp.backend.threads import limited_threads
from catopt_xp.data.decoding import decode_images
from catopt_xp.data.drawn.scenes import draw_picture

FILES, PICTURE, SHAPE = 120, (500, 400), (224, 224)
TRAIN, TEST = 1000, 200  # photographs of each class
PIXEL_DIFFERENCE = 8.0  # mean over all values: OpenCV does not average when it makes a picture smaller, Pillow does


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """JPEG files of drawn cats and dogs in turn."""
    folder = tmp_path_factory.mktemp("photographs")
    files = [folder / f"{k:04d}.jpg" for k in range(FILES)]
    for k, file in enumerate(files):
        Image.fromarray(draw_picture([0, 0, k % 2, k], k % 2 == 1, PICTURE)).save(file)
    return files


@pytest.fixture(scope="module")
def chapter_folder(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,400 photographs in the chapter's layout; each picture comes twenty times, as files of their own."""
    root = tmp_path_factory.mktemp("set")
    small = [tmp_path_factory.getbasetemp() / f"small-{file.name}" for file in photographs]
    for file, photograph in zip(small, photographs, strict=True):  # quickly decoded: that is not timed here
        with Image.open(photograph) as picture:
            picture.resize(SHAPE).save(file)
    for part, size in (("training_set", TRAIN), ("test_set", TEST)):
        for name in ("cats", "dogs"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for k in range(size):
                shutil.copyfile(small[k % FILES], folder / f"{name}.{k:04d}.jpg")
    return root


def load_and_read(root: Path) -> tuple[int, int]:
    """Loads the set and reads every pixel; the number of samples and the brightest value."""
    train_X, _, dev_X, _ = get_cat_set(root, SHAPE, TRAIN, TEST, progress=False)
    return train_X.shape[1] + dev_X.shape[1], max(int(train_X.max()), int(dev_X.max()))


def test_cached_load(benchmark: Any, chapter_folder: Path) -> None:
    """The second and later loads: files listed, the cache mapped, all 361 MB read."""
    benchmark.group = "load 2400 cached photographs"
    first = get_cat_set(chapter_folder, SHAPE, TRAIN, TEST, progress=False)  # decodes, and fills the cache
    again = get_cat_set(chapter_folder, SHAPE, TRAIN, TEST, progress=False)
    for ours, cached in zip(first, again, strict=True):
        assert np.array_equal(ours, cached)
    found = benchmark.pedantic(load_and_read, args=(chapter_folder,), rounds=5, warmup_rounds=1)
    assert found == (2 * (TRAIN + TEST), 255)
    benchmark.extra_info["bytes"] = found[0] * SHAPE[0] * SHAPE[1] * 3


def chapter_loader(cv2: Any, files: list[Path]) -> NDArray[np.uint8]:
    """The chapter's way: one file after the other, read whole, its colours turned round, resized; (m, n_x)."""
    rows = np.empty((len(files), SHAPE[0] * SHAPE[1] * 3), dtype=np.uint8)
    for row, file in zip(rows, files, strict=True):
        picture = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        row[:] = cv2.resize(picture, SHAPE).reshape(-1)
    return rows


@pytest.fixture(scope="module")
def cv2() -> Any:
    """OpenCV on one thread."""
    module = pytest.importorskip(
        "cv2", reason="OpenCV (opencv-python-headless) is not installed, so it is no peer here"
    )
    module.setNumThreads(1)
    return module


@pytest.mark.parametrize("one_thread", [False, True], ids=["all threads", "one thread"])
def test_decode(benchmark: Any, photographs: list[Path], one_thread: bool, threads: int) -> None:
    benchmark.group = f"decode {FILES} photographs"
    with limited_threads(1 if one_thread else threads):
        rows = benchmark.pedantic(
            decode_images, args=(photographs, SHAPE), kwargs={"progress": False}, rounds=5, warmup_rounds=1
        )
    assert rows.shape == (FILES, SHAPE[0] * SHAPE[1] * 3)
    note_rate(benchmark, 1 if one_thread else threads)


def test_decode_as_the_chapter(benchmark: Any, photographs: list[Path], cv2: Any) -> None:
    """OpenCV's imread, cvtColor and resize, once it is seen to give nearly the same pixels."""
    benchmark.group = f"decode {FILES} photographs"
    ours, theirs = decode_images(photographs, SHAPE, progress=False), chapter_loader(cv2, photographs)
    assert np.abs(ours.astype(np.int16) - theirs).mean() < PIXEL_DIFFERENCE
    benchmark.pedantic(chapter_loader, args=(cv2, photographs), rounds=5, warmup_rounds=1)
    note_rate(benchmark, 1)


def note_rate(benchmark: Any, threads: int) -> None:
    benchmark.extra_info |= {
        "threads": threads,
        "photographs_per_second": round(FILES / benchmark.stats.stats.median),
    }
