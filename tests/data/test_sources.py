"""load_data: one call for drawings, folders, .npz files and arrays."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catopt_xp.data.dataset import DataArgumentError, DataSet
from catopt_xp.data.load import load_data

REPOSITORY = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
X, Y = RNG.random((6, 5), dtype=np.float32), np.array([[0, 1, 1, 0, 1]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATOPT_XP_CACHE", str(tmp_path / "cache"))


def test_nothing_given_is_the_drawn_set() -> None:
    data = load_data(None, (8, 8), train_size=2, dev_size=1, seed=5)
    assert "drawn" in data.name
    assert data.train_X.shape == (192, 4)
    assert data.dev_X.shape == (192, 2)
    assert load_data(None, (8, 8), train_size=2, dev_size=0).dev_X is None


def test_nothing_given_has_the_reference_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def fake(*sizes: object, seed: int, progress: bool | None) -> DataSet:
        asked.extend([*sizes, seed, progress])
        return DataSet(X, Y)

    monkeypatch.setattr("catopt_xp.data.load.get_drawn_set", fake)
    load_data(progress=False)
    assert asked == [(224, 224), 1000, 200, 0, False]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_photographs(tmp_path: Path, kind: type) -> None:
    for name in ("cats", "dogs"):
        for k in range(5):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 3), (k, 0, 0)).save(tmp_path / "photos" / name / f"{k}.png")
    data = load_data(kind(tmp_path / "photos"), train_size=2, dev_size=1)
    assert data.name.startswith("photographs in ")
    assert data.img_shape == (4, 3)
    assert data.train_Y.tolist() == [[1, 1, 0, 0]]
    assert data.dev_Y.tolist() == [[1, 0]]
    assert set(data.timings) == {"read", "decode"}


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_the_bar_is_as_asked_and_without_a_terminal_not_there(
    tmp_path: Path, progress: bool | None, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cats", "dogs"):
        for k in range(2):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 3), (k, 0, 0)).save(tmp_path / "photos" / name / f"{k}.png")
    load_data(tmp_path / "photos", progress=progress)
    assert ("decoding" in capsys.readouterr().err) == shown
    load_data(None, (8, 8), train_size=1, dev_size=0, progress=progress)
    assert ("drawing cats and dogs" in capsys.readouterr().err) == shown


def test_arrays_are_handed_on_as_they_are() -> None:
    data = load_data((X, Y))
    assert data.train_X is X
    assert data.train_Y is Y
    assert data.dev_X is None
    assert data.classes == ()
    four = load_data((X, Y, X[:, :2], Y[:, :2]))
    assert four.dev_X.shape == (6, 2)
    assert four.dev_Y.shape == (1, 2)


def test_npz_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", X=X, Y=Y)
    np.savez_compressed(tmp_path / "four.npz", X=X, Y=Y, dev_X=X, dev_Y=Y)
    two, four = load_data(tmp_path / "two.npz"), load_data(str(tmp_path / "four.npz"))
    np.testing.assert_array_equal(two.train_X, X)
    np.testing.assert_array_equal(two.train_Y, Y)
    assert two.dev_X is None
    np.testing.assert_array_equal(four.dev_X, X)
    assert two.name.endswith("two.npz")


def test_npz_files_keep_sample_major_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=np.ascontiguousarray(X.T).T, Y=Y)
    assert load_data(tmp_path / "a.npz").train_X.T.flags.c_contiguous


def test_pictures_in_arrays_have_a_shape() -> None:
    assert load_data((X, Y), img_shape=(2, 1)).img_shape == (2, 1)
    with pytest.raises(ValueError, match=r"img_shape: 2x2 RGB pictures have 12 values, X is \(6, 5\)"):
        load_data((X, Y), img_shape=(2, 2))


def pickled(file: Path) -> None:
    np.savez(file, X=np.array([{}], dtype=object), Y=Y)


def words(file: Path) -> None:
    np.savez(file, X=np.array([["a"]]), Y=Y)


def no_labels(file: Path) -> None:
    np.savez(file, X=X, labels=Y)


def half_a_dev_set(file: Path) -> None:
    np.savez(file, X=X, Y=Y, dev_X=X)


def no_samples(file: Path) -> None:
    np.savez(file, X=np.float32(3.0), Y=Y)


def one_row(file: Path) -> None:
    np.savez(file, X=X, Y=Y, dev_X=X[0], dev_Y=Y)


def text(file: Path) -> None:
    file.write_text("X, Y")


def one_array(file: Path) -> None:
    with file.open("wb") as stream:
        np.save(stream, X)


def truncated(file: Path) -> None:
    np.savez(file, X=X, Y=Y)
    file.write_bytes(file.read_bytes()[:200])


def spoiled_member(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("X.npy", b"\x93NUMPY nonsense")
        archive.writestr("Y.npy", b"")


def nothing(file: Path) -> None:
    assert not file.exists()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (nothing, FileNotFoundError, "no such file"),
        (pickled, ValueError, "cannot be read as an .npz file of plain arrays"),
        (words, ValueError, "X must hold numbers, not <U1"),
        (no_labels, ValueError, "Y missing; the file has X, labels"),
        (half_a_dev_set, ValueError, "dev_Y missing"),
        (no_samples, ValueError, r"X has shape \(\); it must be \(n_x, m\), a sample in each column"),
        (one_row, ValueError, r"dev_X has shape \(5,\); it must be"),
        (text, ValueError, "cannot be read as an .npz file"),
        (one_array, ValueError, "cannot be read as an .npz file"),
        (truncated, ValueError, "cannot be read as an .npz file"),
        (spoiled_member, ValueError, "cannot be read as an .npz file"),
    ],
)
def test_wrong_npz_files_have_one_clear_line(tmp_path: Path, make: object, kind: type[Exception], message: str) -> None:
    file = tmp_path / "a.npz"
    make(file)  # type: ignore[operator]
    with pytest.raises(kind, match=message) as caught:
        load_data(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_other_files_and_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"a\.csv: cannot be read as data; give a folder"):
        load_data(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="no such folder of photographs"):
        load_data(tmp_path / "none")
    with pytest.raises(TypeError, match=r"data: a folder, an \.npz or \.npy file, .* expected, got 3 arrays"):
        load_data((X, Y, X))
    with pytest.raises(TypeError, match="got int"):
        load_data(7)  # type: ignore[arg-type]
    with pytest.raises(DataArgumentError, match="dev_size: apply to pictures only, as --train-size"):
        load_data((X, Y), train_size=3)
    with pytest.raises(DataArgumentError, match="data is empty; give a folder"):
        load_data("")


@pytest.mark.parametrize("source", [None, (X, Y)])
def test_an_unknown_way_with_errors_is_refused_whatever_the_source(source: object) -> None:
    with pytest.raises(DataArgumentError, match="on_error: 'no' is not known"):
        load_data(source, on_error="no")  # type: ignore[arg-type]


def test_importing_the_data_room_loads_no_pillow() -> None:
    code = "import sys, catopt_xp.data; sys.exit(any(name.split('.')[0] == 'PIL' for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0


def test_a_data_set_that_is_loaded_is_handed_on_and_left_alone() -> None:
    given = DataSet(np.zeros((12, 2)), np.ones((1, 2)), name="mine")
    loaded = load_data(given, img_shape=(2, 2))
    assert (loaded.name, loaded.img_shape, given.img_shape) == ("mine", (2, 2), None)
    assert loaded.train_X is given.train_X


def test_rows_in_an_npy_file_are_mapped_with_the_labels_beside_them(tmp_path: Path) -> None:
    rows = np.arange(40, dtype=np.uint8).reshape(8, 5)
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "a_labels.npy", np.arange(8) % 2)
    data = load_data(tmp_path / "a.npy")
    assert isinstance(data.train_X.base, np.memmap)
    np.testing.assert_array_equal(data.train_X, rows.T)
    np.testing.assert_array_equal(data.train_Y, (np.arange(8) % 2).reshape(1, 8))
    assert data.dev_X is None
    np.save(tmp_path / "a_dev.npy", rows[:2])
    np.save(tmp_path / "a_dev_labels.npy", np.ones((1, 2)))
    data = load_data(tmp_path / "a.npy")
    assert (data.name, data.dev_X.shape, data.dev_Y.shape) == (str(tmp_path / "a.npy"), (5, 2), (1, 2))
    (tmp_path / "a_dev_labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"a_dev_labels\.npy: no such file, where the labels of"):
        load_data(tmp_path / "a.npy")
