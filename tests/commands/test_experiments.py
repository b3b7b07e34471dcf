"""The chapter's comparisons on tiny sets: what is run, what is shared, what goes on; and the optimizer paths."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from marks import some

from catopt_xp.commands import compare as experiments
from catopt_xp.commands.compare import SURFACES, compare, data_digest, final_table, optimizer_paths, planned_runs
from catopt_xp.data.dataset import DataSet
from catopt_xp.training.history import History
from catopt_xp.training.train import TrainResult, train

M = 150


@pytest.fixture
def data() -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (M + 30, 12), dtype=np.uint8)
    Y = (X[:, :6].mean(axis=1) > 128).astype(np.int64).reshape(1, -1)
    return X[:M].T, Y[:, :M], X[M:].T, Y[:, M:]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every `train` call that a comparison makes."""
    calls: list[dict[str, Any]] = []

    def counted(**options: Any) -> TrainResult:
        calls.append(options)
        return train(**options)

    monkeypatch.setattr(experiments, "train", counted)
    return calls


def small(kind: str, data: Any, folder: Path, **options: Any) -> dict[str, History]:
    settings: dict[str, Any] = {"total_epoch": 3, "save_dir": folder, "verbose": False}
    return compare(kind, data, **(settings | options))


# --- which runs -------------------------------------------------------------------------------------------------------


def test_the_chapters_runs() -> None:
    def of(kind: str, stochastic: bool = False) -> list[tuple[str, str, int]]:
        return [(run.label, run.optimizer, run.batch_size) for run in planned_runs(kind, 2000, stochastic)]

    sizes = [("batch 8", "gd", 8), ("batch 64", "gd", 64), ("batch 128", "gd", 128)]
    whole = ("batch 2000 (whole set)", "gd", 2000)
    assert of("batch-size") == [*sizes, whole]
    assert of("batch-size", stochastic=True) == [*sizes, whole, ("batch 1", "gd", 1)]
    assert of("optimizers") == [
        ("gradient descent (0.001)", "gd", 64),
        ("Momentum (0.001)", "momentum", 64),
        ("RMSProp (1e-05)", "rmsprop", 64),
        ("Adam (1e-05)", "adam", 64),
    ]
    assert [(run.label, run.lr_scheduler(1.0, 10)) for run in planned_runs("decay", 2000)] == [
        ("constant", 1.0),
        ("decay 0.2", pytest.approx(1 / 3)),
        ("decay 0.005", pytest.approx(1 / 1.05)),
    ]


@pytest.mark.parametrize("m", [1, 5, 8, 64, 100, 128, 129])
@pytest.mark.parametrize("kind", ["batch-size", "optimizers", "decay"])
def test_a_small_set_bounds_the_batches_and_names_no_run_twice(kind: str, m: int) -> None:
    runs = planned_runs(kind, m, stochastic=kind == "batch-size")
    assert all(1 <= run.batch_size <= m for run in runs)
    assert len({run.name for run in runs}) == len({run.label for run in runs}) == len(runs)


