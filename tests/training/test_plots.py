"""Figures: what is drawn, what is written, and what is said when that cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from catopt_xp.training.plots import plot_benchmark, plot_comparison, plot_history, plot_mini_batch, plot_paths

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

MANY = {f"work_dirs/photographs_of_animals/run_{k}_adam_batch64": RUN for k in range(12)}
BENCH: dict[str, Any] = {
    "workload": {"optimizer": "adam"},
    "machine": {"cpu": "a processor"},
    "threads": 2,
    "rows": [
        {
            "batch_size": size,
            "floor_seconds": 0.1,
            "contenders": {
                "panels": {"seconds_per_epoch": 0.2, "turns": [0.19, 0.2, 0.25]},
                "torch": {"seconds_per_epoch": 0.6, "turns": [0.6]},
            },
        }
        for size in (64, 8)
    ],
}


def panel(figure: Any, title: str) -> Any:
    """The panel with this title."""
    (found,) = (axes for axes in figure.axes if axes.get_title() == title)
    return found


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> what is drawn under it."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_history_has_eight_panels_with_titles_and_the_run_in_the_title() -> None:
    figure = plot_history(RUN)
    assert {axes.get_title(): (axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes} == {
        "Cost by epoch": ("epoch", "cost"),
        "Cost by time": ("training time (s)", "cost"),
        "Accuracy by epoch": ("epoch", "right answers (%)"),
        "Accuracy by time": ("training time (s)", "right answers (%)"),
        "Learning rate": ("epoch", "learning rate per step"),
        "Time per epoch, training alone": ("epoch", "time per epoch (s)"),
        "Cost of the mini-batches": ("step", "cost"),
        "Where the time went": ("seconds", ""),
    }
    assert figure.get_suptitle() == "Adam, batch size 64, drawings, cpu"
    assert "\n" in plot_history(RUN | {"run": {"data": "a long name " * 20}}).get_suptitle()


def test_costs_stand_at_their_epochs_and_at_the_seconds_up_to_their_end() -> None:
    figure = plot_history(RUN)
    by_epoch, by_second = panel(figure, "Cost by epoch"), panel(figure, "Cost by time")
    assert lines(by_epoch)["training set, after the epoch"] == ([0, 2], [0.75, 0.55])
    assert lines(by_epoch)["mean of the mini-batches"] == ([0, 1, 2], [0.8, 0.7, 0.6])
    assert lines(by_second)["mean of the mini-batches"] == ([0.5, 0.75, 1.0], [0.8, 0.7, 0.6])
    assert lines(by_second)["dev set"] == ([0.5, 1.0], [0.7, 0.65])


def test_accuracy_is_in_percent() -> None:
    figure = plot_history(RUN)
    for title, places in (("Accuracy by epoch", [0, 2]), ("Accuracy by time", [0.5, 1.0])):
        expected = {"training set, after the epoch": (places, [50.0, 75.0]), "dev set": (places, [50.0, 62.5])}
        assert lines(panel(figure, title)) == expected


@pytest.mark.parametrize(
    ("seconds", "label", "last"),
    [(0.01, "ms", 30.0), (2.0, "s", 6.0), (600.0, "min", 30.0), (3600.0, "h", 3.0)],
)
def test_times_are_in_the_unit_that_suits_them(seconds: float, label: str, last: float) -> None:
    by_second = panel(plot_history(RUN | {"seconds": [seconds] * 3}), "Cost by time")
    assert by_second.get_xlabel() == f"training time ({label})"
    assert lines(by_second)["dev set"][0][-1] == pytest.approx(last)


def test_the_learning_rate_and_the_time_of_each_epoch_are_drawn() -> None:
    figure = plot_history(RUN)
    (rate,) = panel(figure, "Learning rate").lines
    assert list(rate.get_ydata()) == RUN["learning_rate"]
    (times,) = panel(figure, "Time per epoch, training alone").lines
    assert list(times.get_ydata()) == RUN["seconds"]
    assert panel(figure, "Learning rate").get_yscale() == "linear"
    falling = RUN | {"learning_rate": [1e-2, 1e-3, 1e-4]}
    assert panel(plot_history(falling), "Learning rate").get_yscale() == "log"


def test_a_bar_for_every_stage_says_seconds_and_share() -> None:
    stages = panel(plot_history(RUN), "Where the time went")
    assert [bar.get_width() for bar in stages.patches] == [0.2, 1.0, 0.1]
    assert [text.get_text() for text in stages.texts] == ["0.20 s, 15%", "1.00 s, 77%", "0.10 s, 8%"]


def test_what_was_not_recorded_is_left_out() -> None:
    bare = {key: RUN[key] for key in ("epoch", "learning_rate", "seconds", "train_loss")}
    figure = plot_history(bare)
    assert list(lines(panel(figure, "Cost by epoch"))) == ["mean of the mini-batches"]
    empty = {axes.get_title() for axes in figure.axes if [text.get_text() for text in axes.texts] == ["not recorded"]}
    assert empty == {"Accuracy by epoch", "Accuracy by time", "Cost of the mini-batches", "Where the time went"}
    assert {axes.get_title() for axes in figure.axes if not axes.has_data()} == empty
    assert figure.get_suptitle() == ""
    assert [axes.has_data() for axes in plot_history({"epoch": [0, 1]}).axes] == [False] * 8


def test_stages_that_took_no_time_were_not_recorded() -> None:
    """As in a history that is read from a CSV."""
    nothing = RUN | {"timings": dict.fromkeys(RUN["timings"], 0.0)}
    for figure in (plot_history(nothing), plot_comparison({"a": nothing})):
        stages = panel(figure, "Where the time went")
        assert [text.get_text() for text in stages.texts] == ["not recorded"]


def test_equal_curves_have_markers_at_different_places() -> None:
    long = RUN | {"epoch": list(range(100)), "learning_rate": [1e-3] * 100, "seconds": [1.0] * 100, "train_loss": []}
    starts = [line.get_markevery()[0] for line in panel(plot_comparison({"a": long, "b": long}), "Learning rate").lines]
    assert starts[0] != starts[1]


def test_mini_batch_costs_with_their_moving_average() -> None:
    drawn = lines(plot_mini_batch(RUN).axes[0])
    assert drawn["every mini-batch"] == ([1, 2, 3, 4, 5, 6], RUN["mini_batch_loss"])
    assert drawn["moving average of 10 mini-batches"][1] == pytest.approx([0.9, 0.8, 0.8, 0.75, 0.74, 0.7])


def test_the_moving_average_spans_an_epoch_of_many_steps() -> None:
    many = RUN | {"mini_batch_loss": [1.0, 0.0] * 45}  # 30 steps in each of 3 epochs
    drawn = lines(plot_mini_batch(many).axes[0])
    assert drawn["moving average of 30 mini-batches"][1][29:] == pytest.approx([0.5] * 61)


def test_comparison_draws_every_run_by_epoch_and_by_second() -> None:
    slow = RUN | {"seconds": [1.0, 1.0, 1.0]}
    figure = plot_comparison({"batch 8": slow, "batch 64": RUN}, title="batch size")
    by_epoch, by_second = panel(figure, "Cost by epoch"), panel(figure, "Cost by time")
    assert figure.get_suptitle() == "batch size"
    assert lines(by_epoch) == {"batch 8": ([0, 2], [0.75, 0.55]), "batch 64": ([0, 2], [0.75, 0.55])}
    assert [list(line.get_xdata()) for line in by_second.lines] == [[1.0, 3.0], [0.5, 1.0]]
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in by_epoch.lines]
    assert all(a != b for a, b in zip(*styles, strict=True))
    assert styles == [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in by_second.lines]
    assert by_second.get_xscale() == "linear"
    accuracy = panel(figure, "Accuracy by time")
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[50.0, 75.0]] * 2
    assert [list(line.get_ydata()) for line in panel(figure, "Learning rate").lines] == [RUN["learning_rate"]] * 2


def test_a_comparison_is_of_the_dev_sets_where_that_is_asked_for() -> None:
    figure = plot_comparison({"a": RUN, "b": RUN}, part="dev")
    cost, accuracy = panel(figure, "Cost by epoch"), panel(figure, "Accuracy by epoch")
    assert (cost.get_ylabel(), accuracy.get_ylabel()) == ("cost over the dev set", "right answers (%) of the dev set")
    assert lines(cost)["a"] == ([0, 2], [0.7, 0.65])
    assert lines(accuracy)["b"] == ([0, 2], [50.0, 62.5])


def test_without_a_title_a_comparison_says_what_its_runs_have_in_common() -> None:
    other = RUN | {"run": RUN["run"] | {"optimizer": "Momentum"}}
    assert plot_comparison({"a": RUN, "b": other}).get_suptitle() == "batch size 64, drawings, cpu"
    assert plot_comparison({"a": RUN, "b": RUN | {"run": {}}}).get_suptitle() == ""


def test_each_run_has_a_bar_of_its_stages_shares_the_first_on_top() -> None:
    runs = {"a": RUN, "b": RUN | {"timings": {"train": 300.0, "read": 100.0, "move": 0.1}}}
    stages = panel(plot_comparison(runs), "Where the time went")
    bars = {bar.get_label(): [(patch.get_x(), patch.get_width()) for patch in bar] for bar in stages.containers}
    assert list(bars) == ["read", "train", "save"]  # nobody would see b's move
    in_a = [number for name in bars for number in bars[name][0]]
    assert in_a == pytest.approx([0.0, 100 / 13, 100 / 13, 1000 / 13, 1100 / 13, 200 / 13])
    in_b = [number for name in bars for number in bars[name][1]]
    assert in_b == pytest.approx([0.0, 25.0, 25.0, 75.0, 100.0, 0.0], abs=0.05)
    assert len({bar.patches[0].get_hatch() for bar in stages.containers}) == 3
    labels = dict(zip((text.get_text() for text in stages.get_yticklabels()), stages.get_yticks(), strict=True))
    assert labels["a"] > labels["b"]
    assert {text.get_text(): text.get_position()[1] for text in stages.texts} == {
        "1.3 s": labels["a"],
        "6.67 min": labels["b"],
    }


def test_legends_stand_beside_the_panels_and_name_each_thing_once() -> None:
    for figure, labels in (
        (
            plot_history(RUN),
            [
                "mean of the mini-batches",
                "training set, after the epoch",
                "dev set",
                "every mini-batch",
                "moving average of 10 mini-batches",
            ],
        ),
        (plot_mini_batch(RUN), ["every mini-batch", "moving average of 10 mini-batches"]),
        (plot_comparison({"a": RUN, "b": RUN}), ["a", "b"]),
        (plot_benchmark(BENCH), ["torch", "panels (ours)", "floor of this machine"]),
        (plot_comparison(MANY), list(MANY)),
    ):
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == labels
        figure.draw_without_rendering()
        own = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
        for box in (beside.get_window_extent() for beside in (legend, *own)):
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_a_benchmark_is_drawn_by_batch_size_with_the_range_of_its_turns() -> None:
    axes = plot_benchmark(BENCH).axes[0]
    assert lines(axes) == {
        "panels (ours)": ([8, 64], [0.2] * 2),
        "torch": ([8, 64], [0.6] * 2),
        "floor of this machine": ([8, 64], [0.1] * 2),
    }
    assert axes.get_title() == "Time per epoch: adam, a processor, 2 threads"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch size (samples)", "time per epoch (s)")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    ranges = [segment[:, 1].tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert sorted(ranges) == [[0.19, 0.25]] * 2 + [[0.6, 0.6]] * 2


def test_twenty_eight_runs_all_look_different() -> None:
    drawn = panel(plot_comparison({f"run {k}": RUN for k in range(28)}), "Cost by epoch").lines
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 28


def test_times_of_very_different_length_are_drawn_over_a_logarithmic_axis() -> None:
    long = RUN | {"seconds": [10.0, 10.0, 10.0]}
    figure = plot_comparison({"long": long, "short": RUN})
    assert {panel(figure, f"{what} by time").get_xscale() for what in ("Cost", "Accuracy")} == {"log"}
    assert panel(figure, "Cost by epoch").get_xscale() == "linear"


def test_paths_start_at_the_dot_and_keep_a_style_over_all_panels() -> None:
    figure = plot_paths([PANEL, PANEL | {"paths": {"RMSProp": [[0.5, 0.5], [0.0, 0.0]]}}], title="paths")
    first, second = figure.axes
    adam, rmsprop, start = first.lines
    assert list(adam.get_xdata()) == [1.0, 0.5, 0.0]
    assert (list(start.get_xdata()), list(start.get_ydata())) == ([1.0], [1.0])
    assert second.lines[0].get_color() == rmsprop.get_color() != adam.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Adam", "RMSProp", "start"]


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
        (lambda: plot_comparison({"a": RUN}, part="test"), "unknown part 'test'; choose train, dev"),
        (
            lambda: plot_comparison({"a": RUN | {"dev_loss": []}}, part="dev"),
            "run 'a' has no dev_loss; give it a dev set",
        ),
        (lambda: plot_benchmark({"rows": []}), "plot_benchmark: there are no rows"),
        (lambda: plot_benchmark({"rows": [{"batch_size": 8}]}), "plot_benchmark: a row has no floor_seconds"),
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
