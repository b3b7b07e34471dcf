"""Figures: what is drawn, what is written, and what is said when that cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from catopt_xp.plots import plot_comparison, plot_history, plot_mini_batch, plot_paths

PNG = b"\x89PNG\r\n\x1a\n"
RUN: dict[str, Any] = {
    "epoch": [0, 1, 2],
    "learning_rate": [1e-3, 9e-4, 8e-4],
    "seconds": [0.5, 0.25, 0.25],
    "train_loss": [0.8, 0.7, 0.6],
    "eval_epoch": [0, 2],
    "train_accuracy": [0.5, 0.75],
    "full_train_loss": [0.75, 0.55],
    "dev_loss": [0.7, 0.65],
    "dev_accuracy": [0.5, 0.625],
    "mini_batch_loss": [0.9, 0.7, 0.8, 0.6, 0.7, 0.5],
    "timings": {"read": 0.1, "train": 1.0, "save": 0.2},
    "run": {"optimizer": "Adam", "batch_size": 64, "data": "drawings", "device": "cpu"},
}
PANEL: dict[str, Any] = {
    "title": "bowl",
    "x": [-1.0, 0.0, 1.0],
    "y": [-1.0, 0.0, 1.0],
    "height": [[2.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]],
    "paths": {"Adam": [[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]], "RMSProp": [[1.0, 1.0], [0.2, 0.2], [0.0, 0.1]]},
}


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> what is drawn under it."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_history_has_six_panels_with_titles_and_the_run_in_the_title() -> None:
    figure = plot_history(RUN)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "Cost by epoch",
        "Cost by time",
        "Accuracy",
        "Cost of the mini-batches",
        "Learning rate",
        "Where the time went",
    ]
    assert figure.get_suptitle() == "Adam, batch size 64, drawings, cpu"


def test_costs_stand_at_their_epochs_and_at_the_seconds_up_to_their_end() -> None:
    by_epoch, by_second = plot_history(RUN).axes[:2]
    assert lines(by_epoch)["training set, after the epoch"] == ([0, 2], [0.75, 0.55])
    assert lines(by_epoch)["mean of the mini-batches"] == ([0, 1, 2], [0.8, 0.7, 0.6])
    assert lines(by_second)["mean of the mini-batches"] == ([0.5, 0.75, 1.0], [0.8, 0.7, 0.6])
    assert lines(by_second)["dev set"] == ([0.5, 1.0], [0.7, 0.65])


def test_accuracy_is_in_percent() -> None:
    accuracy = plot_history(RUN).axes[2]
    assert lines(accuracy) == {"training set": ([0, 2], [50.0, 75.0]), "dev set": ([0, 2], [50.0, 62.5])}


def test_a_bar_for_every_stage_says_seconds_and_share() -> None:
    stages = plot_history(RUN).axes[5]
    assert [bar.get_width() for bar in stages.patches] == [0.2, 1.0, 0.1]
    assert [text.get_text() for text in stages.texts] == ["0.20 s, 15%", "1.00 s, 77%", "0.10 s, 8%"]


def test_what_was_not_recorded_is_left_out() -> None:
    bare = {key: RUN[key] for key in ("epoch", "learning_rate", "seconds", "train_loss")}
    figure = plot_history(bare)
    assert list(lines(figure.axes[0])) == ["mean of the mini-batches"]
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 0, 0, 1, 0]
    assert figure.get_suptitle() == ""
    assert [len(axes.lines) for axes in plot_history({"epoch": [0, 1]}).axes] == [0] * 6


def test_mini_batch_costs_with_their_moving_average() -> None:
    drawn = lines(plot_mini_batch(RUN).axes[0])
    assert drawn["every mini-batch"] == ([1, 2, 3, 4, 5, 6], RUN["mini_batch_loss"])
    assert drawn["moving average of 10"][1] == pytest.approx([0.9, 0.8, 0.8, 0.75, 0.74, 0.7])


def test_the_moving_average_spans_an_epoch_of_many_steps() -> None:
    many = RUN | {"mini_batch_loss": [1.0, 0.0] * 45}  # 30 steps in each of 3 epochs
    drawn = lines(plot_mini_batch(many).axes[0])
    assert drawn["moving average of 30"][1][29:] == pytest.approx([0.5] * 61)


def test_comparison_draws_every_run_by_epoch_and_by_second_in_its_own_style() -> None:
    slow = RUN | {"seconds": [1.0, 1.0, 1.0]}
    by_epoch, by_second = plot_comparison({"batch 8": slow, "batch 64": RUN}, title="batch size").axes
    assert lines(by_epoch) == {"batch 8": ([0, 2], [0.75, 0.55]), "batch 64": ([0, 2], [0.75, 0.55])}
    assert [list(line.get_xdata()) for line in by_second.lines] == [[1.0, 3.0], [0.5, 1.0]]
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in by_epoch.lines]
    assert all(a != b for a, b in zip(*styles, strict=True))
    assert styles == [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in by_second.lines]
    assert by_second.get_xscale() == "linear"


def test_twenty_eight_runs_all_look_different() -> None:
    drawn = plot_comparison({f"run {k}": RUN for k in range(28)}).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 28


def test_times_of_very_different_length_are_drawn_over_a_logarithmic_axis() -> None:
    long = RUN | {"seconds": [10.0, 10.0, 10.0]}
    assert plot_comparison({"long": long, "short": RUN}).axes[1].get_xscale() == "log"


def test_paths_start_at_the_dot_and_keep_a_style_over_all_panels() -> None:
    figure = plot_paths([PANEL, PANEL | {"paths": {"RMSProp": [[0.5, 0.5], [0.0, 0.0]]}}], title="paths")
    first, second = figure.axes
    adam, rmsprop, start = first.lines
    assert list(adam.get_xdata()) == [1.0, 0.5, 0.0]
    assert (list(start.get_xdata()), list(start.get_ydata())) == ([1.0], [1.0])
    assert second.lines[0].get_color() == rmsprop.get_color() != adam.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Adam", "RMSProp"]


@pytest.mark.parametrize("draw", [plot_history, plot_mini_batch, lambda run, path: plot_comparison({"a": run}, path)])
def test_a_png_is_written_whole(draw: Any, tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    file.write_bytes(b"older")
    draw(RUN, file)
    assert file.read_bytes().startswith(PNG)
    assert file.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert list(tmp_path.iterdir()) == [file]


def test_the_ending_names_the_format(tmp_path: Path) -> None:
    plot_paths([PANEL], tmp_path / "paths.svg")
    assert b"<svg" in (tmp_path / "paths.svg").read_bytes()
    plot_paths([PANEL], tmp_path / "without")
    assert (tmp_path / "without").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match=r"paths\.gif: a figure is not written as 'gif'; choose png, pdf, svg"):
        plot_paths([PANEL], tmp_path / "paths.gif")


def test_a_failed_drawing_leaves_the_older_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "figure.png"
    file.write_bytes(b"older")

    def full(self: Any, target: Any, **options: Any) -> None:
        target.write(PNG)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match=r"could not write .*figure\.png: No space left on device"):
        plot_history(RUN, file)
    assert file.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [file]


def test_without_matplotlib_one_line_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "catopt-xp\[plot\]"') as error:
        plot_history(RUN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_history(RUN | {"epoch": []}), "plot_history: the history has no epochs"),
        (lambda: plot_mini_batch(RUN | {"mini_batch_loss": []}), "plot_mini_batch: the history has no mini_batch_loss"),
        (lambda: plot_comparison({}), "plot_comparison: there are no runs"),
        (lambda: plot_comparison({"a": RUN | {"full_train_loss": []}}), "run 'a' has no full_train_loss"),
        (lambda: plot_paths([]), "plot_paths: there are no panels"),
        (lambda: plot_comparison({"a": RUN | {"seconds": []}}), "run 'a' has no seconds"),
        (lambda: plot_comparison({"a": RUN | {"seconds": [0.5]}}), "run 'a': seconds has 1 values, epoch has 3"),
        (lambda: plot_history(RUN | {"train_loss": [1.0]}), "plot_history: train_loss has 1 values, epoch has 3"),
        (lambda: plot_mini_batch(RUN | {"mini_batch_loss": "abc"}), "mini_batch_loss is not a list of numbers"),
    ],
)
def test_nothing_to_draw_is_said(draw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_pyplot_stays_out_of_it() -> None:
    before = "matplotlib.pyplot" in sys.modules
    plot_history(RUN)
    assert ("matplotlib.pyplot" in sys.modules) == before
