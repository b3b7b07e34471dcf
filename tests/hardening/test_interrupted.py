"""Interrupted anywhere, also within a call of the system: what was there before is there, or all that was to come."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from short_runs import fit, small_network

import catopt_xp
from catopt_xp.commands.export import export_onnx, export_safetensors
from catopt_xp.data.cache import store_rows
from catopt_xp.data.photographs import get_photograph_set
from catopt_xp.io.files import keep_copy
from catopt_xp.optim.rules import Adam
from catopt_xp.training.callbacks import CsvLog, JsonLog, TrainState
from catopt_xp.training.checkpoint import load_model, read_checkpoint, save_state_dict
from catopt_xp.training.history import History
from catopt_xp.training.train import TrainResult

Record = Callable[..., None]
pytestmark = [  # a file or an archive of which the opening was interrupted
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*ZipFile.__del__:pytest.PytestUnraisableExceptionWarning"),
]
PACKAGE = str(Path(catopt_xp.__file__).parent)
# Functions written in C that change files, or ask for what changes them.
OF_THE_SYSTEM = {
    "open", "write", "flush", "close", "fsync", "fileno", "replace", "rename", "link", "unlink", "mkdir", "stat",
    "lstat", "listdir", "truncate", "flock", "utime", "readinto", "read", "seek", "fstat", "lseek", "scandir",
}  # fmt: skip


class Stop(KeyboardInterrupt):
    """What is raised in the midst of things, told from any other interruption."""


@dataclass
class Injector:
    """Raises an error at the n-th point that it sees: points are numbered from 1."""

    at: int
    make: Callable[[], BaseException]
    seen: int = 0

    def point(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise self.make()

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """Before and after each function of the system."""
        if event in ("c_call", "c_return") and getattr(argument, "__name__", "") in OF_THE_SYSTEM:
            self.point()

    def before_calls(self, frame: FrameType, event: str, argument: Any) -> None:
        """Before each function of the system, as one that fails does nothing; of closing and looking nothing fails."""
        if event == "c_call" and getattr(argument, "__name__", "") in OF_THE_SYSTEM - {
            "close",
            "stat",
            "lstat",
            "fileno",
        }:
            self.point()

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """At each line of the package."""
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.point()
        return self.trace


HOWS = ["lines", "calls", "errors"]


@contextmanager
def interrupting(how: str, at: int) -> Iterator[Injector]:
    """Within it, an interruption comes at one point: a line, a call of the system, or an error of one."""
    injector = Injector(at, Stop if how != "errors" else lambda: OSError(errno.EIO, "Input/output error"))
    install = sys.settrace if how == "lines" else sys.setprofile
    before = sys.gettrace() if how == "lines" else sys.getprofile()
    install({"lines": injector.trace, "calls": injector.profile, "errors": injector.before_calls}[how])
    try:
        yield injector
    finally:
        install(before)  # type: ignore[arg-type]


def interrupted_everywhere(
    how: str, act: Callable[[], object], check: Callable[[], None], stride: int = 1
) -> tuple[int, int]:
    """Does `act` again and again, interrupted at each point in turn, after which `check` looks. Points, and hits."""
    at, hits = 1, 0
    while True:
        try:
            with interrupting(how, at) as injector:
                act()
        except (Stop, OSError):
            hits += 1
        except ValueError as error:  # an archive that says in its turn that it was interrupted
            if not isinstance(error.__context__, Stop):
                raise
            hits += 1
        else:
            if injector.seen < at:
                return injector.seen, hits
        check()
        at += stride


# --- files ------------------------------------------------------------------------------------------------------------


def an_image(folder: Path) -> Any:
    return np.arange(24, dtype=np.uint8).reshape(2, 12)


def history_of(epochs: int) -> History:
    return History(
        epoch=list(range(epochs)), train_loss=[0.5] * epochs, seconds=[1.0] * epochs, learning_rate=[0.1] * epochs
    )


def writers() -> dict[str, tuple[str, Callable[[Path, bool], object]]]:
    """What writes a file: its name, and how; with True it writes something new."""

    def network(new: bool) -> Any:
        return small_network(seed=int(new))

    def saved(path: Path, new: bool) -> object:
        model = network(new)
        return save_state_dict(model, Adam(model.save(), 0.1), path)

    def copied(path: Path, new: bool) -> object:
        source = path.with_name(f"source {new}")
        source.write_text(f"new {new}")
        return keep_copy(source, path)

    def logged(path: Path, new: bool) -> object:
        model = network(new)
        state = TrainState(0, model, Adam(model.save(), 0.1), history_of(1 + new), False)
        return (CsvLog if path.suffix == ".csv" else JsonLog)(path).on_end(state)

    def cached(path: Path, new: bool) -> object:
        return store_rows(path, np.full((3, 12), int(new), np.uint8))

    return {
        "checkpoint": ("a.npz", saved),
        "kept copy": ("copy", copied),
        "JSON": ("history.json", lambda path, new: history_of(1 + new).to_json(path)),
        "CSV": ("history.csv", lambda path, new: history_of(1 + new).to_csv(path)),
        "CSV log": ("log.csv", logged),
        "JSON log": ("log.json", logged),
        "cache": ("rows.npy", cached),
        "safetensors": ("a.safetensors", lambda path, new: export_safetensors(network(new), path)),
        "ONNX": ("a.onnx", lambda path, new: export_onnx(network(new), path)),
    }


def says(file: Path) -> bytes:
    """What a file holds: of an archive, its members, as it is written in another form where one cannot seek."""
    if file.suffix != ".npz":
        return file.read_bytes()
    arrays, meta = read_checkpoint(file)
    return repr((sorted((k, x.dtype, x.tobytes()) for k, x in arrays.items()), meta)).encode()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", writers())
@pytest.mark.filterwarnings("ignore:.*cannot be written.*going on in memory")
def test_a_file_that_is_written_is_the_old_one_or_the_new_one(kind: str, how: str, tmp_path: Path) -> None:
    if kind in ("safetensors", "ONNX"):
        library = kind.lower()
        pytest.importorskip(library, reason=f"{library} is not installed")
    name, write = writers()[kind]
    file = tmp_path / name
    write(file, True)
    new = says(file)
    write(file, False)
    old, names = says(file), {path.name for path in tmp_path.iterdir()}
    assert old != new
    found: list[bool] = []

    def look() -> None:
        content = says(file)
        assert content in (old, new), f"{len(content)} bytes, which are neither"
        left = {path.name for path in tmp_path.iterdir()} - names - {"source True"}
        assert not left, f"{left} left behind"
        found.append(content == new)
        write(file, False)
        assert says(file) == old

    # A checkpoint has hundreds of points.
    points, hits = interrupted_everywhere(how, lambda: write(file, True), look, 5 if kind == "checkpoint" else 1)
    # What cannot be cached is said in a warning and goes on in memory.
    assert hits >= (0 if (kind, how) == ("cache", "errors") else 3), f"{hits} interruptions at {points} points"
    assert not all(found)


@pytest.mark.parametrize("coarse", [20, pytest.param(1, marks=pytest.mark.long)], ids=["some", "many"])
@pytest.mark.parametrize("how", HOWS)
def test_a_figure_that_is_drawn_is_the_old_one_or_the_new_one(
    how: str, coarse: int, tmp_path: Path, record: Record
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    file = tmp_path / "a.png"
    history_of(2).plot(file)
    old = file.read_bytes()
    stride = coarse * {"lines": 9, "calls": 40, "errors": 40}[how]

    def look() -> None:
        if file.read_bytes() != old:
            assert Image.open(file).size[0] > 0
        assert os.listdir(tmp_path) == ["a.png"]
        file.write_bytes(old)

    points, hits = interrupted_everywhere(how, lambda: history_of(3).plot(file), look, stride)
    assert hits >= 2, f"{hits} interruptions at {points} points"
    record(points=points, interrupted=hits, broke=0)


# --- logs that grow ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_a_log_that_grows_keeps_its_rows(how: str, tmp_path: Path) -> None:
    file, model = tmp_path / "log.csv", small_network()

    def at(epochs: int) -> TrainState:
        return TrainState(epochs - 1, model, Adam(model.save(), 0.1), history_of(epochs), False)

    log = CsvLog(file)

    def begin() -> None:
        nonlocal log
        log = CsvLog(file)
        log.on_epoch(at(1))
        log.on_epoch(at(2))

    def look() -> None:
        listed = History.from_csv(file)
        assert listed.epoch in ([0, 1], [0, 1, 2])
        assert os.listdir(tmp_path) == ["log.csv"]
        log.on_epoch(at(4))  # it goes on, whatever was interrupted
        assert History.from_csv(file).epoch == [0, 1, 2, 3]
        assert file.read_text() == history_of(4).to_csv()
        begin()

    begin()
    _, hits = interrupted_everywhere(how, lambda: log.on_epoch(at(3)), look)
    assert hits >= 3


# --- photographs and their cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_photographs_are_right_after_any_interruption(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "photographs", tmp_path / "cache"
    monkeypatch.setenv("CATOPT_XP_CACHE", str(cache))
    for k in range(6):
        place = folder / ("cats" if k % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 40 * k, np.uint8)).save(place / f"{k}.png")

    def pixels() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a cache that could not be written
            loaded = get_photograph_set(folder, (4, 4), progress=False)
        assert loaded.dev_X is not None
        return np.concatenate([loaded.train_X, loaded.dev_X], axis=1)

    expected = pixels()
    files = sorted(path.name for path in cache.iterdir())
    whole = {path.name: path.read_bytes() for path in cache.iterdir()}

    def look() -> None:
        for path in cache.iterdir():
            assert path.read_bytes() == whole.get(path.name), f"{path.name} is not whole"
        assert np.array_equal(pixels(), expected)
        assert sorted(path.name for path in cache.iterdir()) == files
        for path in cache.iterdir():
            path.unlink()

    look()
    points, hits = interrupted_everywhere(how, pixels, look, stride=7 if how == "lines" else 3)
    least = 1 if how == "errors" else 3  # what cannot be cached is said in a warning
    assert hits >= least, f"{hits} interruptions at {points} points"


# --- whole runs -------------------------------------------------------------------------------------------------------


def same_bits(one: TrainResult, other: TrainResult) -> bool:
    pairs = ((one.model.save(), other.model.save()), (one.optimizer.save(), other.optimizer.save()))
    losses = one.history.mini_batch_loss == other.history.mini_batch_loss
    return losses and all(np.array_equal(a[k], b[k]) for a, b in pairs for k in a)


@pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.long)], ids=["some", "every"])
@pytest.mark.parametrize("how", ["calls", "errors"])
@pytest.mark.filterwarnings("ignore:at the end of the run")
def test_a_run_interrupted_in_any_system_call_keeps_its_bits(
    how: str, stride: int, tmp_path: Path, record: Record
) -> None:
    options: dict[str, Any] = {"engine": "plain", "total_epoch": 3, "checkpoint_every_steps": 2, "early_stopping": 9}
    whole = fit(**options)
    earlier = tmp_path / "model_latest.npz"
    fit(**options | {"seed": 5, "total_epoch": 1}, save_dir=tmp_path)
    of_another = earlier.read_bytes()
    callbacks = [CsvLog(tmp_path / "log.csv"), JsonLog(tmp_path / "log.json")]
    found = {"of another run": 0, "gone on": 0}

    def look() -> None:
        kept = tmp_path / "model_previous.npz"
        contents = [path.read_bytes() for path in (earlier, kept) if path.exists()]
        assert of_another in contents, "the checkpoint of the run before is gone"
        load_model(earlier)
        if earlier.read_bytes() == of_another:
            found["of another run"] += 1
        else:
            resumed = fit(**options, model=load_model(earlier), recover_from=earlier)
            assert same_bits(resumed, whole)
            found["gone on"] += 1
        left = [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
        assert not left, f"{left} left behind"
        kept.unlink(missing_ok=True)
        earlier.write_bytes(of_another)

    points, hits = interrupted_everywhere(
        how, lambda: fit(**options, save_dir=tmp_path, callbacks=callbacks), look, stride
    )
    assert hits >= points // stride // 2, f"{hits} interruptions at {points} points"
    assert all(found.values()), found
    record(points=points, interrupted=hits, broke=0, **found)
