"""What runs leave, found and read: folders, files of each kind, and short names for them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from short_runs import fit

from catopt_xp.commands.plot import read_benchmark, read_history, run_files, run_names
from catopt_xp.training.callbacks import CsvLog, JsonLog, TrainState
from catopt_xp.training.checkpoint import CheckpointError, save_state_dict
from catopt_xp.training.history import History

NAMES = ("a_history.json", "a_history.csv", "a_latest.npz", "a.json")


@pytest.fixture
def trained(tmp_path: Path) -> History:
    """The history of a run that left every kind of file, `a_…`, in the folder."""
    logs = [CsvLog(tmp_path / "a_history.csv"), JsonLog(tmp_path / "a_history.json")]
    result = fit(callbacks=logs, save_dir=tmp_path, model_name="a", total_epoch=2)
    result.history.to_json(tmp_path / "a.json")
    return result.history


def touch(file: Path, time: int) -> None:
    file.touch()
    os.utime(file, (time, time))


def test_a_history_is_read_from_each_kind_of_file(tmp_path: Path, trained: History) -> None:
    assert read_history(tmp_path / "a_history.json") == read_history(tmp_path / "a.json") == trained
    from_csv, from_checkpoint = read_history(tmp_path / "a_history.csv"), read_history(tmp_path / "a_latest.npz")
    for name in ("epoch", "learning_rate", "train_loss", "eval_epoch", "full_train_loss"):
        assert getattr(from_csv, name) == getattr(from_checkpoint, name) == getattr(trained, name)
    assert from_checkpoint.mini_batch_loss == trained.mini_batch_loss
    assert from_checkpoint.run == trained.run


def test_a_checkpoint_without_a_run_has_an_empty_history(tmp_path: Path) -> None:
    result = fit(total_epoch=1)
    assert read_history(save_state_dict(result.model, result.optimizer, tmp_path / "state.npz")) == History()
    (tmp_path / "a.npz").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"a\.npz"):
        read_history(tmp_path / "a.npz")


@pytest.mark.parametrize("newest", NAMES)
def test_of_a_run_in_a_folder_the_file_that_was_written_last_counts(tmp_path: Path, newest: str) -> None:
    for name in NAMES:
        touch(tmp_path / name, 200 if name == newest else 100)
    assert run_files(tmp_path) == [tmp_path / newest]


def test_of_files_equally_old_the_one_with_most_to_tell_counts(tmp_path: Path) -> None:
    for name in ("a_history.csv", "a_latest.npz", "a_history.json"):
        touch(tmp_path / name, 100)
        assert run_files(tmp_path) == [tmp_path / name]


def test_each_run_of_a_folder_is_found_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b_latest.npz", "b.json", "a_history.csv", "a_previous.npz", "bench.json", "notes.csv"):
        touch(tmp_path / name, 100)
    assert run_files(tmp_path) == [tmp_path / "a_history.csv", tmp_path / "b.json"]


def test_a_file_is_itself_and_a_folder_without_runs_is_said(tmp_path: Path) -> None:
    assert run_files(tmp_path / "none.json") == [tmp_path / "none.json"]
    with pytest.raises(ValueError, match=r"holds no run, as it has none of \*_history\.json, ") as caught:
        run_files(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_results_of_a_benchmark_are_told_from_histories(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    rows = {"rows": [{"batch_size": 8}]}
    for content, expected in ((json.dumps(rows), rows), ('{"epoch": []}', None), ("[1]", None), ("rows", None)):
        file.write_text(content)
        assert read_benchmark(file) == expected
    file.write_bytes(b"\xff\x00rows")
    assert read_benchmark(file) is None
    for content in ('{"rows": []}', '{"rows": 5}', '{"rows": [5]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"bench\.json has no rows of a benchmark; give what catopt-xp"):
            read_benchmark(file)


def test_a_run_that_goes_on_is_read_while_it_does(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Look:
        def on_epoch(self, state: TrainState) -> None:
            (file,) = run_files(tmp_path)
            seen.append(read_history(file).epoch)

    touch(tmp_path / "model_history.json", 100)  # of the run before
    fit(callbacks=[CsvLog(tmp_path / "model_history.csv"), Look()])
    assert seen == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["x/adam_history.json", "x/gd_latest.npz", "rmsprop.json"], ["adam", "gd", "rmsprop"]),
        (["adam/model_history.json", "gd/model_history.csv"], ["adam", "gd"]),
        (["a/adam_history.json", "b/gd.json", "c/gd.json"], ["a/adam", "b/gd", "c/gd"]),
        (["a/x/m.json", "b/x/m.json"], ["a/x/m.json", "b/x/m.json"]),
        (["m.json"], ["m"]),
    ],
)
def test_names_are_as_short_as_tell_the_runs_apart(files: list[str], names: list[str]) -> None:
    assert run_names([Path(file) for file in files]) == [str(Path(name)) if "/x/" in name else name for name in names]


def test_a_run_in_the_current_folder_has_that_folder_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    files: list[Any] = [Path("m.json"), Path("../there/m.json")]
    assert run_names(files) == ["here", "there"]
