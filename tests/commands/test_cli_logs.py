"""The command line's logs and figures: what `train` writes as it goes, and what `plot` draws of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import catopt_xp
from catopt_xp.commands import main as cli
from catopt_xp.commands.main import main
from catopt_xp.training.history import History


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of numbers in an .npz file: 60 samples of 12 pixels, 20 more to develop on."""
    X = np.random.default_rng(0).integers(0, 256, (80, 12), dtype=np.uint8)
    Y = (X[:, :6].mean(axis=1) > 128).astype(np.int64).reshape(1, -1)
    file = tmp_path_factory.mktemp("arrays") / "set.npz"
    np.savez(file, X=X[:60].T, Y=Y[:, :60], dev_X=X[60:].T, dev_Y=Y[:, 60:])
    return file


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` draws no figure, which takes longer than the run."""
    monkeypatch.setattr(History, "plot", lambda history, path: None)


def train(data: Path, folder: Path, *more: str, epochs: int = 3) -> int:
    return main(["train", "--data", str(data), "--save-dir", str(folder), "--epochs", str(epochs), *more])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said.strip()


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_writes_csv_and_json_and_says_where(
    arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(arrays, tmp_path) == 0
    assert f"log: {tmp_path / 'model_history.csv'}\n" in capsys.readouterr().out
    whole, by_epoch = (
        History.from_json(tmp_path / "model_history.json"),
        History.from_csv(tmp_path / "model_history.csv"),
    )
    assert whole.train_loss == by_epoch.train_loss
    assert len(whole.mini_batch_loss) == 3
    assert train(arrays, tmp_path, "--recover-from", str(tmp_path / "model_latest.npz"), epochs=5) == 0
    assert History.from_csv(tmp_path / "model_history.csv").epoch == [0, 1, 2, 3, 4]


def test_train_writes_events_for_tensorboard_when_asked(
    arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    assert train(arrays, tmp_path / "work", "--tensorboard", str(tmp_path / "all runs"), "--model-name", "mine") == 0
    (events,) = (tmp_path / "all runs" / "mine").iterdir()
    assert b"loss/mini_batch_loss" in events.read_bytes()
    assert f"to look at it: tensorboard --logdir '{tmp_path / 'all runs'}'\n" in capsys.readouterr().out


def test_without_tensorboardx_one_line_names_the_extra(
    arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert train(arrays, tmp_path / "work", "--tensorboard", str(tmp_path / "events")) == 1
    assert one_line(capsys).endswith('pip install "catopt-xp[tensorboard]"')
    assert not (tmp_path / "work").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers no SIGINT to a child")
def test_an_interrupted_command_leaves_its_history_too(arrays: Path, tmp_path: Path) -> None:
    words = [
        "train",
        "--data",
        str(arrays),
        "--save-dir",
        str(tmp_path),
        "--epochs",
        "1000000",
        "--print-interval",
        "1",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "catopt_xp", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(catopt_xp.__file__).parent.parent), "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        started = any(line.startswith("epoch    2") for line in process.stdout)  # reads until there
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert (started, process.returncode) == (True, 130), said
    history = History.from_json(tmp_path / "model_history.json")
    assert len(history.epoch) > 2
    assert History.from_csv(tmp_path / "model_history.csv").train_loss == history.train_loss


# --- plot -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(arrays: Path) -> Path:
    """A folder with the folders of two runs, to be read and not written."""
    folder = arrays.parent / "runs"
    for name in ("adam", "momentum"):
        words = ["--optimizer", name, "--learning-rate", "0.01", "--print-interval", "1", "--quiet"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(History, "plot", lambda history, path: None)
            assert train(arrays, folder / name, *words) == 0
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is handed over to be drawn, instead of a drawing."""
    found: list[Any] = []
    for name in ("plot_history", "plot_mini_batch", "plot_comparison", "plot_benchmark"):
        monkeypatch.setattr(cli, name, lambda *given, name=name: found.append((name, *given)))
    return found


@pytest.mark.parametrize("left", ["", "model_history.json", "model_history.csv", "model_latest.npz"])
def test_plot_draws_a_run_from_its_folder_or_any_of_its_files(runs: Path, drawn: list[Any], left: str) -> None:
    assert main(["plot", str(runs / "adam" / left)]) == 0
    ((what, history, out),) = drawn
    assert what == "plot_history"
    assert history["epoch"] == [0, 1, 2]
    assert out == (runs / "adam" / (left or "model_history.json")).with_suffix(".png")


@pytest.mark.parametrize(("flags", "part"), [([], "train"), (["--dev"], "dev")])
def test_plot_compares_two_runs_on_one_axis_named_by_their_folders(
    runs: Path, drawn: list[Any], flags: list[str], part: str
) -> None:
    assert main(["plot", str(runs / "adam"), str(runs / "momentum"), "--title", "two", "--out", "a.png", *flags]) == 0
    ((what, named, out, title, of),) = drawn
    assert (what, out, title, of) == ("plot_comparison", Path("a.png"), "two", part)
    assert {name: history["run"]["optimizer"] for name, history in named.items()} == {
        "adam": "Adam",
        "momentum": "Momentum",
    }


def test_plot_draws_every_run_of_a_comparison_s_folder(
    arrays: Path, tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "decay", "--data", str(arrays), "--epochs", "2", "--save-dir", str(tmp_path), "--quiet"]
    assert main(words) == 0
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "all.svg")]) == 0
    assert list(drawn[0][1]) == ["adam_batch60", "adam_batch60_decay0.005", "adam_batch60_decay0.2"]
    assert capsys.readouterr().out.endswith(f"figure: {tmp_path / 'all.svg'}\n")


def test_plot_draws_the_results_of_a_benchmark(tmp_path: Path, drawn: list[Any]) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"rows": [{"batch_size": 8}]}))
    assert main(["plot", str(file)]) == 0
    assert drawn == [("plot_benchmark", {"rows": [{"batch_size": 8}]}, tmp_path / "bench.png")]


def test_two_runs_are_really_drawn(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "two.png"
    assert main(["plot", str(runs / "adam"), str(runs / "momentum"), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_lacks_and_where(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path)]) == 1
    assert one_line(capsys).startswith(f"catopt-xp: error: {tmp_path} holds no run")
    (tmp_path / "bench.json").write_text('{"rows": [{"batch_size": 8}]}')
    assert main(["plot", str(tmp_path / "bench.json")]) == 1
    assert "a row has no floor_seconds" in one_line(capsys)
    history = json.loads((runs / "adam" / "model_history.json").read_text()) | {"dev_loss": [], "dev_accuracy": []}
    (tmp_path / "a.json").write_text(json.dumps(history))
    assert main(["plot", str(runs / "adam"), str(tmp_path / "a.json"), "--dev"]) == 1
    assert one_line(capsys).startswith(f"catopt-xp: error: {tmp_path / 'a.json'} has no dev_loss or no seconds")
