"""The command line: what each command prints and leaves, its exit status, its one-line errors."""

from __future__ import annotations

import errno
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from marks import some
from PIL import Image

import catopt_xp
from catopt_xp.backend.devices import DeviceFallbackWarning
from catopt_xp.commands import flags as arguments
from catopt_xp.commands import flags as flag_values
from catopt_xp.commands import main as cli
from catopt_xp.commands import messages
from catopt_xp.commands.compare import TITLES
from catopt_xp.commands.main import main
from catopt_xp.data import load
from catopt_xp.io.console import ASKING_TO_END
from catopt_xp.training.checkpoint import load_model, read_checkpoint, write_checkpoint
from catopt_xp.training.history import History
from catopt_xp.training.plots import plot_paths

MODULE = [sys.executable, "-m", "catopt_xp"]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of numbers in an .npz file: 60 samples of 12 pixels, 20 more to develop on."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (80, 12), dtype=np.uint8)
    Y = (X[:, :6].mean(axis=1) > 128).astype(np.int64).reshape(1, -1)
    file = tmp_path_factory.mktemp("arrays") / "set.npz"
    np.savez(file, X=X[:60].T, Y=Y[:, :60], dev_X=X[60:].T, dev_Y=Y[:, 60:])
    return file


@pytest.fixture
def figures() -> None:
    """Asked for by tests that want the figure of `train` really drawn."""


@pytest.fixture(autouse=True)
def hurried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no figure of a run, which takes longer than the run, for those who do not look at it."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(History, "plot", lambda history, path: None)


