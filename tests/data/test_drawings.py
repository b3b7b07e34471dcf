"""The built-in drawings: the same pictures however they are made, and no class in anything but shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from catopt_xp.data.drawn import drawings
from catopt_xp.data.drawn.drawings import get_drawn_set
from catopt_xp.data.drawn.scenes import draw_picture

SHAPE = (24, 20)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CATOPT_XP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_shapes_labels_and_memory_order() -> None:
    data = get_drawn_set(SHAPE, train_size=3, test_size=2)
    assert data.train_X.shape == (24 * 20 * 3, 6)
    assert data.dev_X.shape == (24 * 20 * 3, 4)
    assert data.train_X.dtype == data.dev_X.dtype == np.uint8
    assert data.train_X.T.flags.c_contiguous
    assert data.dev_X.T.flags.c_contiguous
    assert data.train_Y.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert data.dev_Y.tolist() == [[1, 1, 0, 0]]
    assert data.classes == ("dog", "cat")
    assert "drawn" in data.name
    assert data.img_shape == SHAPE


def test_values_run_through_height_width_channel() -> None:
    data = get_drawn_set(SHAPE, train_size=1, test_size=0)
    picture = draw_picture([0, drawings.TRAIN, drawings.CAT, 0], True, SHAPE)
    assert picture.shape == (20, 24, 3)
    np.testing.assert_array_equal(data.train_X[:, 0], picture.reshape(-1))


def test_a_small_set_is_the_beginning_of_a_large_one() -> None:
    small = get_drawn_set(SHAPE, train_size=2, test_size=1, cache=False)
    large = get_drawn_set(SHAPE, train_size=5, test_size=3, cache=False)
    for label in (1, 0):
        for part in ("train", "dev"):
            few = getattr(small, part + "_X")[:, getattr(small, part + "_Y")[0] == label]
            many = getattr(large, part + "_X")[:, getattr(large, part + "_Y")[0] == label]
            np.testing.assert_array_equal(few, many[:, : few.shape[1]])


def test_seeds_give_other_pictures() -> None:
    first, second = (get_drawn_set(SHAPE, 1, 0, seed=seed, cache=False).train_X for seed in (0, 1))
    assert (first != second).mean() > 0.5


def test_pictures_do_not_depend_on_the_number_of_processes() -> None:
    here = get_drawn_set((8, 8), train_size=100, test_size=1, cache=False, workers=1)
    elsewhere = get_drawn_set((8, 8), train_size=100, test_size=1, cache=False, workers=2)
    np.testing.assert_array_equal(here.train_X, elsewhere.train_X)
    np.testing.assert_array_equal(here.dev_X, elsewhere.dev_X)


def test_there_are_as_many_processes_as_threads_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def fake(tasks: list[object], img_shape: tuple[int, int], workers: int, progress: bool | None) -> np.ndarray:
        used.append(workers)
        return np.zeros((len(tasks), 3), dtype=np.uint8)

    monkeypatch.setattr(drawings, "_draw_rows", fake)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    get_drawn_set((1, 1), 1, 0, cache=False)
    get_drawn_set((1, 1), 1, 0, cache=False, workers=3)
    assert used == [5, 3]


def test_a_script_without_a_main_guard_draws_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('start')\n"
        "from catopt_xp.data.drawn.drawings import get_drawn_set\n"
        "print(get_drawn_set((8, 8), 100, 0, cache=False, workers=2).train_X.shape)\n"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["start", "(192, 200)", ""]
    assert done.stderr == ""  # no progress bar where there is no terminal


def test_a_drawing_process_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false" if Path("/bin/false").exists() else sys.executable)
    if sys.executable != "/bin/false":
        pytest.skip("there is no /bin/false on this system")
    with pytest.raises(RuntimeError, match="ended early: no message"):
        get_drawn_set((8, 8), 100, 0, cache=False, workers=2)


def test_the_cache_is_used_and_a_damaged_file_is_made_anew(own_cache: Path) -> None:
    first = get_drawn_set(SHAPE, 2, 1)
    (file,) = own_cache.iterdir()
    assert file.suffix == ".npy"
    again = get_drawn_set(SHAPE, 2, 1)
    assert again.timings["decode"] == 0.0
    assert again.notices == []
    np.testing.assert_array_equal(first.train_X, again.train_X)
    expected = np.array(first.train_X)
    del first, again
    file.write_bytes(file.read_bytes()[:-10])
    mended = get_drawn_set(SHAPE, 2, 1)
    assert "damaged cache file" in mended.notices[0]
    np.testing.assert_array_equal(mended.train_X, expected)
    assert list(own_cache.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_shape": (0, 5)}, "img_shape: must be"),
        ({"img_shape": 224}, "img_shape: must be"),
        ({"img_shape": (2.5, 3)}, "img_shape: must be"),
        ({"train_size": 0}, "train_size: must be a whole number from 1"),
        ({"test_size": -1}, "test_size: must be a whole number from 0"),
        ({"seed": -1}, "seed: must be a whole number from 0"),
        ({"seed": 0.5}, "seed: must be a whole number from 0, got 0.5"),
        ({"train_size": float("nan")}, "train_size: must be a whole number from 1, got nan"),
        ({"train_size": None}, "train_size: must be a whole number from 1, got None"),
        ({"img_shape": (float("inf"), 3)}, "img_shape: must be"),
        (
            {"train_size": 10**9},
            r"^2000000400 drawings of 224x224 pixels need \d+\.\d GB of memory, .* smaller img_shape, or fewer",
        ),
        ({"train_size": 10**12, "img_shape": (1, 1)}, "drawings of 1x1 pixels need"),
        ({"train_size": 1, "img_shape": (100_000, 100_000)}, "drawings of 100000x100000 pixels need"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_drawn_set(**arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """The same 150 scenes with a cat and with a dog: (150, height, width, 3) each."""
    cats = np.stack([draw_picture([7, k], True, (48, 48)) for k in range(150)])
    dogs = np.stack([draw_picture([7, k], False, (48, 48)) for k in range(150)])
    return cats.astype(np.float64), dogs.astype(np.float64)


def test_the_class_changes_the_animal_alone(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    cats, dogs = pairs
    changed = (cats != dogs).any(axis=3).mean(axis=(1, 2))
    assert (changed > 0).all()  # every picture shows its class
    assert changed.mean() < 0.3  # background, clutter, light and noise are the same
    assert changed.max() < 0.7


def test_brightness_and_colour_do_not_give_the_class_away(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    cats, dogs = pairs
    spread = cats.mean(axis=(1, 2)).std(axis=0)
    gap = (cats - dogs).mean(axis=(0, 1, 2))
    assert (np.abs(gap) < 0.06 * spread).all()
    contrast = cats.std(axis=(1, 2, 3)) - dogs.std(axis=(1, 2, 3))
    assert abs(contrast.mean()) < 1.0


def test_pictures_are_as_bright_as_photographs(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    both = np.concatenate(pairs)
    assert 105 < both.mean() < 135
    assert 48 < both.std() < 72


@pytest.mark.hardening
def test_dev_pictures_are_not_near_copies_of_train_pictures() -> None:
    data = get_drawn_set((16, 16), train_size=150, test_size=40, cache=False, workers=1)
    train, dev = (X.T.astype(np.float64) for X in (data.train_X, data.dev_X))

    def nearest(rows: np.ndarray, others: np.ndarray, itself: bool) -> np.ndarray:
        squares = (rows**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * rows @ others.T
        if itself:
            np.fill_diagonal(squares, np.inf)
        return np.sqrt(squares.min(axis=1))

    within, between = nearest(train, train, True), nearest(dev, train, False)
    assert between.min() > 0.9 * within.min()
    assert np.median(between) > 0.95 * np.median(within)
    assert within.min() > 0.3 * np.median(within)  # no near copies within train either
