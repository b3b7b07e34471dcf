"""Disks that are full, broken, read-only or gone, at any byte of anything that is written.

`small_disk` runs the commands on a real small disk. The other tests write each kind of file in this process, where the
system refuses all bytes beyond a limit (RLIMIT_FSIZE), or where a given call fails with a given error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_runs import fit, small_set

from catopt_xp.commands.export import export_onnx, export_safetensors
from catopt_xp.data.cache import store_rows
from catopt_xp.io import files
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import Adam
from catopt_xp.training import callbacks
from catopt_xp.training.callbacks import Checkpointing, CsvLog, TensorBoard, TrainState
from catopt_xp.training.checkpoint import load_model, save_state_dict
from catopt_xp.training.history import History
from catopt_xp.training.plots import finished, new_figure

if sys.platform != "linux":
    pytest.skip("limits and disks as Linux has them", allow_module_level=True)

import resource

Record = Callable[..., None]
HELPERS = Path(__file__).resolve().parents[1] / "helpers"
PAGE = 4096
ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.EACCES, errno.ENOENT]

# --- each kind of file, cut off at any byte ---------------------------------------------------------------------------

HISTORY = History(
    epoch=[0, 1],
    learning_rate=[0.1, 0.1],
    seconds=[1.0, 1.0],
    train_loss=[0.7, 0.6],
    eval_epoch=[1],
    train_accuracy=[0.5],
    full_train_loss=[0.6],
    mini_batch_loss=[0.7, 0.6],
)
NETWORK = DeepNetwork([12, 6, 1], ["relu", "sigmoid"])
ROWS = np.arange(3 * 1001, dtype=np.uint16).astype(np.uint8).reshape(3, 1001)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.npz": lambda path: save_state_dict(NETWORK, Adam(NETWORK.save(), 0.1), path),
    "a.json": lambda path: HISTORY.to_json(path),
    "a.csv": lambda path: HISTORY.to_csv(path),
    "a.onnx": lambda path: export_onnx(NETWORK, path),
    "a.safetensors": lambda path: export_safetensors(NETWORK, path),
    "a.npy": lambda path: store_rows(path, ROWS),
}


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may have more bytes: the system writes as many, and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def limits_of(file: Path, every: int) -> list[int]:
    """Sizes to stop at: every so many bytes and pages, and all around the ends of an archive's members."""
    size = file.stat().st_size
    limits = {*range(0, size, every), *range(0, size, PAGE), size - 1}
    if file.suffix == ".npz":
        with zipfile.ZipFile(file) as archive:
            ends = [member.header_offset for member in archive.infolist()] + [archive.start_dir, size]
        limits |= {end + near for end in ends for near in range(-3, 4) if 0 <= end + near < size}
    return sorted(limits)


def refused(write: Callable[[Path], object], path: Path, reason: str) -> None:
    """The write fails, and says so in one line that names the file and the reason; a cache warns and goes on."""
    if path.suffix == ".npy":
        with pytest.warns(UserWarning, match="cannot be written") as told:
            write(path)
        text = str(told[0].message)
    else:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            write(path)
        text = str(caught.value)
        assert text.count("could not write") == 1
    assert str(path) in text
    assert reason in text
    assert "\n" not in text


