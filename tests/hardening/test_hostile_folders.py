"""Folders of any origin: links, pipes and devices in them, names that no shell likes, too much or too little of all."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if sys.platform == "win32":
    pytest.skip("Windows has no such names, pipes and links", allow_module_level=True)

from fuzz_targets import short_run, small_set

from catopt_xp.commands.main import main
from catopt_xp.data.decoding import decode_images
from catopt_xp.data.load import load_data
from catopt_xp.data.photographs import find_photographs, get_photograph_set
from catopt_xp.training.checkpoint import CheckpointError, load_model
from catopt_xp.training.history import History
from catopt_xp.training.train import train

# Names that a folder may hold; bytes that are no UTF-8 come as surrogates.
NAMES = {
    "a line": "two\nlines",
    "a cursor": "\x1b[2J\x1b[31m\x07",
    "no UTF-8": os.fsdecode(b"\xff\xfe"),
    "a formula": "$\\frac{$",
    "a flag": "--help",
    "quotes": '\'; rm -rf "$HOME" `x`',
    "right to left": "\u202egnp.exe",
    "spaces": " \t ",
    "240 letters": "x" * 240,
    "a format": "%s{0}%n",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATOPT_XP_CACHE", str(tmp_path / "cache"))


def paint(folder: Path, *names: str, level: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        with open(folder / name, "wb") as file:
            Image.new("RGB", (4, 3), (level, k, 9)).save(file, "PNG")


def two_classes(root: Path, photographs: int = 5) -> Path:
    for level, name in ((200, "cats"), (50, "dogs")):
        paint(root / name, *(f"{k}.png" for k in range(photographs)), level=level)
    return root


def printable(said: str) -> bool:
    return all(line.isprintable() for line in said.replace("\t", " ").split("\n"))


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", NAMES)
@pytest.mark.filterwarnings("always:skipped")
def test_names_of_every_kind_are_read_and_told_in_plain_lines(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(History, "plot", lambda history, path: None)  # which takes longer than all else
    name = NAMES[what]
    try:
        root = two_classes(tmp_path / name)
        paint(root / f"{name}s", *(f"{name}{k}.png" for k in range(5)), level=120)
    except (OSError, UnicodeError) as error:
        pytest.skip(f"this disk has no such names: {error}")
    run = [
        "--save-dir",
        str(tmp_path / "runs"),
        "--epochs",
        "1",
        "--hidden",
        "3",
        "--device",
        "cpu",
        "--engine",
        "plain",
    ]
    assert main(["train", "--data", str(root), *run]) == 0
    checkpoint = tmp_path / "runs" / "model_latest.npz"
    image = root / f"{name}s" / f"{name}0.png"
    assert main(["predict", f"--checkpoint={checkpoint}", "--device", "cpu", str(image)]) == 0
    assert main(["evaluate", str(checkpoint), "--data", str(root), "--device", "cpu"]) == 0
    image.write_bytes(b"no photograph")
    assert main(["train", "--data", str(root), *run]) == 1
    assert main(["train", "--data", str(root), "--on-error", "skip", *run]) == 0
    shutil.rmtree(root / "dogs")
    shutil.rmtree(root / "cats")
    assert main(["train", "--data", str(root), *run]) == 1
    said = capsys.readouterr()
    assert printable(said.out), said.out
    assert printable(said.err), said.err
    assert "only one class with photographs found" in said.err
    saved = json.loads((tmp_path / "runs" / "model_history.json").read_text())
    assert sorted(saved["run"]["classes"]) == sorted(["cats", "dogs", f"{name}s"])


def test_flat_names_of_every_kind(tmp_path: Path) -> None:
    names = [name for name in NAMES.values() if "." not in name and "x" * 200 not in name]
    paint(tmp_path / "flat", *(f"{name}.{k}.png" for name in names for k in range(3)))
    data = get_photograph_set(tmp_path / "flat")
    assert sorted(data.classes) == sorted(names)
    assert data.train_X.shape == (4 * 3 * 3, 2 * len(names))


def test_a_message_escapes_what_is_in_a_name(tmp_path: Path) -> None:
    (tmp_path / "\x1b[2J\n.png").write_bytes(b"no photograph")
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match="not a photograph that Pillow can read") as caught:
            decode_images([tmp_path / "\x1b[2J\n.png"], on_error=on_error)
        assert str(caught.value).isprintable()


# ---- what is no file -------------------------------------------------------------------------------------------------


def test_pipes_sockets_devices_folders_and_loops_are_left_out(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "data")
    expected = get_photograph_set(root).train_X.copy()
    cats = root / "cats"
    os.mkfifo(cats / "pipe.png")
    (cats / "folder.png").mkdir()
    (cats / "zeros.png").symlink_to("/dev/zero")
    (cats / "terminal.png").symlink_to("/dev/tty")
    (cats / "up.png").symlink_to(root, target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to("self")
    server = socket.socket(socket.AF_UNIX)
    place = Path.cwd()
    os.chdir(cats)  # a socket's path is short
    try:
        server.bind("socket.png")
    finally:
        os.chdir(place)
        server.close()
    started = time.monotonic()
    np.testing.assert_array_equal(get_photograph_set(root).train_X, expected)
    assert time.monotonic() - started < 5.0


def test_links_to_themselves_are_damaged_photographs(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "data")
    expected = get_photograph_set(root, (4, 3), dev_fraction=0.0).train_X
    (root / "cats" / "around.png").symlink_to("around.png")
    with pytest.raises(ValueError, match=r"around\.png: damaged photograph \(.*; remove or replace the file"):
        get_photograph_set(root)
    (root / "cats" / "nowhere.png").symlink_to("none.png")
    with pytest.warns(UserWarning, match="skipped 2 that cannot be decoded"):
        data = get_photograph_set(root, (4, 3), dev_fraction=0.0, on_error="skip")
    np.testing.assert_array_equal(data.train_X, expected)


def test_links_to_photographs_elsewhere_are_followed(tmp_path: Path) -> None:
    two_classes(tmp_path / "disk")
    root = tmp_path / "data"
    root.mkdir()
    for name in ("cats", "dogs"):
        (root / name).symlink_to(tmp_path / "disk" / name, target_is_directory=True)
    np.testing.assert_array_equal(get_photograph_set(root).train_X, get_photograph_set(tmp_path / "disk").train_X)


def test_folders_that_loop_end(tmp_path: Path) -> None:
    for name in ("training_set", "test_set"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).symlink_to(tmp_path / name, target_is_directory=True)
    with pytest.raises(ValueError, match="no photographs"):
        find_photographs(tmp_path)
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(FileNotFoundError, match="no such folder of photographs"):
        load_data(tmp_path / "self")


@pytest.mark.parametrize("ending", ["npz", "npy", "json", "csv", "png", ""])
def test_a_pipe_given_as_a_file_is_refused_and_not_waited_for(ending: str, tmp_path: Path) -> None:
    pipe = tmp_path / f"pipe.{ending}".removesuffix(".")
    os.mkfifo(pipe)
    X, Y = small_set()
    with pytest.raises((ValueError, OSError)):
        load_data(pipe)
    with pytest.raises(CheckpointError, match="is no file but a pipe or a device"):
        load_model(pipe)
    with pytest.raises(CheckpointError, match="is no file but a pipe or a device"):
        short_run(X=X, Y=Y, recover_from=pipe)
    with pytest.raises(ValueError, match="a pipe or a device, where the file of a photograph is expected"):
        decode_images([pipe])
    with pytest.raises(ValueError, match="is no file but a pipe or a device"):
        History.from_json(pipe)
    assert main(["plot", str(pipe)]) == 1
    assert main(["predict", str(pipe), "--checkpoint", str(pipe)]) == 1


def test_devices_given_as_files_are_refused(tmp_path: Path) -> None:
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises((ValueError, OSError)):
            load_data(device)
        with pytest.raises(CheckpointError, match="is no file but a pipe or a device"):
            load_model(device)
        with pytest.raises(ValueError, match="a pipe or a device"):
            decode_images([device])


# ---- too many and too few --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:skipped")
def test_empty_files_without_number_are_refused_soon_and_in_a_line(
    count: int, tmp_path: Path, record: Callable[..., None]
) -> None:
    chapter = tmp_path / "data" / "training_set"
    shutil.copytree(two_classes(tmp_path / "two", 1), chapter)
    root = chapter.parent
    for k in range(count):
        (chapter / ("cats", "dogs")[k % 2] / f"empty{k}.jpg").touch()
    seconds = {}
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"empty\d+\.jpg: not a photograph that Pillow can read") as caught:
        load_data(root, (8, 8))
    seconds["refused"] = time.monotonic() - started
    assert str(caught.value).isprintable()
    for what in ("skipped", "from the cache"):
        started = time.monotonic()
        with pytest.warns(UserWarning, match=f"skipped {count} that cannot be decoded") as warned:
            data = load_data(root, (8, 8), on_error="skip")
        seconds[what] = time.monotonic() - started
        text = str(warned[0].message)
        assert text.endswith(f"and {count - 20} more")
        assert len(text) < 20_000
        assert data.train_X.shape[1] == 2
    assert seconds["refused"] < 5.0 + count / 2_000
    record(files=count, seconds={what: round(spent, 1) for what, spent in seconds.items()})


def test_a_set_of_one_class_is_refused_or_trained(tmp_path: Path) -> None:
    paint(tmp_path / "photographs" / "cats", *(f"{k}.png" for k in range(5)))
    with pytest.raises(ValueError, match=r"only one class with photographs found \(cats\); two or more are needed"):
        train(data=tmp_path / "photographs", save_dir=None, verbose=False)
    X, Y = small_set()
    for label in (0, 1):  # arrays may be a part of a set
        with pytest.warns(UserWarning, match=f"all 20 samples have the label {label}"):
            result = short_run(X=X, Y=np.full_like(Y, label))
        assert np.isfinite(result.history.full_train_loss).all()
    with pytest.raises(ValueError, match="has the label 2"):
        short_run(X=X, Y=np.full_like(Y, 2))


def test_photographs_without_a_byte(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "data")
    (root / "cats" / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2\.png: not a photograph that Pillow can read"):
        get_photograph_set(root)
    for file in (*(root / "cats").iterdir(), *(root / "dogs").iterdir()):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="not a photograph that Pillow can read"):
        get_photograph_set(root, on_error="skip")
