"""Files written whole or not at all, and what asks a run to end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_runs import fit

from catopt_xp.engines import choose
from catopt_xp.io.console import ASKING_TO_END, Signals
from catopt_xp.io.files import keep_copy, mark, remove_stale, write_whole
from catopt_xp.training.callbacks import CsvLog, JsonLog, TrainState
from catopt_xp.training.loop import Interrupted


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path):
        with pytest.raises(OSError, match=r"could not write .*: it is no file; choose another name$"):
            write_whole(place, lambda file: file.write(b"content"))
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def left_by_a_killed_writer(file: Path) -> Path:
    left = file.with_name(f".{file.name}.0123abcd.tmp")
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    return left


def test_whatever_is_written_removes_what_killed_writers_of_it_left(tmp_path: Path) -> None:
    """Of a run: its history, its logs and figures too, and what is kept of the run before."""
    (tmp_path / "model_latest.npz").write_bytes(b"of another run")
    names = ("model_latest.npz", "model_history.csv", "model_history.json", "model_previous.npz")
    left = [left_by_a_killed_writer(tmp_path / name) for name in names]
    others = left_by_a_killed_writer(tmp_path / "notes.txt")
    logs = [CsvLog(tmp_path / "model_history.csv"), JsonLog(tmp_path / "model_history.json")]
    fit(save_dir=tmp_path, callbacks=logs)
    assert not any(file.exists() for file in left)
    assert others.exists()
    assert {file.name for file in tmp_path.iterdir()} == {*names, others.name}


def test_a_copy_that_is_kept_already_leaves_nothing_beside_it(tmp_path: Path) -> None:
    """As where a run was killed between that and its first checkpoint: both are one file, and a rename does nothing."""
    file, copy = tmp_path / "a", tmp_path / "b"
    file.write_text("content")
    for _ in range(2):
        keep_copy(file, copy)
    assert copy.read_text() == "content"
    assert sorted(tmp_path.iterdir()) == [file, copy]


def test_a_link_that_another_run_took_for_stale_is_made_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, copy = tmp_path / "a", tmp_path / "b"
    file.write_text("content")
    os.utime(file, (0, 0))
    right = os.link

    def then_removed(source: Path, target: Path) -> None:
        right(source, target)
        remove_stale(copy)

    monkeypatch.setattr(os, "link", then_removed)
    keep_copy(file, copy)
    assert copy.read_text() == "content"
    assert sorted(tmp_path.iterdir()) == [file, copy]


def test_a_mark_changes_with_every_writing(tmp_path: Path) -> None:
    file = tmp_path / "a"
    marks = [write_whole(file, lambda stream: stream.write(b"content")) for _ in range(3)]
    assert len(set(marks)) == 3
    assert mark(file) == marks[-1]


def test_a_folder_where_the_checkpoint_goes_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "model_latest.npz").mkdir()
    with pytest.raises(OSError, match=r"model_latest\.npz is a folder, where the checkpoint goes; remove it"):
        fit(save_dir=tmp_path)


@pytest.mark.parametrize("number", ASKING_TO_END)
def test_any_signal_that_asks_to_end_ends_in_good_order(number: signal.Signals, tmp_path: Path) -> None:
    class Ask:
        def on_epoch(self, state: TrainState) -> None:
            if state.epoch == 1:
                os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        fit(save_dir=tmp_path, callbacks=[Ask()])
    assert caught.value.checkpoint == tmp_path / "model_latest.npz"
    assert caught.value.checkpoint.exists()


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("unchecked")
def test_ctrl_c_while_code_is_compiled_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    right, ended = choose.PlainEngine.steps, []

    def interrupted(engine: Any, *arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)  # in the midst of the check, where numba would swallow it
        yield from right(engine, *arguments, **options)
        ended.append(engine)

    monkeypatch.setattr(choose.PlainEngine, "steps", interrupted)
    rng = np.random.default_rng(0)
    X, Y = rng.integers(0, 256, (3000, 40), dtype=np.uint8), np.arange(40).reshape(1, -1) % 2
    with pytest.raises(KeyboardInterrupt):
        fit(X=X, Y=Y, dev_X=None, dev_Y=None, engine="panels", batch_size=8)
    assert len(ended) == 1