@pytest.mark.parametrize("every", [397, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_cut_at_any_byte_leaves_that_of_before(
    name: str, every: int, tmp_path: Path, record: Record
) -> None:
    write, path = WRITERS[name], tmp_path / name
    write(path)
    limits = limits_of(path, every)
    whole = path.read_bytes()
    for before in ({}, {name: b"what was there"}):
        for limit in limits:
            path.unlink(missing_ok=True)
            for other, text in before.items():
                (tmp_path / other).write_bytes(text)
            with largest_file(limit):
                refused(write, path, "File too large")
            assert content(tmp_path) == before, limit
        path.unlink(missing_ok=True)
        write(path)
        assert path.read_bytes() == whole
    record(file=name, bytes=len(whole), tried=2 * len(limits), broke=0)


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
@pytest.mark.parametrize("times", [2, pytest.param(100, marks=pytest.mark.long)])
def test_a_figure_that_is_cut_leaves_that_of_before(kind: str, times: int, tmp_path: Path, record: Record) -> None:
    figure, path = new_figure(2.0, 1.5), tmp_path / f"a.{kind}"
    figure.subplots().plot([1, 2])
    for _ in range(2):  # the first time it finds its layout
        finished(figure, path)
    size = path.stat().st_size - 300  # dates and random names are packed more or less tightly
    limits = list(range(0, size, size // times))
    path.write_bytes(b"what was there")
    for limit in limits:
        with largest_file(limit):
            refused(partial(finished, figure), path, "File too large")
        assert content(tmp_path) == {path.name: b"what was there"}, limit
    record(file=path.name, bytes=size, tried=len(limits), broke=0)


# --- logs that grow ---------------------------------------------------------------------------------------------------


def state_of(history: History) -> TrainState:
    return TrainState(history.epoch[-1], NETWORK, Adam(NETWORK.save(), 0.1), history, evaluated=False)


def two_epochs() -> tuple[History, History]:
    first = History(epoch=[0], learning_rate=[0.1], seconds=[1.0], train_loss=[0.7], mini_batch_loss=[0.7])
    return first, History(
        epoch=[0, 1], learning_rate=[0.1, 0.1], seconds=[1.0, 1.0], train_loss=[0.7, 0.6], mini_batch_loss=[0.7, 0.6]
    )


def test_a_csv_that_cannot_grow_keeps_its_whole_rows_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    first, both = two_epochs()
    log = CsvLog(path)
    log.on_epoch(state_of(first))
    before, row = path.read_bytes(), len(both.csv_row(1))
    for more in range(row):
        with largest_file(len(before) + more), pytest.raises(OSError, match=r"could not write .*a\.csv: File too"):
            log.on_epoch(state_of(both))
        assert content(tmp_path) == {"a.csv": before}, more
    log.on_epoch(state_of(both))
    assert path.read_text() == both.to_csv()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorboardX leaves its file open then
def test_events_stay_readable_where_the_disk_is_full(tmp_path: Path) -> None:
    from small_disk import check_whole

    first, both = two_epochs()

    def begun() -> tuple[TensorBoard, Path]:
        log = TensorBoard(tmp_path)
        log.on_epoch(state_of(first))
        return log, next(tmp_path.iterdir())

    def two(log: TensorBoard) -> None:
        for history in (first, both):
            log.on_epoch(state_of(history))

    log, file = begun()
    before = file.stat().st_size
    log.on_epoch(state_of(both))
    log.on_end(state_of(both))
    limits = [*range(0, before, 61), *range(before, file.stat().st_size, 7)]
    file.unlink()
    for limit in limits:
        log = TensorBoard(tmp_path)
        with largest_file(limit):
            with pytest.raises(OSError, match="could not write"):
                two(log)
            with contextlib.suppress(OSError):  # where it has something left to write
                log.on_end(state_of(both))
        for file in tmp_path.iterdir():
            assert file.stat().st_size <= limit
            check_whole(file)
            file.unlink()


# --- any error of any call --------------------------------------------------------------------------------------------


class Failing(io.FileIO):
    """A file whose disk fails once so many bytes are written: the system's call takes what fits before it fails."""

    room, number = 0, errno.EIO

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        taken = min(len(view), Failing.room)
        if not taken:
            raise OSError(Failing.number, os.strerror(Failing.number))
        Failing.room -= taken
        return super().write(view[:taken])


def failing_open(path: Any, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
    if "b" not in mode or mode == "rb":
        return open(path, mode, buffering, **options)
    raw = Failing(path, mode.replace("b", ""))
    return raw if buffering == 0 else io.BufferedWriter(raw)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", WRITERS)
def test_any_error_while_writing_leaves_the_file_of_before(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, path = WRITERS[name], tmp_path / name
    write(path)
    size = path.stat().st_size
    path.write_bytes(b"what was there")
    monkeypatch.setattr(files, "open", failing_open, raising=False)
    Failing.number = number
    for room in (0, 1, size // 2, size - 1):
        Failing.room = room
        refused(write, path, os.strerror(number))
        assert content(tmp_path) == {name: b"what was there"}, room


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("name", WRITERS)
def test_any_call_that_fails_leaves_the_file_of_before(
    name: str, call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, path = WRITERS[name], tmp_path / name
    path.write_bytes(b"what was there")

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if call == "open":
            patch.setattr(files, "open", fail, raising=False)
        else:
            patch.setattr(os, call, fail)
        refused(write, path, os.strerror(number))
    assert content(tmp_path) == {name: b"what was there"}


def test_a_failing_cleanup_does_not_hide_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def interrupted(file: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", fail)
    Failing.room, Failing.number = 3, errno.EIO
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "a", interrupted)
    monkeypatch.setattr(files, "open", failing_open, raising=False)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_whole(tmp_path / "a", lambda file: file.write(b"content"))


def test_a_csv_on_a_disk_that_breaks_keeps_its_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, both = two_epochs()
    log = CsvLog(tmp_path / "a.csv")
    log.on_epoch(state_of(first))
    before = content(tmp_path)
    for module in (callbacks, files):  # a file that is no longer as the log left it is written anew
        monkeypatch.setattr(module, "open", failing_open, raising=False)
    for number in ERRORS:
        Failing.room, Failing.number = 5, number
        with pytest.raises(OSError, match=os.strerror(number)):
            log.on_epoch(state_of(both))
        assert content(tmp_path) == before


def test_a_folder_that_is_removed_during_the_run_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    class Remove:
        def on_epoch(self, state: TrainState) -> None:
            if state.epoch == 1:
                shutil.rmtree(folder)

    with pytest.raises(OSError, match=r"could not write .*model_latest\.npz: No such file or directory; choose anoth"):
        fit(save_dir=folder, callbacks=[Remove()])
    assert content(tmp_path) == {}


def test_a_copy_of_the_run_before_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of another run is kept by a link, or where there are none by a copy, on a disk that is full."""
    fit(save_dir=tmp_path)
    before = content(tmp_path)

    def no_links(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    checkpointing = Checkpointing(tmp_path / "model_latest.npz")
    X, Y = small_set()

    class Full:
        limit = 0

        def on_epoch(self, state: TrainState) -> None:
            with largest_file(self.limit):
                checkpointing.write(state)

    for Full.limit in range(0, len(before["model_latest.npz"]), 1500):
        with pytest.raises(OSError, match=r"could not write .*_previous\.npz: File too large"):
            fit(X=X, Y=Y, total_epoch=1, callbacks=[Full()])
        assert content(tmp_path) == before


def test_a_full_disk_then_space_gives_the_bits_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    """Each save of a run is cut somewhere else; what is there then goes on to the same end."""
    straight = fit(save_dir=tmp_path / "straight", total_epoch=4)
    size = (tmp_path / "straight" / "model_latest.npz").stat().st_size

    class Fill:
        def __init__(self, limit: int) -> None:
            self.limits, self.limit = contextlib.ExitStack(), limit

        def on_epoch(self, state: TrainState) -> None:
            if state.epoch == 2:
                self.limits.enter_context(largest_file(self.limit))

    for number, limit in enumerate(range(1, 3 * size // 4, size // 6)):
        folder, fill = tmp_path / str(number), Fill(limit)
        with fill.limits, pytest.raises(OSError, match="could not write"):
            fit(save_dir=folder, total_epoch=4, callbacks=[fill])
        assert os.listdir(folder) == ["model_latest.npz"]
        resumed = fit(save_dir=folder, total_epoch=4, recover_from=folder / "model_latest.npz")
        assert resumed.history.epoch == [0, 1, 2, 3]
        assert resumed.history.mini_batch_loss == straight.history.mini_batch_loss
        for name, x in straight.model.save().items():
            assert np.array_equal(load_model(folder / "model_latest.npz").save()[name], x)


def test_a_limit_on_files_leaves_no_trial_of_writing(tmp_path: Path) -> None:
    """As under `ulimit -f 0`: the first thing that is written is a byte, before the first epoch."""
    with largest_file(0), pytest.raises(OSError, match="cannot be written \\(File too large\\)"):
        fit(save_dir=tmp_path)
    assert content(tmp_path) == {}


# --- commands on a small disk -----------------------------------------------------------------------------------------

SHORT = {"train": 20, "cache of photographs": 12}
LONG = {
    "first run": 4,
    "early stopping": 4,
    "compare": 40,
    "cache of drawings": 1,
    "onnx": 1,
    "new run over another's": 8,
    "safetensors": 1,
    "bench": 1,
}
LONG |= {"plot": 8, "plot pdf": 4, "plot svg": 16, "train and draw": 40, **dict.fromkeys(SHORT, 2)}


def namespace() -> list[str]:
    """What gives a process mounts of its own; the test is skipped where this user may have none."""
    for words in (["unshare", "-m"], ["unshare", "-Urm"]):
        trial = [*words, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
        try:
            if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
                return words
        except FileNotFoundError:
            break
    pytest.skip("this user may not mount a small disk (unshare)")


def alone() -> dict[str, str]:
    """The environment of a driver, whose process has one thread."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return (
        os.environ | one | {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HELPERS)]))}
    )


@pytest.mark.parametrize(
    ("case", "step"),
    [*SHORT.items(), *(pytest.param(*pair, marks=pytest.mark.long) for pair in LONG.items())],
)
def test_a_command_on_a_disk_with_any_space_left(case: str, step: int, tmp_path: Path, record: Record) -> None:
    command = [*namespace(), sys.executable, str(HELPERS / "small_disk.py"), str(tmp_path), case, str(step)]
    done = subprocess.run(command, capture_output=True, text=True, env=alone(), check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["broke"] == []
    assert found["tried"] > 1
    if found["ended"].get("status 1", 0) == 0:
        assert case.startswith("cache")
    assert found["ended"]["status 0"] > 0, "there was never enough space: nothing was seen"
    record(**found, pages_between=step)