@pytest.fixture(scope="module")
def trained(arrays: Path) -> Path:
    """The folder of a run on `arrays`, to be read and not written."""
    folder = arrays.parent / "trained"
    assert train(arrays, folder, "--learning-rate", "0.01", "--quiet") == 0
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """The chapter's folders: bright cats, dark dogs."""
    rng = np.random.default_rng(1)
    for part, per_class in (("training_set", 12), ("test_set", 3)):
        for kind, level in (("cats", 190), ("dogs", 60)):
            folder = tmp_path / "photographs" / part / kind
            folder.mkdir(parents=True)
            for k in range(per_class):
                pixels = np.clip(rng.normal(level, 25, (6, 6, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{kind}.{k}.png")
    return tmp_path / "photographs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "work"


def train(data: Path, folder: Path, *more: str, epochs: int = 3) -> int:
    return main(["train", "--data", str(data), "--save-dir", str(folder), "--epochs", str(epochs), *more])


def module_environment() -> dict[str, str]:
    """Where a new process finds this package."""
    return os.environ | {"PYTHONPATH": str(Path(catopt_xp.__file__).parent.parent), "PYTHONUNBUFFERED": "1"}


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with status 2."""
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else -1
    said = capsys.readouterr().err
    assert status == 2, said
    return one_line(said)


def failed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with status 1."""
    status, said = main(argv), capsys.readouterr().err
    assert status == 1, said
    return one_line(said)


def one_line(said: str) -> str:
    assert said.endswith("\n")
    assert said.count("\n") == 1, said
    assert said.startswith("catopt-xp: error: ")
    return said.strip().removeprefix("catopt-xp: error: ")


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_leaves_checkpoint_history_and_figure(
    arrays: Path, folder: Path, figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(arrays, folder, "--plot-mini-batch") == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"catopt_xp {catopt_xp.__version__} on cpu (")
    assert said.err == ""
    assert said.out.splitlines()[-3:] == [
        f"checkpoint: {folder / 'model_latest.npz'}",
        f"history: {folder / 'model_history.json'}",
        f"figure: {folder / 'model_history.png'}",
    ]
    names = {"model_latest.npz", "model_history.json", "model_history.csv", "model_history.png", "model_mini_batch.png"}
    assert {file.name for file in folder.iterdir()} == names
    history = History.from_json(folder / "model_history.json")
    assert history.epoch == [0, 1, 2]
    assert history.run["optimizer"] == "Adam"
    assert history.run["batch_size"] == 60  # 64 are asked, 60 there are
    assert history.run["model"]["neuron_cnt"] == [12, 30, 20, 20, 1]


def test_every_flag_of_train_reaches_the_run(arrays: Path, folder: Path) -> None:
    flags = (
        "--hidden 5,4 --activation tanh --dropout 0.1 --dtype float64 --optimizer momentum --learning-rate 0.01"
        " --schedule hyperbola(0.5) --schedule-by step --weight-decay 0.1 --l2 0.2 --clip-norm 3 --beta 0.8 --nesterov"
        " --batch-size 7 --accumulate 2 --shuffle once --drop-last --seed 4 --print-interval 2 --early-stopping 9"
        " --checkpoint-every 1 --checkpoint-every-steps 5 --model-name mine --device cpu --engine plain --quiet"
    )
    assert train(arrays, folder, *flags.split()) == 0
    run = History.from_json(folder / "mine_history.json").run
    expected = {"batch_size": 7, "accumulate": 2, "shuffle": "once", "drop_last": True, "seed": 4, "print_interval": 2}
    assert run.items() >= expected.items()
    assert run["schedule_by"] == "step"
    assert run["optimizer"] == "Momentum"
    assert run["options"] == {
        "learning_rate": 0.01,
        "lr_scheduler": "Hyperbola(decay_rate=0.5)",
        "weight_decay": 0.1,
        "l2": 0.2,
        "clip_norm": 3.0,
        "beta": 0.8,
        "nesterov": True,
        "correct_param": False,
    }
    assert run["model"] == {
        "neuron_cnt": [12, 5, 4, 1],
        "activation_func": ["tanh", "tanh", "sigmoid"],
        "seed": 4,
        "dtype": "float64",
        "dropout": 0.1,
    }


def test_options_of_adam_and_the_bias_correction(arrays: Path, folder: Path) -> None:
    flags = "--beta1 0.5 --beta2 0.6 --eps 0.001 --eps-mode inside --no-bias-correction --batch-size auto --hidden none"
    assert train(arrays, folder, *flags.split(), epochs=1) == 0
    run = History.from_json(folder / "model_history.json").run
    assert run["options"].items() >= {"beta1": 0.5, "beta2": 0.6, "eps": 0.001, "eps_mode": "inside"}.items()
    assert run["options"]["correct_param"] is False
    assert run["model"]["neuron_cnt"] == [12, 1]


def test_quiet_prints_nothing(arrays: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(arrays, folder, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_train_goes_on_from_a_checkpoint(arrays: Path, folder: Path, tmp_path: Path) -> None:
    assert train(arrays, tmp_path / "whole", epochs=5) == 0
    assert train(arrays, folder, epochs=2) == 0
    assert train(arrays, folder, "--recover-from", str(folder / "model_latest.npz"), epochs=5) == 0
    whole, resumed = load_model(tmp_path / "whole" / "model_latest.npz"), load_model(folder / "model_latest.npz")
    assert all(np.array_equal(x, whole.save()[name]) for name, x in resumed.save().items())
    assert History.from_json(folder / "model_history.json").epoch == [0, 1, 2, 3, 4]


def test_a_resumed_run_takes_absent_flags_from_its_checkpoint(arrays: Path, folder: Path) -> None:
    flags = "--seed 4 --batch-size 7 --shuffle once --drop-last --accumulate 2 --print-interval 2 --quiet"
    flags += " --schedule-by step --schedule hyperbola(0.5)"
    assert train(arrays, folder, *flags.split(), epochs=2) == 0
    checkpoint = str(folder / "model_latest.npz")
    before = History.from_json(folder / "model_history.json").run
    assert train(arrays, folder, "--recover-from", checkpoint, "--quiet", epochs=4) == 0
    after = History.from_json(folder / "model_history.json").run
    assert set(arguments.REMEMBERED) < set(after)
    assert after == before | {"total_epoch": 4}
    given = ["--recover-from", checkpoint, "--quiet", "--no-drop-last", "--seed", "0", "--batch-size", "5"]
    assert train(arrays, folder, *given, epochs=6) == 0
    last = History.from_json(folder / "model_history.json").run
    assert (last["drop_last"], last["seed"], last["batch_size"], last["shuffle"]) == (False, 0, 5, "once")


def test_what_is_remembered_is_else_as_in_train() -> None:
    defaults = {name: p.default for name, p in inspect.signature(catopt_xp.train).parameters.items()}
    assert {name: defaults[name] for name in arguments.REMEMBERED} == arguments.REMEMBERED


def test_a_resumed_run_draws_in_the_size_of_before(folder: Path) -> None:
    words = ["train", "--train-size", "2", "--dev-size", "0", "--save-dir", str(folder), "--quiet", "--epochs"]
    assert main([*words, "1", "--img-shape", "5x4"]) == 0
    assert main([*words, "2", "--recover-from", str(folder / "model_latest.npz")]) == 0
    assert History.from_json(folder / "model_history.json").run["img_shape"] == [5, 4]


def test_a_full_disk_at_the_figure_comes_after_what_is_there(
    arrays: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(history: History, figure: Path) -> None:
        raise OSError(errno.ENOSPC, f"could not write {figure}: No space left on device")

    monkeypatch.setattr(History, "plot", full)
    assert train(arrays, folder) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-2:] == [
        f"checkpoint: {folder / 'model_latest.npz'}",
        f"history: {folder / 'model_history.json'}",
    ]
    told = one_line(said.err)
    assert told == f"could not write {folder / 'model_history.png'}: No space left on device"


@pytest.mark.parametrize("words", [(), ("--no-figure",)])
def test_no_figure_leaves_out_the_figure_alone(
    words: tuple[str, ...], arrays: Path, folder: Path, figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(arrays, folder, *words) == 0
    drawn = {"model_history.png"} - ({"model_history.png"} if words else set())
    left = {file.name for file in folder.iterdir()}
    assert left == {"model_latest.npz", "model_history.json", "model_history.csv"} | drawn
    assert ("figure:" in capsys.readouterr().out) == bool(drawn)


@pytest.mark.filterwarnings("default::UserWarning")
def test_without_matplotlib_a_line_says_what_to_install(
    arrays: Path, folder: Path, figures: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(arrays, folder, "--quiet") == 0
    said = capsys.readouterr().err
    assert said.startswith("catopt-xp: warning: no figure was drawn: ")
    assert said.endswith('pip install "catopt-xp[plot]"\n')
    assert {file.name for file in folder.iterdir()} == {"model_latest.npz", "model_history.json", "model_history.csv"}


@pytest.mark.filterwarnings("default::catopt_xp.backend.devices.DeviceFallbackWarning")
def test_a_warning_is_one_clean_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warned() -> Any:
        warnings.warn("cuda cannot be used:\n  no driver", DeviceFallbackWarning, stacklevel=1)
        return "report"

    monkeypatch.setattr(cli, "device_report", warned)
    assert main(["info"]) == 0
    assert capsys.readouterr() == ("report\n", "catopt-xp: warning: cuda cannot be used: no driver\n")


# --- evaluate and predict ---------------------------------------------------------------------------------------------


def test_evaluate_prints_what_the_run_ended_with(
    arrays: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History.from_json(trained / "model_history.json")
    assert main(["evaluate", str(trained / "model_latest.npz"), "--data", str(arrays)]) == 0
    head, named, training, dev = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{trained / 'model_latest.npz'} on cpu (")
    assert named == f"data: {arrays}"
    accuracy, cost = history.train_accuracy[-1], history.full_train_loss[-1]
    assert training == f"training set (60 samples): accuracy {accuracy:.2%}, cost {cost:.4f}"
    accuracy, cost = history.dev_accuracy[-1], history.dev_loss[-1]
    assert dev == f"dev set (20 samples): accuracy {accuracy:.2%}, cost {cost:.4f}"


def test_evaluate_needs_a_set_unless_the_drawings_were_trained(
    arrays: Path, trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained / "model_latest.npz"
    said = refused(["evaluate", str(checkpoint)], capsys)
    assert said == f"{checkpoint} was trained on {arrays}: name the set to evaluate it over with --data"
    unknown = folder / "unknown.npz"
    folder.mkdir()
    model = load_model(checkpoint)
    catopt_xp.save_state_dict(model, catopt_xp.Adam(model.save(), 1e-3), unknown)
    assert "does not say what it was trained on: name the set" in refused(["evaluate", str(unknown)], capsys)
    sizes = ["--img-shape", "6x6", "--train-size", "2", "--dev-size", "1"]
    words = ["train", *sizes, "--total-epoch", "1", "--save-dir", str(folder), "--quiet"]
    assert main(words) == 0
    assert main(["evaluate", str(folder / "model_latest.npz"), *sizes[2:]]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "data: drawn cats and dogs (built in, seed 0)"


def test_photographs_from_training_to_prediction(
    photographs: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(photographs, folder, "--img-shape", "4x3", "--learning-rate", "0.01", epochs=60) == 0
    checkpoint = str(folder / "model_latest.npz")
    capsys.readouterr()
    assert main(["evaluate", checkpoint, "--data", str(photographs)]) == 0  # in the checkpoint's 4x3
    assert "dev set (6 samples): accuracy 100.00%" in capsys.readouterr().out
    images = [str(photographs / "test_set" / kind / f"{kind}.0.png") for kind in ("cats", "dogs")]
    assert main(["predict", *images, "--checkpoint", checkpoint]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [[images[0], "cat"], [images[1], "dog"]]
    assert all(0.5 < float(row[2]) <= 1.0 for row in rows)


def test_predict_of_several_classes(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colours = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
    for name, colour in colours.items():
        (tmp_path / "colours" / name).mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", (3, 3), colour).save(tmp_path / "colours" / name / f"{k}.png")
    flags = ("--img-shape", "2x2", "--learning-rate", "0.01")
    assert train(tmp_path / "colours", folder, *flags, epochs=120) == 0
    capsys.readouterr()
    images = [str(tmp_path / "colours" / name / "0.png") for name in colours]
    assert main(["predict", *images, "--checkpoint", str(folder / "model_latest.npz")]) == 0
    assert [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()] == list(colours)


def test_predict_needs_to_know_the_size_of_images(
    photographs: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(photographs / "test_set" / "cats" / "cats.0.png")
    words = ["predict", image, "--checkpoint", str(trained / "model_latest.npz")]
    assert "does not say how large its images are; give --img-shape WxH" in failed(words, capsys)
    assert "takes 12 numbers a sample, an image of 3x3 has 27" in failed([*words, "--img-shape", "3x3"], capsys)
    assert main([*words, "--img-shape", "2x2"]) == 0
    assert capsys.readouterr().out.split("\t")[1] in ("class 0", "class 1")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda meta: meta["model"].update(neuron_cnt=[12, 30]),
        lambda meta: meta["model"].update(neuron_cnt=7),
        lambda meta: meta["model"].update(neuron_cnt=[12, 10**15, 10**15, 20, 1]),
        lambda meta: meta["model"].update(activation_func=[1, 2, 3, 4]),
        lambda meta: meta["model"].update(dtype="float7"),
        lambda meta: meta["model"].update(dtype=[]),
        lambda meta: meta["run"].update(history=5),
        lambda meta: meta["run"]["history"].update(run=5),
        lambda meta: meta["run"]["history"]["run"].update(data=5),
        lambda meta: meta["run"]["history"]["run"].update(classes="cat"),
        lambda meta: meta["run"]["history"]["run"].update(classes=["dog"]),
        lambda meta: meta["run"]["history"]["run"].update(img_shape=["wide", None]),
    ],
)
def test_a_doctored_checkpoint_is_named_in_one_line(
    spoil: Any, arrays: Path, trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir()
    checkpoint = folder / "doctored.npz"
    found, meta = read_checkpoint(trained / "model_latest.npz")
    spoil(meta)
    write_checkpoint(checkpoint, found, meta)
    for words in (["evaluate", str(checkpoint), "--data", str(arrays)], ["predict", "a", "--checkpoint"]):
        told = failed(words if "evaluate" in words else [*words, str(checkpoint)], capsys)
        assert told.startswith(f"{checkpoint}: "), told
        assert "--debug" not in told


def test_a_message_about_arrays_names_their_file(
    arrays: Path, trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir()
    with np.load(arrays) as found:
        good = dict(found)
    for spoiled, told in (
        ({"Y": 7 * good["Y"]}, "Y has the label 7"),
        ({"X": good["X"][:, :9]}, "X has 9 samples and Y has 60"),
        ({"X": np.full((12, 60), np.nan)}, "X is not finite at feature 0, sample 0"),
    ):
        file = folder / "spoiled.npz"
        np.savez(file, **(good | spoiled))
        for words in (
            ["train", "--data", str(file), "--save-dir", str(folder), "--quiet"],
            ["evaluate", str(trained / "model_latest.npz"), "--data", str(file)],
            ["compare", "decay", "--data", str(file), "--save-dir", str(folder), "--quiet"],
        ):
            assert f"{file}: {told}" in failed(words, capsys)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_predict_prints_one_line_for_an_image_of_any_name(photographs: Path, folder: Path) -> None:
    assert train(photographs, folder, "--img-shape", "2x2", "--quiet", epochs=1) == 0
    picture = photographs / "test_set" / "cats" / "cats.0.png"
    images = [folder / name for name in ("two\nlines\t.png", "gelb-ü-\u732b.png", os.fsdecode(b"no-\xff.png"))]
    for image in images:
        image.write_bytes(picture.read_bytes())
    result = subprocess.run(
        [*MODULE, "predict", *map(str, images), "--checkpoint", str(folder / "model_latest.npz")],
        capture_output=True,
        env=module_environment() | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    rows = [line.split(b"\t") for line in result.stdout.splitlines()]
    assert [len(row) for row in rows] == [3, 3, 3]
    names = [row[0].rpartition(b"/")[2] for row in rows]
    assert names == [rb"two\nlines\t.png", rb"gelb-\xfc-\u732b.png", rb"no-\udcff.png"]


def test_a_set_of_other_classes_or_size_is_refused(
    photographs: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(photographs, folder, "--img-shape", "2x2", "--quiet") == 0
    checkpoint = str(folder / "model_latest.npz")
    words = ["evaluate", checkpoint, "--data", str(photographs), "--img-shape", "3x3"]
    assert "--img-shape 3x3: pictures of 27 values, the network of" in refused(words, capsys)
    assert "takes 12" in refused(["train", "--recover-from", checkpoint, *words[2:]], capsys)
    for name in ("cats", "dogs"):
        for part in ("training_set", "test_set"):
            (photographs / part / name).rename(photographs / part / f"little {name}")
    said = failed(["evaluate", checkpoint, "--data", str(photographs)], capsys)
    assert said.endswith("has little cats, little dogs")


# --- compare, info, plot ----------------------------------------------------------------------------------------------


def test_compare(arrays: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "decay", "--data", str(arrays), "--save-dir", str(folder), "--epochs", "2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("comparison decay on cpu (")
    assert said.endswith(f"figure: {folder / 'decay.png'}\n")
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_flags_know_every_comparison_and_every_argument_of_train(
    arrays: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(arguments.COMPARISONS) == list(TITLES)
    passed: dict[str, Any] = {}

    def stop(**options: Any) -> None:
        passed.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", stop)
    assert train(arrays, folder) == 130
    only_from_python = {"model", "X", "Y", "dev_X", "dev_Y", "sample_weight", "class_weight"}
    assert set(passed) == set(inspect.signature(catopt_xp.train).parameters) - only_from_python
    monkeypatch.setattr(cli, "compare", stop)
    passed.clear()
    assert main(["compare", "decay"]) == 130
    assert set(passed) == set(inspect.signature(catopt_xp.compare).parameters)


@pytest.mark.parametrize(
    ("flags", "progress", "verbose"),
    [("", None, True), ("--quiet", False, False), ("--quiet --progress", True, False), ("--no-progress", False, True)],
)
@pytest.mark.parametrize("command", ["train", "compare decay"])
def test_quiet_shows_no_bar_unless_one_is_asked_for(
    command: str, flags: str, progress: bool | None, verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: dict[str, Any] = {}

    def stop(**options: Any) -> None:
        passed.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, command.split()[0], stop)
    assert main([*command.split(), *flags.split()]) == 130
    assert (passed["progress"], passed["verbose"]) == (progress, verbose)


@pytest.mark.parametrize("command", ["train", "compare decay"])
def test_epochs_have_the_librarys_own_name_too(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def stop(**options: Any) -> None:
        asked.append(options["total_epoch"])
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, command.split()[0], stop)
    for flag in ("--epochs", "--total-epoch"):
        assert main([*command.split(), flag, "7"]) == 130
    assert asked == [7, 7]


def test_stochastic_goes_with_batch_sizes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["compare", "decay", "--stochastic"], capsys) == "--stochastic goes with batch-size alone"


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out.startswith("device: ")
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == catopt_xp.device_report().to_dict() | {
        "host_free_memory": pytest.approx(0, abs=2**60)  # memory moves between the two looks
    }


def test_plot_one_and_several(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, other = tmp_path / "model_history.json", tmp_path / "other_history.json"
    for copy in (file, other):
        copy.write_bytes((trained / "model_history.json").read_bytes())
    for words, out in (
        ([str(file)], tmp_path / "model_history.png"),
        ([str(file), "--mini-batch", "--out", "steps.svg"], Path("steps.svg")),
        ([str(file), str(other)], Path("comparison.png")),
        ([str(file), str(file), "--out", "same.pdf", "--title", "twice"], Path("same.pdf")),
    ):
        assert main(["plot", *words]) == 0
        assert capsys.readouterr().out == f"figure: {out}\n"
        assert out.stat().st_size > 1000


def test_paths_are_drawn_over_three_surfaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn: list[str] = []

    def counted(panels: list[dict[str, Any]], out: Path) -> None:
        drawn.extend(panel["title"].split(":")[0] for panel in panels)
        plot_paths(panels, out)

    monkeypatch.setattr(cli, "plot_paths", counted)
    for words, out in (([], "paths.png"), (["--out", "three.svg"], "three.svg")):
        assert main(["paths", *words]) == 0
        assert capsys.readouterr().out == f"figure: {out}\n"
        assert Path(out).stat().st_size > 1000
    assert drawn == ["Saddle point", "Plateau", "Valley"] * 2
    assert "not written as 'bmp'" in failed(["paths", "--out", "a.bmp"], capsys)


def test_plot_refuses_what_it_cannot_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "a.json"
    foreign.write_text('{"colour": 1}')
    assert failed(["plot", str(foreign)], capsys) == f"{foreign} is not a history: unknown colour"
    foreign.write_text('{"epoch": [0, 1], "seconds": [1.0]}')
    told = f"{foreign}: seconds has 1 values, epoch has 2; give a history as train wrote it"
    assert failed(["plot", str(foreign)], capsys) == told
    foreign.write_text('{"epoch": []}')
    assert failed(["plot", str(foreign)], capsys).startswith(f"{foreign} has no epoch;")
    assert failed(["plot", str(foreign), "--mini-batch"], capsys).startswith(f"{foreign} has no mini_batch_loss")
    assert failed(["plot", str(foreign), str(foreign)], capsys).startswith(
        f"{foreign} has no full_train_loss or no sec"
    )
    missing = tmp_path / "missing.json"
    assert failed(["plot", str(missing)], capsys) == f"{missing}: No such file or directory"
    words = ["plot", "--mini-batch", str(foreign), str(missing)]
    assert refused(words, capsys) == "--mini-batch draws one run, 2 are given"


# --- bad usage and failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "arguments are required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("train --batch-size 0", "argument --batch-size: '0' is not a whole number of at least 1, or auto"),
        ("train --batch-size many", "argument --batch-size: 'many' is not a whole number"),
        ("train --learning-rate -1", "argument --learning-rate: '-1' is not a number above 0"),
        ("train --learning-rate nan", "argument --learning-rate: 'nan' is not a number above 0"),
        ("train --weight-decay -1", "argument --weight-decay: '-1' is not a number of at least 0"),
        ("train --optimizer foo", "argument --optimizer: invalid choice: 'foo'"),
        ("train --epochs 1.5", "argument --epochs/--total-epoch: '1.5' is not a whole number of at least 1"),
        ("train --dropout 1", "argument --dropout: '1' is not a number of at least 0 and below 1"),
        ("train --hidden 30,0", "argument --hidden: '0' is not a whole number of at least 1"),
        ("train --img-shape 224", "argument --img-shape: '224' is not WIDTHxHEIGHT"),
        ("train --model-name a/b", "argument --model-name: 'a/b' is not a plain file name"),
        ("train --schedule hyperbola()", "argument --schedule: schedule 'hyperbola()': missing a required argument"),
        ("train --learning 1", "unrecognized arguments: --learning 1"),
        ("train --device tpu", "device='tpu' is not known"),
        ("evaluate x.npz --device tpu", "device='tpu' is not known"),
        ("train --optimizer gd --nesterov", "gd has no option '--nesterov'; it takes --schedule, --weight-decay, --l2"),
        ("train --beta 0.5", "adam has no option '--beta'; it takes --beta1, --beta2, --eps, --bias-correction"),
        ("train --optimizer gd --no-bias-correction", "gd has no option '--bias-correction'; it takes"),
        ("train --optimizer momentum --nesterov --bias-correction", "Momentum: --nesterov has no bias-corrected form"),
        ("train --eps 1e-60", "Adam: --eps is 1e-60, which is not above 0 in W0's float32"),
        ("compare colours", "invalid choice: 'colours'"),
        ("train --model-name ..", "argument --model-name: '..' is not a plain file name"),
        (
            "train --hidden 99999999,99999999",
            "the parameters of --hidden 99999999,99999999, their gradient and moments",
        ),
        ("train --hidden 9 --img-shape 1000000x1000000", "choose a smaller --hidden or --img-shape"),
        ("train --train-size 9999999999", "smaller --img-shape, or fewer pictures (--train-size, --dev-size)"),
        ("train --foo 1", "unrecognized arguments: --foo 1 (see catopt-xp train --help)"),
        ("evaluate x.npz --epochs 1", "unrecognized arguments: --epochs 1 (see catopt-xp evaluate --help)"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(words.split(), capsys)


def test_a_strict_device_is_that_one_or_none(arrays: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", str(arrays), "--device", "cuda:99", "--strict-device"]
    assert "device='cuda:99' cannot be used" in failed(words, capsys)


def test_a_failed_run_names_flags_and_leaves_names_of_files(
    arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", str(arrays), "--save-dir", str(tmp_path / "clip_norm"), "--quiet", "--seed", "1"]
    told = failed([*words, "--optimizer", "gd", "--learning-rate", "1e38", "--device", "cpu"], capsys)
    assert "lower it, set --clip-norm, or scale X; " in told
    assert "clip_norm" not in told or f"{tmp_path}/clip_norm/model_latest.npz" in told
    text = "clip_norm, 'correct_param', /a/clip_norm/x.npz, clip_norm.npz, my_clip_norm and clip_norm."
    told = "--clip-norm, '--bias-correction', /a/clip_norm/x.npz, clip_norm.npz, my_clip_norm and --clip-norm."
    assert arguments.with_flags(text, ["clip_norm", "correct_param"]) == told


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data", ""],
        ["train", "--recover-from="],
        ["train", "--save-dir", ""],
        ["compare", "decay", "--save-dir", ""],
        ["predict", ""],
        ["plot", ""],
    ],
)
def test_an_empty_name_is_not_the_current_folder(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "the name of a file or folder is expected, the text is empty" in refused(words, capsys)


@pytest.mark.parametrize("flags", ["--train-size 3", "--img-shape 7x7"])
def test_flags_that_do_not_go_with_arrays_are_bad_usage(
    flags: str, arrays: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", str(arrays), "--save-dir", str(folder), "--quiet", *flags.split()]
    assert flags.split()[0] in refused(words, capsys)


def test_failures_are_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK but no more")
    save = ["--save-dir", str(tmp_path / "new")]
    missing = str(tmp_path / "missing.npz")
    assert missing in failed(["train", "--data", missing, *save], capsys)
    assert str(broken) in failed(["train", "--data", str(broken), *save], capsys)
    assert missing in failed(["train", "--recover-from", missing, *save], capsys)
    assert str(broken) in failed(["evaluate", str(broken)], capsys)
    assert missing in failed(["predict", "a.png", "--checkpoint", missing], capsys)
    assert "cannot be written" in failed(["train", "--save-dir", str(broken)], capsys)


def test_a_closed_stdout_is_said_unless_nothing_would_be_printed(
    arrays: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["info"]) == 1
    assert train(arrays, folder, "--quiet", epochs=1) == 0
    assert one_line(capsys.readouterr().err).startswith("stdout is closed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("words", "buffered"),
    some(
        [(words, buffered) for words in ("info", "--help") for buffered in (True, False)],
        [("info", True)],
        pytest.mark.hardening,
    ),
)
def test_a_full_disk_under_stdout_is_one_line_that_says_so(words: str, buffered: bool) -> None:
    environment = module_environment() | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*MODULE, words], stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    assert result.returncode == 1
    assert one_line(result.stderr) == "stdout cannot be written (No space left on device)"


def test_a_run_that_diverges_is_status_1(arrays: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--optimizer", "gd", "--learning-rate", "1e300", "--dtype", "float64", "--engine", "plain", "--quiet")
    with np.errstate(all="ignore"):
        assert train(arrays, folder, *words, epochs=50) == 1
    assert "(learning rate 1e+300): lower it" in one_line(capsys.readouterr().err)


def test_debug_shows_the_traceback_before_or_after_the_command(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.json")
    for words in (["--debug", "plot", missing], ["plot", missing, "--debug"]):
        with pytest.raises(FileNotFoundError):
            main(words)


def test_an_error_not_meant_for_the_user_names_its_kind() -> None:
    assert messages.one_line(KeyError("W0")) == "KeyError: 'W0' (--debug shows where)"
    told = "choose a smaller --img-shape, --train-size, --hidden or --batch-size"
    assert messages.one_line(MemoryError()) == f"out of memory: {told}"
    assert messages.one_line(MemoryError("3 GiB")) == f"out of memory (3 GiB): {told}"
    assert messages.one_line(ValueError("a\x1b[31m.npz")) == "a\\x1b[31m.npz"
    assert messages.one_line(ValueError("two\n  lines")) == "two lines"
    assert messages.one_line(OSError(28, "could not write a: full")) == "could not write a: full"


# --- interruption -----------------------------------------------------------------------------------------------------


def interrupted(monkeypatch: pytest.MonkeyPatch, name: str, checkpoint: Path | None) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise catopt_xp.Interrupted("stopped", checkpoint, 7, History())

    monkeypatch.setattr(cli, name, stop)


def test_an_interruption_prints_the_command_that_resumes(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, "train", Path("my work/model_latest.npz"))
    old = str(trained / "model_latest.npz")
    words = ["train", "--data", "the set.npz", "--recover-from=older.npz", "--seed", "3", "--recover-from", old]
    assert main(words, prog="python -m catopt_xp") == 130
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"catopt-xp: interrupted in epoch 7; saved {Path('my work/model_latest.npz')}"
    if os.name != "nt":
        assert second == (
            "to resume: python -m catopt_xp train --data 'the set.npz' --seed 3"
            " --recover-from 'my work/model_latest.npz'"
        )


def test_a_comparison_resumes_by_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, "compare", Path("compare/adam_latest.npz"))
    assert main(["compare", "decay", "--seed", "3"]) == 130
    assert capsys.readouterr().err.splitlines()[1] == "to resume: catopt-xp compare decay --seed 3"


def test_an_interruption_without_a_checkpoint_promises_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, "train", None)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "catopt-xp: interrupted in epoch 7, nothing was saved\n"


@pytest.mark.parametrize("command", ["train", "compare decay"])
def test_an_interruption_while_the_data_are_loaded_promises_nothing(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "get_drawn_set", stop)
    assert main([*command.split(), "--save-dir", str(folder), "--quiet"]) == 130
    assert capsys.readouterr().err == "catopt-xp: interrupted, nothing was trained\n"


def test_an_interruption_at_once_names_the_checkpoint_that_was_written(
    arrays: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def insist(**options: Any) -> None:
        catopt_xp.train(**options)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", insist)
    assert train(arrays, folder, "--quiet") == 130
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"catopt-xp: interrupted; saved {folder / 'model_latest.npz'}"
    assert second.startswith("to resume: catopt-xp train --data ")
    (folder / "model_latest.npz").unlink()
    interrupted(monkeypatch, "train", None)
    assert train(arrays, folder, "--quiet") == 130
    assert capsys.readouterr().err.endswith(", nothing was saved\n")


def test_an_interruption_in_which_other_code_fails_is_an_interruption(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the lock of a progress bar, which is released, also where it was not taken."""

    def stop(*arguments: Any, **options: Any) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise AttributeError("no lock to release")

    monkeypatch.setattr(cli, "train", stop)
    assert main(["train", "--save-dir", str(folder), "--quiet"]) == 130
    assert capsys.readouterr().err == "catopt-xp: interrupted, nothing was saved\n"
    monkeypatch.undo()
    monkeypatch.setattr(load, "get_drawn_set", stop)
    assert main(["train", "--save-dir", str(folder), "--quiet"]) == 130
    assert capsys.readouterr().err == "catopt-xp: interrupted, nothing was trained\n"


def test_an_interruption_of_the_figure_names_what_was_saved(
    arrays: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def insist(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(History, "plot", insist)
    assert train(arrays, folder, "--quiet") == 130
    assert capsys.readouterr().err.startswith(f"catopt-xp: interrupted; saved {folder / 'model_latest.npz'}\n")
    assert History.from_json(folder / "model_history.json").epoch == [0, 1, 2]


def test_the_program_is_named_as_it_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "my tools" / "catopt-xp"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert messages.program_again("catopt-xp") == "catopt-xp"
    if os.name != "nt":
        assert messages.program_again(str(program)) == f"'{program}'"
        monkeypatch.setenv("PATH", str(program.parent))
        assert messages.program_again(str(program)) == "catopt-xp"


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back the handlers of signals, which `entry` leaves to a process that ends."""
    before = {number: signal.getsignal(number) for number in ASKING_TO_END}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_an_interruption_of_the_first_moments_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["catopt-xp", "info"])
    for name in ("parse_words", "program_again"):
        monkeypatch.setattr(cli, name, stop)
        with pytest.raises(SystemExit) as ended:
            cli.entry()
        assert ended.value.code == 130
        assert capsys.readouterr().err == "catopt-xp: interrupted\n"


SIGNAL_AFTER_A_RUN = """
import os, signal, sys
from catopt_xp.commands import compare as experiments
from catopt_xp.commands import main as cli
train, number = experiments.train, int(sys.argv[1])
def then_signal(**options):
    result = train(**options)
    os.kill(os.getpid(), number)
    return result
experiments.train = then_signal
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers no SIGINT or SIGTERM to a child")
@pytest.mark.parametrize("number", some([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM], pytest.mark.hardening))
def test_a_signal_between_two_compared_runs_interrupts(arrays: Path, folder: Path, number: signal.Signals) -> None:
    words = ["compare", "decay", "--data", str(arrays), "--save-dir", str(folder), "--epochs", "2", "--quiet"]
    result = subprocess.run(
        [sys.executable, "-c", SIGNAL_AFTER_A_RUN, str(int(number)), *words],
        capture_output=True,
        text=True,
        env=module_environment(),
        check=False,
    )
    assert result.returncode == 130, result.stderr
    said = result.stderr.splitlines()
    assert said == ["catopt-xp: interrupted", f"to resume: catopt-xp {shlex.join(words)}"]
    assert main(shlex.split(said[1])[3:]) == 0
    assert len(list(folder.glob("*.json"))) == 3


def test_the_handler_of_sigterm_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["info"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers no SIGINT or SIGTERM to a child")
@pytest.mark.parametrize("number", some([signal.SIGINT, signal.SIGTERM], [signal.SIGINT], pytest.mark.hardening))
def test_a_stopped_process_goes_on_with_the_command_that_it_prints(
    arrays: Path, folder: Path, number: signal.Signals
) -> None:
    words = ["train", "--data", str(arrays), "--save-dir", str(folder), "--epochs", "1000000", "--print-interval", "1"]
    with subprocess.Popen(
        [*MODULE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=module_environment()
    ) as process:
        assert process.stdout is not None
        started = any(line.startswith("epoch    2") for line in process.stdout)  # reads until there
        process.send_signal(number)
        said = process.communicate(timeout=30)[1].splitlines()
    assert (started, process.returncode) == (True, 130), said
    assert said[-2].startswith("catopt-xp: interrupted in epoch ")
    assert said[-1].startswith(f"to resume: {shlex.quote(sys.executable)} -m catopt_xp train ")
    resume = shlex.split(said[-1])[5:]
    stopped = int(said[-2].split("in epoch ")[1].split(";")[0])
    resume[resume.index("1000000")] = str(stopped + 2)
    assert main(resume) == 0
    assert History.from_json(folder / "model_history.json").epoch == list(range(stopped + 2))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE and other error texts")
def test_a_reader_that_leaves_is_no_noise() -> None:
    with subprocess.Popen(
        [*MODULE, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=module_environment()
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert said == ""
    assert process.returncode == 1


# --- the process ------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_loads_no_optional_library() -> None:
    code = (
        "import sys; from catopt_xp.commands.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'cupy', 'numba', 'PIL', 'matplotlib', 'sklearn', 'onnx', 'mpi4py'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=module_environment(), check=False
    )
    assert result.returncode == 0, result.stderr
    assert "exit status:" in result.stdout
    for variable in ("CATOPT_XP_DEVICE", "CATOPT_XP_STRICT_DEVICE", "CATOPT_XP_CACHE", "~/.cache"):
        assert variable in result.stdout
    assert time.perf_counter() - started < 5.0  # 0.3 s on a quiet machine


def test_ctrl_c_while_the_module_is_imported_is_one_line() -> None:
    code = (
        "import runpy, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'catopt_xp.nn.network': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "runpy.run_module('catopt_xp', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=module_environment(), check=False
    )
    assert (result.returncode, result.stderr) == (130, "catopt-xp: interrupted\n")


def test_version_and_module_run() -> None:
    result = subprocess.run(
        [*MODULE, "--version"], capture_output=True, text=True, env=module_environment(), check=False
    )
    assert (result.returncode, result.stdout) == (0, f"catopt_xp {catopt_xp.__version__}\n")


@pytest.mark.usefixtures("handlers")
def test_the_installed_command_ends_with_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["catopt-xp", "plot", "/nowhere/a.json"])
    with pytest.raises(SystemExit) as stop:
        cli.entry()
    assert stop.value.code == 1
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in ASKING_TO_END)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_shapes_and_counts_are_read_back(width: int, height: int) -> None:
    assert flag_values.shape(f"{width}x{height}") == (width, height)
    assert flag_values.layers(f"{width},{height}") == (width, height)
    assert flag_values.batch_size(str(width)) == flag_values.count(str(width)) == width


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "compare", "export", "info", "plot", "paths"])
def test_every_flag_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "exit status:" in said
    assert "show the traceback of an error" in said
    assert ("the\n       command that resumes it" in said) == (command in ("train", "compare"))
    parser = arguments.make_parser("catopt-xp")._subparsers._group_actions[0].choices[command]  # type: ignore
    assert all(action.help for action in parser._actions)