def test_an_unknown_comparison_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown comparison 'colour'; choose batch-size, optimizers, decay"):
        compare("colour", save_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- running ----------------------------------------------------------------------------------------------------------


def test_a_comparison_leaves_histories_checkpoints_and_a_figure(data: Any, tmp_path: Path) -> None:
    histories = small("optimizers", data, tmp_path)
    names = ["gd_batch64", "momentum_batch64", "rmsprop_batch64", "adam_batch64"]
    assert {file.name for file in tmp_path.iterdir()} == {
        "optimizers.png",
        *(f"{name}.json" for name in names),
        *(f"{name}_latest.npz" for name in names),
    }
    assert [history.run["optimizer"] for history in histories.values()] == [
        "GradientDescent",
        "Momentum",
        "RMSProp",
        "Adam",
    ]
    assert [history.run["options"]["learning_rate"] for history in histories.values()] == [1e-3, 1e-3, 1e-5, 1e-5]
    for history, name in zip(histories.values(), names, strict=True):
        assert History.from_json(tmp_path / f"{name}.json") == history


def test_runs_share_initial_weights_and_row_orders(data: Any, tmp_path: Path) -> None:
    first_losses = {h.mini_batch_loss[0] for h in small("optimizers", data, tmp_path).values()}
    assert len(first_losses) == 1  # the first batch is seen by the same weights, whatever then updates them


def test_a_finished_comparison_is_read_and_not_run_again(
    data: Any, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    first = small("decay", data, tmp_path)
    assert len(trained) == 3
    (checkpoint, *_) = tmp_path.glob("*_latest.npz")
    left = checkpoint.with_name(f".{checkpoint.name}.0123abcd.tmp")  # by a process that was killed before it finished
    left.touch()
    os.utime(left, (0, 0))
    assert small("decay", data, tmp_path) == first
    assert len(trained) == 3
    assert not left.exists()


def test_equal_runs_of_two_comparisons_are_trained_once(
    data: Any, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    by_size, by_optimizer, by_decay = (small(k, data, tmp_path) for k in ("batch-size", "optimizers", "decay"))
    assert len(trained) == 4 + 3 + 2
    assert by_size["batch 64"] == by_optimizer["gradient descent (0.001)"]
    assert by_optimizer["Adam (1e-05)"] == by_decay["constant"]


def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_costs(
    data: Any, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    fresh = small("decay", data, whole, total_epoch=6)
    small("decay", data, halves, total_epoch=2)
    (halves / "adam_batch64_decay0.2.json").unlink()  # as a run that was stopped before its end leaves the folder
    resumed = small("decay", data, halves, total_epoch=6)
    assert [call["recover_from"] is not None for call in trained] == [False] * 6 + [True] * 3
    for label in fresh:
        assert resumed[label].epoch == [0, 1, 2, 3, 4, 5]
        assert resumed[label].mini_batch_loss == fresh[label].mini_batch_loss


def test_another_seed_in_the_same_folder_is_refused(data: Any, tmp_path: Path) -> None:
    small("decay", data, tmp_path)
    with pytest.raises(ValueError, match=r"adam_batch64\.json is of a run with seed 0, not 1: choose another save_dir"):
        small("decay", data, tmp_path, seed=1)


EACH = [(left, changed) for left in ("a history", "a checkpoint") for changed in (0, 1, 2, 3)]
ALWAYS = [("a history", 0), ("a checkpoint", 1)]


@pytest.mark.parametrize(("left", "changed"), some(EACH, ALWAYS, pytest.mark.hardening))
def test_the_results_of_another_set_of_the_same_name_and_shape_are_refused(
    data: Any, tmp_path: Path, changed: int, left: str
) -> None:
    small("decay", data, tmp_path, total_epoch=1)
    if left == "a checkpoint":
        (tmp_path / "adam_batch64.json").unlink()
    others = [np.array(array) for array in data]
    others[changed][...] = np.roll(others[changed], 1, axis=1)
    with pytest.raises(ValueError, match=r"adam_batch64.* is of a run with data arrays, digest \w{8}, not arrays, dig"):
        small("decay", tuple(others), tmp_path, total_epoch=1)


@pytest.mark.parametrize("m", [1, 63, 64, 65, 200])
def test_the_digest_is_of_values_and_not_of_their_place(m: int) -> None:
    rows = np.random.default_rng(m).integers(0, 256, (m, 6), dtype=np.uint8)
    labels = np.arange(m)[np.newaxis] % 2
    digest = data_digest(DataSet(rows.T, labels))
    assert data_digest(DataSet(np.ascontiguousarray(rows.T), labels, name="other")) == digest
    assert data_digest(DataSet(rows.T, labels, rows.T, labels)) != digest
    assert data_digest(DataSet(255 - rows.T, labels)) != digest


@pytest.mark.parametrize("total_epoch", [0, -3])
def test_a_comparison_of_no_epochs_is_refused_before_any_work(data: Any, tmp_path: Path, total_epoch: int) -> None:
    with pytest.raises(ValueError, match=f"total_epoch is {total_epoch}; a comparison needs a whole number"):
        compare("decay", data, total_epoch, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("progress", [True, False, None])
def test_the_bar_of_loading_is_as_asked(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: bool | None
) -> None:
    asked: list[object] = []

    def stop(*source: object, on_error: str, progress: bool | None) -> None:
        asked.append(progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "load_data", stop)
    with pytest.raises(KeyboardInterrupt):
        small("decay", data, tmp_path, progress=progress)
    assert asked == [progress]


def test_a_checkpoint_of_other_settings_is_refused(data: Any, tmp_path: Path) -> None:
    train(
        data=data, optimizer="adam", learning_rate=0.5, save_dir=tmp_path, model_name="adam_batch64", total_epoch=1,
        verbose=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"adam_batch64_latest\.npz is of a run with learning_rate 0\.5, not 1e-05"):
        small("decay", data, tmp_path)


def test_fewer_epochs_than_are_there_are_refused(data: Any, tmp_path: Path) -> None:
    small("decay", data, tmp_path)
    with pytest.raises(ValueError, match=r"adam_batch64\.json has 3 epochs, 2 are asked"):
        small("decay", data, tmp_path, total_epoch=2)


def test_what_is_printed(data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small("batch-size", data, tmp_path, stochastic=True, verbose=True)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("comparison batch-size on cpu (")
    assert said[1].startswith("the data were loaded in ")
    assert not any(line.startswith("data: ") for line in said[:3])  # every run says it
    assert "batch-size, run 5 of 5: batch 1" in said
    expected = next(line for line in said if line.startswith("batch size 1 makes 450 steps: "))
    assert "a step as with batch size 8" in expected
    assert said.index(expected) < len(said) - 10  # before the run, not after it
    assert [line.split("  ")[0] for line in said[-6:-1]] == [
        "batch 8", "batch 64", "batch 128", "batch 150 (whole set)", "batch 1",
    ]  # fmt: skip
    assert said[-1] == f"figure: {tmp_path / 'batch-size.png'}"


def test_a_history_that_was_never_evaluated_is_named(data: Any, tmp_path: Path) -> None:
    small("decay", data, tmp_path)
    file = tmp_path / "adam_batch64.json"
    history = History.from_json(file)
    history.eval_epoch, history.full_train_loss = [], []
    history.train_accuracy, history.dev_loss, history.dev_accuracy = [], [], []
    history.to_json(file)
    with pytest.raises(ValueError, match=r"adam_batch64\.json has no evaluated epoch: move it away"):
        small("decay", data, tmp_path)
    history.run = {"options": 5}
    history.to_json(file)
    with pytest.raises(ValueError, match=r"adam_batch64\.json is of a run with optimizer None, not Adam"):
        small("decay", data, tmp_path)


def test_nothing_is_printed_when_not_wanted(data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small("decay", data, tmp_path)
    assert capsys.readouterr().out == ""


def test_without_matplotlib_a_warning_stands_in_for_the_figure(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r'no figure was drawn: .*pip install "catopt-xp\[plot\]"'):
        histories = small("decay", data, tmp_path)
    assert len(histories) == 3
    assert not (tmp_path / "decay.png").exists()


def test_the_table_says_when_there_is_no_dev_set() -> None:
    run = History(epoch=[0, 1], seconds=[1.0, 0.5], full_train_loss=[0.7, 0.6], train_accuracy=[0.5, 0.75])
    assert final_table({"a": run}).splitlines()[1].split() == ["a", "2", "1.5", "0.7000", "0.6000", "75.0%", "-"]


# --- paths ------------------------------------------------------------------------------------------------------------


@given(x=st.floats(-3, 3), y=st.floats(-3, 3), name=st.sampled_from(sorted(SURFACES)))
def test_gradients_of_the_surfaces_against_central_differences(x: float, y: float, name: str) -> None:
    ground, h = SURFACES[name], 1e-5
    numeric = (
        (ground.height(x + h, y) - ground.height(x - h, y)) / (2 * h),
        (ground.height(x, y + h) - ground.height(x, y - h)) / (2 * h),
    )
    assert ground.gradient(x, y) == pytest.approx(numeric, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("name", sorted(SURFACES))
def test_paths_begin_at_the_start_and_go_down(name: str) -> None:
    ground, drawn = SURFACES[name], optimizer_paths(name, steps=50, grid=5)
    assert np.shape(drawn["height"]) == (5, 5)
    assert drawn["height"][1][3] == ground.height(drawn["x"][3], drawn["y"][1])  # rows are y
    assert list(drawn["paths"]) == ["gradient descent", "Momentum", "RMSProp", "Adam"]
    for path in drawn["paths"].values():
        assert len(path) == 51
        assert tuple(path[0]) == ground.start
        assert ground.height(*path[-1]) < ground.height(*path[0])


def test_a_path_is_the_rule_in_float64() -> None:
    path = optimizer_paths("valley", steps=3, learning_rates={"gd": 0.5})["paths"]["gradient descent"]
    # x' = x - 0.5*x/10, y' = y - 0.5*2*y = 0
    assert path == [[-4.0, 1.5], [-3.8, 0.0], [-3.61, 0.0], [pytest.approx(-3.4295, abs=1e-15), 0.0]]


def test_scaled_steps_leave_saddle_and_plateau_sooner() -> None:
    saddle, plateau = (optimizer_paths(name, steps=30)["paths"] for name in ("saddle", "plateau"))
    for name in ("RMSProp", "Adam"):
        assert saddle[name][-1][1] > 0.9  # in the valley at y = 1, while gradient descent is still on the ridge
        assert np.hypot(*plateau[name][-1]) < np.hypot(*plateau["gradient descent"][-1])
    assert saddle["gradient descent"][-1][1] < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surface": "hill"}, "unknown surface 'hill'; choose saddle, plateau, valley"),
        ({"surface": "saddle", "steps": 0}, "steps is 0"),
        ({"surface": "saddle", "learning_rates": {"sgd": 0.1}}, "unknown optimizer 'sgd'"),
        ({"surface": "saddle", "learning_rates": {"gd": -0.1}}, "learning_rate is -0.1"),
    ],
)
def test_bad_arguments_of_paths_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_paths(**options)
